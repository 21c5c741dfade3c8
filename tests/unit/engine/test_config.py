"""What an engine may be asked for, and what DeepSpeed is told."""

from __future__ import annotations

import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.engine.zero.config import EngineConfig, as_run, zero_config


@pytest.mark.parametrize(
    "precision, stage, reason",
    [
        ("bf16", 0, "no fp32 master weights"),
        ("fp64", 1, "in fp32"),
        ("fp64", 2, "in fp32"),
        ("fp64", 3, "in fp32"),
    ],
)
def test_pairs_that_cannot_be_exact_are_refused_with_the_reason(precision, stage, reason):
    with pytest.raises(ConfigError, match=reason):
        EngineConfig(precision=precision, zero_stage=stage)


@pytest.mark.parametrize(
    "precision, stage",
    [
        ("fp32", 0),
        ("fp32", 2),
        ("autocast", 0),
        ("bf16", 1),
        ("bf16", 2),
        ("fp64", 0),
        ("fp32", 3),
        ("bf16", 3),
    ],
)
def test_all_other_pairs_are_told_to_deepspeed_without_its_defaults(precision, stage):
    told = zero_config(EngineConfig(precision=precision, zero_stage=stage), world_size=2)
    assert told["managed_gradient_accumulation"] is False
    assert told["gradient_clipping"] == 0.0  # DeepSpeed's own default clips at 1.0
    assert told["communication_data_type"] == "fp32"
    assert "optimizer" not in told  # such a block compiles a CPU Adam
    assert told.get("bf16", {}).get("enabled", False) is (precision == "bf16")
    assert "torch_autocast" not in told  # it reduces Linear gradients in bf16


def test_an_offloaded_optimizer_is_ours_on_the_cpu_and_needs_zero():
    told = zero_config(EngineConfig(zero_stage=2, offload_optimizer="cpu"), world_size=1)
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert (
        told["zero_force_ds_cpu_optimizer"] is False
    )  # else DeepSpeed wants its own Adam, compiled when first used
    with pytest.raises(ConfigError, match="zero_stage 1, 2 or 3"):
        EngineConfig(zero_stage=0, offload_optimizer="cpu")


def test_negative_clipping_is_refused():
    with pytest.raises(ConfigError, match="below 0"):
        EngineConfig(gradient_clipping=-1.0)


@pytest.mark.parametrize(
    ("config", "ranks", "device", "stage"),
    [
        (EngineConfig(zero_stage=1, precision="fp32"), 1, "cpu", 0),
        (EngineConfig(zero_stage=2, precision="autocast"), 1, "cpu", 0),
        # what is cut, or has masters of its own, or lies on a GPU, keeps its stage
        (EngineConfig(zero_stage=1, precision="fp32"), 2, "cpu", 1),
        (EngineConfig(zero_stage=3, precision="fp32"), 1, "cpu", 3),
        (EngineConfig(zero_stage=1, precision="bf16"), 1, "cpu", 1),
        (EngineConfig(zero_stage=2, precision="fp32", offload_optimizer="cpu"), 1, "cpu", 2),
        (EngineConfig(zero_stage=1, precision="autocast"), 1, "cuda", 1),
    ],
)
def test_stages_that_cut_nothing_are_run_as_stage_0(config, ranks, device, stage):
    assert as_run(config, ranks=ranks, device=torch.device(device)).zero_stage == stage
