"""Normalisation of each token's features."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Norm = Literal["layernorm", "rmsnorm"]


def make_norm(kind: Norm, width: int, *, eps: float, bias: bool) -> nn.Module:
    """[T, C] -> [T, C]; the weight starts at 1, the bias, if any, at 0.

    layernorm: (x - mean) / sqrt(biased variance + eps) * weight + bias (Ba et al. 2016)
    rmsnorm:   x / sqrt(mean of squares + eps) * weight (Zhang and Sennrich 2019), which has no bias
    """
    if kind == "rmsnorm":
        assert not bias, "an RMSNorm has no bias"
        return nn.RMSNorm(width, eps=eps)
    assert kind in get_args(Norm), f"no norm {kind}"
    return nn.LayerNorm(width, eps=eps, bias=bias)
