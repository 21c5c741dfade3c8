"""Which parameters decay: matrices do, vectors and biases do not."""

from __future__ import annotations

from typing import Any

import torch


def decay_groups(model: torch.nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups [decay, no decay] of a model's parameters; empty groups are left out, tied ones come once.

    Each says under `decays` which it is: a phase of a run may change the amount. No decay: at most one dimension, or a name that ends in .bias (the rule of ModernBERT's optimizer.py). The tied
    embedding is a matrix and decays.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in named if _decays(name, p)]
    rest = [p for name, p in named if not _decays(name, p)]
    groups = [{"params": decay, "weight_decay": weight_decay, "decays": True},
              {"params": rest, "weight_decay": 0.0, "decays": False}]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith(".bias")
