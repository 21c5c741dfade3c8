"""SIGKILL in the middle of a step, and on other ranks at another ZeRO stage: pairs, distillation and each family lose nothing.

whole      one rank, stage 0, 4 micro-batches of 2 rows a step
killed     rank 0 is gone between forward and backward of its sixth step, and with it the others
resumed    on another number of ranks, with other micro-batches, at another stage
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from encoder.base.dist import World
from encoder.engine.engine import Engine
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools.report.report import verify_ledger
from encoder.train.checkpointing import Checkpointing
from encoder.train.pretraining import pretrain
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import distance, weights
from tests.process.test_two_terms import DETECTED, DISTILLED, ORDERED, PAIRS, write_texts

KILLED_STEP = 6
ROBERTA = [
    "model={system: roberta, vocab_size: 64, hidden_size: 64, intermediate_size: 96,"
    " num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}",
    "phases.0.model={}",
    "phases.1.model={}",
    "objective={name: mlm, mask_share: 0.15, mask_count: round_at_random,"
    " mask_special_tokens: true, random_tokens: not_special}",
]
# two phases of documents up to 32 and 64 tokens: two and four segments
XLNET = [
    "model={system: xlnet, vocab_size: 64, hidden_size: 64, intermediate_size: 96,"
    " num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}",
    "phases.0.model={}",
    "phases.1.model={}",
    "objective={name: plm, block_tokens: 8, segment_tokens: 16, memory_tokens: 10}",
    "data.sources=[{path: {folder}/a_cls_last}]",
    "evaluation.sources=[{path: {folder}/held_cls_last}]",
]
SETTINGS = {
    "xlnet": XLNET,
    "nsp": [*PAIRS, "objective.name=mlm_nsp"],
    "distill": [*DISTILLED, "objective.name=distill"],
    "roberta": ROBERTA,
    "albert": [*ORDERED, "objective.name=mlm_sop"],
    "electra": DETECTED,
}
# loss, held-out loss, and each term's where there are several
TERMS = {"xlnet": 2, "nsp": 4, "distill": 5, "roberta": 2, "albert": 4, "electra": 4}
# (ranks, ZeRO stage, rows of a micro-batch) until the kill, and after it
ON = {
    "xlnet": ((2, 1, 1), (3, 3, 2)),
    "nsp": ((2, 1, 1), (3, 2, 2)),
    "distill": ((2, 2, 2), (1, 0, 3)),
    "roberta": ((3, 3, 1), (2, 1, 2)),
    "albert": ((2, 3, 1), (3, 2, 2)),
    "electra": ((3, 1, 1), (2, 2, 2)),
}


def settings_of(name: str, out: str, *, folder: str, stage: int, rows: int) -> list[str]:
    return [
        f"out={folder}/{out}",
        "phases.0.tokens=1K",
        "phases.1.tokens=1K",
        f"engine.zero_stage={stage}",
        f"loader.micro_batch_rows={rows}",
        *(["engine.activation_checkpointing=blocks"] if stage == 3 else []),
        *(setting.replace("{folder}", folder) for setting in SETTINGS.get(name, ())),
    ]


def train_whole(world: World, *, folder: str, name: str) -> None:
    settings = settings_of(name, f"{name}-whole", folder=folder, stage=0, rows=2)
    pretrain(read_run(f"{folder}/run.yaml", settings), world)


def train(
    world: World,
    *,
    folder: str,
    name: str,
    stage: int,
    rows: int,
    dies: bool,
    more: Sequence[str] = (),
) -> None:
    """Trains on; where it dies, rank 0 is killed between a forward and its backward pass. `more`: settings that come last."""
    settings = [*settings_of(name, name, folder=folder, stage=stage, rows=rows), *more]
    with pytest.MonkeyPatch.context() as patch:
        # saves are waited for, so that one is there before the kill on any machine
        plain = Checkpointing.save
        patch.setattr(Checkpointing, "save", lambda own, name, **_: plain(own, name, wait=True))
        if dies and world.rank == 0:
            patch.setattr(Engine, "step", _killed_at(KILLED_STEP))
        pretrain(read_run(f"{folder}/run.yaml", settings), world)


def _killed_at(step: int) -> Any:
    plain = Engine.step
    taken: list[int] = []

    def stepping(engine: Engine, *values: Any, **named: Any) -> Any:
        taken.append(len(taken))
        if len(taken) == step:
            engine.module.register_forward_hook(
                lambda *_: os.kill(os.getpid(), signal.SIGKILL), always_call=True
            )
        return plain(engine, *values, **named)

    return stepping


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("killed_families"))


@pytest.fixture
def folder(texts, name) -> Path:
    """Both runs of a family, trained for the first test that asks."""
    if (texts / name).exists():
        return texts
    run_ranks(train_whole, 1, folder=str(texts), name=name)
    (ranks, stage, rows), (other_ranks, other_stage, other_rows) = ON[name]
    values = dict(folder=str(texts), name=name)
    with pytest.raises(AssertionError, match="rank 0, exit code -9"):
        run_ranks(train, ranks, stage=stage, rows=rows, dies=True, **values)
    assert not (texts / name / "done.json").exists()
    run_ranks(train, other_ranks, stage=other_stage, rows=other_rows, dies=False, **values)
    return texts


# segments that see each other, and shared layers with two terms
IN_EVERY_RUN = ("xlnet", "albert")
NAMES = [
    name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.matrix)
    for name in SETTINGS
]


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_family_goes_on_with_the_same_rows_and_weights(folder, name):
    killed, whole = folder / name, folder / f"{name}-whole"
    assert read_jsonl(killed / LEDGER) == read_jsonl(whole / LEDGER) and verify_ledger(killed)
    assert distance(weights(whole), weights(killed)) < 1e-5
    starts = [e for e in read_jsonl(killed / EVENTS) if e["event"] in ("start", "resume")]
    assert [(e["event"], e["ranks"], e["zero_stage"]) for e in starts] == [
        ("start", *ON[name][0][:2]),
        ("resume", *ON[name][1][:2]),
    ]
    assert 0 < starts[1]["step"] < KILLED_STEP


@pytest.mark.parametrize("name", NAMES)
def test_each_term_of_a_killed_family_is_that_of_the_whole_run(folder, name):
    found, expected = (losses_of(folder / run) for run in (name, f"{name}-whole"))
    assert len(found) == len(expected) > 6
    assert len({term for line in expected for term in line}) >= TERMS[name]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


def losses_of(run: Path) -> list[dict[str, float]]:
    """Every loss of each step; a term without a target in it is left out."""
    lines = merged_metrics(run / METRICS)
    return [{k: v for k, v in line.items() if "loss" in k and v is not None} for line in lines]
