"""Layers computed again in the backward: the same bits, and only their inputs kept until then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.objectives.mlm import mlm_loss
from tests.helpers.packed import packed

CONFIG = ModernBertConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    window_radius_tokens=6,
    initializer_range=0.3,
)
BERT = ModernBertConfig(
    **{
        **vars(CONFIG),
        **dict(norm_place="post", mlp="gelu", positions="learned", type_vocab_size=1),
    }
)
BATCH = packed([30, 50, 20], vocab=96)


def forward_and_backward(
    config: ModernBertConfig, *, again: bool, mixed: bool = False, compiled: bool = False
) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and the bytes that autograd keeps between forward and backward beside the parameters."""
    model = ModernBertForMaskedLM(config, seed=1)
    if compiled:
        model.compile_blocks_(backend="aot_eager")
    if again:
        model.recompute_blocks_()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed),
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        loss = mlm_loss(model, BATCH).total
    count = sum(x.untyped_storage().nbytes() for x in kept.values())
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], count


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["modernbert", "bert"])
def test_loss_and_gradients_are_the_same_to_the_last_bit_with_dropout_on(config, mixed):
    plain, again = (forward_and_backward(config, again=a, mixed=mixed) for a in (False, True))
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_of_a_layer_only_its_input_is_kept():
    """What two layers more cost."""
    fewer = ModernBertConfig(**{**vars(CONFIG), "num_hidden_layers": 3})
    layer_input = 100 * 32 * 4
    plain, again = (
        forward_and_backward(CONFIG, again=a)[2] - forward_and_backward(fewer, again=a)[2]
        for a in (False, True)
    )
    assert again == 2 * layer_input
    assert plain > 30 * layer_input  # seen: 34


def test_compiled_layers_are_computed_again_by_the_same_three_graphs():
    torch._dynamo.reset()
    counters.clear()
    plain = forward_and_backward(CONFIG, again=False, compiled=True)
    again = forward_and_backward(CONFIG, again=True, compiled=True)
    assert counters["stats"]["unique_graphs"] == 3
    assert torch.equal(plain[0], again[0]) and all(
        torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True)
    )
    torch._dynamo.reset()
