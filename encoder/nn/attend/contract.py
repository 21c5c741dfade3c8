"""What an attention backend is: a name, a reason why it cannot run here, and a plan made once per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a backend is asked about: where and on what it would run."""

    device: torch.device
    dtype: torch.dtype  # of q, k and v
    head_width: int
    training: bool  # gradients are needed


class Plan(Protocol):
    """Everything a micro-batch's attention needs that does not depend on the layer: indices, masks, groups."""

    # torch.compile sees through it, and other documents do not make it compile again
    traceable: bool

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """Attention inside documents, [T, H, D], scale 1/sqrt(D); local: only keys with |i - j| <= window radius."""


class Backend(Protocol):
    """One way to compute attention. All backends give the same numbers: tests/unit/nn/test_attend.py."""

    @property
    def name(self) -> str:
        """The word by which a run file asks for it."""

    def why_not(self, request: AttentionRequest) -> str | None:
        """Why this backend cannot run there (found, needed), or None if it can. Asked at every forward: cheap."""

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> Plan:
        """A plan for documents that end at cu_seqlens_S1[1:]; a repeated end is an empty document and is ignored."""


def document_bounds(cu_seqlens_S1: Tensor, *, tokens: int) -> list[tuple[int, int]]:
    """(start, end) of every document that has tokens, on the host."""
    ends = cu_seqlens_S1.tolist()
    assert ends[0] == 0 and ends[-1] == tokens, (
        f"cu_seqlens end at {ends[-1]} but there are {tokens} tokens"
    )
    return [(start, end) for start, end in zip(ends, ends[1:], strict=False) if end > start]
