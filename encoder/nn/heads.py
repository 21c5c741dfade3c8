"""From hidden states to what the decoder reads: dense, GELU, norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.nn.norm import layer_norm


class PredictionHead(nn.Module):
    """norm(gelu(dense(x))), no bias."""

    def __init__(self, *, width: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, bias=False)
        self.norm = layer_norm(width, eps=norm_eps)

    def forward(self, x_MC: Tensor) -> Tensor:
        """[M, C] -> [M, C]."""
        return self.norm(F.gelu(self.dense(x_MC)))


class DecoderBias(nn.Module):
    """What a tied decoder owns: a bias for every vocabulary entry. Its weight is the embedding, with one name only."""

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
