"""A tag for each word: entities, parts of speech, kinds of code.

    words      EU     rejects   German       lamb
    tags       B-ORG  O         B-MISC       O
    text       "EU rejects German lamb"                        single blanks, as running text: the tokens of pretraining
    tokens     [CLS] EU  rejects  Ger man  lamb [SEP]
    asked            1   2        3        5                   the first token that has a letter of the word

A row that is too long is split between two words: each word is asked once, and none is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.data.examples import Examples, Places
from encoder.data.labelled import DataError, Rows, check_unicode, label_name
from encoder.finetune import metrics as measures
from encoder.finetune.encoding import TextEncoder, examples_of
from encoder.finetune.kinds.columns import (
    MOST_LABELS,
    check_labels,
    class_names,
    known_labels,
    number_of,
    refuse_missing,
    sorted_labels,
)
from encoder.finetune.kinds.contract import Decided, NothingCarried, NothingDecided
from encoder.finetune.metrics import Scores
from encoder.models.with_task import HeadKind
from encoder.nn.task_heads import Pooling
from encoder.objectives.text_tasks import Classes, TextObjective

if TYPE_CHECKING:
    from tokenizers import Encoding

OUTSIDE = "O"  # of no entity
# what seqeval reads as the beginning, inside, end or whole of an entity
_ENTITY_TAG = re.compile(r"[BIES]-.+")
ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
WORD_METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True, kw_only=True)
class TagsConfig(NothingCarried):
    """A tag for each word of a row, as named entities have it."""

    KIND: ClassVar[str] = "tags"
    HEAD: ClassVar[HeadKind] = "token"
    PROBLEM: ClassVar[str | None] = None
    COUNTED: ClassVar[str] = "words"
    PACKAGES: ClassVar[tuple[tuple[str, str], ...]] = (
        *measures.SCIKIT,
        ("seqeval", "seqeval"),
    )
    pooling: ClassVar[Pooling] = "cls"
    pairs: ClassVar[bool] = False

    words: str  # column of the words: a list in each row
    label: str  # column of their tags: a list as long, of names or their numbers
    # the tags' names in the order of their numbers; default: those of the training rows, O first
    labels: tuple[str, ...] | None = None
    # those that are reported; default: entity_f1, entity_precision, entity_recall, accuracy; without B- and I- accuracy, macro_f1
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels, least=2)
        if self.words == self.label:
            raise ConfigError(f"words and label both name {self.words!r}; needed: two columns.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Words and tags."""
        return (self.words, self.label)

    @property
    def kept_together(self) -> tuple[str, ...]:
        """Rows of the same words."""
        return (self.words,)

    @property
    def outputs(self) -> int:
        """One for each tag."""
        return len(known_labels(self.labels))

    @property
    def objective(self) -> TextObjective:
        """Cross entropy of each word."""
        return Classes()

    def metric_names(self) -> tuple[str, ...]:
        """Those of entities need tags of entities."""
        known = (*ENTITY_METRICS, *WORD_METRICS)
        names = measures.chosen(known, self.metrics)
        if self.labels is None:
            return names
        strange = [x for x in self.labels if x != OUTSIDE and not _ENTITY_TAG.fullmatch(x)]
        if not strange:
            return names if self.metrics else (*ENTITY_METRICS, "accuracy")
        if self.metrics is None:
            return WORD_METRICS
        if asked := [name for name in names if name in ENTITY_METRICS]:
            raise ConfigError(
                f"task.metrics: {asked[0]} counts entities, and the tag {strange[0]!r} is of none;"
                " needed: O, B-NAME, I-NAME, E-NAME or S-NAME. Use accuracy or macro_f1."
            )
        return names

    def labels_in(self, rows: Rows) -> tuple[str, ...] | None:
        """Those that the data name, or all that occur, O first, then sorted; numbers by their size."""
        if names := class_names(rows, self.label):
            return names
        found = {name for row in range(len(rows)) for name in self._tags(rows, row)}
        if len(found) < 2:
            raise DataError(
                f"{rows.path}: {self.label} is {next(iter(found))!r} for every word; needed: at"
                " least two tags."
            )
        if len(found) > MOST_LABELS:
            raise DataError(f"{rows.path}: {self.label} has {len(found):,} different tags.")
        return sorted_labels(found, first=OUTSIDE)

    def check_length(self, max_tokens: int) -> None:
        """Any will do."""

    def encode(self, rows: Rows, encoder: TextEncoder, *, name: str) -> TagSet:
        """A class for each word."""
        words = [self._words(rows, row) for row in range(len(rows))]
        tag_W = np.concatenate([self._numbers(rows, row, words[row]) for row in range(len(rows))])
        windows = _windows(words, encoder)
        split = len(rows) - sum(window.whole for window in windows)
        # a row without any token asks nothing
        windows = [window for window in windows if len(window.words_W)]
        if not windows:
            raise DataError(f"{rows.path}: no word has a token; needed: texts that say something.")
        word_P = np.concatenate([window.words_W for window in windows])
        counts = [len(window.words_W) for window in windows]
        places = Places(
            starts_N1=np.concatenate([[0], np.cumsum(counts)]),
            token_P=np.concatenate([window.token_W for window in windows]).astype(np.int32),
        )
        encoded = [window.encoding for window in windows]
        return TagSet(
            examples=examples_of(
                encoded, encoder, name=name, value_P=tag_W[word_P], places=places, cut=0
            ),
            labels=known_labels(self.labels),
            words=words,
            tag_W=tag_W,
            word_P=word_P,
            split=split,
        )

    def check_training(self, examples: Examples, rows: Rows) -> None:
        """Every tag is there."""
        labels = known_labels(self.labels)
        counts = np.bincount(examples.value_P, minlength=len(labels))
        refuse_missing(labels, counts, rows, self.label, word="tag")

    def _words(self, rows: Rows, row: int) -> list[str]:
        words = _list_of(rows, row, self.words, needed="words")
        for word in words:
            if not isinstance(word, str) or not word or any(letter.isspace() for letter in word):
                raise DataError(
                    f"{rows.place(row)}: {self.words} has {str(word)[:40]!r}; needed: words, each"
                    " without a blank."
                )
            check_unicode(word, rows, row)
        return words

    def _numbers(self, rows: Rows, row: int, words: list[str]) -> np.ndarray:
        """int64, of the tags of a row's words."""
        numbers = {name: number for number, name in enumerate(known_labels(self.labels))}
        tags = self._tags(rows, row)
        if len(tags) != len(words):
            raise DataError(
                f"{rows.place(row)}: {self.words} has {counted(len(words), 'word')}, {self.label}"
                f" {counted(len(tags), 'tag')}; needed: a tag for each word."
            )
        found = [number_of(tag, numbers, rows, row, self.label) for tag in tags]
        return np.array(found, dtype=np.int64)

    def _tags(self, rows: Rows, row: int) -> list[str]:
        tags = _list_of(rows, row, self.label, needed="tags")
        return [label_name(tag, rows, row) for tag in tags]


def _list_of(rows: Rows, row: int, column: str, *, needed: str) -> list[Any]:
    value = rows.columns[column][row]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{rows.place(row)}: {column} is {str(value)[:40]!r}; needed: a list of {needed}."
        )
    return value


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Some words of a row."""

    encoding: Encoding
    words_W: np.ndarray  # int64: numbers of its words in the data set, those that have a token
    token_W: np.ndarray  # int64: their first tokens
    whole: bool  # it is the whole row


def _windows(words: Sequence[list[str]], encoder: TextEncoder) -> list[_Window]:
    """All rows, in as few windows as their lengths allow."""
    found: list[_Window] = []
    first = 0
    encoded = encoder.encoded([" ".join(row) for row in words], cut="longest_first")
    for row, encoding in zip(words, encoded, strict=True):
        if not encoding.overflowing:
            found.append(_window(encoding, row, first=first, whole=True))
        else:
            found += _split(row, encoder, first=first)
        first += len(row)
    return found


def _split(row: list[str], encoder: TextEncoder, *, first: int) -> Iterator[_Window]:
    """The windows of a row that is too long, each of words that are whole in it."""
    begin = 0
    while begin < len(row):
        # no more words than tokens
        some = row[begin : begin + encoder.max_tokens]
        (encoding,) = encoder.encoded([" ".join(some)], cut="longest_first")
        if encoding.overflowing:
            last = max(end for _, end in encoding.offsets)
            ends = np.cumsum([len(word) + 1 for word in some]) - 1
            # a word that is longer than a window is cut
            some = some[: max(1, int((ends <= last).sum()))]
            # encoded anew: without the beginning of a word that comes next
            (encoding,) = encoder.encoded([" ".join(some)], cut="longest_first")
        yield _window(encoding, some, first=first + begin, whole=False)
        begin += len(some)


def _window(encoding: Encoding, words: list[str], *, first: int, whole: bool) -> _Window:
    """Where the words begin in their tokens.

    encoding: of the words, joined
    words: that are asked
    first: number of the first in the data set
    whole: they are a whole row
    """
    real = np.flatnonzero(1 - np.array(encoding.special_tokens_mask))
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[real]
    lengths = np.array([len(word) for word in words])
    starts = np.cumsum(lengths + 1) - lengths - 1
    # the first token that ends behind the word's beginning; byte-level tokens begin at the blank before
    at = np.searchsorted(spans[:, 1], starts, side="right")
    is_there = at < len(real)
    at = np.minimum(at, max(0, len(real) - 1))
    if len(real):
        is_there &= spans[at, 0] < starts + lengths
    # a token that reaches over a blank is the first word's
    before = np.maximum.accumulate(np.where(is_there, at, -1))[:-1]
    is_there[1:] &= at[1:] > before
    return _Window(
        encoding=encoding,
        words_W=first + np.flatnonzero(is_there),
        token_W=real[at[is_there]] if len(real) else at[:0],
        whole=whole,
    )


@dataclass(frozen=True, kw_only=True)
class TagSet(NothingDecided):
    """A data set of tagged words (encoder.finetune.kinds.contract.AskedSet). W words in all."""

    examples: Examples
    labels: tuple[str, ...]
    words: list[list[str]]  # of each row
    tag_W: np.ndarray  # int64, as the file has them
    word_P: np.ndarray  # int64: the word that a place asks
    split: int  # rows that are several examples

    def notes(self) -> list[str]:
        """Of rows that were split, and of words that have no token."""
        name, lines = self.examples.name, []
        if self.split:
            lines.append(
                f"{counted(self.split, 'row')} of {name} longer than data.max_tokens: split"
                " between words"
            )
        if lost := len(self.tag_W) - len(self.word_P):
            lines.append(
                f"{counted(lost, 'word')} of {name} without a token of its own: read as"
                f" {self.labels[self._outside]}"
            )
        return lines

    def scores(
        self, logits_PK: np.ndarray, metrics: Sequence[str], decided: Decided | None = None
    ) -> Scores:
        """The loss over words, entities by seqeval."""
        if not np.isfinite(logits_PK).all():
            return Scores.without_numbers(metrics)
        guess_W = self._guesses(logits_PK)
        count = len(self.labels)
        found = {
            "accuracy": measures.accuracy(self.tag_W, guess_W, count),
            "macro_f1": measures.macro_f1(self.tag_W, guess_W, count),
        }
        if any(name in ENTITY_METRICS for name in metrics):
            found |= entity_scores(self._by_row(self.tag_W), self._by_row(guess_W))
        return Scores.of(
            loss=measures.cross_entropy(logits_PK, self.examples.value_P),
            metrics={name: found[name] for name in metrics},
            constant=len(guess_W) > 1 and bool((guess_W == guess_W[0]).all()),
        )

    def lines(
        self, logits_PK: np.ndarray, decided: Decided | None = None
    ) -> Iterator[dict[str, Any]]:
        """A line a row, with the tags of its words."""
        guesses = self._by_row(self._guesses(logits_PK))
        targets = self._by_row(self.tag_W)
        for row, words in enumerate(self.words):
            yield {"row": row, "words": words, "tags": guesses[row], "target": targets[row]}

    @property
    def _outside(self) -> int:
        """What a word without a token is."""
        return self.labels.index(OUTSIDE) if OUTSIDE in self.labels else 0

    def _guesses(self, logits_PK: np.ndarray) -> np.ndarray:
        guess_W = np.full(len(self.tag_W), self._outside)
        guess_W[self.word_P] = logits_PK.argmax(axis=1)
        return guess_W

    def _by_row(self, tag_W: np.ndarray) -> list[list[str]]:
        ends = np.cumsum([len(words) for words in self.words])
        rows = np.split(tag_W, ends[:-1])
        return [[self.labels[number] for number in row] for row in rows]


def entity_scores(true: list[list[str]], guessed: list[list[str]]) -> dict[str, float]:
    """Of entities whose span and type are exact, over all rows (micro), as seqeval and conlleval count."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    return {
        "entity_f1": float(f1_score(true, guessed, zero_division=0)),
        "entity_precision": float(precision_score(true, guessed, zero_division=0)),
        "entity_recall": float(recall_score(true, guessed, zero_division=0)),
    }
