"""Layer normalisation with a weight and no bias."""

from __future__ import annotations

from torch import nn


def layer_norm(width: int, *, eps: float) -> nn.LayerNorm:
    """(x - mean) / sqrt(biased variance + eps) * weight (Ba et al. 2016); the weight starts at 1."""
    return nn.LayerNorm(width, eps=eps, bias=False)
