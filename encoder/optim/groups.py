"""Which parameters a rule treats alike: matrices decay, vectors and biases do not, the layers' matrices may be Muon's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch

from encoder.base.model import TorchModule


class Factors(NamedTuple):
    """What a parameter has of a step that others do not."""

    rate: float = 1.0  # times the learning rate
    gradient: float = 1.0  # times the clipped gradient, before the update sees it


def decay_groups(
    model: TorchModule,
    *,
    weight_decay: float,
    hidden_matrices: Mapping[str, int] | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of a model's parameters; empty groups are left out, tied parameters come once.

    No decay: at most one dimension, or a name that ends in .bias (the rule of ModernBERT's optimizer.py). The tied
    embedding is a matrix and decays. A group says whether it `decays` (a phase may change the amount), how many
    `matrices` each of its parameters is, and by what `rate` and `gradient` its rate and gradients are multiplied.

    model: whose parameters
    weight_decay: of those that decay
    hidden_matrices: name -> how many matrices a parameter is; 0 for all others
    factors: name -> of its rate and gradient; 1 for all others
    """
    hidden = hidden_matrices or {}
    given = factors or {}
    # keyed by (factors, decays, matrices), in an order that does not depend on that of the parameters
    kinds = [(True, n) for n in sorted({*hidden.values(), 0})] + [(False, 0)]
    groups: dict[tuple[Factors, bool, int], list[torch.Tensor]] = {
        (factor, *kind): [] for factor in sorted({*given.values(), Factors()}) for kind in kinds
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[given.get(name, Factors()), _decays(name, p), hidden.get(name, 0)].append(p)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
            "matrices": matrices,
            **factor._asdict(),
        }
        for (factor, decays, matrices), params in groups.items()
        if params
    ]


def _decays(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith(".bias")


def parameters_of(groups: Iterable[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The parameters of all groups of an optimizer, in their order."""
    return list(chain.from_iterable(group["params"] for group in groups))
