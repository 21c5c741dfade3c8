"""Normalisation of each token's features."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from encoder.nn.half import sums_are_rounded

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
    return LayerNorm(width, eps=eps, bias=bias)


class LayerNorm(nn.LayerNorm):
    """torch's, with half-precision input computed in fp32 on a CPU.

    torch 2.11's CPU kernel adds up the gradient of the weight in bf16: 1.2 % off after 256 tokens, 2.5 % after 1,024, 9.4 % after
    16,384. RMSNorm adds in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], in the dtype of x."""
        if not sums_are_rounded(x):
            return super().forward(x)
        weight = self.weight.float()
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = bias.float()
        out = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return out.to(x.dtype)
