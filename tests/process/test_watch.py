"""Nobody waits for ever: a rank that hangs or fails ends all ranks, and the first error is the one that is shown."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from encoder.base.dist import World
from encoder.runs.folder import ERRORS, HANGS
from encoder.train.watchdog import Watchdog
from tests.process.ranks import start_ranks, wait_for


def hangs(world: World, *, folder: str) -> None:
    """Rank 1 stands still; rank 0 waits for it in a collective."""
    import torch

    from encoder.base.dist import sum_over_ranks

    with Watchdog(Path(folder), world, hang_minutes=2 / 60) as watch:
        for step in range(1, 5):
            watch.heartbeat(f"in step {step}")
            if step == 3 and world.rank == 1:
                stands_still()
            sum_over_ranks(torch.ones(1))


def stands_still() -> None:
    time.sleep(600)


def fails(world: World, *, folder: str) -> None:
    """Rank 1 meets a defect in step 2; rank 0 waits for it in a collective, or does not even do that."""
    import torch

    from encoder.base.dist import sum_over_ranks

    with Watchdog(Path(folder), world, hang_minutes=30) as watch:
        watch.heartbeat("in step 2")
        if world.rank == 1:
            [][7]
        if folder.endswith("apart"):
            stands_still()
        sum_over_ranks(torch.ones(1))


def ended(function, folder: Path, *, within_seconds: float) -> str:
    """What the ranks said; they must all end by themselves."""
    folder.mkdir()
    ranks = start_ranks(function, 2, folder=str(folder))
    end = time.monotonic() + 60 + within_seconds
    while any(process.poll() is None for process, _ in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    left = [process.poll() is None for process, _ in ranks]
    with pytest.raises(AssertionError) as said:
        wait_for(ranks, timeout_seconds=0.0)
    assert not any(left), f"still there: {left}"
    return str(said.value)


def test_a_hang_is_ended_by_every_rank_with_its_step_and_the_stacks_of_all_threads(tmp_path):
    said = ended(hangs, tmp_path / "run", within_seconds=10)
    assert said.count("exit code 3") == 2
    (error,) = (tmp_path / "run" / ERRORS).iterdir()
    assert (
        " hangs: nothing has moved for " in error.read_text() and "in step 3." in error.read_text()
    )
    stacks = (tmp_path / "run" / HANGS / "rank00001.txt").read_text()
    # the seconds are measured
    assert re.search(r"rank 1 hangs: nothing has moved for \d+ s, in step 3\.", stacks)
    assert "in stands_still" in stacks and stacks.count("hread 0x") >= 2
    assert "sum_over_ranks" in (tmp_path / "run" / HANGS / "rank00000.txt").read_text()


def test_a_rank_that_hangs_and_loses_another_that_does_ends_as_one_that_hangs(
    tmp_path, monkeypatch
):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(ConnectionError), Watchdog(tmp_path, World(), hang_minutes=None) as watch:
        watch._say_where(2.0)
        raise ConnectionError("connection closed by peer")
    assert codes == [3]


@pytest.mark.parametrize("name", ["in_a_collective", "apart"])
def test_one_ranks_defect_ends_all_and_is_the_error_shown(tmp_path, name):
    said = ended(fails, tmp_path / name, within_seconds=30)
    (file,) = (tmp_path / name / ERRORS).iterdir()
    first, _, rest = file.read_text().partition("\n")
    assert first == "rank 1 failed, in step 2: IndexError: list index out of range"
    assert "[][7]" in rest
    of_zero = said.split("--- rank 1")[0]
    assert first in of_zero and "IndexError" in said


@pytest.mark.matrix
def test_a_run_that_moves_is_left_alone_and_nothing_is_written(tmp_path):
    with Watchdog(tmp_path, World(), hang_minutes=2 / 60) as watch:
        for _ in range(10):
            watch.heartbeat("in a step")
            time.sleep(0.25)
    assert not list(tmp_path.iterdir())
