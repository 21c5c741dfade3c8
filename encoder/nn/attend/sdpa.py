"""The judge: torch's scaled_dot_product_attention, one document at a time, on any device and in any precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.nn.attend.contract import AttentionRequest, document_bounds


class Sdpa:
    """Plain and sure; a loop over documents on the host, so slow where documents are many and short."""

    name = "sdpa"

    def why_not(self, request: AttentionRequest) -> str | None:
        """It runs everywhere."""
        return None

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> SdpaPlan:
        """Host-side bounds and one band mask of the longest document."""
        bounds = document_bounds(cu_seqlens_S1, tokens=tokens)
        place = torch.arange(
            max((end - start for start, end in bounds), default=0), device=cu_seqlens_S1.device
        )
        return SdpaPlan(
            lengths=[end - start for start, end in bounds],
            radius=window_radius_tokens,
            band_LL=(place[:, None] - place[None, :]).abs() <= window_radius_tokens,
        )


class SdpaPlan:
    """Documents of one micro-batch."""

    traceable = False

    def __init__(self, *, lengths: list[int], radius: int, band_LL: Tensor) -> None:
        self.lengths, self.radius, self.band_LL = lengths, radius, band_LL

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        if not self.lengths:
            return v_THD
        parts = []
        for qkv in zip(*(x.split(self.lengths) for x in (q_THD, k_THD, v_THD)), strict=True):
            length = len(qkv[0])
            # among radius + 1 tokens no two are farther apart than the radius
            mask = self.band_LL[:length, :length] if local and length > self.radius + 1 else None
            q_1HLD, k_1HLD, v_1HLD = (x_LHD.transpose(0, 1)[None] for x_LHD in qkv)
            out = F.scaled_dot_product_attention(q_1HLD, k_1HLD, v_1HLD, attn_mask=mask)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)
