"""The feed-forward layer: gated (GeGLU, SwiGLU: Shazeer 2020) or plain (GELU by erf, or by tanh)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.nn.dropout import AddressedDropout

Mlp = Literal["geglu", "swiglu", "gelu", "gelu_tanh"]
# x Phi(x), exact by erf; or as BERT's code has it, by tanh
Gelu = Literal["gelu", "gelu_tanh"]

# what bends the first half; GELU is the exact one, by erf
_BEND: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "swiglu": F.silu,
}
_UNBEND = {"geglu": torch.ops.aten.gelu_backward, "swiglu": torch.ops.aten.silu_backward}


def is_gated(kind: Mlp) -> bool:
    """Whether Wi has two halves, of which one is the other's gate."""
    return kind in _BEND


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    """gelu: x Phi(x). gelu_tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016).

    They differ by 4.7e-4 at most, at |x| = 2.70.
    """
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """geglu, swiglu: Wo(bend(a) * g), where Wi's output is [a | g] and the second half stays linear.

    gelu, gelu_tanh: Wo(drop(gelu(Wi x))), where `inner_dropout` is given.
    """

    def __init__(
        self,
        *,
        kind: Mlp,
        width: int,
        intermediate: int,
        bias: bool,
        inner_dropout: AddressedDropout | None = None,
    ) -> None:
        super().__init__()
        assert kind in get_args(Mlp), f"no feed-forward {kind}"
        assert inner_dropout is None or not is_gated(kind), "inner dropout is for plain GELU"
        self.kind = kind
        self.Wi = nn.Linear(width, (1 + is_gated(kind)) * intermediate, bias=bias)
        self.Wo = nn.Linear(intermediate, width, bias=bias)
        self.inner_dropout = inner_dropout

    def forward(self, x_TC: Tensor, dropout_key_T: Tensor | None = None) -> Tensor:
        """[T, C] -> [T, C]."""
        inner = self.Wi(x_TC)
        if self.kind == "gelu" or self.kind == "gelu_tanh":
            inner = gelu(inner, self.kind)
            if self.inner_dropout is not None:
                inner = self.inner_dropout.alone(inner, dropout_key_T)
            return self.Wo(inner)

        # the compiler fuses this better than it can see through our own step
        if torch.compiler.is_compiling():
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

        # y = bend(a) g, so d_g = d bend(a) and d_a = bend'(a) d g; both are halves of d_both
        torch.mul(d_TF, bent_TF, out=d_gate)
        _UNBEND[ctx.kind](d_TF * gate_TF, a_TF, grad_input=d_a)
        return d_both, None
