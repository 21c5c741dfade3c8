"""Tasks that ask at places of documents: a class, several labels at once, a number, or which one of several places it is.

    Classes    logits [M, K], a class each            -log softmax(logits)[class]
    YesNo      logits [M, K], K times yes or no       mean over K of -log sigmoid(+-logit)
    Numbers    logits [M, K], K numbers each          mean over K of the squared difference
    Picks      logits [M, K], K picks of a group      mean over K of -log softmax over the group's rows [the right one]

A place is the first token of a document (a class of a text), of a word (tags), any token of a window (spans), or the first
token of each of several documents (choices). The losses are sums, so the denominator of a step is its number of places, or of
groups of them, on any ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch
from encoder.nn.loss import class_loss_sum, pick_loss_sum

TERM = "examples"


class AnsweringModel(Protocol):
    """What these tasks ask of a model."""

    def answers(self, batch: TokenBatch, index_M: Tensor) -> Tensor:
        """Logits [M, K] at tokens index_M."""


class TextObjective(Protocol):
    """The objective of such a task (encoder.base.objective.TrainedObjective), and what a model answers."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The one loss term."""

    @property
    def scored_terms(self) -> tuple[str, ...]:
        """None: its answers are measured by the kind of task."""

    @property
    def documents(self) -> int:
        """That the fixed batch of a checkpoint has."""

    def loss(self, model: AnsweringModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """The sum over what is asked; a batch that only fills a rank up has no target, and adds zero."""

    def answers(self, model: AnsweringModel, batch: TokenBatch) -> Tensor:
        """The logits [M, K] at the places of a micro-batch."""

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Targets of a fixed batch, by whose loss a checkpoint is known to have come back as it went."""


class _AtPlaces:
    terms = (TERM,)
    scored_terms: ClassVar[tuple[str, ...]] = ()
    documents = 1

    def answers(self, model: AnsweringModel, batch: TokenBatch) -> Tensor:
        """The logits [M, K] at the places of a micro-batch."""
        return model.answers(batch, batch.targets[TERM].index_M)


@dataclass(frozen=True, kw_only=True)
class Classes(_AtPlaces):
    """A class at each place."""

    def loss(self, model: AnsweringModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """Cross entropy, summed over places."""
        return {TERM: class_loss_sum(self.answers(model, batch), batch.targets[TERM].value_M)}

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """The first class of the one document that these ids are."""
        first = torch.zeros(1, dtype=torch.int64)
        return {TERM: Targets(index_M=first, value_M=first, count=1)}


class _OverOutputs(_AtPlaces):
    outputs: int

    def loss(self, model: AnsweringModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """The mean over outputs, summed over places."""
        logits_MK, targets = self.answers(model, batch), batch.targets[TERM]
        if not targets.count:
            return {TERM: _nothing(logits_MK)}
        exact = torch.promote_types(logits_MK.dtype, torch.float32)
        losses_MK = self.losses(logits_MK.to(exact), targets.value_M.to(exact))
        total = losses_MK.mean(dim=1).sum()
        count = torch.tensor(targets.count, device=logits_MK.device)
        return {TERM: LossTerm(total, total.detach(), count, torch.zeros_like(count))}

    def losses(self, logits_MK: Tensor, value_MK: Tensor) -> Tensor:
        """Of each output [M, K]."""
        raise NotImplementedError

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Zeros of the one document that these ids are."""
        first = torch.zeros(1, dtype=torch.int64)
        return {TERM: Targets(index_M=first, value_M=torch.zeros(1, self.outputs), count=1)}


@dataclass(frozen=True, kw_only=True)
class YesNo(_OverOutputs):
    """Each output is yes or no."""

    outputs: int  # K

    def losses(self, logits_MK: Tensor, value_MK: Tensor) -> Tensor:
        """Binary cross entropy."""
        return F.binary_cross_entropy_with_logits(logits_MK, value_MK, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Numbers(_OverOutputs):
    """Each output is a number."""

    outputs: int  # K

    def losses(self, logits_MK: Tensor, value_MK: Tensor) -> Tensor:
        """Squared differences."""
        return (logits_MK - value_MK).square()


@dataclass(frozen=True, kw_only=True)
class Picks(_AtPlaces):
    """Each output picks one place of a group."""

    outputs: int  # K
    documents: int = 1  # of a group in the fixed batch: choices are a document each

    def loss(self, model: AnsweringModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """Cross entropy over the places of a group, its mean over picks, summed over groups."""
        logits_MK, targets = self.answers(model, batch), batch.targets[TERM]
        if targets.group_M is None:
            return {TERM: _nothing(logits_MK)}
        return {
            TERM: pick_loss_sum(logits_MK, targets.value_M, targets.group_M, groups=targets.count)
        }

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """The first of all tokens, or of the documents that these ids are cut into."""
        index_M = torch.arange(len(ids_T))
        if self.documents > 1:
            index_M = torch.arange(self.documents) * (len(ids_T) // self.documents)
        right_MK = torch.zeros(len(index_M), self.outputs, dtype=torch.int8)
        right_MK[0] = 1
        group_M = torch.zeros_like(index_M)
        return {TERM: Targets(index_M=index_M, value_M=right_MK, count=1, group_M=group_M)}


def _nothing(logits_MK: Tensor) -> LossTerm:
    """Of a rank that only keeps the others company: zero, and every parameter in the graph."""
    total = logits_MK.sum() * 0.0
    count = torch.zeros((), dtype=torch.int64, device=logits_MK.device)
    return LossTerm(total, total.detach(), count, count)
