"""A micro-batch: rows of packed documents laid end to end, with the targets to predict; and the loss terms that answer it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

IGNORE = -100  # target of a position that only fills the fixed capacity
SCORE_BINS = 1024  # of logits, by which answers yes and no are told apart


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What one loss term predicts: a value at each of M positions.

    masked tokens   index 2, 7    value cat, sat       (ids before masking)
    sentence pair   index 0       value 1              (0 or 1 at the document's [CLS])
    one of several  index 0, 9    value 0, 1, group 0, 0    (the second is right)
    """

    index_M: torch.Tensor  # int64 into T
    value_M: torch.Tensor  # int64; IGNORE where the fixed capacity is not used
    # positions that count, or groups of them, known on the host before the first forward
    count: int
    # int64, ascending from 0: positions of which one is to be picked; None: each is asked by itself
    group_M: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One forward. T tokens, S documents (pieces, and segments of padding), M target positions of a loss term.

    ids      [CLS] a  a [MASK] [SEP] [CLS] b [SEP] pad pad
    position   0   1  2    3     4     0   1   2    0   1
    cu_seqlens 0                       5            8      10 (then 10 repeated up to the fixed length)
    """

    ids_T: torch.Tensor  # int64, after masking
    positions_T: torch.Tensor  # int32, restarts at 0 in every document
    # int32, first 0, last T; the tail may repeat T (empty documents)
    cu_seqlens_S1: torch.Tensor
    max_seqlen: int  # longest document, known on the host
    targets: Mapping[str, Targets]  # by the name of a loss term
    # int64, one random key per token, a function of the row's address: what dropout, sampling
    # and permutations are drawn from
    token_key_T: torch.Tensor
    tokens: int  # tokens without padding
    # int64, segment of each token; None: all of segment 0
    segments_T: torch.Tensor | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Targets of each loss term."""
        return {name: t.count for name, t in self.targets.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those of targets as `targets.NAME.index_M`."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}

        for name, t in self.targets.items():
            found[f"targets.{name}.index_M"] = t.index_M
            found[f"targets.{name}.value_M"] = t.value_M
            if t.group_M is not None:
                found[f"targets.{name}.group_M"] = t.group_M
        return found

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> TokenBatch:
        """The same batch with other tensors, named as tensors() names them."""
        targets = {
            name: replace(
                t,
                index_M=tensors[f"targets.{name}.index_M"],
                value_M=tensors[f"targets.{name}.value_M"],
                group_M=tensors.get(f"targets.{name}.group_M"),
            )
            for name, t in self.targets.items()
        }

        own: dict[str, Any] = {
            name: tensor for name, tensor in tensors.items() if not name.startswith("targets.")
        }
        return replace(self, targets=targets, **own)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """The same batch with its tensors on another device."""
        return self.with_tensors(
            {name: x.to(device, non_blocking=non_blocking) for name, x in self.tensors().items()}
        )


def counts_of(batches: Sequence[TokenBatch]) -> dict[str, int]:
    """Targets of each loss term in several micro-batches, at least one."""
    counts = Counter(batches[0].counts)
    for batch in batches[1:]:
        counts.update(batch.counts)
    return dict(counts)


def packed_documents(
    documents: Sequence[torch.Tensor], targets: Mapping[str, Targets] | None = None
) -> TokenBatch:
    """Documents (int64 ids) end to end, without padding, token keys or segments; without targets, unless they are given."""
    lengths = torch.tensor([len(d) for d in documents])
    ids_T = torch.cat([*documents])
    return TokenBatch(
        ids_T=ids_T,
        positions_T=torch.cat([torch.arange(len(d), dtype=torch.int32) for d in documents]),
        cu_seqlens_S1=torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32),
        max_seqlen=int(lengths.max()),
        targets=targets or {},
        token_key_T=torch.zeros_like(ids_T),
        tokens=len(ids_T),
    )


def nothing_to_predict(terms: Sequence[str]) -> TokenBatch:
    """One document of two tokens without targets: a forward of a rank whose batches are done while others go on."""
    # index 0, id 0: any would do, since IGNORE keeps the position out of the loss
    one = torch.zeros(1, dtype=torch.int64)
    nothing = Targets(index_M=one, value_M=one + IGNORE, count=0)
    return packed_documents([one.repeat(2)], dict.fromkeys(terms, nothing))


class LossTerm(NamedTuple):
    """One term of a micro-batch's loss: sums over its targets, scalars on the model's device.

    The loss of a step is, over all its micro-batches and ranks, the sum over terms of weight x total / count.
    """

    # what is differentiated: `sum`, and what is added to it in training (z-loss)
    total: torch.Tensor
    sum: torch.Tensor  # nats, detached: what is reported
    # int64: targets in the sums (the batch's count); instead of a tuple's own method of this name
    count: torch.Tensor  # type: ignore[assignment]
    # int64: targets that have the highest logit; counted without gradients only
    correct: torch.Tensor
    weight: float = 1.0  # of this term's mean in the loss
    # of a term of yes or no, without gradients: int64 [2, bins], targets no and yes by their logits, ascending
    scores: torch.Tensor | None = None


class TermSum(NamedTuple):
    """One term over all ranks: the sum of its losses in nats, its targets, and those that had the highest logit."""

    sum: float
    count: int  # type: ignore[assignment]  # as in LossTerm
    correct: int
    # int64 [2, bins] of a term of yes or no, as in LossTerm
    scores: torch.Tensor | None = None
