"""Which tokens of a row are predicted, where their number is exact: single tokens, words, n-grams or spans of each document.

    units of a document       1 2 1 3 tokens (words), 3 to predict; n-grams up to 3, in a drawn order of their first units
    first unit 0, n = 3       4 tokens are too many: n = 2, 3 tokens: done
    first unit 3, n = 1       3 tokens: done

Devlin et al.'s code draws words (create_pretraining_data.py), Lan et al.'s n-grams with p(n) ~ 1/n, and Joshi et al.'s spans of
n words with p(n) ~ 0.8^n. What would be too many is tried shorter; what touches a token that is taken is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from encoder.objectives.words import WordEdges

Count = Literal["bernoulli", "round", "round_at_random", "floor"]
Spans = Literal["none", "ngram", "geometric"]

LONGEST_SPAN = {"none": 1, "ngram": 3, "geometric": 10}  # units, as published
GEOMETRIC = 0.2  # SpanBERT's, arXiv 1907.10529, section 3.1


class Run(NamedTuple):
    """Units that follow each other and are predicted together."""

    first: int
    units: int


class Chosen(NamedTuple):
    """The predicted tokens of a row, M of them, and the number of the run that each is of."""

    index_M: np.ndarray  # int64, ascending
    run_M: np.ndarray  # int64


@dataclass(frozen=True, kw_only=True)
class ExactChoice:
    """An exact number of tokens in each document."""

    count: Count  # how the number follows from share and tokens; not bernoulli
    counts_special: bool  # whether tokens that are never masked are counted, too
    most_tokens: int | None  # of a document
    spans: Spans
    longest_span: int  # units
    words: WordEdges | None  # units are words; None: tokens

    def choose(
        self,
        ids: np.ndarray,
        maskable_T: np.ndarray,
        lengths: Sequence[int],
        generator: np.random.Generator,
        *,
        share: float,
    ) -> Chosen:
        """The predicted tokens of a row, document by document.

        ids: int64 [T]
        maskable_T: bool [T]
        lengths: of the documents, in their order; empty: the row is one
        generator: the only source of chance
        share: of the tokens of each document
        """
        index: list[np.ndarray] = []
        runs: list[np.ndarray] = []
        start = 0
        for length in lengths or (len(ids),):
            # each document has a number of its own; its places count from its start
            own = slice(start, start + length)
            for run in self._runs(ids[own], maskable_T[own], generator, share=share):
                index.append(start + run)
                runs.append(np.full(len(run), len(runs)))
            start += length

        # runs come in the order they were drawn; targets ascend. The empty part keeps int64
        # where there are no runs
        index_M = np.concatenate([*index, np.empty(0, dtype=np.int64)])
        run_M = np.concatenate([*runs, np.empty(0, dtype=np.int64)])
        order = np.argsort(index_M, kind="stable")
        return Chosen(index_M[order], run_M[order].astype(np.int64))

    def _runs(
        self,
        ids: np.ndarray,
        maskable_T: np.ndarray,
        generator: np.random.Generator,
        *,
        share: float,
    ) -> Iterator[np.ndarray]:
        """The places of each run in one document."""
        # runs are made among the places that may be masked, so they reach over special tokens
        places = np.flatnonzero(maskable_T)
        counted = len(places)
        if self.counts_special:
            counted = len(ids)
        number = number_of(self.count, share=share, tokens=counted, generator=generator)
        if self.most_tokens is not None:
            number = min(number, self.most_tokens)
        if not number or not len(places):
            return

        # first units are tried in a random order: the ranks of one draw for each unit
        starts_U = self._unit_starts(ids, places)
        lengths_U = np.diff(starts_U, append=len(places))
        order = np.argsort(generator.random(len(starts_U)), kind="stable")
        sizes = self._sizes(order, generator)
        for run in take_runs(lengths_U, order, sizes, number):
            begin = starts_U[run.first]
            end = begin + lengths_U[run.first : run.first + run.units].sum()
            yield places[begin:end]

    def _unit_starts(self, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Where units begin among the places that may be masked."""
        if self.words is None:
            return np.arange(len(places))
        # where the number of the word changes; -1 makes the first place a beginning
        word_M = self.words.words(ids)[places]
        return np.flatnonzero(np.diff(word_M, prepend=-1))

    def _sizes(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Units of the run that begins at each unit of `order`, drawn among the lengths that the document has room for."""
        if self.spans == "none":
            return np.ones(len(order), dtype=np.int64)

        # inverse CDF: a uniform draw below the cumulative weight of the lengths that have room,
        # and the first length whose cumulative weight exceeds it
        cumulative = np.cumsum(span_weights(self.spans, self.longest_span))
        room = np.minimum(len(order) - order, self.longest_span)
        drawn = generator.random(len(order)) * cumulative[room - 1]
        return np.minimum(np.searchsorted(cumulative, drawn, side="right") + 1, room)


def number_of(count: Count, *, share: float, tokens: int, generator: np.random.Generator) -> int:
    """Tokens of a document to be predicted.

    count: round (halves to the even number, at least 1), round_at_random (share n + u, cut off), or floor
    share: of the tokens
    tokens: of the document
    generator: draws u where it is asked for
    """
    if count == "round":
        return max(1, round(share * tokens))
    if count == "round_at_random":
        return int(share * tokens + generator.random())
    assert count == "floor", "a Bernoulli draw has no number"
    return int(share * tokens)


def span_weights(spans: Spans, longest: int) -> np.ndarray:
    """The chance of each length from 1 to the longest, up to a factor, fp64 [longest]."""
    lengths = np.arange(1, longest + 1)
    if spans == "ngram":
        return 1.0 / lengths
    return (1.0 - GEOMETRIC) ** (lengths - 1)


def take_runs(
    lengths_U: np.ndarray, order: np.ndarray, sizes: np.ndarray, number: int
) -> Iterator[Run]:
    """Runs of units that have `number` tokens together, or a few less.

    lengths_U: tokens of each unit
    order: first units, as they are tried
    sizes: units of the run that begins at each of them
    number: tokens to be predicted
    """
    # one byte for each unit, so that a slice of them tells whether a run is free
    taken = bytearray(len(lengths_U))
    lengths = lengths_U.tolist()
    left = number
    for first, units in zip(order.tolist(), sizes.tolist(), strict=True):
        if not left:
            return
        # a run with too many tokens is tried without its last units, down to none
        while units and sum(lengths[first : first + units]) > left:
            units -= 1
        if units and not any(taken[first : first + units]):
            taken[first : first + units] = b"\1" * units
            left -= sum(lengths[first : first + units])
            yield Run(first, units)
