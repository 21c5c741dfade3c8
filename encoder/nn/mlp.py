"""The gated feed-forward layer (GeGLU, Shazeer 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GeGLU(nn.Module):
    """Wo(gelu(a) * g), where Wi's output is [a | g]: exact erf GELU on the first half, the second half linear."""

    def __init__(self, *, width: int, intermediate: int) -> None:
        super().__init__()
        self.Wi = nn.Linear(width, 2 * intermediate, bias=False)
        self.Wo = nn.Linear(intermediate, width, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        return self.Wo(_GatedGelu.apply(self.Wi(x_TC)))


class _GatedGelu(torch.autograd.Function):
    """gelu(a) * g of [a | g]; the gradient is written straight into both halves, which saves a copy of [T, 2F]."""

    @staticmethod
    def forward(ctx: Any, both_T2F: Tensor) -> Tensor:
        a_TF, gate_TF = both_T2F.chunk(2, dim=-1)
        bent_TF = F.gelu(a_TF)
        ctx.save_for_backward(both_T2F, bent_TF)
        return bent_TF * gate_TF

    @staticmethod
    def backward(ctx: Any, d_TF: Tensor) -> Tensor:
        both_T2F, bent_TF = ctx.saved_tensors
        a_TF, gate_TF = both_T2F.chunk(2, dim=-1)
        d_both = torch.empty_like(both_T2F)
        d_a, d_gate = d_both.chunk(2, dim=-1)
        torch.mul(d_TF, bent_TF, out=d_gate)
        torch.ops.aten.gelu_backward(d_TF * gate_TF, a_TF, grad_input=d_a)
        return d_both
