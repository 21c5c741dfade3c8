"""Decay by layer: of rates by the formula of the run's header, of gradients as XLNet's code has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from encoder.finetune.rates import layer_factors
from encoder.optim.adamw import AdamW, AdamWConfig
from encoder.optim.groups import Factors, decay_groups
from tests.reference.xlnet_gradients import xlnet_steps

LAYERS = 3


class Small(nn.Module):
    """A body of three layers by our names, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"tok_embeddings": nn.Embedding(3, 2)}),
                "layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS)),
                "final_norm": nn.LayerNorm(2),
            }
        )
        self.classifier = nn.Linear(2, 2)
        self.double()


def test_a_rate_falls_to_the_embeddings_and_the_head_has_the_peak():
    factors = layer_factors(Small(), layers=LAYERS, decay=0.5, gradient_decay=1.0)
    rates = {name.rpartition(".")[0]: factor.rate for name, factor in factors.items()}
    assert rates == {
        "model.embeddings.tok_embeddings": 0.125,
        "model.layers.0": 0.25,
        "model.layers.1": 0.5,
    }
    assert {factor.gradient for factor in factors.values()} == {1.0}
    assert layer_factors(Small(), layers=LAYERS, decay=1.0, gradient_decay=1.0) == {}


def test_gradients_by_layer_are_those_of_xlnets_code():
    model = Small()
    factors = layer_factors(model, layers=LAYERS, decay=1.0, gradient_decay=0.75)
    assert factors["model.layers.0.weight"] == Factors(gradient=0.75**2)
    config = AdamWConfig(betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, bias_correction=False)
    optimizer = AdamW(decay_groups(model, weight_decay=0.0, factors=factors), config, lr=1e-2)
    before = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(2)
    # from far above eps to far below it: the two rules part where gradients are small
    steps = []
    for size in (1.0, 1e-4, 1e-6, 1e-3):
        drawn = {
            name: size * torch.randn(p.shape, generator=draw, dtype=torch.float64)
            for name, p in model.named_parameters()
        }
        steps.append({name: g.flatten().tolist() for name, g in drawn.items()})
        for name, p in model.named_parameters():
            p.grad = drawn[name].clone()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad.div_(max(1.0, float(norm) / 0.5))
        optimizer.step()
    after = xlnet_steps(
        before,
        steps,
        layers=LAYERS,
        layer_decay=0.75,
        clip=0.5,
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-6,
    )
    for name, p in model.named_parameters():
        assert p.detach().flatten().tolist() == pytest.approx(after[name], rel=1e-12), name


@pytest.mark.parametrize(
    ("gradient", "above", "changed"), [(1e-3, 11, 0.98), (1e-5, 11, 0.33), (1e-3, 23, 0.57)]
)
def test_under_adam_a_factor_on_gradients_is_none_on_steps(gradient, above, changed):
    """c (g + eps) / (c g + eps) for c = 0.75^layers above, as the fact sheet of the rule has it."""
    moved = []
    for factor in (1.0, 0.75**above):
        weight = nn.Linear(1, 1, bias=False).double()
        factors = {"weight": Factors(gradient=factor)}
        config = AdamWConfig(eps=1e-6, weight_decay=0.0)
        optimizer = AdamW(decay_groups(weight, weight_decay=0.0, factors=factors), config, lr=1.0)
        before = weight.weight.item()
        weight.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        moved.append(before - weight.weight.item())
    assert moved[1] / moved[0] == pytest.approx(changed, abs=0.006)
