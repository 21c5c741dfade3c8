"""Steps and held-out rows without a masked token: they move nothing, on all ranks alike, and a run goes on past them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import ShardError, UserError
from encoder.data.loader import Loader
from encoder.data.shard_format import CARD
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.engine.engine import Engine
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, METRICS, read_jsonl
from encoder.tools.report.report import verify_ledger, write_report
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks

RUN = """
name: seldom
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a, name: a}}], row_tokens: 8, window_documents: 30}}
objective: {{name: mlm, mask_share: 0.1}}
phases: [{{name: one, tokens: 240, max_tokens_per_document: 8, batch_tokens: 16, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 80, keep_last: 99}}
evaluation: {{sources: [{{path: {root}/h, name: h}}], every_tokens: 100, rows: 1, mask_share: 0.0001}}
engine: {{precision: fp32}}
loader: {{workers: 0}}
tracking: {{print_every_steps: 100}}
"""


def start(world: World, folder: str, out: str, stage: int, *, stop_at: int = 0) -> list:
    """One start: [its error or nothing, updates of the optimizer]; `stop_at`: it fails before this step."""
    plain, calls, engines = Loader.next_step, [0], []
    step = Engine.step

    def next_step(self):
        calls[0] += 1
        if calls[0] == stop_at:
            raise UserError("stopped here")
        return plain(self)

    def watched(self, *values, **named):
        engines.append(self)
        return step(self, *values, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next_step", next_step)
        patch.setattr(Engine, "step", watched)
        try:
            pretrain(
                read_run(
                    f"{folder}/run.yaml", [f"out={folder}/{out}", f"engine.zero_stage={stage}"]
                ),
                world,
            )
        except UserError as error:
            return [str(error), engines[-1].optimizer_steps]
    return ["", engines[-1].optimizer_steps]


def on_two_ranks(world: World, *, folder: str) -> list:
    return [start(world, folder, f"two{stage}", stage) for stage in (0, 1, 2, 3)]


def on_one_rank(world: World, *, folder: str) -> list:
    return [
        start(world, folder, "one", 1),
        start(world, folder, "stopped", 1, stop_at=12),
        start(world, folder, "stopped", 1),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list]:
    root = tmp_path_factory.mktemp("seldom")
    write_source(root / "a", random_documents(90, seed=1, longest=8), vocab_size=64)
    write_source(
        root / "h", random_documents(9, seed=2, longest=8), vocab_size=64, split="held_out"
    )
    (root / "run.yaml").write_text(RUN.format(root=root))
    two, other = run_ranks(on_two_ranks, 2, folder=str(root))
    assert two == other
    (one,) = run_ranks(on_one_rank, 1, folder=str(root))
    return root, [*two, *one]


def test_a_step_that_asks_nothing_moves_nothing_and_the_run_goes_on(runs):
    root, said = runs
    lines = read_jsonl(root / "one" / LEDGER)
    silent = [line["step"] for line in lines if not line["masked_tokens"]]
    assert 3 <= len(silent) < len(lines) - 3 and not any("fault" in line for line in lines)
    assert verify_ledger(root / "one") == len(lines)
    assert [error for error, _ in said] == ["", "", "", "", "", "stopped here", ""]
    assert all(
        count == len(lines) - len(silent) for count in (said[i][1] for i in (0, 1, 2, 3, 4, 6))
    ), "its counter stands still"
    assert [
        e["step"] for e in read_jsonl(root / "one" / EVENTS) if e["event"] == "nothing_asked"
    ] == silent


def test_steps_that_ask_nothing_are_the_same_on_any_ranks_and_stages(runs):
    root, _ = runs
    one = read_weights(newest_checkpoint(root / "one" / "checkpoints"))
    for name in ("two0", "two1", "two2", "two3", "stopped"):
        assert read_jsonl(root / name / LEDGER) == read_jsonl(root / "one" / LEDGER)
        for key, whole in read_weights(newest_checkpoint(root / name / "checkpoints")).items():
            torch.testing.assert_close(whole, one[key], rtol=1e-4, atol=1e-6)


def test_held_out_rows_that_ask_nothing_have_no_loss_and_stop_no_run(runs):
    root, _ = runs
    seen = [m for m in read_jsonl(root / "one" / METRICS) if "held_out_loss" in m]
    assert seen and all(m["held_out_loss"] is None and m["held_out_accuracy"] is None for m in seen)
    assert write_report([root / "one"], root / "report").is_file()


def lose_all(world: World, *, folder: str) -> str:
    run = read_run(f"{folder}/run.yaml", [f"out={folder}/lost", "loader.on_bad_shard=quarantine"])
    with open(f"{folder}/a/shard.00000.mds", "r+b") as f:
        f.seek(4)
        f.write(b"\xff" * 64)
    signal.alarm(60)
    try:
        pretrain(run, world)
    except ShardError as error:
        return str(error)
    return ""


def test_a_mixture_whose_every_shard_is_damaged_stops_and_does_not_hang(tmp_path):
    write_source(tmp_path / "a", random_documents(90, seed=1, longest=8), vocab_size=64)
    write_source(
        tmp_path / "h", random_documents(9, seed=2, longest=8), vocab_size=64, split="held_out"
    )
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    assert (tmp_path / "a" / CARD).is_file() and not (tmp_path / "a" / "shard.00001.mds").exists()
    (said,) = run_ranks(lose_all, 1, timeout_seconds=120, folder=str(tmp_path))
    assert "was the last shard of the mixture that could be read" in said and "\n" not in said
