"""What a kind of task is: how rows become examples, what is asked of a model, how its answers are measured and told.

    rows -> encode -> AskedSet.examples -> objective -> model -> logits [P, K] -> AskedSet.scores, AskedSet.lines

A new kind is one class with these names, a line in encoder/finetune/kinds/catalog.py, and where transformers has a class for it
a line in encoder/models/hf/task.py. Nothing else asks which kind it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from encoder.base.schema import Settings
from encoder.data.examples import Examples
from encoder.data.labelled import Rows
from encoder.finetune.encoding import TextEncoder
from encoder.finetune.metrics import Scores
from encoder.models.with_task import HeadKind
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import TextObjective

# numbers that are chosen on a dev set and hold for test sets, such as a threshold
Decided = Mapping[str, float]


class AskedSet(Protocol):
    """A data set that was encoded, with what its answers are held against."""

    @property
    def examples(self) -> Examples:
        """What a model is asked."""

    def notes(self) -> list[str]:
        """Sentences about rows that did not fit as they are."""

    def decided(self, logits_PK: np.ndarray) -> Decided:
        """What these answers choose for other sets."""

    def undecided(self) -> Decided:
        """What holds for test sets where no dev set chooses it; empty: nothing is to be chosen."""

    def scores(
        self, logits_PK: np.ndarray, metrics: Sequence[str], decided: Decided | None = None
    ) -> Scores:
        """Loss and metrics.

        logits_PK: fp64, of the places of all examples, in their order
        metrics: names of the kind's
        decided: on another set; None: on this one
        """

    def lines(
        self, logits_PK: np.ndarray, decided: Decided | None = None
    ) -> Iterator[dict[str, Any]]:
        """What is told of each row, in the order of the file; logits and decided as above."""


class TaskConfig(Settings, Protocol):
    """`task` of a task file."""

    KIND: ClassVar[str]
    HEAD: ClassVar[HeadKind]
    PROBLEM: ClassVar[str | None]  # transformers' problem_type, where its class has one
    COUNTED: ClassVar[str]  # what a step's loss is divided by the number of
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]]  # (module, package) that its metrics need

    @property
    def columns(self) -> tuple[str, ...]:
        """That are read of a file."""

    @property
    def kept_together(self) -> tuple[str, ...]:
        """Columns: rows that are equal in them are never on both sides of data.dev_share."""

    @property
    def pairs(self) -> bool:
        """Whether documents have two texts."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the outputs; None: not known before the rows are read, or there are none."""

    @property
    def pooling(self) -> Pooling:
        """What a text's vector is."""

    @property
    def metrics(self) -> tuple[str, ...] | None:
        """Which are reported; None: all of the kind."""

    @property
    def outputs(self) -> int:
        """Logits of a place."""

    @property
    def objective(self) -> TextObjective:
        """Whose loss is trained."""

    def metric_names(self) -> tuple[str, ...]:
        """Those that are reported; the first is the one by which runs are compared. Raises ConfigError for an unknown one."""

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """The names that the training rows give, in their order."""

    def check_length(self, max_tokens: int) -> None:
        """Examples of so many tokens have room for what is asked. Raises ConfigError."""

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> AskedSet:
        """The examples of a data set, in its order; labels are known. Raises DataError with file and row."""

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Raises DataError where a label never occurs."""

    def carried(self, decided: Decided) -> dict[str, Any]:
        """What config.json of an export has beside transformers' words: how answers are read off logits.

        decided: on a dev set of the run
        """


class NothingCarried:
    """Of kinds whose answers are read off logits as everybody reads them (TaskConfig)."""

    def carried(self, decided: Decided) -> dict[str, Any]:
        """Nothing."""
        return {}


class NothingDecided:
    """Of data sets whose answers need no decision beforehand (AskedSet)."""

    def decided(self, logits_PK: np.ndarray) -> Decided:
        """Nothing."""
        return {}

    def undecided(self) -> Decided:
        """Nothing."""
        return {}
