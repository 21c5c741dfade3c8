"""From hidden states of packed documents to a vector each, and from that to the answers of a task.

[CLS] a  a [SEP] [CLS] b [SEP]         cls    the first token of each document
  x   x  x   x     x   x   x           mean   of all its tokens, special ones included, as transformers takes it
                                       last   the last token: [CLS] of XLNet
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.nn.dropout import AddressedDropout

Pooling = Literal["cls", "mean"]
Place = Literal["cls", "mean", "last"]
Activation = Literal["tanh", "relu", "gelu"]
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}


def pooled(
    states: Callable[..., Tensor], batch: TokenBatch, first_M: Tensor, place: Place
) -> Tensor:
    """A vector [M, C] of each document asked about.

    states: a model's hidden_states
    batch: whose documents are asked about
    first_M: int64, the first token of each
    place: cls, mean, or last
    """
    if place == "cls":
        return states(batch, at_M=first_M)

    # the document of a token: documents that begin at it or before, less one. Empty documents
    # repeat the total at the end, where no token is
    starts_S1 = batch.cu_seqlens_S1.to(torch.int64)
    tokens_T = torch.arange(len(batch.ids_T), device=starts_S1.device)
    document_T = torch.searchsorted(starts_S1, tokens_T, right=True) - 1
    if place == "last":
        ends_M = starts_S1[1:].index_select(0, document_T.index_select(0, first_M))
        return states(batch, at_M=ends_M - 1)

    x_TC = states(batch)
    exact = torch.promote_types(x_TC.dtype, torch.float32)
    sums_SC = x_TC.new_zeros(len(starts_S1) - 1, x_TC.shape[1], dtype=exact)
    sums_SC = sums_SC.index_add(0, document_T, x_TC.to(exact))
    document_M = document_T.index_select(0, first_M)
    lengths_M = starts_S1.diff().index_select(0, document_M)
    means_MC = sums_SC.index_select(0, document_M) / lengths_M[:, None]
    return means_MC.to(x_TC.dtype)


class DenseHead(nn.Module):
    """activation(dense(x)): what BERT, ALBERT, RoBERTa, DistilBERT and ELECTRA have before their classifiers."""

    def __init__(self, *, width: int, activation: Activation) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = activation

    def forward(self, x_MC: Tensor) -> Tensor:
        """[M, C] -> [M, C]."""
        return _ACTIVATIONS[self.activation](self.dense(x_MC))


class HeadDropout(AddressedDropout):
    """Dropout of vectors that stand for documents: keyed by their first tokens."""

    def forward(self, x_MC: Tensor, key_M: Tensor) -> Tensor:  # type: ignore[override]
        """[M, C] -> [M, C]; key_M int64."""
        return self.alone(x_MC, key_M)
