"""What kernels share that take packed documents as they are (torch's varlen, flash-attn): what they need, and their plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.nn.attend.contract import AttentionRequest

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a CUDA kernel asks of its request."""

    at_least: tuple[int, int]  # compute capability
    below: tuple[int, int] | None = None  # first compute capability that it does not know
    dtypes: tuple[torch.dtype, ...] = HALVES
    head_widths: range = range(8, 257, 8)

    def unmet(self, request: AttentionRequest) -> str | None:
        """The first need that is not met (needed, found), or None."""
        if request.device.type != "cuda":
            return f"needs a CUDA device, this is {request.device.type}"
        found = torch.cuda.get_device_capability(request.device)
        if found < self.at_least or (self.below and found >= self.below):
            limit = f" and below {_dotted(self.below)}" if self.below else ""
            return (
                f"needs compute capability {_dotted(self.at_least)}{limit}, this device is"
                f" {_dotted(found)}"
            )
        if request.dtype not in self.dtypes:
            return f"needs {' or '.join(map(_word, self.dtypes))}, this is {_word(request.dtype)}"
        if request.head_width not in self.head_widths:
            widths = self.head_widths
            multiple = f"a multiple of {widths.step} " if widths.step > 1 else ""
            return (
                f"needs a head width of {multiple}from {widths[0]} to {widths[-1]}, this is"
                f" {request.head_width}"
            )
        return None


class PackedPlan:
    """A kernel and the documents it is given; attend(q, k, v, cu_seqlens, longest, window or None) -> out."""

    traceable = True

    def __init__(
        self, attend: Callable[..., Any], *, cu_seqlens_S1: Tensor, max_seqlen: int, radius: int
    ) -> None:
        self.attend, self.cu_seqlens_S1, self.radius = attend, cu_seqlens_S1, radius
        # The kernels only size their grid by the longest document. Powers of two: a compiled layer sees few of them.
        self.longest = 1 << (max_seqlen - 1).bit_length() if max_seqlen else 0

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        if not len(q_THD):
            return v_THD
        return self.attend(
            q_THD, k_THD, v_THD, self.cu_seqlens_S1, self.longest, self.radius if local else None
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
