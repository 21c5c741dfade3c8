"""The run files of published families: each is planned, and its parameters are the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.models.catalog import PRESETS
from encoder.runs.config import read_run
from encoder.tools.plan.forecast import gpu
from encoder.tools.plan.plan import plan_text
from launch.new_file import FAMILIES

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "pretrain"

# by transformers' classes, with the heads that are trained; of the others by shape
COUNTS = {
    "bert_tiny": 4_433_468,
    "bert_mini": 11_267_900,
    "bert_small": 29_058_876,
    "bert_medium": 41_668_412,
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "roberta_base": 124_697_433,
    "roberta_large": 355_412_057,
    "distilbert_base": 66_985_530,
    "mini_roberta": 17_699_072,
    "mini_roberta_readme": 17_757_017,
    "ettin_150m": 149_655_232,
    "ettin_400m": 395_881_664,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_run_file_is_planned_with_its_parameters(name):
    run = read_run(CONFIGS / f"{name}.yaml")
    said = plan_text(run, ranks=8, machine=gpu("h100"))
    counted = run.model.parameter_counts().total
    assert f"{counted:,} parameters" in said and "does NOT fit" not in said
    assert counted == COUNTS.get(name, counted)
    assert name in PRESETS and run.name == name


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("modernbert")])
def test_a_run_file_that_picks_a_preset_needs_nothing_else(name, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"name: a\ndata: shards/web/train\nmodel: {{preset: {name}}}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3}\n"
    )
    run = read_run(tmp_path / "run.yaml")
    longest = run.phases[0].max_tokens_per_document
    assert longest == min(1024, run.model.max_position_embeddings)
    expected = 0.02 if getattr(run.model, "initialization", "megatron") != "megatron" else None
    assert expected in (None, run.model.initializer_range)
