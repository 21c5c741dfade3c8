"""From hidden states to logits: dense, GELU, norm, then the decoder; and of a text's first token, whether B follows A."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from encoder.nn.mlp import Gelu, gelu


class TokenDecoder(NamedTuple):
    """The last map from hidden states to logits, not yet computed: logits = hidden W^T + b, never whole in memory."""

    hidden_MC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None


class PredictionHead(nn.Module):
    """norm(gelu(dense(x)))."""

    def __init__(
        self,
        *,
        width: int,
        out_width: int,
        bias: bool,
        norm: nn.Module,
        activation: Gelu = "gelu",
    ) -> None:
        """width, out_width: of the stream, and of what is decoded
        bias: of the dense layer
        norm: of out_width features
        activation: between them
        """
        super().__init__()
        self.dense = nn.Linear(width, out_width, bias=bias)
        self.norm = norm
        self.activation = activation

    def forward(self, x_MC: Tensor) -> Tensor:
        """[M, C] -> [M, E], as wide as the embedding."""
        return self.norm(gelu(self.dense(x_MC), self.activation))


class Decoder(nn.Module):
    """What the decoder owns: a bias for every vocabulary entry, and a weight [V, C] unless that is the embedding (tied)."""

    def __init__(self, *, vocab_size: int, width: int, bias: bool, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None


class Pooler(nn.Module):
    """tanh(dense(x)) of a text's first token: what the sentence head and classifiers of BERT stand on."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x_MC: Tensor) -> Tensor:
        """[M, C] -> [M, C]."""
        return torch.tanh(self.dense(x_MC))
