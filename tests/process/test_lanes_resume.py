"""A run with lanes goes on from two ranks to one and then to three: one ledger, without a seam, and epochs in its events."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from encoder.base.dist import World
from encoder.data.loader import Loader
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, read_jsonl
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks

RUN = """
name: lanes
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a, name: a, weight: 2}}, {{path: {root}/b, name: b}}], row_tokens: 64,
       window_documents: 12, lanes: 2}}
objective: {{name: mlm, whole_words: true}}
optimizer: {{}}
phases:
  - {{name: one, tokens: 6K, max_tokens_per_document: 48, batch_tokens: 512, mask_share_end: 0.15,
     batch_warmup: {{from_tokens: 256, over_tokens: 1K}}, lr: {{schedule: constant, peak: 1e-3}}}}
checkpoints: {{every_tokens: 100K}}
engine: {{precision: fp32}}
loader: {{workers: 0}}
"""


def go_on(world: World, *, folder: str, out: str, stop_at: int | None) -> int:
    """Trains on, with a SIGTERM at the step that reaches `stop_at` tokens, or to the end; returns the steps done."""
    plain = Loader.next_step

    def next_step(self):
        step = plain(self)
        if stop_at is not None and step.end.phase_tokens >= stop_at:
            signal.raise_signal(signal.SIGTERM)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next_step", next_step)
        outcome = pretrain(read_run(f"{folder}/run.yaml", [f"out={folder}/{out}"]), world)
    assert outcome.done == (stop_at is None)
    return outcome.progress.step


def go_on_and_alone(world: World, *, folder: str, stop_at: int) -> list[int]:
    """The middle part, and the whole run without a stop: in one process, which takes seconds to start."""
    return [
        go_on(world, folder=folder, out="cut", stop_at=stop_at),
        go_on(world, folder=folder, out="whole", stop_at=None),
    ]


def test_two_ranks_then_one_then_three_continue_one_ledger(tmp_path: Path):
    write_source(tmp_path / "a", random_documents(60, seed=1, longest=60), shard_bytes=700)
    write_source(tmp_path / "b", random_documents(90, seed=2, longest=30), shard_bytes=700)
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    first = run_ranks(go_on, 2, folder=str(tmp_path), out="cut", stop_at=1500)[0]
    ((second, steps),) = run_ranks(go_on_and_alone, 1, folder=str(tmp_path), stop_at=3500)
    last = run_ranks(go_on, 3, folder=str(tmp_path), out="cut", stop_at=None)[0]
    assert 0 < first < second < last == steps
    whole, cut = (read_jsonl(tmp_path / out / LEDGER) for out in ("whole", "cut"))
    assert cut == whole and len(whole[-1]["next"]) == 2
    begun = [
        [
            (e["step"], e["source"], e["epoch"])
            for e in read_jsonl(tmp_path / out / EVENTS)
            if e["event"] == "epoch"
        ]
        for out in ("whole", "cut")
    ]
    assert begun[0] == begun[1] and {source for _, source, _ in begun[0]} == {"a", "b"}
