"""What a task file asks of each row: a class, several labels, or a number; and how a cell of its label column becomes a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from encoder.base.errors import ConfigError, nearest
from encoder.base.schema import Settings
from encoder.data.labelled import DataError, Rows, label_name
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import TaskKind

MOST_LABELS = 100_000


class TaskConfig(Settings, Protocol):
    """`task` of a task file."""

    KIND: ClassVar[TaskKind]
    PROBLEM: ClassVar[str]

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns of the one or two texts."""

    @property
    def label(self) -> str:
        """Column of the target."""

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
        """Logits of a text."""

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """The names that the training rows give, in their order."""

    def targets(self, rows: Rows) -> np.ndarray:
        """[N] classes, or float32 [N, K]. Raises DataError."""

    def check_training(self, values: np.ndarray, rows: Rows) -> None:
        """Raises DataError where a label never occurs."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """One class of several for each row."""

    KIND: ClassVar[TaskKind] = "classify"
    PROBLEM: ClassVar[str] = "single_label_classification"

    texts: tuple[str, ...]  # columns: one text, or two of a pair
    label: str  # column of the class, by its name or its number
    # the classes' names in the order of their numbers; default: those of the training rows, sorted
    labels: tuple[str, ...] | None = None
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: accuracy, f1, macro_f1, matthews
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_columns(self.texts, self.label)
        check_labels(self.labels, least=2)

    @property
    def outputs(self) -> int:
        """One for each class."""
        assert self.labels, "labels are known once the training rows were read"
        return len(self.labels)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """All that occur, sorted; numbers by their size."""
        found = {label_name(value, rows, row) for row, value in enumerate(rows.columns[self.label])}
        if len(found) < 2:
            raise DataError(
                f"{rows.path}: {self.label} is {next(iter(found))!r} in every row; needed: at least"
                " two classes."
            )
        if len(found) > MOST_LABELS:
            raise DataError(f"{rows.path}: {self.label} has {len(found):,} different values.")
        whole = all(name.isdecimal() for name in found)
        return tuple(sorted(found, key=lambda name: (int(name) if whole else 0, name)))

    def targets(self, rows: Rows) -> np.ndarray:
        """int64 [N]."""
        assert self.labels, "labels are known once the training rows were read"
        numbers = {name: number for number, name in enumerate(self.labels)}
        return np.array(
            [
                _number_of(label_name(value, rows, row), numbers, rows, row, self.label)
                for row, value in enumerate(rows.columns[self.label])
            ],
            dtype=np.int64,
        )

    def check_training(self, values: np.ndarray, rows: Rows) -> None:
        """Every class is there."""
        assert self.labels
        counts = np.bincount(values, minlength=len(self.labels))
        never = [name for name, count in zip(self.labels, counts, strict=True) if not count]
        if never:
            raise DataError(
                f"{rows.path}: no row has the class {never[0]!r} of task.labels. Take it out, or add"
                " rows of it."
            )


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Any number of labels for each row, each yes or no."""

    KIND: ClassVar[TaskKind] = "labels"
    PROBLEM: ClassVar[str] = "multi_label_classification"

    texts: tuple[str, ...]  # columns: one text, or two of a pair
    label: str  # column of the labels: a list of names, or names with `separator` between them
    # their names; default: those of the training rows, sorted
    labels: tuple[str, ...] | None = None
    separator: str = ","  # of a cell that is one text, as in CSV
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: micro_f1, macro_f1, exact_match
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_columns(self.texts, self.label)
        check_labels(self.labels, least=1)
        if not self.separator:
            raise ConfigError("separator is empty; needed: what stands between two labels.")

    @property
    def outputs(self) -> int:
        """One for each label."""
        assert self.labels, "labels are known once the training rows were read"
        return len(self.labels)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """All that occur, sorted."""
        found = {name for row in range(len(rows)) for name in self._names(rows, row)}
        if not found:
            raise DataError(f"{rows.path}: no row has a label in {self.label}.")
        return tuple(sorted(found))

    def targets(self, rows: Rows) -> np.ndarray:
        """float32 [N, K] of 0 and 1."""
        assert self.labels, "labels are known once the training rows were read"
        numbers = {name: number for number, name in enumerate(self.labels)}
        values = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        for row in range(len(rows)):
            for name in self._names(rows, row):
                values[row, _number_of(name, numbers, rows, row, self.label)] = 1.0
        return values

    def check_training(self, values: np.ndarray, rows: Rows) -> None:
        """Every label is there."""
        assert self.labels
        never = [name for name, count in zip(self.labels, values.sum(0), strict=True) if not count]
        if never:
            raise DataError(
                f"{rows.path}: no row has the label {never[0]!r} of task.labels. Take it out, or add"
                " rows of it."
            )

    def _names(self, rows: Rows, row: int) -> list[str]:
        value = rows.columns[self.label][row]
        if isinstance(value, str):
            return [part.strip() for part in value.split(self.separator) if part.strip()]
        if isinstance(value, list):
            return [label_name(part, rows, row) for part in value]
        raise DataError(
            f"{rows.place(row)}: {self.label} is {str(value)[:40]!r}; needed: a list of labels."
        )


@dataclass(frozen=True, kw_only=True)
class RegressConfig:
    """A number for each row."""

    KIND: ClassVar[TaskKind] = "regress"
    PROBLEM: ClassVar[str] = "regression"
    labels: ClassVar[None] = None

    texts: tuple[str, ...]  # columns: one text, or two of a pair
    label: str  # column of the number
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: pearson, spearman, mean_squared_error
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_columns(self.texts, self.label)

    @property
    def outputs(self) -> int:
        """The number itself."""
        return 1

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """A number has no names."""
        return None

    def targets(self, rows: Rows) -> np.ndarray:
        """float32 [N, 1]."""
        values = [
            [_finite(value, rows, row, self.label)]
            for row, value in enumerate(rows.columns[self.label])
        ]
        return np.array(values, dtype=np.float32)

    def check_training(self, values: np.ndarray, rows: Rows) -> None:
        """The numbers differ."""
        if len(values) > 1 and values.min() == values.max():
            raise DataError(
                f"{rows.path}: {self.label} is {float(values[0, 0]):g} in every row; needed: numbers"
                " that differ."
            )


TASKS: dict[str, type[TaskConfig]] = {
    "classify": ClassifyConfig,
    "labels": LabelsConfig,
    "regress": RegressConfig,
}


def check_columns(texts: Sequence[str], label: str) -> None:
    """One text or two, each of a column of its own. Raises ConfigError."""
    if not 1 <= len(texts) <= 2:
        raise ConfigError(f"texts has {len(texts)} columns; needed: one, or two of a pair.")
    columns = [*texts, label]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"texts and label name the column {twice!r} twice; needed: columns that differ."
        )


def check_labels(labels: Sequence[str] | None, *, least: int) -> None:
    """Names that differ. Raises ConfigError."""
    if labels is None:
        return
    if len(labels) < least:
        raise ConfigError(f"labels has {len(labels)} names; needed: at least {least}.")
    twice = next((name for name in labels if list(labels).count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"labels has {twice!r} twice; each may stand once.")


def _number_of(name: str, numbers: dict[str, int], rows: Rows, row: int, column: str) -> int:
    if name in numbers:
        return numbers[name]
    # the number of a class, as GLUE's tables have it; where names are numbers themselves, a number is a name
    named_by_numbers = any(other.isdecimal() for other in numbers)
    if name.isdecimal() and not named_by_numbers and int(name) < len(numbers):
        return int(name)
    raise DataError(
        f"{rows.place(row)}: {column} is {name[:40]!r}, which is none of task.labels."
        f" {nearest(name, [*numbers])}"
    )


def _finite(value: Any, rows: Rows, row: int, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{rows.place(row)}: {column} is {str(value)[:40]!r}; needed: a finite number."
        )
    return number
