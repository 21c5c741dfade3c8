"""The shipped recipes, scaled down, through the real training loop: every phase and every batch size as planned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from encoder.base.dist import World
from encoder.engine.engine import Engine
from encoder.runs.config import RunConfig, read_run
from encoder.runs.folder import METRICS, merged_metrics
from encoder.runs.phases import planned_steps
from encoder.train.pretraining import pretrain
from tests.helpers.shards import write_source
from tests.process.ranks import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
ROW_TOKENS, STEPS = 32, 3  # of a stair of the batch warm-up; of each later stretch
TINY = [
    (
        "model={system: modernbert, vocab_size: 64, hidden_size: 16, intermediate_size: 24,"
        " num_hidden_layers: 2, num_attention_heads: 2, window_radius_tokens: 3,"
        " max_position_embeddings: 32}"
    ),
    f"data.row_tokens={ROW_TOKENS}",
    "data.window_documents=64",
    "engine.precision=fp32",
    "evaluation=",
    "init_from=",
    "loader={micro_batch_rows: 6, workers: 0}",
]


def scaled_down(name: str, root: Path) -> RunConfig:
    """The recipe's phases, rates, decays and thetas; rows of 32 tokens, the batch one row where the recipe's begins."""
    path = CONFIGS / f"modernbert_{name}.yaml"
    whole, overrides = (
        read_run(path),
        [
            *TINY,
            f"out={root}/{name}",
            f"data.sources=[{{path: {root}/a, name: a}}]",
        ],
    )
    row = whole.phases[0].batch_warmup.from_tokens
    for i, phase in enumerate(whole.phases):
        rows, warm_up = phase.batch_tokens // row, 0
        if phase.batch_warmup:
            warm_up = STEPS * sum(range(1, rows)) * ROW_TOKENS
            overrides += [
                f"phases.{i}.batch_warmup={{from_tokens: {ROW_TOKENS}, over_tokens: {warm_up}}}",
                f"phases.{i}.lr.warmup_tokens={warm_up // 16}",
            ]
        if phase.sources:
            overrides.append(f"phases.{i}.sources=[{{path: {root}/a, name: a}}]")
        overrides += [
            f"phases.{i}.max_tokens_per_document={ROW_TOKENS}",
            f"phases.{i}.batch_tokens={rows * ROW_TOKENS}",
            f"phases.{i}.tokens={warm_up + STEPS * rows * ROW_TOKENS}",
        ]
    if name == "base":
        overrides.append("phases.2.max_lr=8.0e-4")  # as the authors' code had it
    return read_run(path, overrides)


def train(world: World, *, root: str) -> dict[str, list]:
    """What each step was told: the rate, the peak, the decay of the matrices, both RoPE thetas."""
    told: list = []

    def listening(engine: Engine, *args, **kwargs):
        result = step(engine, *args, **kwargs)
        matrices = max(g["weight_decay"] for g in engine.optimizer.param_groups)
        told.append(
            [kwargs["lr"], kwargs["max_lr"], matrices, *engine.module.phase_settings.values()]
        )
        return result

    step, Engine.step, seen = Engine.step, listening, {}
    for name in ("base", "large"):
        pretrain(scaled_down(name, Path(root)), world)
        seen[name] = [*told]
        told.clear()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    root = tmp_path_factory.mktemp("recipes")
    random = np.random.default_rng(1)
    # documents as long as a row: every row is full, so that plan's tokens are the loader's
    write_source(
        root / "a", [random.integers(6, 64, ROW_TOKENS) for _ in range(200)], vocab_size=64
    )
    return root, run_ranks(train, 2, root=str(root))[0]


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_trainer_takes_the_planned_steps_through_all_phases_and_batch_sizes(seen, name):
    root, told = seen
    run = scaled_down(name, root)
    planned = [
        (s.step, run.phases[s.phase].name, s.rows, s.tokens, s.lr) for s in planned_steps(run)
    ]
    trained = [
        (m["step"], m["phase"], m["rows"], m["step_tokens"], m["lr"])
        for m in merged_metrics(root / name / METRICS)
    ]
    assert trained == planned
    assert [t[0] for t in told[name]] == [p[4] for p in planned]
    rows = [p[2] for p in planned if p[1] == "stable"]
    full = {"base": 6, "large": 11}[name]
    assert rows == [size for size in range(1, full + 1) for _ in range(STEPS)]


@pytest.mark.parametrize("name", ["base", "large"])
def test_every_step_has_its_phases_peak_decay_and_thetas(seen, name):
    root, told = seen
    run = scaled_down(name, root)
    expected = []
    for phase in (run.phases[s.phase] for s in planned_steps(run)):
        peak = 8e-4 if (name, phase.name) == ("base", "decay") else phase.lr.peak
        expected.append(
            [
                peak,
                1e-5 if name == "base" or phase.name == "stable" else 1e-6,
                phase.model["global_rope_theta"],
                1e4,
            ]
        )
    assert [t[1:] for t in told[name]] == expected
