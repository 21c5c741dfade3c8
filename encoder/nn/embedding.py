"""Token ids to vectors: lookups, added, and a norm. With rotary positions the order comes in inside attention, not here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.nn.dropout import AddressedDropout
from encoder.nn.half import sums_are_rounded

# ends the name of the table of tokens in every model
TOKEN_TABLE = "tok_embeddings.weight"


class TokenEmbedding(nn.Module):
    """dropout(norm(token + position, if not rotary + segment, if there are segments)).

    vocab_size, width: of the table of tokens
    norm: of the sum; nn.Identity for none
    positions: rows of a learned table
    first_position: the row of a document's first token; RoBERTa's 2
    sinusoids: fixed positions with a learned scale instead of a table
    segments: rows of their table
    dropout: of what comes out; None for none
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        norm: nn.Module,
        positions: int = 0,
        first_position: int = 0,
        sinusoids: bool = False,
        segments: int = 0,
        dropout: AddressedDropout | None = None,
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width) if positions else None
        self.sinusoids = ScaledSinusoids(width=width) if sinusoids else None
        self.token_type_embeddings = nn.Embedding(segments, width) if segments else None
        self.norm = norm
        self.first_position = first_position
        self.dropout = dropout

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        segments_T: Tensor | None = None,
        dropout_key_T: Tensor | None = None,
        *,
        beside_TC: Tensor | None = None,
    ) -> Tensor:
        """[T, C] of [T] ids, positions inside the document, segments (None: every token is of segment 0) and keys.

        beside_TC: added before the norm, as another embedding's `rows` are
        """
        x_TC = self.rows(ids_T, positions_T, segments_T)
        if beside_TC is not None:
            x_TC = x_TC + beside_TC
        x_TC = self.norm(x_TC)
        if self.dropout is not None:
            x_TC = self.dropout.alone(x_TC, dropout_key_T)
        return x_TC

    def rows(self, ids_T: Tensor, positions_T: Tensor, segments_T: Tensor | None = None) -> Tensor:
        """[T, C]: what the tables say, added; without norm and dropout."""
        x_TC = lookup(self.tok_embeddings, ids_T)
        if self.position_embeddings is not None:
            at_T = positions_T
            if self.first_position:  # the row of a document's first token
                at_T = positions_T + self.first_position
            x_TC = x_TC + lookup(self.position_embeddings, at_T)
        if self.sinusoids is not None:
            x_TC = x_TC + self.sinusoids(positions_T).to(x_TC.dtype)
        if self.token_type_embeddings is not None:
            table = self.token_type_embeddings
            if segments_T is None:
                x_TC = x_TC + table.weight[0]
            else:
                x_TC = x_TC + lookup(table, segments_T)
        return x_TC


class ScaledSinusoids(nn.Module):
    """scale * [sin(p w_0), cos(p w_0), sin(p w_1), ...], w_f = 10000^(-2f/C) (Vaswani et al. 2017, 3.5), the scale learned."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, positions_T: Tensor) -> Tensor:
        """[T] -> [T, C]; the angles in fp32."""
        even_F = torch.arange(0, self.width, 2, device=positions_T.device, dtype=torch.float32)
        frequency_F = 1.0 / 10000.0 ** (even_F / self.width)
        angle_TF = positions_T.to(torch.float32)[:, None] * frequency_F
        # sine and cosine side by side; an odd width has no place for the last cosine
        waves_TC = torch.stack((angle_TF.sin(), angle_TF.cos()), dim=-1).flatten(1)
        return self.scale * waves_TC[:, : self.width].to(self.scale.dtype)


def lookup(table: nn.Embedding, ids_T: Tensor) -> Tensor:
    """table(ids_T), its gradient added up in fp32.

    By torch 2.11 on a CPU that of a half-precision table is 9 % off for a token seen 2,000 times.
    """
    weight = table.weight
    if sums_are_rounded(weight):
        return F.embedding(ids_T, weight.float()).to(weight.dtype)
    return table(ids_T)
