"""What an objective is: how a row of clean tokens is masked (numpy, in loader workers), and the loss that a model then has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch

PAIR_FRAME_TOKENS = 3  # [CLS] A [SEP] B [SEP]
LEAST_PAIR_TOKENS = PAIR_FRAME_TOKENS + 2


class RowTargets(NamedTuple):
    """Targets of one loss term in a row. M of them, ascending."""

    # int64 [M] into the row; instead of a tuple's own method of this name
    index: np.ndarray  # type: ignore[assignment]
    value: np.ndarray  # int64 [M]


class Stretch(NamedTuple):
    """Tokens of a document that attend to each other, and what they see beside themselves."""

    tokens: int
    memory_tokens: int = 0  # before them, whose keys they see
    query_rows: float = 0.0  # rows beside theirs, which are no keys


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """How the documents of an objective become pairs of sentences: [CLS] A [SEP] B [SEP]."""

    # half of the pairs: B of another document (BERT), or A and B change places (ALBERT)
    label_1: Literal["random", "swapped"]
    short_share: float = 0.1  # of the documents: shorter pairs, of a random length


class RowPairs(NamedTuple):
    """The pairs of a row, each a document of it. S of them."""

    label_S: np.ndarray  # int64 [S]: 0, B follows A; 1, it does not
    first_tokens_S: np.ndarray  # int64 [S], tokens of [CLS] A [SEP]


@dataclass(frozen=True, kw_only=True)
class MaskedRow:
    """One row as the model sees it, and what is to be predicted. T tokens of the row without padding.

    clean           [CLS]  the   cat   sat  [SEP]
    ids             [CLS]  the [MASK]  sat  [SEP]
    targets["mlm"]  index 2, value cat
    """

    ids: np.ndarray  # int64 [T], after masking
    # by the name of a loss term: each of the objective's, also where it is empty
    targets: Mapping[str, RowTargets]
    segments: np.ndarray | None = None  # int64 [T]; None: all of segment 0


class Masker(Protocol):
    """The data half of an objective. It is sent to worker processes, so it must survive pickling."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, in the order in which ledger and reports have them."""

    @property
    def has_segments(self) -> bool:
        """Whether its rows have segments."""

    @property
    def pairs(self) -> PairRule | None:
        """How its rows' documents are pairs of sentences; None: they are documents."""

    def mask(
        self,
        ids: np.ndarray,
        generator: np.random.Generator,
        *,
        lengths: Sequence[int],
        phase_tokens: int,
    ) -> MaskedRow:
        """The masked row of clean ids; the same arguments give the same row.

        ids: int64 [T], documents end to end, not changed
        generator: keyed by the row's address
        lengths: of the row's documents, in their order
        phase_tokens: tokens of the phase before this row, by which schedules go

        An objective that asks for pairs gets `pairs`, too: a RowPairs.
        """

    def capacity(self, term: str, tokens: int) -> int:
        """Targets of a term to make room for in a row of `tokens` tokens; a row has more once in 10^9."""


class TrainedObjective(Protocol):
    """The half of an objective that an engine needs: the loss."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, in the order in which ledger and reports have them."""

    @property
    def scored_terms(self) -> tuple[str, ...]:
        """Those of yes or no, whose held-out answers are told apart by their scores, too; mostly none."""

    def loss(self, model: Any, batch: TokenBatch) -> dict[str, LossTerm]:
        """The loss terms of a micro-batch, one for each of `terms` in their order.

        Every trained parameter must be connected to them, also where a term has no target: gradients are then zeros, not None.
        """

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Targets at every place of a document that can have one: the loss that tells whether weights came back as they went."""


class Objective(Masker, TrainedObjective, Protocol):
    """Both halves. One object serves one phase."""
