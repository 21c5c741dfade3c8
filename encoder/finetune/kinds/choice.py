"""One of several choices is right: RACE, HellaSwag, COPA.

    article    "John ran home."        question "Who ran?"        options [John, Jane]        answer A
    document   [CLS] John ran home. [SEP] Who ran? John [SEP]
    document   [CLS] John ran home. [SEP] Who ran? Jane [SEP]

A choice is a document, a row an example. Its documents lie in one micro-batch, and the softmax goes over them; rows may have
different numbers of choices. What stands before the choices gives way to them where both are too long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.data.examples import Examples, Places
from encoder.data.labelled import DataError, Rows, check_unicode, label_name
from encoder.finetune import metrics as measures
from encoder.finetune.encoding import TextEncoder, examples_of
from encoder.finetune.kinds.columns import (
    check_differ,
    check_room,
    columns_of,
    is_whole_number,
    written,
)
from encoder.finetune.kinds.contract import Decided, NothingCarried, NothingDecided
from encoder.finetune.metrics import Scores
from encoder.models.with_task import HeadKind
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import Picks, TextObjective


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig(NothingCarried):
    """Which of a row's choices is right."""

    KIND: ClassVar[str] = "choice"
    HEAD: ClassVar[HeadKind] = "choice"
    PROBLEM: ClassVar[str | None] = None
    COUNTED: ClassVar[str] = "examples"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = ()
    pairs: ClassVar[bool] = True
    labels: ClassVar[None] = None
    outputs: ClassVar[int] = 1

    # columns of what stands before the choices: a text, and perhaps a question that each choice follows; as of classify
    # a text may be of several columns, "{premise} {question}"
    texts: tuple[str, ...]
    choices: tuple[str, ...]  # a column of lists, or a column for each choice
    label: str  # column of the right one: its number from 0, or its letter from A
    max_choice_tokens: int = 128  # of question and choice; longer ones are cut at their beginning
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: accuracy
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.texts) <= 2:
            raise ConfigError(
                f"texts has {len(self.texts)} columns; needed: a text, or a text and a question."
            )
        if not self.choices:
            raise ConfigError("choices names no column; needed: one of lists, or one for each.")
        check_differ([*self.texts, *self.choices, self.label])
        if self.max_choice_tokens < 1:
            raise ConfigError(f"max_choice_tokens {self.max_choice_tokens} must be at least 1.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts, choices and the right one."""
        return (*columns_of(self.texts), *self.choices, self.label)

    @property
    def kept_together(self) -> tuple[str, ...]:
        """All questions about a text."""
        return columns_of(self.texts[:1])

    @property
    def objective(self) -> TextObjective:
        """Cross entropy over the choices of a row."""
        return Picks(outputs=1, documents=2)

    def metric_names(self) -> tuple[str, ...]:
        """There is one."""
        return measures.chosen(("accuracy",), self.metrics)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """Choices have no names that hold for all rows."""
        return None

    def check_length(self, max_tokens: int) -> None:
        """Room for a choice and a token of the text."""
        check_room(max_tokens, max_choice_tokens=self.max_choice_tokens)

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> ChoiceSet:
        """A document for each choice of each row."""
        texts = list(written(rows, self.texts[0]))
        questions = [""] * len(rows)
        if len(self.texts) == 2:
            questions = list(written(rows, self.texts[1]))
        choices = [self._choices(rows, row) for row in range(len(rows))]
        right = [self._right(rows, row, choices[row]) for row in range(len(rows))]

        seconds = [
            f"{question} {choice}".lstrip()
            for question, some in zip(questions, choices, strict=True)
            for choice in some
        ]
        counts = np.array([len(some) for some in choices])
        firsts = [text for text, count in zip(texts, counts, strict=True) for _ in range(count)]
        cut = encoder.shortened(seconds, most_tokens=self.max_choice_tokens, keep="last")
        pairs = list(zip(firsts, cut, strict=True))
        starts = np.concatenate([[0], np.cumsum(counts)])
        right_P1 = np.zeros((len(pairs), 1), dtype=np.int8)
        right_P1[starts[:-1] + right] = 1
        documents = examples_of(
            encoder.encoded(pairs, cut="only_first"), encoder, name=name, value_P=right_P1
        )
        return ChoiceSet(
            examples=by_row(documents, starts, grouped=True),
            choices=choices,
            cut_choices=sum(a != b for a, b in zip(seconds, cut, strict=True)),
        )

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Any choice may be right."""

    def _choices(self, rows: Rows, row: int) -> list[str]:
        cells = [rows.columns[name][row] for name in self.choices]
        if len(self.choices) == 1:
            (cells,) = cells
        if not isinstance(cells, list) or len(cells) < 2:
            found = f"has {counted(len(cells), 'choice')}"
            if not isinstance(cells, list):
                found = f"is {str(cells)[:40]!r}"
            raise DataError(
                f"{rows.place(row)}: {self.choices[0]} {found}; needed: a list of at least two."
            )
        for choice in cells:
            if not isinstance(choice, str) or not choice.strip():
                raise DataError(
                    f"{rows.place(row)}: a choice is {str(choice)[:40]!r}; needed: a text."
                )
            check_unicode(choice, rows, row)
        return cells

    def _right(self, rows: Rows, row: int, choices: Sequence[str]) -> int:
        """The number of the right one: 2 and C are the third."""
        name = label_name(rows.columns[self.label][row], rows, row)
        number = -1
        if is_whole_number(name):
            number = int(name)
        elif len(name) == 1 and "A" <= name <= "Z":
            number = ord(name) - ord("A")
        if not 0 <= number < len(choices):
            last = len(choices) - 1
            # there are no more letters
            letter = chr(ord("A") + min(last, 25))
            raise DataError(
                f"{rows.place(row)}: {self.label} is {name[:40]!r}; needed: 0 to {last}, or A to"
                f" {letter}, as there are {len(choices)} choices."
            )
        return number


def by_row(documents: Examples, starts_N1: np.ndarray, *, grouped: bool) -> Examples:
    """Documents, an example each, as choices of rows.

    documents: of all rows, in their order
    starts_N1: the first document of each row
    grouped: one choice of a row is picked; else each is asked by itself
    """
    token_starts = documents.starts_N1[starts_N1]
    lengths = np.diff(starts_N1)
    token_P = documents.starts_N1[:-1] - np.repeat(token_starts[:-1], lengths)
    places = Places(
        starts_N1=starts_N1, token_P=token_P.astype(np.int32), grouped=grouped, documents=True
    )
    return dataclasses.replace(documents, starts_N1=token_starts, places=places)


@dataclass(frozen=True, kw_only=True)
class ChoiceSet(NothingDecided):
    """A data set of choices (encoder.finetune.kinds.contract.AskedSet)."""

    examples: Examples
    choices: list[list[str]]  # of each row
    cut_choices: int

    def notes(self) -> list[str]:
        """How many were cut."""
        name, lines = self.examples.name, []
        if self.examples.cut:
            lines.append(
                f"{counted(self.examples.cut, 'document')} of {name} longer than data.max_tokens:"
                " the text before the choice is cut"
            )
        if self.cut_choices:
            lines.append(
                f"{counted(self.cut_choices, 'choice')} of {name} longer than"
                " task.max_choice_tokens: cut at the beginning"
            )
        return lines

    def scores(
        self, logits_PK: np.ndarray, metrics: Sequence[str], decided: Decided | None = None
    ) -> Scores:
        """The loss over rows, and the share that is right."""
        if not np.isfinite(logits_PK).all():
            return Scores.without_numbers(metrics)
        pairs = [*self._guesses(logits_PK)]
        found: Mapping[str, float] = {
            "accuracy": float(np.mean([guess == right for guess, right in pairs]))
        }
        return Scores.of(
            loss=measures.pick_loss(logits_PK, self.examples.value_P, self._starts_N1[:-1]),
            metrics={name: found[name] for name in metrics},
            constant=len(pairs) > 1 and len({guess for guess, _ in pairs}) == 1,
        )

    def lines(
        self, logits_PK: np.ndarray, decided: Decided | None = None
    ) -> Iterator[dict[str, Any]]:
        """A line a row: the chosen one and its text, with the scores of all."""
        for row, (guess, right) in enumerate(self._guesses(logits_PK)):
            begin, end = self._starts_N1[row : row + 2]
            yield {
                "row": row,
                "choice": guess,
                "text": self.choices[row][guess],
                "logits": [float(x) for x in logits_PK[begin:end, 0]],
                "target": right,
            }

    @property
    def _starts_N1(self) -> np.ndarray:
        assert self.examples.places is not None
        return self.examples.places.starts_N1

    def _guesses(self, logits_PK: np.ndarray) -> Iterator[tuple[int, int]]:
        """(chosen, right) of each row."""
        for begin, end in zip(self._starts_N1, self._starts_N1[1:], strict=False):
            right_P1 = self.examples.value_P[begin:end]
            yield int(logits_PK[begin:end, 0].argmax()), int(right_P1[:, 0].argmax())
