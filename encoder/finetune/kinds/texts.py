"""Kinds that ask one thing of each text, or of each pair of texts: its class, several labels at once, or a number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.data.examples import Examples
from encoder.data.labelled import DataError, Rows, label_name
from encoder.finetune import metrics as measures
from encoder.finetune.encoding import TextEncoder, examples_of
from encoder.finetune.kinds.columns import (
    MOST_LABELS,
    check_columns,
    check_labels,
    class_names,
    columns_of,
    groups_of,
    known_labels,
    number_of,
    refuse_missing,
    sorted_labels,
    written,
)
from encoder.finetune.kinds.contract import Decided, NothingCarried, NothingDecided
from encoder.finetune.kinds.marks import check_marks
from encoder.finetune.metrics import Metric, Scores
from encoder.models.with_task import HeadKind
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import Classes, Numbers, TextObjective, YesNo

MOST_FP32 = float(np.finfo(np.float32).max)


class TextKind(Protocol):
    """What a kind has of its own: how logits become predictions, losses and words."""

    METRICS: ClassVar[Mapping[str, Metric]]

    def predictions(self, logits_NK: np.ndarray) -> np.ndarray:
        """Classes [N], labels [N, K] of 0 and 1, or numbers [N, K]."""

    def mean_loss(self, logits_NK: np.ndarray, value_N: np.ndarray) -> float:
        """As the objective takes it, over all rows."""

    def said(self, logits_K: np.ndarray, guess: Any) -> dict[str, Any]:
        """What is told of a row."""

    def target(self, value: Any) -> Any:
        """A row's target in words."""


@dataclass(frozen=True, kw_only=True)
class TextSet(NothingDecided):
    """A data set of texts (encoder.finetune.kinds.contract.AskedSet)."""

    examples: Examples
    kind: TextKind
    group_N: np.ndarray | None = None  # int64, the question of each row, where rows are in groups

    def notes(self) -> list[str]:
        """How many were cut."""
        cut, count = self.examples.cut, len(self.examples)
        if not cut:
            return []
        return [
            f"{counted(cut, 'example')} of {self.examples.name} ({cut / count:.1%}) longer than"
            " data.max_tokens: cut"
        ]

    def scores(
        self, logits_PK: np.ndarray, metrics: Sequence[str], decided: Decided | None = None
    ) -> Scores:
        """Loss and metrics of all rows."""
        value_N = self.examples.value_P
        if not np.isfinite(logits_PK).all():
            return Scores.without_numbers(metrics)
        guesses = self.kind.predictions(logits_PK)
        outputs = logits_PK.shape[1]
        return Scores.of(
            loss=self.kind.mean_loss(logits_PK, value_N),
            metrics={name: self._metric(name, guesses, outputs) for name in metrics},
            constant=len(guesses) > 1 and bool((guesses == guesses[:1]).all()),
        )

    def _metric(self, name: str, guesses: np.ndarray, outputs: int) -> float:
        value_N = self.examples.value_P
        if name != measures.GROUP_EXACT_MATCH:
            return self.kind.METRICS[name](value_N, guesses, outputs)
        assert self.group_N is not None, "metric_names has it with groups alone"
        return measures.group_exact_match(value_N, guesses, self.group_N)

    def lines(
        self, logits_PK: np.ndarray, decided: Decided | None = None
    ) -> Iterator[dict[str, Any]]:
        """A line a row."""
        guesses = self.kind.predictions(logits_PK)
        for row, logits_K in enumerate(logits_PK):
            yield {
                "row": row,
                **self.kind.said(logits_K, guesses[row]),
                "logits": [float(x) for x in logits_K],
                "target": self.kind.target(self.examples.value_P[row]),
            }


class _OfTexts(NothingCarried):
    """What kinds of task about one text or two share; the settings themselves stand in each."""

    METRICS: ClassVar[Mapping[str, Metric]]
    texts: tuple[str, ...]
    label: str
    metrics: tuple[str, ...] | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts and label."""
        return (*columns_of(self.texts), self.label)

    @property
    def kept_together(self) -> tuple[str, ...]:
        """Rows of the same texts."""
        return columns_of(self.texts)

    @property
    def pairs(self) -> bool:
        """Two texts."""
        return len(self.texts) == 2

    def metric_names(self) -> tuple[str, ...]:
        """Those of METRICS that are reported."""
        return measures.chosen(self.METRICS, self.metrics)

    def check_length(self, max_tokens: int) -> None:
        """Any will do."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(_OfTexts):
    """One class of several for each row."""

    KIND: ClassVar[str] = "classify"
    HEAD: ClassVar[HeadKind] = "text"
    PROBLEM: ClassVar[str | None] = "single_label_classification"
    COUNTED: ClassVar[str] = "examples"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = measures.SCIKIT
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "accuracy": measures.accuracy,
        "f1": measures.f1,
        "macro_f1": measures.macro_f1,
        "matthews": measures.matthews,
    }

    # columns: one text, or two of a pair; "{word}: {sentence1}" makes one text of several columns
    texts: tuple[str, ...]
    label: str  # column of the class, by its name or its number
    # the classes' names in the order of their numbers; default: those of the training rows, sorted
    labels: tuple[str, ...] | None = None
    # columns in which all rows about one question are equal, as in MultiRC; idx.question: what cells of idx have under question
    groups: tuple[str, ...] | None = None
    # column of a text -> columns of a first character and of an end, or of a word's number from 0 and of the words: these
    # words of it stand between asterisks
    marks: dict[str, tuple[str, ...]] | None = None
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: accuracy, f1, macro_f1, matthews, and with groups group_exact_match
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_columns(self.texts, self.label)
        check_labels(self.labels, least=2)
        check_marks(self.marks or {}, columns_of(self.texts))

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts, label, and those of groups and marks."""
        groups = [name.partition(".")[0] for name in self.groups or ()]
        marks = [name for places in (self.marks or {}).values() for name in places]
        return (*columns_of(self.texts), self.label, *groups, *marks)

    @property
    def kept_together(self) -> tuple[str, ...]:
        """Rows of the same texts; with groups all about a first text."""
        return columns_of(self.texts[:1] if self.groups else self.texts)

    def metric_names(self) -> tuple[str, ...]:
        """That of groups needs some."""
        of_groups = (measures.GROUP_EXACT_MATCH,) if self.groups else ()
        return measures.chosen([*self.METRICS, *of_groups], self.metrics)

    @property
    def outputs(self) -> int:
        """One for each class."""
        return len(known_labels(self.labels))

    @property
    def objective(self) -> TextObjective:
        """Cross entropy."""
        return Classes()

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """Those that the data name, or all that occur, sorted; numbers by their size."""
        if names := class_names(rows, self.label):
            return names
        found = {label_name(value, rows, row) for row, value in enumerate(rows.columns[self.label])}
        if len(found) < 2:
            raise DataError(
                f"{rows.path}: {self.label} is {next(iter(found))!r} in every row; needed: at least"
                " two classes."
            )
        if len(found) > MOST_LABELS:
            raise DataError(f"{rows.path}: {self.label} has {len(found):,} different values.")
        return sorted_labels(found)

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> TextSet:
        """A class for each row: int64 [N]."""
        numbers = {name: number for number, name in enumerate(known_labels(self.labels))}
        value_N = np.array(
            [
                number_of(label_name(value, rows, row), numbers, rows, row, self.label)
                for row, value in enumerate(rows.columns[self.label])
            ],
            dtype=np.int64,
        )
        texts = [written(rows, text, self.marks) for text in self.texts]
        found = _encoded(self, texts, encoder, name=name, value_N=value_N)
        return dataclasses.replace(found, group_N=groups_of(rows, self.groups or ()))

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Every class is there."""
        labels = known_labels(self.labels)
        counts = np.bincount(examples.value_P, minlength=len(labels))
        refuse_missing(labels, counts, rows, self.label, word="class")

    def predictions(self, logits_NK: np.ndarray) -> np.ndarray:
        """Classes [N]."""
        return logits_NK.argmax(axis=1)

    def mean_loss(self, logits_NK: np.ndarray, value_N: np.ndarray) -> float:
        """Cross entropy."""
        return measures.cross_entropy(logits_NK, value_N)

    def said(self, logits_K: np.ndarray, guess: Any) -> dict[str, Any]:
        """The class and its probability."""
        shifted = np.exp(logits_K - logits_K.max())
        probability = float(shifted[guess] / shifted.sum())
        return {"label": known_labels(self.labels)[int(guess)], "probability": probability}

    def target(self, value: Any) -> str:
        """The class."""
        return known_labels(self.labels)[int(value)]


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(_OfTexts):
    """Any number of labels for each row, each yes or no."""

    KIND: ClassVar[str] = "labels"
    HEAD: ClassVar[HeadKind] = "text"
    PROBLEM: ClassVar[str | None] = "multi_label_classification"
    COUNTED: ClassVar[str] = "examples"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = measures.SCIKIT
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "micro_f1": measures.micro_f1,
        "macro_f1": measures.macro_f1,
        "exact_match": measures.accuracy,
    }

    # columns: one text, or two of a pair; "{word}: {sentence1}" makes one text of several columns
    texts: tuple[str, ...]
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
        return len(known_labels(self.labels))

    @property
    def objective(self) -> TextObjective:
        """Binary cross entropy."""
        return YesNo(outputs=self.outputs)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """Those that the data name, or all that occur, sorted; numbers by their size."""
        if names := class_names(rows, self.label):
            return names
        found = {name for row in range(len(rows)) for name in self._names(rows, row)}
        if not found:
            raise DataError(f"{rows.path}: no row has a label in {self.label}.")
        return sorted_labels(found)

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> TextSet:
        """float32 [N, K] of 0 and 1."""
        labels = known_labels(self.labels)
        numbers = {name: number for number, name in enumerate(labels)}
        value_NK = np.zeros((len(rows), len(labels)), dtype=np.float32)
        for row in range(len(rows)):
            for label in self._names(rows, row):
                value_NK[row, number_of(label, numbers, rows, row, self.label)] = 1.0
        texts = [written(rows, text) for text in self.texts]
        return _encoded(self, texts, encoder, name=name, value_N=value_NK)

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Every label is there."""
        counts = examples.value_P.sum(0)
        refuse_missing(known_labels(self.labels), counts, rows, self.label, word="label")

    def predictions(self, logits_NK: np.ndarray) -> np.ndarray:
        """[N, K]: given from probability 1/2 on."""
        return (logits_NK > 0).astype(np.int64)

    def mean_loss(self, logits_NK: np.ndarray, value_N: np.ndarray) -> float:
        """Binary cross entropy."""
        return measures.yes_no_loss(logits_NK, value_N)

    def said(self, logits_K: np.ndarray, guess: Any) -> dict[str, Any]:
        """The labels that are given."""
        return {"labels": self.target(guess)}

    def target(self, value: Any) -> list[str]:
        """The labels that are 1."""
        return [name for name, is_it in zip(known_labels(self.labels), value, strict=True) if is_it]

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
class RegressConfig(_OfTexts):
    """A number for each row."""

    KIND: ClassVar[str] = "regress"
    HEAD: ClassVar[HeadKind] = "text"
    PROBLEM: ClassVar[str | None] = "regression"
    COUNTED: ClassVar[str] = "examples"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = measures.SCIKIT
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "pearson": measures.pearson,
        "spearman": measures.spearman,
        "mean_squared_error": measures.squared_error,
    }
    labels: ClassVar[None] = None
    outputs: ClassVar[int] = 1

    # columns: one text, or two of a pair; "{word}: {sentence1}" makes one text of several columns
    texts: tuple[str, ...]
    label: str  # column of the number
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: pearson, spearman, mean_squared_error
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_columns(self.texts, self.label)

    @property
    def objective(self) -> TextObjective:
        """Squared error."""
        return Numbers(outputs=self.outputs)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """A number has no names."""
        return None

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> TextSet:
        """float32 [N, 1]."""
        values = [
            [_finite(value, rows, row, self.label)]
            for row, value in enumerate(rows.columns[self.label])
        ]
        value_N1 = np.array(values, dtype=np.float32)
        texts = [written(rows, text) for text in self.texts]
        return _encoded(self, texts, encoder, name=name, value_N=value_N1)

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """The numbers differ."""
        values = examples.value_P
        if len(values) > 1 and values.min() == values.max():
            raise DataError(
                f"{rows.path}: {self.label} is {float(values[0, 0]):g} in every row; needed: numbers"
                " that differ."
            )

    def predictions(self, logits_NK: np.ndarray) -> np.ndarray:
        """The numbers as they are."""
        return logits_NK

    def mean_loss(self, logits_NK: np.ndarray, value_N: np.ndarray) -> float:
        """Squared error."""
        return measures.squared_error(value_N, logits_NK, 1)

    def said(self, logits_K: np.ndarray, guess: Any) -> dict[str, Any]:
        """The number."""
        return {"value": float(logits_K[0])}

    def target(self, value: Any) -> float:
        """The number."""
        return float(value[0])


def _encoded(
    kind: TextKind,
    texts: Sequence[Iterable[str]],
    encoder: TextEncoder,
    *,
    name: str,
    value_N: np.ndarray,
) -> TextSet:
    """The examples of all rows.

    kind: of the data set
    texts: the first of each row, and of a pair the second; the longer one is cut first
    encoder: of the model
    name: of the data set
    value_N: the targets
    """
    pairs: list[Any] = list(zip(*texts, strict=True))
    given = [pair[0] if len(pair) == 1 else pair for pair in pairs]
    encoded = encoder.encoded(given, cut="longest_first")
    return TextSet(examples=examples_of(encoded, encoder, name=name, value_P=value_N), kind=kind)


def _finite(value: Any, rows: Rows, row: int, column: str) -> float:
    """The number of a cell, which fp32 can hold."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        # of a whole number
        number = math.inf
    if not abs(number) <= MOST_FP32:
        raise DataError(
            f"{rows.place(row)}: {column} is {str(value)[:40]!r}; needed: a finite number, at most"
            f" {MOST_FP32:.4g} in size."
        )
    return number
