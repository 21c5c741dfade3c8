"""Token ids to vectors: lookups, added, and a norm. With rotary positions the order comes in inside attention, not here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """norm(token + position, if learned + segment, if there are segments)."""

    def __init__(self, *, vocab_size: int, width: int, norm: nn.Module, positions: int = 0, segments: int = 0) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width) if positions else None
        self.token_type_embeddings = nn.Embedding(segments, width) if segments else None
        self.norm = norm

    def forward(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """[T] ids and places inside the document -> [T, C]. Every token is of segment 0: a batch knows no other yet."""
        x_TC = lookup(self.tok_embeddings, ids_T)
        if self.position_embeddings is not None:
            x_TC = x_TC + lookup(self.position_embeddings, positions_T)
        if self.token_type_embeddings is not None:
            x_TC = x_TC + self.token_type_embeddings.weight[0]
        return self.norm(x_TC)


def lookup(table: nn.Embedding, ids_T: Tensor) -> Tensor:
    """table(ids_T), its gradient added up in fp32.

    On a CPU torch 2.11 adds the gradients of a half-precision table in its own dtype: 9 % off for a token seen 2,000 times. Its
    CUDA kernel adds in fp32.
    """
    weight = table.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return table(ids_T)
    return F.embedding(ids_T, weight.float()).to(weight.dtype)
