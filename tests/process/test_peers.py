"""A rank whose peer is gone ends within ten seconds, wherever it stands; a peer that is stopped is not gone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from encoder.base.dist import World, free_port
from encoder.base.peers import LOOK_SECONDS, LOST_SECONDS
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, METRICS, read_jsonl
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import Rank, start_ranks
from tests.process.test_killed_run import RUN

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 10.0
KILLS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("peers")
    write_source(root / "a", random_documents(120, seed=1, longest=60), vocab_size=64)
    write_source(root / "held", random_documents(30, seed=2, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root, tokens="400K"))
    return root


def trains(world: World, *, folder: str, out: str, overrides: list[str]) -> bool:
    return pretrain(read_run(f"{folder}/run.yaml", [f"out={folder}/{out}", *overrides]), world).done


def stands_still_in(world: World, *, folder: str, out: str, name: str) -> bool:
    """Trains; where `module:Class.method` is called first, rank zero says so and stands still, in no collective."""
    import importlib

    module, _, owner = name.partition(":")
    *classes, method = owner.split(".")
    holder = importlib.import_module(module)
    for one in classes:
        holder = getattr(holder, one)
    plain = getattr(holder, method)

    def stand_still(*args, **kwargs):
        Path(folder, f"{out}.{world.rank}").touch()
        if world.rank == 0:
            time.sleep(120)
        return plain(*args, **kwargs)

    setattr(holder, method, stand_still)
    # a loader's process imports torch anew: one of the places has such processes
    workers = int(out == "step")
    overrides = [f"loader.workers={workers}", *(f"phases.{i}.tokens=2K" for i in range(3))]
    return trains(world, folder=folder, out=out, overrides=overrides)


@pytest.fixture(scope="module")
def left_alone(folder) -> dict[str, tuple[float, int, str]]:
    """By place: seconds from the kill of rank one to the end of rank zero, its exit code and what it said.

    The runs go side by side: what each waits for is a look at its peer, and no CPU.
    """
    pairs = {
        place: start_ranks(stands_still_in, 2, folder=str(folder), out=place, name=name)
        for place, name in STANDS.items()
    }
    killed = {place: killed_at(folder / f"{place}.0", ranks) for place, ranks in pairs.items()}
    found = {}
    for place, ((zero, path), _) in pairs.items():
        seconds_to_end(zero)
        code = zero.wait()
        ended = path.with_suffix(".code").stat().st_mtime
        said = path.with_suffix(".err").read_text()
        found[place] = ended - killed[place], code, said
    return found


def killed_at(mark: Path, ranks: list[tuple[Rank, Path]]) -> float:
    """Kills rank one once the mark is there; returns the time."""
    (zero, path), (one, _) = ranks
    until = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < until and zero.poll() is None:
        time.sleep(0.02)
    assert mark.exists(), path.with_suffix(".err").read_text()[-2000:]
    one.kill()
    return time.time()


def seconds_to_end(rank: Rank, *, most: float = 90.0) -> float:
    began = time.monotonic()
    while rank.poll() is None and time.monotonic() - began < most:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    rank.kill()
    return seconds


# where rank zero stands in no collective at all, and no error of one can reach it
STANDS = {
    "start": "encoder.train.start:start_engine",
    "step": "encoder.engine.engine:Engine.step",
    "evaluation": "encoder.train.pretraining:held_out_numbers",
    "save": "encoder.engine.checkpoint.save:_Save.write_rank",
    "end": "encoder.train.recorder:Recorder.done",
}


@pytest.mark.parametrize("place", STANDS)
def test_a_rank_whose_peer_is_killed_ends_within_ten_seconds(left_alone, place):
    seconds, code, said = left_alone[place]
    assert seconds < MOST_SECONDS
    assert code == 1
    assert "rank 1 is gone" in said


@pytest.mark.matrix
def test_a_peer_that_is_stopped_or_busy_is_not_taken_for_gone(folder):
    (zero, _), (one, _) = start_ranks(
        trains, 2, folder=str(folder), out="stopped", overrides=["loader.workers=0"]
    )
    until = time.monotonic() + 120
    while len(read_jsonl(folder / "stopped" / METRICS)) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (one, zero):
            os.kill(rank.pid, number)
            time.sleep(4.0 if number == signal.SIGSTOP else 0.1)
    steps = len(read_jsonl(folder / "stopped" / METRICS))
    until = time.monotonic() + 60
    while len(read_jsonl(folder / "stopped" / METRICS)) < steps + 5 and time.monotonic() < until:
        time.sleep(0.05)
    still_train = zero.poll() is None and one.poll() is None
    for rank in (zero, one):
        rank.kill()
    assert still_train and len(read_jsonl(folder / "stopped" / METRICS)) >= steps + 5


def doors() -> set[str]:
    """The names by which ranks of this machine find each other, of all that watch now."""
    lines = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
    return {line.partition("@")[2] for line in lines if "@tessera " in line}


def latest_moment(out: Path) -> str:
    """What a run did last, by its folder."""
    events = read_jsonl(out / EVENTS)
    steps = len(read_jsonl(out / LEDGER))
    return f"step {steps}, last event {events[-1].get('event')}" if events else "starting"


SLOW_TO_IMPORT = """
import os, sys, time


class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and os.environ["RANK"] == "0":
            sys.meta_path.remove(self)
            while not os.path.exists(os.environ["RANK_ONE_LEFT"]):
                time.sleep(0.02)


sys.meta_path.insert(0, Slow())
"""


@pytest.mark.matrix
def test_a_peer_that_leaves_a_done_run_is_not_taken_for_gone(folder, tmp_path):
    """Rank one finds done.json and leaves while rank zero, on a busy machine, is still importing torch."""
    tokens = [f"phases.{i}.tokens=2K" for i in range(3)]
    settings = [f"out={folder}/done", "loader.workers=0", *tokens]
    assert pretrain(read_run(f"{folder}/run.yaml", settings), World()).done
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_IMPORT, encoding="utf-8")
    where = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "RANK_ONE_LEFT": str(tmp_path / "left"),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "launch" / "pretrain.py", folder / "run.yaml", *settings],
            env={**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    zero, one = ranks
    assert one.wait(timeout=120) == 0
    # a rank whose peer was gone would end by then
    time.sleep(LOST_SECONDS + 0.5)
    assert zero.poll() is None
    (tmp_path / "left").touch()
    assert zero.wait(timeout=120) == 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_sixty_kills_at_random_moments_leave_no_rank_behind(folder):
    """One of two ranks, from the moment on that both have begun to watch, which they do before torch is imported.

    Every kill counts. A rank that dies before that moment is its launcher's to notice, and there is none here.
    """
    chance = random.Random(14)
    waits = []
    for number in range(KILLS):
        out = f"random{number}"
        tokens = "20K" if number % 3 == 2 else "400K"  # every third is near its end when it is hit
        # a loader's process imports torch anew: most runs do without it, and so reach more of their life in the same time
        overrides = [
            *(f"phases.{i}.tokens={tokens}" for i in range(3)),
            f"loader.workers={int(number % 6 == 1)}",
        ]
        before = doors()
        ranks = start_ranks(trains, 2, folder=str(folder), out=out, overrides=overrides)
        until = time.monotonic() + 60
        while (
            len(doors() - before) < 2
            and not (folder / out / EVENTS).exists()
            and time.monotonic() < until
        ):
            time.sleep(0.01)
        time.sleep(2 * LOOK_SECONDS)
        if number % 3:
            until = time.monotonic() + 60
            while not read_jsonl(folder / out / EVENTS) and time.monotonic() < until:
                time.sleep(0.02)
        # a third of them while it starts, the half of these in its first second
        time.sleep(chance.uniform(0.05, 1.0) if number % 6 == 0 else chance.uniform(0.5, 6.0))
        moment = latest_moment(folder / out)
        victim = chance.randrange(2)
        if ranks[victim][0].poll() is not None or ranks[1 - victim][0].poll() is not None:
            continue
        ranks[victim][0].kill()
        seconds = seconds_to_end(ranks[1 - victim][0])
        waits.append(seconds)
        print(
            f"kill {number}: rank {victim}, {moment}; the other ended after {waits[-1]:.1f} s",
            flush=True,
        )
    print(
        f"{len(waits)} kills, at most {max(waits):.1f} s, median"
        f" {sorted(waits)[len(waits) // 2]:.1f} s"
    )
    assert len(waits) >= KILLS * 5 // 6 and max(waits) < MOST_SECONDS
