"""A gap in a sentence about a text is filled by one of several candidates: ReCoRD.

    passage    "Anna wrote to Carl."     query "@placeholder got a letter."     entities [Anna, Carl]     answers [Carl]
    document   [CLS] Anna wrote to Carl. [SEP] Anna got a letter. [SEP]         no
    document   [CLS] Anna wrote to Carl. [SEP] Carl got a letter. [SEP]         yes

A candidate is a document, a row an example. Each candidate is asked by itself whether it is an answer, several may be, and the
likeliest one is the prediction, as SuperGLUE's own baseline does it (Wang et al. 2019). F1 and exact match of the predicted text
are the best over the right answers, as ReCoRD's script counts them (Zhang et al. 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.data.examples import Examples
from encoder.data.labelled import DataError, Rows, check_unicode, texts_of
from encoder.finetune import metrics as measures
from encoder.finetune.encoding import TextEncoder, examples_of
from encoder.finetune.kinds import squad
from encoder.finetune.kinds.choice import by_row
from encoder.finetune.kinds.columns import check_differ, check_room
from encoder.finetune.kinds.contract import Decided, NothingCarried, NothingDecided
from encoder.finetune.metrics import Scores
from encoder.models.with_task import HeadKind
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import TextObjective, YesNo


@dataclass(frozen=True, kw_only=True)
class ClozeConfig(NothingCarried):
    """Which of a row's candidates fills the gap of a sentence about a text."""

    KIND: ClassVar[str] = "cloze"
    HEAD: ClassVar[HeadKind] = "choice"
    PROBLEM: ClassVar[str | None] = None
    COUNTED: ClassVar[str] = "candidates"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = ()
    pairs: ClassVar[bool] = True
    labels: ClassVar[None] = None
    outputs: ClassVar[int] = 1

    text: str = "passage"  # column of the text
    query: str = "query"  # column of the sentence with the gap
    candidates: str = "entities"  # column of what may fill it: a list of texts
    answers: str = "answers"  # column of what does: a list of texts
    gap: str = "@placeholder"  # as the query spells it
    max_query_tokens: int = 128  # of the query, filled; a longer one is cut at its end
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)
    # those that are reported; default: f1, exact_match
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_differ(self.columns)
        if not self.gap.strip():
            raise ConfigError("gap is empty; needed: how a query spells it, such as @placeholder.")
        if self.max_query_tokens < 1:
            raise ConfigError(f"max_query_tokens {self.max_query_tokens} must be at least 1.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Text, query, candidates and answers."""
        return (self.text, self.query, self.candidates, self.answers)

    @property
    def kept_together(self) -> tuple[str, ...]:
        """All queries about a text."""
        return (self.text,)

    @property
    def objective(self) -> TextObjective:
        """Binary cross entropy of each candidate."""
        return YesNo(outputs=1)

    def metric_names(self) -> tuple[str, ...]:
        """Of the predicted text."""
        return measures.chosen(("f1", "exact_match"), self.metrics)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """Candidates have no names that hold for all rows."""
        return None

    def check_length(self, max_tokens: int) -> None:
        """Room for a query and a token of the text."""
        check_room(max_tokens, max_query_tokens=self.max_query_tokens)

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> ClozeSet:
        """A document for each candidate of each row; float32 [P, 1], whether it is an answer."""
        texts = list(texts_of(rows, self.text))
        queries = [*self._queries(rows)]
        candidates = [_texts_in(rows, row, self.candidates) for row in range(len(rows))]
        answers = [_texts_in(rows, row, self.answers) for row in range(len(rows))]

        filled = [
            query.replace(self.gap, candidate)
            for query, some in zip(queries, candidates, strict=True)
            for candidate in some
        ]
        counts = [len(some) for some in candidates]
        firsts = [text for text, count in zip(texts, counts, strict=True) for _ in range(count)]
        right = [
            [float(candidate in golds)]
            for some, golds in zip(candidates, answers, strict=True)
            for candidate in some
        ]
        cut = encoder.shortened(filled, most_tokens=self.max_query_tokens, keep="first")
        pairs = list(zip(firsts, cut, strict=True))
        documents = examples_of(
            encoder.encoded(pairs, cut="only_first"),
            encoder,
            name=name,
            value_P=np.array(right, dtype=np.float32),
        )
        starts = np.concatenate([[0], np.cumsum(counts)])
        return ClozeSet(
            examples=by_row(documents, starts, grouped=False),
            candidates=candidates,
            answers=answers,
            cut_queries=sum(a != b for a, b in zip(filled, cut, strict=True)),
        )

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Some candidate is an answer, and some is none."""
        if examples.value_P.min() == examples.value_P.max():
            found = "every candidate is one" if examples.value_P.max() else "no candidate is one"
            raise DataError(
                f"{rows.path}: {found} of {self.answers}; needed: candidates that are answers, spelt"
                " alike, beside others."
            )

    def _queries(self, rows: Rows) -> Iterator[str]:
        for row, query in enumerate(texts_of(rows, self.query)):
            if self.gap not in query:
                raise DataError(
                    f"{rows.place(row)}: {self.query} has no {self.gap}; needed: one, where a"
                    " candidate stands. task.gap says how it is spelt."
                )
            yield query


def _texts_in(rows: Rows, row: int, column: str) -> list[str]:
    """The texts of a cell, at least one. Raises DataError."""
    cell = rows.columns[column][row]
    if not isinstance(cell, list) or not cell:
        raise DataError(
            f"{rows.place(row)}: {column} is {str(cell)[:40]!r}; needed: a list of at least one"
            " text. A row without one cannot be asked: leave it out."
        )
    for text in cell:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{rows.place(row)}: {column} has {str(text)[:40]!r}; needed: texts that say"
                " something."
            )
        check_unicode(text, rows, row)
    return cell


@dataclass(frozen=True, kw_only=True)
class ClozeSet(NothingDecided):
    """A data set of gaps (encoder.finetune.kinds.contract.AskedSet)."""

    examples: Examples
    candidates: list[list[str]]  # of each row
    answers: list[list[str]]  # the right ones of each row
    cut_queries: int

    def notes(self) -> list[str]:
        """How many were cut, and which rows cannot be answered."""
        name, lines = self.examples.name, []
        if self.examples.cut:
            lines.append(
                f"{counted(self.examples.cut, 'document')} of {name} longer than data.max_tokens:"
                " the text before the query is cut"
            )
        if self.cut_queries:
            lines.append(
                f"{counted(self.cut_queries, 'document')} of {name} whose query is longer than"
                " task.max_query_tokens: cut"
            )
        pairs = zip(self.candidates, self.answers, strict=True)
        if lost := sum(not {*some} & {*golds} for some, golds in pairs):
            lines.append(f"{counted(lost, 'row')} of {name} with no answer among the candidates")
        return lines

    def scores(
        self, logits_PK: np.ndarray, metrics: Sequence[str], decided: Decided | None = None
    ) -> Scores:
        """The loss over candidates, F1 and exact match over rows."""
        if not np.isfinite(logits_PK).all():
            return Scores.without_numbers(metrics)
        texts = [text for text, _ in self._guesses(logits_PK)]
        found = squad.means(texts, self.answers)
        return Scores.of(
            loss=measures.yes_no_loss(logits_PK, self.examples.value_P),
            metrics={name: found[name] for name in metrics},
            constant=len(texts) > 1 and len({*texts}) == 1,
        )

    def lines(
        self, logits_PK: np.ndarray, decided: Decided | None = None
    ) -> Iterator[dict[str, Any]]:
        """A line a row: the likeliest candidate, with the scores of all."""
        for row, (text, logits_P) in enumerate(self._guesses(logits_PK)):
            yield {
                "row": row,
                "answer": text,
                "logits": [float(x) for x in logits_P],
                "target": self.answers[row],
            }

    def _guesses(self, logits_PK: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(likeliest candidate, logits of all) of each row."""
        assert self.examples.places is not None
        starts_N1 = self.examples.places.starts_N1
        for some, begin, end in zip(self.candidates, starts_N1, starts_N1[1:], strict=False):
            logits_P = logits_PK[begin:end, 0]
            yield some[int(logits_P.argmax())], logits_P
