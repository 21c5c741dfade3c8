"""A sweep by its command: a 2 x 2 grid with a point that fails, killed in three ways, gone on with, beside runs alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from encoder.base.dist import World
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from tests.helpers.tasks import write_task
from tests.process.ranks import ROOT, run_ranks

pytestmark = pytest.mark.matrix  # named_commands runs sweeps in every run, without kills

SWEEP = """
base: {root}/task.yaml
out: {root}/points
grid: {{lr.peak: [5.0e-3, 0.02], data.max_tokens: [24, 9999]}}
seeds: [1, 2]
"""
FIRST = "lr.peak=0.005,data.max_tokens=24,seed=1"
SECOND = "lr.peak=0.02,data.max_tokens=24,seed=1"
THIRD = "lr.peak=0.005,data.max_tokens=24,seed=2"
FOURTH = "lr.peak=0.02,data.max_tokens=24,seed=2"
TOO_LONG = "data.max_tokens is 9,999; needed: 3 to 64"


def start(root: Path) -> subprocess.Popen[str]:
    """The command, in a process group of its own as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "sweep.py"), str(root / "sweep.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(root: Path, point: str, steps: int, process: subprocess.Popen[str]) -> None:
    while len(read_jsonl(root / "points" / point / LEDGER)) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    (worker,) = psutil.Process(process.pid).children()
    return worker


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The command is killed at the first point, a process of it at the second; Ctrl-C at the third; then to the end."""
    root = tmp_path_factory.mktemp("sweep")
    write_task(root)
    (root / "sweep.yaml").write_text(SWEEP.format(root=root))

    # the command itself: its process saves and leaves
    process = start(root)
    wait_for_steps(root, FIRST, 3, process)
    worker = worker_of(process)
    process.kill()
    worker.wait(timeout=60)
    assert newest_checkpoint(root / "points" / FIRST / "checkpoints")

    # a process that trains, as where memory ends: the others go on. Then Ctrl-C: it saves, and says how to go on
    process = start(root)
    wait_for_steps(root, SECOND, 4, process)
    worker_of(process).kill()
    wait_for_steps(root, THIRD, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    said, told = process.communicate(timeout=200)
    assert process.returncode == 130, told
    assert f"error: sweep: {SECOND}: its process was ended by SIGKILL" in told
    assert told.count(TOO_LONG) == 2 and said.count("done  ") == 1
    assert "stopped: 1 point done; the same command goes on" in said

    process = start(root)
    said, told = process.communicate(timeout=200)
    assert process.returncode == 2 and told.count(TOO_LONG) == 4, told
    assert said.count("done  ") == 3 and "4 of 8 points failed" in told
    return root


def results(root: Path) -> dict[str, dict]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted((root / "points").glob("*/result.json"))
    }


def test_what_was_done_is_not_done_again_and_what_was_killed_went_on(root):
    resumes = {
        name: [e["event"] for e in read_jsonl(root / "points" / name / EVENTS)].count("resume")
        for name in results(root)
    }
    assert resumes == {FIRST: 1, SECOND: 1, THIRD: 1, FOURTH: 0}
    # what makes a point's numbers worth nothing stands at the end of its lines
    collapsed = [name for name, found in results(root).items() if found["constant_predictions"]]
    assert collapsed
    for name in collapsed:
        lines = (root / "points" / name / "point.log").read_text().splitlines()
        assert any("gives every row of" in line for line in lines[-4:])
    for folder in (root / "points").glob("*9999*"):
        assert TOO_LONG in (folder / "failed.txt").read_text()
        assert not (folder / LEDGER).exists()


def test_the_table_is_that_of_the_points_by_hand(root):
    table = json.loads((root / "points" / "table.json").read_text())
    found = {s["name"]: s for s in table["settings"]}
    assert [s["failed"] for s in table["settings"]] == [0, 2, 0, 2]
    means = {}
    for setting in ("lr.peak=0.005,data.max_tokens=24", "lr.peak=0.02,data.max_tokens=24"):
        own = [r for name, r in results(root).items() if name.startswith(setting)]
        for of, metric in (("dev", "accuracy"), ("more", "f1"), ("dev", "loss")):
            values = np.array([r["metrics"][of][metric] for r in own])
            told = found[setting]["numbers"][of][metric]
            assert told["n"] == 2 and told["mean"] == pytest.approx(values.mean(), rel=1e-12)
            assert told["std"] == pytest.approx(values.std(ddof=1), rel=1e-9, abs=1e-15)
            assert (told["median"], told["least"], told["most"]) == (
                np.median(values),
                values.min(),
                values.max(),
            )
        means[setting] = found[setting]["numbers"]["dev"]["accuracy"]["mean"]
    assert table["chosen"] == max(means, key=means.get)


def train(world: World, *, root: str, out: str) -> bool:
    settings = ["lr.peak=0.02", "data.max_tokens=24", "seed=2", f"out={out}"]
    return finetune(read_task(f"{root}/task.yaml", settings), world).done


def test_a_point_after_others_in_a_process_is_the_run_alone_to_the_last_digit(root):
    assert run_ranks(train, 1, root=str(root), out=str(root / "alone")) == [True]
    # behind three others in its process, of which one failed
    point = root / "points" / FOURTH
    assert read_jsonl(point / LEDGER) == read_jsonl(root / "alone" / LEDGER)
    numbers = [
        [(line["step"], line.get("loss"), line.get("dev_loss")) for line in merged_metrics(run)]
        for run in (point / METRICS, root / "alone" / METRICS)
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 12
    point_said, alone_said = (
        json.loads((run / "result.json").read_text())["metrics"] for run in (point, root / "alone")
    )
    assert point_said == alone_said
    weights = [
        read_weights(newest_checkpoint(run / "checkpoints")) for run in (point, root / "alone")
    ]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
