"""Rotary positions (Su et al. 2021), half-split: pair (j, j + D/2) of a head turns by position * theta^(-2j/D)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions_T: Tensor, *, theta: float, head_width: int) -> Tensor:
    """cos and sin of the angles, [2, T, 1, D/2]; made once per micro-batch and theta.

    Angles are fp32 whatever the model's precision: at position 8,191 a bf16 angle would be off by up to 32 radians.
    """
    pair = torch.arange(0, head_width, 2, device=positions_T.device, dtype=torch.float32)
    angle_TP = positions_T.to(torch.float32)[:, None] * theta ** (-pair / head_width)
    return torch.stack((angle_TP.cos(), angle_TP.sin()))[:, :, None, :]


def rotate(x_THD: Tensor, table: Tensor) -> Tensor:
    """Each head turned by its token's angles; the result has x's dtype."""
    cos, sin = table.to(x_THD.dtype)
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
