"""What an objective must be (encoder.base.objective), its settings, and what it may know of tokenizer and phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from encoder.base.objective import (
    MaskedRow,
    Masker,
    Objective,
    PairRule,
    RowPairs,
    RowTargets,
    Stretch,
)
from encoder.base.schema import Settings
from encoder.base.tokenizer_json import Frame
from encoder.objectives.words import WordEdges

__all__ = [
    "MaskShare",
    "MaskedRow",
    "Masker",
    "ModelShape",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveFacts",
    "PairRule",
    "RowPairs",
    "RowTargets",
    "Specials",
    "Stretch",
    "frame_text",
]


class ObjectiveConfig(Settings, Protocol):
    """The settings of an objective: a frozen dataclass that checks itself when it is made (ConfigError)."""

    # settings that name stored models which the loss asks beside the trained one, such as a teacher
    STORED_MODELS: ClassVar[tuple[str, ...]]
    # least values of settings that the model must have, such as type_vocab_size: 2
    model_needs: ClassVar[Mapping[str, int]]
    # of the shards' documents; None: any
    frame: ClassVar[Frame | None]
    # what the first loss term asks, for people
    target_text: ClassVar[str]

    @property
    def mask_share(self) -> float:
        """Of the tokens that may be masked."""

    @property
    def task_text(self) -> str:
        """What is learned, for people: `masked tokens, 30% of the text`."""

    @property
    def pairs(self) -> PairRule | None:
        """How the loader makes pairs of sentences of documents; None: it does not."""

    @property
    def needs_word_edges(self) -> bool:
        """Whether build() must know where words begin."""

    @property
    def needs_unused_ids(self) -> bool:
        """Whether build() must know the ids that no text has."""

    @property
    def asks_every_document(self) -> bool:
        """Whether no document is without a masked token, so that every step has some."""

    def check_documents(self, *, longest_tokens: int) -> None:
        """Documents of at most so many tokens fit the settings. Raises ConfigError."""

    def held_out(self, *, mask_share: float) -> ObjectiveConfig:
        """The objective of the held-out loss: the same for all models. Its loss terms are those of training."""

    def without_effect(self, given: Callable[[str], bool]) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each; `given`: whether the run file has one."""

    def check_models(self, model: ModelShape, stored: Mapping[str, ModelShape]) -> None:
        """The trained model and those of STORED_MODELS, by setting, fit each other. Raises ConfigError."""

    def expected_targets(
        self, *, documents: float, tokens: float, mask_share: float
    ) -> dict[str, float]:
        """Targets of each loss term in so many documents, or pairs, of so many tokens together, for a plan."""

    def longest_stretch(self, *, longest_tokens: int, mask_share: float) -> Stretch:
        """What of a document of so many tokens attends to each other, for a plan's memory."""

    def train_flops(
        self,
        model: ModelShape,
        stored: Mapping[str, ModelShape],
        *,
        lengths: Sequence[int] | np.ndarray,
        targets: Mapping[str, float],
    ) -> float:
        """Model FLOP of documents forward and backward, and of the stored models that are at hand.

        model, stored: the trained model, and those of STORED_MODELS by setting
        lengths: of the documents, in tokens
        targets: of each loss term
        """

    def build(self, facts: ObjectiveFacts) -> Objective:
        """The objective of a phase. Raises ConfigError."""


class ModelShape(Protocol):
    """What an objective's settings ask of a model's."""

    @property
    def hidden_size(self) -> int:
        """Features of a state."""

    def train_flops(
        self, *, lengths: Sequence[int] | np.ndarray, targets: Mapping[str, float]
    ) -> float:
        """Model FLOP of documents forward and backward; targets by loss term."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveFacts:
    """What an objective may know of the shards and of the phase."""

    vocab_size: int  # the tokenizer's
    specials: Specials
    share: MaskShare | None = None  # the phase's masking rate; None: the settings'
    words: WordEdges | None = None  # where it needs_word_edges
    unused_ids: Sequence[int] = ()  # where it needs_unused_ids
    # those of STORED_MODELS by setting, for the loss alone: loader workers have none
    models: Mapping[str, Any] = field(default_factory=dict)


class Specials(Protocol):
    """The special ids of a tokenizer (a card's SpecialIds is one)."""

    @property
    def mask_id(self) -> int:
        """[MASK]."""

    @property
    def pad_id(self) -> int:
        """[PAD]."""

    @property
    def frame(self) -> Frame:
        """Where [CLS] stands."""

    @property
    def all_special(self) -> tuple[int, ...]:
        """All that no text has."""


def frame_text(where: str) -> str:
    """Why an objective that needs the frame `end` refuses documents that begin with [CLS]; `where` they are."""
    return (
        f"{where} has [CLS] before each text; this objective needs text <sep> <cls>, as XLNet reads"
        " it. Prepare the text with such a tokenizer, data-prep tokenizer train --kind unigram --names"
        " xlnet --files YOUR_FILES --out unigram.json, or use objective: {name: mlm}."
    )


@dataclass(frozen=True, kw_only=True)
class MaskShare:
    """The masking rate of a phase: `start`, or on a straight line to `end` when `over_tokens` were seen."""

    start: float
    end: float | None = None
    over_tokens: int = 1

    def at(self, phase_tokens: int) -> float:
        """The share in a row before which the phase had `phase_tokens` tokens."""
        if self.end is None:
            return self.start
        # linear in the phase's tokens, constant behind over_tokens
        return self.start + (self.end - self.start) * min(1.0, phase_tokens / self.over_tokens)

    @property
    def highest(self) -> float:
        return max(self.start, self.end or 0.0)

    @property
    def mean(self) -> float:
        return self.start if self.end is None else (self.start + self.end) / 2
