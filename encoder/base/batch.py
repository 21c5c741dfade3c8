"""What a micro-batch is: rows of packed documents laid end to end, with the question (which tokens to predict); and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

IGNORE = -100   # label of a predicted position that only fills the fixed capacity


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One forward. T tokens, S documents (pieces, and segments of padding), M predicted positions.

        ids      [CLS] a  a [MASK] [SEP] [CLS] b [SEP] pad pad
        position   0   1  2    3     4     0   1   2    0   1
        cu_seqlens 0                       5            8      10 (then 10 repeated up to the fixed length)
    """

    ids_T: torch.Tensor               # int64, after masking
    positions_T: torch.Tensor         # int32, restarts at 0 in every document
    cu_seqlens_S1: torch.Tensor       # int32, first 0, last T; the tail may repeat T (empty documents)
    max_seqlen: int                   # longest document, known on the host
    predict_index_M: torch.Tensor     # int64 into T
    predict_target_M: torch.Tensor    # int64 clean ids, IGNORE where the capacity is not used
    dropout_key_T: torch.Tensor       # int64, one key a token, a function of the row's address (encoder.nn.dropout)
    masked_tokens: int                # predicted positions that count
    tokens: int                       # tokens without padding

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """The same batch with its tensors on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
                 for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}
        return replace(self, **moved)


def packed_documents(documents: Sequence[torch.Tensor]) -> TokenBatch:
    """Documents (int64 ids) end to end without padding or dropout keys; nothing is asked: replace() puts a question."""
    lengths = torch.tensor([len(d) for d in documents])
    ids_T = torch.cat([*documents])
    nothing = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        ids_T=ids_T, positions_T=torch.cat([torch.arange(len(d), dtype=torch.int32) for d in documents]),
        cu_seqlens_S1=torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32), max_seqlen=int(lengths.max()),
        predict_index_M=nothing, predict_target_M=nothing, dropout_key_T=torch.zeros_like(ids_T), masked_tokens=0,
        tokens=len(ids_T))


class SummedLoss(NamedTuple):
    """What a model says to a micro-batch: sums over its predicted positions, scalars on the model's device."""

    total: torch.Tensor               # what is differentiated: cross entropy, and what is added to it (z-loss)
    cross_entropy: torch.Tensor       # nats, detached: what is reported
    count: torch.Tensor               # int64: positions in the sums (the batch's masked_tokens)
    correct: torch.Tensor             # int64: those whose target has the highest logit; counted without gradients only
