"""Token ids to vectors: a lookup and a norm; positions come in by rotation inside attention, not here."""

from __future__ import annotations

from torch import Tensor, nn

from encoder.nn.norm import layer_norm


class TokenEmbedding(nn.Module):
    """ids_T -> x_TC, normalised."""

    def __init__(self, *, vocab_size: int, width: int, norm_eps: float) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, width)
        self.norm = layer_norm(width, eps=norm_eps)

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] -> [T, C]."""
        return self.norm(self.tok_embeddings(ids_T))
