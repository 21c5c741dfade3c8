"""The gated feed-forward layer (GeGLU, Shazeer 2020)."""

from __future__ import annotations

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
        a_TF, gate_TF = self.Wi(x_TC).chunk(2, dim=-1)
        return self.Wo(F.gelu(a_TF) * gate_TF)
