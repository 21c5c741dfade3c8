"""The answer to a question as a stretch of a text, as SQuAD asks for it.

    context    "John ran home. He slept."      question "Who ran?"      answer "John" at 0
    window     [CLS] who ran ? [SEP] john ran home . [SEP]              start and end: token 5
    window     [CLS] who ran ? [SEP] . he slept . [SEP]                 the answer is not here: [CLS]

A long context is several windows that share `overlap_tokens` with the one before. Each window is an example: start and end are
each picked among all its tokens, and its loss is the mean of both. Devlin et al. 2019 (BERT), sections 4.2 and 4.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from encoder.base.errors import ConfigError
from encoder.base.schema import to_plain
from encoder.base.units import counted
from encoder.data.examples import Examples, Places
from encoder.data.labelled import DataError, Rows, texts_of
from encoder.finetune import metrics as measures
from encoder.finetune.encoding import TextEncoder, examples_of
from encoder.finetune.kinds import squad
from encoder.finetune.kinds.answers import (
    ANSWER_RULE,
    AnswerRule,
    BestAnswer,
    WindowLogits,
    best_answer,
)
from encoder.finetune.kinds.columns import check_differ, check_room
from encoder.finetune.kinds.contract import Decided
from encoder.finetune.metrics import NO_ANSWER_THRESHOLD as THRESHOLD
from encoder.finetune.metrics import Scores
from encoder.models.with_task import HeadKind
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import Picks, TextObjective

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True, kw_only=True)
class SpansConfig:
    """Where in a text the answer to a question stands."""

    KIND: ClassVar[str] = "spans"
    HEAD: ClassVar[HeadKind] = "span"
    PROBLEM: ClassVar[str | None] = None
    COUNTED: ClassVar[str] = "windows"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = ()
    pooling: ClassVar[Pooling] = "cls"
    pairs: ClassVar[bool] = True
    labels: ClassVar[None] = None
    outputs: ClassVar[int] = 2

    question: str = "question"  # column of the question
    context: str = "context"  # column of the text that has the answer
    # column of the right answers: {text: [...], answer_start: [...]}, or a list of {text, answer_start}; starts count characters
    answers: str = "answers"
    no_answer: bool = False  # a row may have none, as in SQuAD 2.0
    max_question_tokens: int = AnswerRule.max_question_tokens  # a longer question is cut at its end
    # tokens that a window shares with the one before; BERT's doc stride is what it does not share
    overlap_tokens: int = AnswerRule.overlap_tokens
    max_answer_tokens: int = AnswerRule.max_answer_tokens  # of a predicted answer
    candidates: int = AnswerRule.candidates  # starts, and ends, that are tried in a window
    # a token counts in the window alone that has most text on both sides of it, as in BERT
    max_context: bool = AnswerRule.max_context
    # no answer is given where the empty one scores higher by more than this; default: the best on the first dev set, without one 0
    no_answer_threshold: float | None = None
    # those that are reported; default: f1, exact_match, and with no_answer the threshold
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_differ(self.columns)
        # the rule checks the settings that it takes
        self.rule({})
        if self.no_answer_threshold is not None and not self.no_answer:
            raise ConfigError(
                "no_answer_threshold has no effect without no_answer: true. Leave it out."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Question, context and answers."""
        return (self.question, self.context, self.answers)

    @property
    def kept_together(self) -> tuple[str, ...]:
        """All questions about a text."""
        return (self.context,)

    @property
    def objective(self) -> TextObjective:
        """Cross entropy of start and end over the tokens of a window."""
        return Picks(outputs=2)

    def rule(self, decided: Decided) -> AnswerRule:
        """How answers are read off logits, by what a dev set or the task has decided; undecided without a threshold."""
        threshold = None
        if self.no_answer:
            threshold = decided.get(THRESHOLD, self.no_answer_threshold)
        return AnswerRule(
            max_question_tokens=self.max_question_tokens,
            overlap_tokens=self.overlap_tokens,
            max_answer_tokens=self.max_answer_tokens,
            candidates=self.candidates,
            max_context=self.max_context,
            no_answer_threshold=threshold,
        )

    def carried(self, decided: Decided) -> dict[str, Any]:
        """The rule, by which the page reads answers."""
        return {ANSWER_RULE: to_plain(self.rule(decided))}

    def metric_names(self) -> tuple[str, ...]:
        """The threshold stands beside those that depend on it."""
        known = ("f1", "exact_match", *([THRESHOLD] if self.no_answer else []))
        return measures.chosen(known, self.metrics)

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """A span has no names."""
        return None

    def check_length(self, max_tokens: int) -> None:
        """Room for the question, the overlap and one token more."""
        check_room(
            max_tokens,
            max_question_tokens=self.max_question_tokens,
            overlap_tokens=self.overlap_tokens,
        )

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> SpanSet:
        """Windows of all rows, in their order."""
        questions = list(texts_of(rows, self.question))
        contexts = list(texts_of(rows, self.context))
        answers = [
            self._answers(rows, row, context=context) for row, context in enumerate(contexts)
        ]
        asked = encoder.shortened(questions, most_tokens=self.max_question_tokens, keep="first")
        pairs = list(zip(asked, contexts, strict=True))
        made = _Made(overlap_tokens=self.overlap_tokens)
        examples = examples_of(
            made.windows(
                encoder.encoded(pairs, cut="only_second", overlap_tokens=self.overlap_tokens)
            ),
            encoder,
            name=name,
            value_P=np.empty((0, 2), dtype=np.int8),
            cut=0,
        )
        windows = made.arrays(examples.starts_N1)
        right_A2, lost = _right(windows, answers)
        places = Places(
            starts_N1=examples.starts_N1,
            token_P=_count_up(examples.lengths_N).astype(np.int32),
            grouped=True,
        )
        return SpanSet(
            examples=dataclasses.replace(examples, value_P=right_A2, places=places),
            kind=self,
            windows=windows,
            contexts=contexts,
            answers=[[text for text, _ in some] for some in answers],
            cut_questions=sum(a != b for a, b in zip(questions, asked, strict=True)),
            lost=lost,
        )

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Any answers will do."""

    def _answers(self, rows: Rows, row: int, *, context: str) -> list[tuple[str, int]]:
        """(text, first character) of each, seen to stand in the context."""
        found = _pairs_of(rows.columns[self.answers][row])
        place = f"{rows.place(row)}: {self.answers}"
        if found is None:
            raise DataError(
                f"{place} is {str(rows.columns[self.answers][row])[:40]!r}; needed: {{text: [...],"
                " answer_start: [...]}, equally long."
            )
        if not found and not self.no_answer:
            raise DataError(
                f"{place} has no answer. Set task.no_answer: true, or leave the row out."
            )
        for text, start in found:
            there = context[start : start + len(text)] if start >= 0 else ""
            if not text.strip() or there != text:
                raise DataError(
                    f"{place} has {text[:40]!r} at {start}, where {self.context} has"
                    f" {there[:40]!r}; needed: the characters that stand there."
                )
        return found


def _pairs_of(cell: Any) -> list[tuple[str, int]] | None:
    """(text, start) of the answers of a cell in either form; None: it has neither."""
    if isinstance(cell, list) and all(isinstance(one, dict) for one in cell):
        cell = {key: [one.get(key) for one in cell] for key in ("text", "answer_start")}
    if not isinstance(cell, dict):
        return None
    texts, starts = cell.get("text"), cell.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in starts)
    if not whole or not all(isinstance(text, str) for text in texts):
        return None
    return list(zip(texts, starts, strict=True))


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of a data set, an example each. N of them, A tokens, R rows."""

    row_N: np.ndarray  # int64, ascending
    begin_N: np.ndarray  # int64: the first token of the context that it has
    span_A2: np.ndarray  # int32, characters of the context that a token is of; -1 for other tokens
    starts_N1: np.ndarray  # int64 into tokens

    def span_L2(self, window: int) -> np.ndarray:
        """The characters of a window's tokens."""
        return self.span_A2[self.starts_N1[window] : self.starts_N1[window + 1]]


class _Made:
    """Windows as they are encoded, one by one."""

    def __init__(self, *, overlap_tokens: int) -> None:
        self._overlap_tokens = overlap_tokens
        self._rows: list[int] = []
        self._begins: list[int] = []
        self._spans: list[np.ndarray] = []

    def windows(self, encoded: Iterator[Encoding]) -> Iterator[Encoding]:
        """Those of each row, noted as they go by."""
        for row, whole in enumerate(encoded):
            begin = 0
            for window in (whole, *whole.overflowing):
                of_context = np.array(window.sequence_ids) == 1
                spans = np.where(of_context[:, None], np.array(window.offsets), -1)
                self._rows.append(row)
                self._begins.append(begin)
                self._spans.append(spans.astype(np.int32))
                begin += int(of_context.sum()) - self._overlap_tokens
                yield window

    def arrays(self, starts_N1: np.ndarray) -> Windows:
        """All that were noted."""
        return Windows(
            row_N=np.array(self._rows),
            begin_N=np.array(self._begins),
            span_A2=np.concatenate(self._spans),
            starts_N1=starts_N1,
        )


def _count_up(lengths_N: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... anew for each length."""
    starts = np.cumsum(lengths_N) - lengths_N
    return np.arange(int(lengths_N.sum())) - np.repeat(starts, lengths_N)


def _right(windows: Windows, answers: Sequence[list[tuple[str, int]]]) -> tuple[np.ndarray, int]:
    """int8 [A, 2], 1 where the first answer starts and ends, at [CLS] where a window lacks it; and rows that have it in none."""
    right_A2 = np.zeros((len(windows.span_A2), 2), dtype=np.int8)
    found = np.zeros(len(answers), dtype=bool)
    for window, row in enumerate(windows.row_N):
        first = last = 0
        if answers[row]:
            text, start = answers[row][0]
            # blanks around an answer are of no token
            start += len(text) - len(text.lstrip())
            first, last = _tokens_of(windows.span_L2(window), start, start + len(text.strip()))
        found[row] |= last > 0
        right_A2[windows.starts_N1[window] + first, 0] = 1
        right_A2[windows.starts_N1[window] + last, 1] = 1
    return right_A2, sum(bool(some) for some in answers) - int(found.sum())


def _tokens_of(span_L2: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last token of characters start to end; 0, 0 where a window does not have them whole."""
    context = np.flatnonzero(span_L2[:, 0] >= 0)
    if not len(context):
        return 0, 0
    begins, ends = span_L2[context].T
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(begins, end, side="left")) - 1
    # the answer begins before the window, or ends behind it
    if first > last or begins[0] > start or ends[-1] < end:
        return 0, 0
    return int(context[first]), int(context[last])


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is predicted for R rows."""

    texts: list[str]  # of the best span; empty: no span is possible
    start_R: np.ndarray  # int64, its first character
    score_R: np.ndarray  # of the best span: sum of its two logits
    none_R: np.ndarray  # of the empty answer, the lowest of the row's windows

    @property
    def missing_R(self) -> np.ndarray:
        """How much better the empty answer is."""
        return self.none_R - self.score_R

    def given(self, rule: AnswerRule) -> list[str]:
        """The answers, empty where the rule gives none."""
        pairs = zip(self.texts, self.missing_R, strict=True)
        return ["" if rule.gives_none(missing) else text for text, missing in pairs]


@dataclass(frozen=True, kw_only=True)
class SpanSet:
    """A data set of questions (encoder.finetune.kinds.contract.AskedSet)."""

    examples: Examples
    kind: SpansConfig
    windows: Windows
    contexts: list[str]
    answers: list[list[str]]  # the right ones of each row
    cut_questions: int
    lost: int  # rows whose answer no window has whole

    def notes(self) -> list[str]:
        """Of long questions, and of answers that are in no window."""
        name, lines = self.examples.name, []
        if self.cut_questions:
            lines.append(
                f"{counted(self.cut_questions, 'question')} of {name} longer than"
                f" task.max_question_tokens {self.kind.max_question_tokens:,}: cut"
            )
        if self.lost:
            lines.append(
                f"{counted(self.lost, 'answer')} of {name} whole in no window: trained as none"
            )
        return lines

    def decided(self, logits_PK: np.ndarray) -> Decided:
        """The threshold, where rows may have no answer."""
        if not self.kind.no_answer:
            return {}
        if self.kind.no_answer_threshold is not None:
            return {THRESHOLD: self.kind.no_answer_threshold}
        found = self._predicted(logits_PK)
        scores = [squad.f1(text, golds) for text, golds in zip(found.texts, self.answers)]
        empty = [squad.f1("", golds) for golds in self.answers]
        threshold = squad.best_threshold(np.array(scores), np.array(empty), found.missing_R)
        return {THRESHOLD: threshold}

    def undecided(self) -> Decided:
        """Threshold 0, where rows may have no answer and none is given: an answer has to score at least as the empty one."""
        is_open = self.kind.no_answer and self.kind.no_answer_threshold is None
        return {THRESHOLD: 0.0} if is_open else {}

    def scores(
        self, logits_PK: np.ndarray, metrics: Sequence[str], decided: Decided | None = None
    ) -> Scores:
        """The loss over windows, EM and F1 over rows."""
        if not np.isfinite(logits_PK).all():
            return Scores.without_numbers(metrics)
        decided = self.decided(logits_PK) if decided is None else decided
        texts = self._predicted(logits_PK).given(self.kind.rule(decided))
        found = {**squad.means(texts, self.answers), **decided}
        starts = self.examples.starts_N1[:-1]
        return Scores.of(
            loss=measures.pick_loss(logits_PK, self.examples.value_P, starts),
            metrics={name: found[name] for name in metrics},
            constant=len(texts) > 1 and len({*texts}) == 1,
        )

    def lines(
        self, logits_PK: np.ndarray, decided: Decided | None = None
    ) -> Iterator[dict[str, Any]]:
        """A line a row: the answer, the best span's score and that of none."""
        decided = self.decided(logits_PK) if decided is None else decided
        found = self._predicted(logits_PK)
        given = found.given(self.kind.rule(decided))
        for row, answer in enumerate(given):
            yield {
                "row": row,
                "answer": answer,
                "start": int(found.start_R[row]) if answer else None,
                "score": float(found.score_R[row]),
                "no_answer_score": float(found.none_R[row]),
                "target": self.answers[row],
            }

    def _predicted(self, logits_PK: np.ndarray) -> Answers:
        rule = self.kind.rule({})
        found = [best_answer(windows, rule) for windows in self._windows_of_rows(logits_PK)]
        spans = [self._characters(row, best) for row, best in enumerate(found)]
        texts = [context[a:b].strip() for context, (a, b) in zip(self.contexts, spans, strict=True)]
        return Answers(
            texts=texts,
            start_R=np.array([start for start, _ in spans], dtype=np.int64),
            score_R=np.array([best.score for best in found]),
            none_R=np.array([best.none for best in found]),
        )

    def _windows_of_rows(self, logits_PK: np.ndarray) -> Iterator[list[WindowLogits]]:
        starts_N1, begin_N = self.windows.starts_N1, self.windows.begin_N
        for first, end in zip(self._first_R, [*self._first_R[1:], len(begin_N)], strict=True):
            yield [
                WindowLogits(
                    logits_L2=logits_PK[starts_N1[window] : starts_N1[window + 1]],
                    inside_L=self.windows.span_L2(window)[:, 0] >= 0,
                    begin=int(begin_N[window]),
                )
                for window in range(first, end)
            ]

    @cached_property
    def _first_R(self) -> np.ndarray:
        """The first window of each row, which has one at least."""
        return np.flatnonzero(np.diff(self.windows.row_N, prepend=-1))

    def _characters(self, row: int, best: BestAnswer) -> tuple[int, int]:
        """First character of the best span, and the one behind its last; 0, 0 without any."""
        if best.window is None:
            return 0, 0
        spans_L2 = self.windows.span_L2(int(self._first_R[row]) + best.window)
        return int(spans_L2[best.first, 0]), int(spans_L2[best.last, 1])
