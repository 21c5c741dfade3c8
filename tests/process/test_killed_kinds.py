"""Fine-tunings of every kind, killed at any operation on their folder: what goes on is the run that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.rng import generator
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from tests.helpers.tasks import write_rows, write_task
from tests.process.ranks import run_ranks, start_ranks, wait_for
from tests.process.test_finetune_kinds import TASKS, rows_of_all_kinds

KINDS = {
    **TASKS,
    "labels": "{kind: labels, texts: [context], label: tags}",
    "regress": "{kind: regress, texts: [context], label: length}",
}
KILLS = 3
# on a run folder: a file is opened, gets its name or goes
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove")

pytestmark = pytest.mark.matrix  # test_finetune.py kills one of texts in every run


def train(world: World, *, root: str, kind: str, out: str, kill_at: int = 0) -> int:
    """Operations on the run folder; SIGKILL at the one of this number, from whichever thread it comes."""
    folder, seen = f"{root}/{out}", []

    def count(event: str, args: tuple) -> None:
        if event in OPERATIONS and str(args[0]).startswith(folder):
            seen.append(event)
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    settings = [f"task={KINDS[kind]}", f"out={folder}", "epochs=1"]
    assert finetune(read_task(f"{root}/task.yaml", settings), world).done
    return len(seen)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    path = write_task(root)
    path.write_text(path.read_text().replace("batch_examples: 8", "batch_examples: 5"))
    for name, count in (("train", 13), ("dev", 7), ("more", 3)):
        rows = rows_of_all_kinds(count, seed=count)
        rows = [{**row, "length": float(len(row["context"]))} for row in rows]
        write_rows(root / f"{name}.jsonl", rows)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_the_ledger_and_the_weights_are_those_of_an_unkilled_run(root, kind):
    (operations,) = run_ranks(train, 1, root=str(root), kind=kind, out=f"whole-{kind}")
    # the first checkpoint stands before half of them
    places = generator(7, kind).integers(operations // 2, operations, KILLS)
    for number, place in enumerate(places):
        out = f"killed-{kind}-{number}"
        killed = start_ranks(train, 1, root=str(root), kind=kind, out=out, kill_at=int(place))
        with contextlib.suppress(AssertionError):
            wait_for(killed, timeout_seconds=100)
        assert killed[0][0].poll() == -signal.SIGKILL
        run_ranks(train, 1, root=str(root), kind=kind, out=out)
        assert "resume" in [line["event"] for line in read_jsonl(root / out / EVENTS)]
        runs = [root / f"whole-{kind}", root / out]
        ledgers = [read_jsonl(run / LEDGER) for run in runs]
        assert ledgers[0] == ledgers[1] and len(ledgers[0]) >= 3
        losses = [[m.get("loss") for m in merged_metrics(run / METRICS)] for run in runs]
        assert losses[0] == losses[1]
        whole, found = (read_weights(newest_checkpoint(run / "checkpoints")) for run in runs)
        for name, weight in whole.items():
            assert torch.equal(found[name], weight), name
