"""encoder.nn.fp8 beside the products that it stands for, computed in fp64 from the same 8-bit numbers, and beside plain layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encoder.base.errors import ConfigError
from encoder.engine.zero.config import EngineConfig
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn import fp8
from encoder.nn.fp8 import BACKWARD, FORWARD, Fp8Linear, quantized, to_fp8_
from encoder.objectives.mlm import mlm_loss
from encoder.optim.groups import decay_groups
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from tests.helpers.packed import packed

CONFIG = ModernBertConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    window_radius_tokens=6,
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def made(*, width=48, out=32, bias=False, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=bias).to(device=device, dtype=dtype)
    return linear, Fp8Linear.of(linear, name="it")


def emulated(a, b, *, kinds):
    """a @ b of the 8-bit numbers, in fp64."""
    (a8, a_scale), (b8, b_scale) = (
        quantized(x, kind) for x, kind in zip((a, b), kinds, strict=True)
    )
    return (a8.double() * a_scale.double()) @ (b8.double() * b_scale.double())


def off(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [64, 37, 1])
@pytest.mark.parametrize("mixed", [False, True])
def test_all_three_products_are_those_of_the_8_bit_numbers(tokens, mixed, device):
    linear, ours = made(device=device, dtype=torch.float32 if mixed else torch.bfloat16)
    x = torch.randn(tokens, 48, device=device, dtype=linear.weight.dtype, requires_grad=True)
    d = 1e-3 * torch.randn(tokens, 32, device=device).bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.backward(d)
    assert (
        x.grad.dtype == x.dtype
        and linear.weight.grad.dtype == linear.weight.dtype
        and linear.weight.grad is ours.weight.grad
    )
    w = linear.weight.detach()
    # the output's rounding, and the weights'; Hopper adds 8-bit products with 13 bits of fraction, 2e-5 to 6e-5 by an emulation
    bf16, own = 2**-8, (1e-5 if device == "cpu" else 1e-3) if mixed else 2**-8
    assert off(y, emulated(x, w.t(), kinds=(FORWARD, FORWARD))) <= bf16
    assert off(x.grad, emulated(d, w, kinds=(BACKWARD, FORWARD))) <= own
    assert off(linear.weight.grad, emulated(d.t(), x, kinds=(BACKWARD, FORWARD))) <= own
    assert (
        1e-3 < off(y, F.linear(x.double(), w.double())) < 0.06
    )  # 3 bits of mantissa: it is no other product


def test_on_a_cpu_the_product_is_that_of_torchs_own():
    a, b = (quantized(torch.randn(32, 48), kind) for kind in (BACKWARD, FORWARD))
    for dtype, within in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        theirs = torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=dtype)
        assert off(fp8._product(a[0], b[0].t(), a[1], b[1], dtype), theirs.double()) <= within


def test_a_scale_maps_the_largest_to_the_largest_whatever_its_size():
    for size in (1e-12, 1.0, 1e12):
        x = torch.tensor([[-3.0, 1.0, 0.0]]) * size
        q, scale = quantized(x, FORWARD)
        assert q.float().abs().max() == 448 and torch.allclose(q.float() * scale, x, rtol=2**-4)
    q, _ = quantized(torch.zeros(2, 2), BACKWARD)
    assert (q.float() == 0).all()


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stays_so(wrong):
    linear, ours = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(torch.randn(32, 48)).backward(torch.full((32, 32), wrong).bfloat16())
    assert not torch.isfinite(linear.weight.grad).any()


def test_the_bias_is_added_and_moves():
    linear, ours = made(bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(torch.zeros(4, 48)).sum().backward()
        assert torch.equal(ours(torch.zeros(4, 48)), linear.bias.bfloat16().expand(4, -1))
    assert torch.equal(linear.bias.grad, torch.full((32,), 4.0))


def test_the_layers_alone_change_and_every_parameter_keeps_its_name_and_identity():
    model = ModernBertForMaskedLM(CONFIG, seed=1)
    before = dict(model.named_parameters())
    model.fp8_blocks_()
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    eight = [name for name, m in model.named_modules() if isinstance(m, Fp8Linear)]
    assert len(eight) == 4 * CONFIG.num_hidden_layers and all(
        name.startswith("model.layers.") for name in eight
    )


@pytest.mark.parametrize("asked", [[], [0, 3, 3, 31]], ids=["no token", "some"])
def test_a_scale_is_that_of_all_tokens_whichever_are_asked(asked):
    model = ModernBertForMaskedLM(CONFIG, seed=1)
    model.fp8_blocks_()
    batch, index_M = packed([30, 1, 5], vocab=96), torch.tensor(asked, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model.hidden_states(batch)
        assert torch.equal(model.hidden_states(batch, at_M=index_M), whole[index_M])


def losses(*, eight: bool, compiled: str | None = None, steps: int = 40) -> list[float]:
    """Of a tiny model that learns a batch."""
    model = ModernBertForMaskedLM(CONFIG, seed=1)
    if eight:
        model.fp8_blocks_()
    if compiled:
        model.compile_blocks_(backend=compiled)
    optimizer = StableAdamW(
        decay_groups(model, weight_decay=1e-5), StableAdamWConfig(), lr=3e-3, max_lr=3e-3
    )
    batch, found = packed([30, 1, 50, 12, 35], vocab=96), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mlm_loss(model, batch)
        (loss.total / batch.counts["mlm"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.sum.item() / batch.counts["mlm"])
    return found


def test_training_in_8_bits_follows_the_plain_curve():
    found, plain = losses(eight=True), losses(eight=False)
    assert plain[-1] < 0.5 * plain[0]
    assert found[0] == pytest.approx(plain[0], rel=5e-3) and found[0] != plain[0]
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) < 0.05
    assert losses(eight=True, steps=3) == found[:3]  # nothing is remembered from step to step


def test_compiled_layers_in_8_bits_are_the_same():
    assert losses(eight=True, compiled="aot_eager", steps=3) == pytest.approx(
        losses(eight=True, steps=3), rel=2e-3
    )


def test_what_cannot_be_in_8_bits_is_refused():
    odd = dataclasses.replace(CONFIG, intermediate_size=100)
    model = ModernBertForMaskedLM(odd)
    with pytest.raises(ConfigError, match=r"0.mlp.Wi is 200 x 64; needed: multiples of 16"):
        model.fp8_blocks_()
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())
    for settings in ({"precision": "fp32"}, {"precision": "bf16", "zero_stage": 3}):
        with pytest.raises(
            ConfigError, match="needed: precision autocast or bf16, and a stage below 3"
        ):
            EngineConfig(fp8="layers", **settings)
    to_fp8_(nn.Sequential(nn.Linear(16, 32)))
