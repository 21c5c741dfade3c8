"""SIGKILL at random moments of a run, of one rank or of all: in the end nothing shows that it ever happened."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, read_jsonl
from encoder.tools.report.report import verify_ledger
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import start_ranks, wait_for

RUN = """
name: killed
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a, name: a}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
optimizer: {{}}
phases:
  - {{name: one, tokens: {tokens}, max_tokens_per_document: 32, batch_tokens: 256,
     batch_warmup: {{from_tokens: 128, over_tokens: 2K}}, lr: {{schedule: wsd, peak: 1e-3, warmup_tokens: 500}}}}
  - {{name: two, tokens: {tokens}, max_tokens_per_document: 64, batch_tokens: 256, model: {{global_rope_theta: 160000}},
     lr: {{schedule: constant, peak: 1e-3}}}}
  - {{name: three, tokens: {tokens}, max_tokens_per_document: 64, batch_tokens: 256, lr: {{schedule: one_minus_sqrt, peak: 1e-3}}}}
evaluation: {{sources: [{{path: {root}/held, name: held}}], every_tokens: 2K, rows: 3}}
checkpoints: {{every_tokens: 1K, keep_last: 2}}
engine: {{zero_stage: 2, precision: fp32}}
loader: {{micro_batch_rows: 2, workers: 1}}
"""


def train(world: World, *, folder: str, out: str, zero_stage: int = 2) -> bool:
    return pretrain(
        read_run(f"{folder}/run.yaml", [f"out={folder}/{out}", f"engine.zero_stage={zero_stage}"]),
        world,
    ).done


def killed_run(
    folder: Path, *, tokens: str, kills: int, topologies: Sequence[tuple[int, int]]
) -> tuple[Path, Path]:
    """The folders of a run on two ranks at stage 2, and of one that is killed so often and starts again each time on one of
    the `topologies` (ranks, ZeRO stage)."""
    write_source(folder / "a", random_documents(120, seed=1, longest=60), vocab_size=64)
    write_source(folder / "held", random_documents(30, seed=2, longest=60), vocab_size=64)
    (folder / "run.yaml").write_text(RUN.format(root=folder, tokens=tokens))
    whole, killed = folder / "whole", folder / "killed"
    assert wait_for(
        start_ranks(train, 2, folder=str(folder), out="whole"), timeout_seconds=900
    ) == [True, True]
    chance, hits = random.Random(4), 0
    while not (killed / "done.json").exists():
        size, stage = chance.choice(topologies)
        ranks = start_ranks(train, size, folder=str(folder), out="killed", zero_stage=stage)
        if hits < kills:
            hits += kill_at_random(ranks, killed, chance)
        try:
            wait_for(
                ranks, timeout_seconds=900 if hits >= kills else 60
            )  # a rank whose peer is gone ends by itself
        except AssertionError:
            assert hits <= kills
        finally:
            shutil.rmtree(ranks[0][1].parent, ignore_errors=True)
    print(
        f"{hits} kills, {sum(e['event'] == 'resume' for e in read_jsonl(killed / EVENTS))} resumes"
    )
    assert hits == kills, f"the run was over after {hits} kills; give it more tokens"
    return whole, killed


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_50_times_and_never_end_with_the_same_weights_and_ledger(tmp_path):
    whole, killed = killed_run(tmp_path, tokens="130K", kills=50, topologies=[(2, 2)])
    assert read_jsonl(killed / LEDGER) == read_jsonl(whole / LEDGER) and verify_ledger(killed)
    a, b = (read_weights(newest_checkpoint(run / "checkpoints")) for run in (killed, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_and_started_again_on_other_ranks_and_stages_the_ledger_is_the_same(tmp_path):
    whole, killed = killed_run(
        tmp_path,
        tokens="40K",
        kills=15,
        topologies=[(n, stage) for n in (1, 2, 3) for stage in range(4)],
    )
    assert read_jsonl(killed / LEDGER) == read_jsonl(whole / LEDGER) and verify_ledger(killed)
    assert (
        len(
            {
                (e["ranks"], e["zero_stage"])
                for e in read_jsonl(killed / EVENTS)
                if e["event"] in ("start", "resume")
            }
        )
        > 5
    )


def kill_at_random(ranks: list, run: Path, chance: random.Random) -> bool:
    """Three of four once this start has trained or saved, the others while it starts or loads."""
    seen, end = (
        len(read_jsonl(run / EVENTS)) + chance.choice([2, 3, 4]),
        time.monotonic() + 60,
    )  # start, checkpoints
    if chance.random() < 0.75:
        while (
            len(read_jsonl(run / EVENTS)) < seen
            and time.monotonic() < end
            and ranks[0][0].poll() is None
        ):
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.4))
    else:
        time.sleep(chance.uniform(0.0, 8.0))
    victims = [
        process for process, _ in (ranks if chance.random() < 0.5 else [chance.choice(ranks)])
    ]
    alive = [process for process in victims if process.poll() is None]
    for process in alive:
        process.kill()
    return bool(alive)
