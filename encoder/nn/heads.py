"""From hidden states to logits: dense, GELU, norm; then the decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenDecoder(NamedTuple):
    """The last map from hidden states to logits, not yet computed: logits = hidden W^T + b, never whole in memory."""

    hidden_MC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None


class PredictionHead(nn.Module):
    """norm(gelu(dense(x)))."""

    def __init__(self, *, width: int, bias: bool, norm: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, bias=bias)
        self.norm = norm

    def forward(self, x_MC: Tensor) -> Tensor:
        """[M, C] -> [M, C]."""
        return self.norm(F.gelu(self.dense(x_MC)))


class Decoder(nn.Module):
    """What the decoder owns: a bias for every vocabulary entry, and a weight [V, C] unless that is the embedding (tied)."""

    def __init__(self, *, vocab_size: int, width: int, bias: bool, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
