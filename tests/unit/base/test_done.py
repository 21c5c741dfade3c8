"""A record of completion counts only with what stands behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from encoder.base.done import is_done, read_done
from tests.helpers.done import finish

ROOT = Path(__file__).resolve().parents[3]


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def empty(folder: Path) -> None:
    (folder / "done.json").write_text("")


def without(name: str):
    return lambda folder: os.rename(folder / name, folder / f"{name}.away")


def in_the_checkpoint(name: str, content: str):
    return lambda folder: (
        next((folder / "checkpoints").glob("tokens*")).joinpath(name).write_text(content)
    )


def fifo(folder: Path) -> None:
    (folder / "done.json").unlink()
    os.mkfifo(folder / "done.json")


def test_a_finished_run_is_done_and_a_folder_without_the_record_is_not(tmp_path):
    assert is_done(tmp_path) == (False, "")
    finish(tmp_path)
    assert is_done(tmp_path) == (True, "") and read_done(tmp_path)["step"] == 5


@pytest.mark.parametrize(
    "break_it, said",
    [
        (empty, "it is empty"),
        (lambda f: (f / "done.json").write_text("{}"), "has no step or no ledger_hash"),
        (lambda f: (f / "done.json").write_text("[" * 9999), "levels deep"),
        (fifo, "it is a fifo"),
        (without("ledger.jsonl"), "stands without a ledger.jsonl"),
        (without("checkpoints"), "no whole checkpoint"),
        (lambda f: change(f / "done.json", ledger_hash="d" * 32), "ends at step 5"),
        (lambda f: change(f / "done.json", step=6), "ends at step 5"),
        (in_the_checkpoint("COMMITTED", ""), "no whole checkpoint"),
        (in_the_checkpoint("progress.json", "{}"), "no whole checkpoint"),
        (in_the_checkpoint("MANIFEST.json", "{}"), "no whole checkpoint"),
    ],
)
def test_a_record_of_completion_that_nothing_stands_behind_is_told_and_does_not_count(
    tmp_path, break_it, said
):
    finish(tmp_path)
    break_it(tmp_path)
    done, problem = is_done(tmp_path)
    assert not done and said in problem and "does not count" in problem and "\n" not in problem


def test_the_job_script_reads_it_with_python_alone(tmp_path):
    """-S: no site packages; the job's first node may have none."""
    finish(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'slurm')!r}); import job; from pathlib import"
        f" Path; print(job.counts_as_done(Path({str(tmp_path)!r})))"
    )
    for expected in ("True", "False"):
        done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == expected and ("does not count" in done.stderr) == (
            expected == "False"
        ), done.stderr
        empty(tmp_path)
