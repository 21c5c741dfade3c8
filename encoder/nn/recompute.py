"""A layer that keeps its input alone for the backward, which computes the rest again: less memory for a third more work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, autograd, nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module, x_TC: Tensor, **named: Any) -> Tensor:
    """`layer(x_TC, **named)`, to the last bit, its gradients, too: nothing in a layer draws random numbers (encoder.nn.dropout).

    Autocast is what it was. Not stopped early: the last hooks of a module are those by which ZeRO stage 3 gives weights back.
    """
    return checkpoint(
        _with_mark,
        layer,
        x_TC,
        named,
        use_reentrant=False,
        preserve_rng_state=False,
        early_stop=False,
    )


def _with_mark(layer: nn.Module, x_TC: Tensor, named: dict[str, Any]) -> Tensor:
    return _Mark.apply(layer(x_TC, **named))


class _Mark(autograd.Function):
    """Stands at a layer's end, where its backward begins, and asks for what was kept: so all of the layer is computed again
    before any part of it is in its backward. ZeRO stage 3 gathers a part's weights for its backward, and a forward of it at
    that moment would give them back."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor) -> Tensor:
        ctx.save_for_backward(x_TC)
        return x_TC.view_as(x_TC)

    @staticmethod
    def backward(ctx: Any, d_TC: Tensor) -> Tensor:
        # to ask is to compute: unpacking what was kept runs the layer's forward again
        ctx.saved_tensors  # noqa: B018
        return d_TC
