"""Through the real training loop: the curve does not depend on ranks, micro-batch, ZeRO stage, nor on a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.runs.config import read_run
from encoder.runs.filling import row_fills
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks

RUN = """
name: t
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2,
        num_attention_heads: 2, window_radius_tokens: 8, max_position_embeddings: 64, attention_output_dropout: 0.1}}
data: {{sources: [{{path: {root}/a, name: a, weight: 2}}, {{path: {root}/b, name: b}}], row_tokens: 64,
       window_documents: 24}}
objective: {{name: mlm}}
optimizer: {{weight_decay: 1e-3}}
phases:
  - {{name: short, tokens: 2K, max_tokens_per_document: 32, batch_tokens: 512, model: {{global_rope_theta: 10000}},
     batch_warmup: {{from_tokens: 256, over_tokens: 1K}}, lr: {{schedule: wsd, peak: 1e-2, warmup_tokens: 500}}}}
  - {{name: long, tokens: 2K, max_tokens_per_document: 64, batch_tokens: 448, model: {{global_rope_theta: 160000}},
     lr: {{schedule: one_minus_sqrt, peak: 5e-3}}}}
evaluation: {{sources: [{{path: {root}/held, name: held}}], every_tokens: 1K, rows: 3}}
checkpoints: {{every_tokens: 1K, keep_last: 9}}
engine: {{precision: fp32}}
loader: {{micro_batch_rows: 2, workers: 0}}
"""
# (name, rows of a micro-batch, ZeRO stage, precision, ranks); 8 rows a step, 7 at the end: 4 micro-batches of 2 on one rank.
# Every stage on every number of ranks is test_engine's; here is the loop around it
CASES = [
    ("fp64", 2, 0, "fp64", (1, 2, 3)),
    ("fp64_half", 1, 0, "fp64", (2,)),
    ("zero0", 2, 0, "fp32", (1,)),
    ("zero1", 2, 1, "fp32", (1, 3)),
    ("zero1_half", 1, 1, "fp32", (2,)),
    ("zero2", 2, 2, "fp32", (2,)),
    ("zero3", 2, 3, "fp32", (3,)),
]
# Trained on one rank by commit 9fabbb9, of 27 November 2026: tests/process/ledgers has its ledgers
FORMER = {
    "plain": [],
    "lanes": [
        "data.lanes=2",
        "phases.1.batch_tokens=512",
        "phases.0.mask_share=0.4",
        "phases.0.mask_share_end=0.2",
    ],
    "whole_words": ["objective.whole_words=true", "seed=4", "phases.0.tokens=4K"],
}
LEDGERS = Path(__file__).parent / "ledgers"
RUNS = [(f"{name}-{size}", precision) for name, *_, precision, sizes in CASES for size in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("one_curve")
    write_source(root / "a", random_documents(120, seed=1, longest=60), vocab_size=64)
    write_source(root / "b", random_documents(90, seed=2, longest=30), vocab_size=64)
    for name, seed, documents, longest in (("many_a", 1, 120, 60), ("many_b", 2, 90, 30)):
        drawn = random_documents(documents, seed=seed, longest=longest)
        write_source(root / name, drawn, vocab_size=64, shard_bytes=1 << 9)
    write_source(root / "held", random_documents(30, seed=3, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    for size in (1, 2, 3):
        cases = [case[:4] for case in CASES if size in case[4]]
        run_ranks(train_cases, size, folder=str(root), cases=cases)
    run_ranks(train_former, 1, folder=str(root))
    return root


def train_cases(world: World, *, folder: str, cases: list) -> None:
    for name, rows, stage, precision in cases:
        pretrain(
            read_run(
                f"{folder}/run.yaml",
                [
                    f"out={folder}/{name}-{world.size}",
                    f"loader.micro_batch_rows={rows}",
                    f"engine.zero_stage={stage}",
                    f"engine.precision={precision}",
                    "phases.1.tokens=1K",
                ],
            ),
            world,
        )


def train_former(world: World, *, folder: str) -> None:
    for name, settings in FORMER.items():
        shards = [f"data.sources.{i}.path={folder}/many_{source}" for i, source in enumerate("ab")]
        pretrain(
            read_run(
                f"{folder}/run.yaml",
                [
                    f"out={folder}/{name}",
                    "model.initializer_range=0.02",
                    *(shards if settings else []),
                    *settings,
                ],
            ),
            world,
        )


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    return read_weights(found)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of all parameters together."""
    assert list(a) == list(b)
    off = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return (off / sum(float(t.double().square().sum()) for t in a.values())) ** 0.5


def test_the_ledgers_are_equal_line_by_line(folder):
    first = read_jsonl(folder / "fp64-1" / LEDGER)
    assert len(first) >= 8 and {line["rows"] for line in first} >= {4, 8, 7}
    for run, _ in RUNS:
        assert read_jsonl(folder / run / LEDGER) == first, run


@pytest.mark.parametrize("name", FORMER)
def test_rows_and_hashes_are_those_of_the_runs_of_old(folder, name):
    """What trained on which rows, with which masks, must not depend on the program's version either."""
    former = read_jsonl(LEDGERS / f"{name}.jsonl")
    found = read_jsonl(folder / name / LEDGER)
    assert len(found) == len(former) > 10
    for line, old in zip(found, former, strict=True):
        assert {key: line[key] for key in old} == old


def test_fp64_stage_0_gives_the_same_parameters_to_1e_10(folder):
    one = weights(folder / "fp64-1")
    assert next(iter(one.values())).dtype == torch.float64
    for other in [run for run, precision in RUNS if precision == "fp64"]:
        assert (
            max(float((one[n] - t).abs().max()) for n, t in weights(folder / other).items()) < 1e-10
        ), other


def test_fp32_stages_0_to_3_give_the_same_parameters_to_1e_5(folder):
    one = weights(folder / "zero1-1")
    for other in [run for run, precision in RUNS if precision == "fp32"] + ["fp64-1"]:
        assert distance(one, weights(folder / other)) < 1e-5, other


def test_a_run_cut_off_anywhere_resumes_on_other_ranks_and_another_stage(folder):
    whole = read_jsonl(folder / "zero1-1" / LEDGER)
    cut = folder / "zero2-2"
    expected = weights(folder / "zero1-1")
    saves = sorted((cut / "checkpoints").glob("*/COMMITTED"))
    for path in saves[1:]:  # as a kill after the first save leaves it
        shutil.rmtree(path.parent)
    (cut / "done.json").unlink()
    lines = (cut / LEDGER).read_text().splitlines(keepends=True)
    (cut / LEDGER).write_text("".join(lines[:-3]) + lines[-3][:20])
    run_ranks(resume, 1, folder=str(folder))
    assert read_jsonl(cut / LEDGER) == whole and (cut / "done.json").exists()
    assert distance(expected, weights(cut)) < 1e-5


def resume(world: World, *, folder: str) -> None:
    pretrain(
        read_run(
            f"{folder}/run.yaml",
            [
                f"out={folder}/zero2-2",
                "loader.micro_batch_rows=3",
                "engine.zero_stage=0",
                "phases.1.tokens=1K",
            ],
        ),
        world,
    )


def test_the_end_of_a_phase_settles_the_save_that_is_due_with_it(folder):
    steps = [
        e["step"] for e in read_jsonl(folder / "zero1-1" / EVENTS) if e["event"] == "checkpoint"
    ]
    phases = [m["phase"] for m in merged_metrics(folder / "zero1-1" / METRICS) if "loss" in m]
    end = phases.count("short")
    assert end in steps and end + 1 not in steps and len(steps) == len({*steps})


def test_the_plan_knows_how_full_the_rows_of_small_windows_get(folder):
    trained = [m for m in merged_metrics(folder / "zero1-1" / METRICS) if "fill" in m]
    for phase, planned in zip(("short", "long"), row_fills(read_run(folder / "run.yaml"))):
        full = [m["fill"] for m in trained if m["phase"] == phase]
        assert planned < 0.99 and planned == pytest.approx(sum(full) / len(full), abs=0.03)
