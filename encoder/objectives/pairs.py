"""Masked tokens and pairs of sentences: does B follow A (BERT's next sentence), or were they swapped (ALBERT's order)?

    [CLS] it rains . [SEP] we stay in . [SEP]        segments 0 0 0 0 0 1 1 1 1 1
    label 0: B follows A        1: mlm_nsp, B is of another document; mlm_sop, A and B changed places

The loader makes the pairs by the rule that these objectives ask for (encoder/data/pairs.py). The label is predicted at the
pair's [CLS]. The loss is the mean over masked tokens plus `pair_weight` times the mean over pairs (Devlin et al. 2018, 3.1;
Lan et al. 2019, 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.objective import LEAST_PAIR_TOKENS
from encoder.nn.loss import class_loss_sum
from encoder.objectives.contract import MaskedRow, ObjectiveFacts, PairRule, RowPairs, RowTargets
from encoder.objectives.mlm import MLM, MaskedLanguageModel, MlmConfig, TokenModel, mlm_loss


@dataclass(frozen=True, kw_only=True)
class _PairConfig(MlmConfig):
    """Masked tokens as in `mlm`, and pairs of sentences."""

    LABEL_1: ClassVar[Literal["random", "swapped"]]
    TERM: ClassVar[str]  # the loss term of the labels
    ASKED: ClassVar[str]  # what the labels tell, for people
    model_needs: ClassVar[Mapping[str, int]] = {"type_vocab_size": 2, "sentence_head": True}

    short_share: float = 0.1  # of the documents: shorter pairs, of a random length
    pair_weight: float = 1.0  # of the mean over pairs in the loss; masked tokens have 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.short_share <= 1:
            raise ConfigError(
                f"short_share {self.short_share} must lie between 0 and 1. BERT uses 0.1."
            )
        if not 0 <= self.pair_weight < math.inf:
            raise ConfigError(
                f"pair_weight {self.pair_weight} must be at least 0. BERT and ALBERT use 1."
            )

    @property
    def task_text(self) -> str:
        """What is learned, for people."""
        return f"{super().task_text} and {self.ASKED}"

    @property
    def pairs(self) -> PairRule:
        """How the loader makes pairs of documents."""
        return PairRule(label_1=self.LABEL_1, short_share=self.short_share)

    def expected_targets(
        self, *, documents: float, tokens: float, mask_share: float
    ) -> dict[str, float]:
        """Targets of each loss term in so many pairs of so many tokens together."""
        masked = super().expected_targets(documents=documents, tokens=tokens, mask_share=mask_share)
        return {**masked, self.TERM: documents}

    def build(self, facts: ObjectiveFacts) -> SentencePairs:
        """Raises ConfigError if a special id is outside the vocabulary."""
        return SentencePairs.of(self, facts)


@dataclass(frozen=True, kw_only=True)
class MlmNspConfig(_PairConfig):
    """Masked tokens as in `mlm`, and the next sentence: half of the B are of another document (BERT)."""

    LABEL_1 = "random"
    TERM = "nsp"
    ASKED = "the next sentence"


@dataclass(frozen=True, kw_only=True)
class MlmSopConfig(_PairConfig):
    """Masked tokens as in `mlm`, and the order of sentences: half of the pairs are swapped (ALBERT)."""

    LABEL_1 = "swapped"
    TERM = "sop"
    ASKED = "the order of sentences"


class PairModel(TokenModel, Protocol):
    """What the loss asks of a model."""

    def sentence_decoder(self, x_MC: Tensor) -> Tensor:
        """Logits [M, 2] of the labels, of the states at the pairs' first tokens."""


class SentencePairs(MaskedLanguageModel):
    """Masked tokens, and the label of each pair at its first token."""

    has_segments = True
    config: _PairConfig

    @property
    def terms(self) -> tuple[str, ...]:
        """`mlm`, and `nsp` or `sop`."""
        return (MLM, self.config.TERM)

    @property
    def pairs(self) -> PairRule:
        """How the loader makes pairs of documents."""
        return self.config.pairs

    def mask(
        self,
        ids: np.ndarray,
        generator: np.random.Generator,
        *,
        lengths: Sequence[int] = (),
        phase_tokens: int = 0,
        pairs: RowPairs | None = None,
    ) -> MaskedRow:
        """One row, masked as in `mlm`, with the labels of its pairs and its segments.

        ids: int64 [T], not changed
        generator: keyed by the row's address
        lengths: of the row's pairs
        phase_tokens: tokens of the phase before this row
        pairs: their labels, and how long the first part of each is
        """
        assert pairs is not None, "who has a rule for pairs gets them"
        row = super().mask(ids, generator, lengths=lengths, phase_tokens=phase_tokens)

        # the place of each token in its pair; behind [CLS] A [SEP] the segment is 1
        lengths_S = np.asarray(lengths, dtype=np.int64)
        starts_S = np.cumsum(lengths_S) - lengths_S
        place_T = np.arange(len(ids)) - np.repeat(starts_S, lengths_S)
        segments_T = (place_T >= np.repeat(pairs.first_tokens_S, lengths_S)).astype(np.int64)

        # a label stands at the pair's [CLS], the first token of each document
        labels = RowTargets(starts_S, pairs.label_S)
        return replace(row, targets={**row.targets, self.config.TERM: labels}, segments=segments_T)

    def capacity(self, term: str, tokens: int) -> int:
        """Of pairs as many as there may be: none is left out."""
        if term == self.config.TERM:
            return max(1, tokens // LEAST_PAIR_TOKENS)
        return super().capacity(term, tokens)

    # its settings need a model with a sentence head
    def loss(  # type: ignore[override]
        self, model: PairModel, batch: TokenBatch
    ) -> dict[str, LossTerm]:
        """Sums of -log p over the masked tokens and over the pairs, from one pass through the model."""
        x_TC = model.hidden_states(batch)
        targets = batch.targets[self.config.TERM]
        logits_M2 = model.sentence_decoder(x_TC.index_select(0, targets.index_M))
        pairs = class_loss_sum(logits_M2, targets.value_M)

        z_loss_weight = self.config.z_loss_weight
        return {
            MLM: mlm_loss(model, batch, x_TC=x_TC, z_loss_weight=z_loss_weight),
            self.config.TERM: pairs._replace(weight=self.config.pair_weight),
        }

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Every token of a document, and its label at the first."""
        first = torch.zeros(1, dtype=torch.int64)
        label = Targets(index_M=first, value_M=first, count=1)
        return {**super().all_targets(ids_T), self.config.TERM: label}
