"""The feed-forward layer: gated (GeGLU, SwiGLU: Shazeer 2020) or plain (GELU)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mlp = Literal["geglu", "swiglu", "gelu"]
_BEND = {"geglu": F.gelu, "swiglu": F.silu, "gelu": F.gelu}  # GELU is the exact one, by erf
_UNBEND = {"geglu": torch.ops.aten.gelu_backward, "swiglu": torch.ops.aten.silu_backward}


class FeedForward(nn.Module):
    """geglu, swiglu: Wo(bend(a) * g), where Wi's output is [a | g] and the second half stays linear. gelu: Wo(gelu(Wi x))."""

    def __init__(self, *, kind: Mlp, width: int, intermediate: int, bias: bool) -> None:
        super().__init__()
        assert kind in get_args(Mlp), f"no feed-forward {kind}"
        self.kind = kind
        self.Wi = nn.Linear(width, intermediate if kind == "gelu" else 2 * intermediate, bias=bias)
        self.Wo = nn.Linear(intermediate, width, bias=bias)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        inner = self.Wi(x_TC)
        if self.kind == "gelu":
            return self.Wo(F.gelu(inner))
        if (
            torch.compiler.is_compiling()
        ):  # the compiler fuses this better than it can see through our own step
            a_TF, gate_TF = inner.chunk(2, dim=-1)
            return self.Wo(_BEND[self.kind](a_TF) * gate_TF)
        return self.Wo(_Gated.apply(inner, self.kind))


class _Gated(torch.autograd.Function):
    """bend(a) * g of [a | g]; the gradient is written straight into both halves, which saves a copy of [T, 2F]."""

    @staticmethod
    def forward(ctx: Any, both_T2F: Tensor, kind: str) -> Tensor:
        a_TF, gate_TF = both_T2F.chunk(2, dim=-1)
        bent_TF = _BEND[kind](a_TF)
        ctx.save_for_backward(both_T2F, bent_TF)
        ctx.kind = kind
        return bent_TF * gate_TF

    @staticmethod
    def backward(ctx: Any, d_TF: Tensor) -> tuple[Tensor, None]:
        both_T2F, bent_TF = ctx.saved_tensors
        a_TF, gate_TF = both_T2F.chunk(2, dim=-1)
        d_both = torch.empty_like(both_T2F)
        d_a, d_gate = d_both.chunk(2, dim=-1)
        torch.mul(d_TF, bent_TF, out=d_gate)
        _UNBEND[ctx.kind](d_TF * gate_TF, a_TF, grad_input=d_a)
        return d_both, None
