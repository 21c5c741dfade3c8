"""Tasks that ask one thing of each document: its class, several labels at once, or a number.

    classify      logits [M, K], a class each            -log softmax(logits)[class]
    labels        logits [M, K], K times yes or no       mean over labels of -log sigmoid(+-logit)
    regress       logits [M, K], K numbers each          mean over them of the squared difference

The losses are sums over documents, so the denominator of a step is its number of examples, on any ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch
from encoder.nn.loss import class_loss_sum

TaskKind = Literal["classify", "labels", "regress"]
TERM = "examples"


class AnsweringModel(Protocol):
    """What these tasks ask of a model."""

    def answers(self, batch: TokenBatch, first_M: Tensor) -> Tensor:
        """Logits [M, K] of the documents that begin at tokens first_M."""


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """The objective of such a task (encoder.base.objective.Objective, without the half that masks)."""

    kind: TaskKind
    outputs: int  # K

    terms = (TERM,)

    def loss(self, model: AnsweringModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """The sum over documents; one that only fills a rank up has no target, and adds zero."""
        targets = batch.targets[TERM]
        logits_MK = model.answers(batch, targets.index_M)
        if self.kind == "classify":
            return {TERM: class_loss_sum(logits_MK, targets.value_M)}
        return {TERM: self._sum_over_outputs(logits_MK, targets)}

    def _sum_over_outputs(self, logits_MK: Tensor, targets: Targets) -> LossTerm:
        exact = torch.promote_types(logits_MK.dtype, torch.float32)
        logits_MK, value_MK = logits_MK.to(exact), targets.value_M.to(exact)
        if not targets.count:
            # of a rank that only keeps the others company: zero, and every parameter in the graph
            value_MK = torch.zeros_like(logits_MK)
        losses_MK = (
            F.binary_cross_entropy_with_logits(logits_MK, value_MK, reduction="none")
            if self.kind == "labels"
            else (logits_MK - value_MK).square()
        )
        total = losses_MK.mean(dim=1).sum() * (1.0 if targets.count else 0.0)
        count = torch.tensor(targets.count, device=logits_MK.device)
        return LossTerm(total, total.detach(), count, torch.zeros_like(count))

    def answers(self, model: AnsweringModel, batch: TokenBatch) -> Tensor:
        """The logits [M, K] of a micro-batch's documents."""
        return model.answers(batch, batch.targets[TERM].index_M)

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """The first class, or zeros, of the one document that these ids are."""
        first = torch.zeros(1, dtype=torch.int64)
        value = first if self.kind == "classify" else torch.zeros(1, self.outputs)
        return {TERM: Targets(index_M=first, value_M=value, count=1)}
