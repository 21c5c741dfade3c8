"""Layers compiled one by one: the same numbers, and nothing compiled twice however the documents lie."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from encoder.models import encoder as shared
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn.attend import Choice
from encoder.objectives.mlm import mlm_loss
from tests.helpers.packed import OnDevice, packed

CONFIG = ModernBertConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    window_radius_tokens=6,
    initializer_range=0.3,
)
TOKENS = 256


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(seed: int):
    """A micro-batch of fixed size, as loaders with static shapes make it: other documents each time."""
    draw, lengths = random.Random(seed), []
    while left := TOKENS - sum(lengths):
        lengths.append(min(left, draw.randint(1, 60)))
    return packed(lengths, vocab=96, seed=seed, predict=64, spare_ends=80 - len(lengths))


@pytest.fixture(params=["tiles", "a kernel for packed documents"])
def attention(request, monkeypatch) -> str:
    """Compiled around it, and with it."""
    if request.param != "tiles":
        monkeypatch.setattr(
            shared,
            "choose_backend",
            lambda *_: Choice(backend=OnDevice(), reason="stands for a kernel"),
        )
    return request.param


def test_thirty_varied_batches_compile_three_graphs_and_never_again(attention):
    """Layer 0's way up (it has no norm), the other layers' way up, every layer's way down. With its attention: layer 0, and the
    other global and local layers."""
    model = ModernBertForMaskedLM(CONFIG)
    model.compile_blocks_(
        backend="aot_eager"
    )  # what is traced and guarded is the same for every backend
    mlm_loss(model, batch(0)).total.backward()
    assert counters["stats"]["unique_graphs"] == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 31):
            loss = mlm_loss(model, batch(seed)).total
            if seed % 10 == 0:
                loss.backward()
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            dict(
                norm_place="post",
                mlp="gelu",
                positions="learned",
                type_vocab_size=1,
                attention_bias=True,
                mlp_bias=True,
            ),
            marks=pytest.mark.matrix,
        ),
        pytest.param(dict(mlp="swiglu", norm="rmsnorm"), marks=pytest.mark.matrix),
    ],
    ids=["modernbert", "bert", "swiglu, rmsnorm"],
)
def test_compiled_layers_give_the_loss_and_gradients_of_plain_ones(attention, backend, settings):
    plain, compiled = (
        ModernBertForMaskedLM(ModernBertConfig(**{**vars(CONFIG), **settings}), seed=1)
        for _ in range(2)
    )
    compiled.compile_blocks_(backend=backend)
    for seed in (0, 1):
        expected, found = mlm_loss(plain, batch(seed)).total, mlm_loss(compiled, batch(seed)).total
        expected.backward()
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        # fp32, 4 layers: sums in another order; the naming of a wrong operation would show in the first digit
        assert (a.grad - b.grad).abs().max() <= 1e-4 * a.grad.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize(
    "fp8", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["", "8-bit layers"]
)
def test_autograd_adds_and_copies_nothing_of_a_layers_size_outside_of_what_is_compiled(
    monkeypatch, fp8
):
    """What a compiled layer hands on as views, or uses twice, autograd would add up in passes of its own over the memory."""
    monkeypatch.setattr(
        shared,
        "choose_backend",
        lambda *_: Choice(backend=OnDevice(), reason="stands for a kernel"),
    )
    model = ModernBertForMaskedLM(CONFIG)
    if fp8:
        model.fp8_blocks_()
    model.compile_blocks_(backend="aot_eager_decomp_partition")
    one = batch(0)
    mlm_loss(model, one).total.backward()
    loss = mlm_loss(model, one).total
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss.backward()
    events = profiler.events()
    assert sum(e.name == "CompiledFunctionBackward" for e in events) == CONFIG.num_hidden_layers
    outside = [
        (e.name, e.input_shapes[0])
        for e in events
        if e.name in ("aten::add", "aten::add_", "aten::copy_")
        and e.input_shapes[0][:1] == [TOKENS]
        and "CompiledFunctionBackward" not in ancestors(e)
    ]
    assert not outside


def ancestors(event):
    """The names of the calls that an event of the profiler is inside of."""
    while event := event.cpu_parent:
        yield event.name
