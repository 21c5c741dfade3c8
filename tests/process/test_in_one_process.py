"""Several runs in one Python process, from a script without a main guard: as from the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from encoder.runs.folder import LEDGER, METRICS, read_jsonl
from tests.helpers.shards import random_documents, write_source
from tests.process.test_killed_run import RUN

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("first", "again", "stopped")
SCRIPT = """
import sys
from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.base.stopping import StopFlag
from encoder.data.loader import Loader
from encoder.engine.engine import Engine
from encoder.runs.config import read_run
from encoder.train.pretraining import pretrain

def run_of(out, stage, workers):
    settings = [f"out={out}", f"engine.zero_stage={stage}", f"loader.workers={workers}"]
    return read_run("run.yaml", settings)

def train(out, stage, workers):
    return pretrain(run_of(out, stage, workers), World()).done

assert train("first", 2, 1)
plain = Loader.next_step
def fails(self):
    raise UserError("a shard is damaged.")
Loader.next_step = fails
try:
    train("failed", 3, 0)
except UserError as error:
    print("refused:", error)
Loader.next_step = plain
assert train("again", 2, 0)

# asked in the middle of step 3: it is finished, saved, and no other one is trained
step, calls = Engine.step, []
with StopFlag() as stop:
    def asked_in_the_third(self, *args, **settings):
        calls.append(1)
        if len(calls) == 3:
            stop._note(15)
        return step(self, *args, **settings)
    Engine.step = asked_in_the_third
    stopped = pretrain(run_of("stopped", 2, 0), World(), stop=stop)
    Engine.step = step
assert (len(calls), stopped.progress.step, stopped.done) == (3, 3, False)
assert train("stopped", 2, 0)
print("all done")
"""


@pytest.mark.matrix
def test_runs_follow_each_other_in_one_process_without_a_main_guard(tmp_path):
    write_source(tmp_path / "a", random_documents(60, seed=1, longest=60), vocab_size=64)
    write_source(tmp_path / "held", random_documents(30, seed=2, longest=60), vocab_size=64)
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path, tokens="2K"), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused: a shard is damaged." in done.stdout and done.stdout.endswith("all done\n")
    ledgers = [read_jsonl(tmp_path / out / LEDGER) for out in RUNS]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    losses = [
        [line["loss"] for line in read_jsonl(tmp_path / out / METRICS) if "loss" in line]
        for out in RUNS
    ]
    assert losses[0] == losses[1] == losses[2]
