"""torch's own kernel for packed documents: torch.nn.attention.varlen, windows included since torch 2.11."""

from __future__ import annotations

import importlib
import inspect
from functools import cache

from torch import Tensor

from encoder.nn.attend.contract import AttentionRequest
from encoder.nn.attend.packed import Needs, PackedPlan

ARGUMENTS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "window_size")


class Varlen:
    """FlashAttention-2's kernels as they ship with torch, one traceable operator."""

    name = "varlen"
    needs = Needs(at_least=(8, 0))

    def why_not(self, request: AttentionRequest) -> str | None:
        """It needs a CUDA device from Ampere on, and halves."""
        return self.needs.unmet(request) or _missing()

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> PackedPlan:
        """The documents as they are: nothing is read back from the device."""
        return PackedPlan(
            _attend, cu_seqlens_S1=cu_seqlens_S1, max_seqlen=max_seqlen, radius=window_radius_tokens
        )


def _attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens_S1: Tensor,
    longest: int,
    radius: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, -1) if radius is None else (radius, radius)
    out = varlen_attn(
        q_THD, k_THD, v_THD, cu_seqlens_S1, cu_seqlens_S1, longest, longest, window_size=window
    )
    assert isinstance(out, Tensor), "nothing but the output was asked for"
    return out


@cache
def _missing() -> str | None:
    """What this torch's varlen_attn does not take."""
    try:
        takes = inspect.signature(
            importlib.import_module("torch.nn.attention.varlen").varlen_attn
        ).parameters
    except (ImportError, AttributeError) as error:
        return f"this torch has no varlen_attn ({error})"
    missing = [name for name in ARGUMENTS if name not in takes]
    if not missing:
        return None
    return f"this torch's varlen_attn takes no {', '.join(missing)}"
