"""Windows: a few thousand documents of the mixture, cut to length and packed together, each planned on its own.

Window k takes floor((k+1) x_s) - floor(k x_s) documents of source s, where x_s is the source's share of the window's
documents: proportional to weight / mean length, so that weights are shares of tokens. All in whole numbers, so that
window 10^9 is as exact, and as near, as window 0.

    documents longer than the phase allows are cut into near-equal pieces, [CLS] and [SEP] put back:
        stored   C a b c d e f g S     (9 tokens, at most 6)
        pieces   C a b c S'            start 0, end 4      S' and C' are put back, never stored
                 C' d e f g S          start 4, end 9
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Protocol

import numpy as np

from encoder.base.errors import ConfigError, ShardError
from encoder.base.rng import generator
from encoder.data.order import DocumentOrder
from encoder.data.packing import pack_best_fit
from encoder.data.shard_format import Card

SOURCE, DOCUMENT, START, END = range(4)      # columns of a piece


class PlannedSource(Protocol):
    """What planning knows of a source: no shard is opened."""

    name: str
    card: Card
    lengths: np.ndarray
    samples_per_shard: np.ndarray


@dataclass(frozen=True)
class WindowPlan:
    """The rows of one window. P pieces, R rows.

    A piece is (source, document, start, end): stored tokens start to end of that document, with [CLS] put back where
    start > 0 and [SEP] where end is not the document's.
    """

    pieces_P4: np.ndarray           # int64, row after row
    row_starts_R1: np.ndarray       # int64 into the pieces
    tokens_R: np.ndarray            # int64, tokens of each row without padding

    @property
    def rows(self) -> int:
        return len(self.tokens_R)

    def pieces(self, row: int) -> np.ndarray:
        """The pieces of a row, int64 [pieces, 4], in the order they are laid."""
        return self.pieces_P4[self.row_starts_R1[row]:self.row_starts_R1[row + 1]]


class Windows:
    """The windows of one phase: a pure function of the window's number."""

    def __init__(self, *, sources: Sequence[PlannedSource], weights: Sequence[float], seed: int, phase: int,
                 max_tokens_per_document: int, row_tokens: int, window_documents: int) -> None:
        self._sources = sources
        self._documents_per_window = documents_per_window([s.card for s in sources], weights, window_documents)
        self._orders = [DocumentOrder(s.samples_per_shard, seed=seed, phase=phase, source=s.name) for s in sources]
        self._seed, self._phase = seed, phase
        self._max_tokens, self._row_tokens = max_tokens_per_document, row_tokens

    def documents_before(self, window: int) -> list[int]:
        """How many documents of each source the windows before this one took."""
        return [x.numerator * window // x.denominator for x in self._documents_per_window]

    def plan(self, window: int) -> WindowPlan:
        """The rows of a window, packed and shuffled."""
        parts = []
        before, after = self.documents_before(window), self.documents_before(window + 1)
        for number, order in enumerate(self._orders):
            documents = order.documents(before[number], after[number] - before[number])
            parts.append(cut(number, documents, self._sources[number].lengths[documents], self._max_tokens))
        pieces = Pieces.joined(parts)
        rows = pack_best_fit(pieces.tokens_P, self._row_tokens)
        shuffled = generator(self._seed, "rows", self._phase, window).permutation(len(rows))
        return lay_rows(pieces, [rows[r] for r in shuffled.tolist()])


@dataclass(frozen=True)
class Pieces:
    """Pieces before packing: int64 [P, 4] as in WindowPlan, and the tokens of each with what is put back."""

    pieces_P4: np.ndarray
    tokens_P: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Pieces]) -> Pieces:
        return Pieces(np.concatenate([p.pieces_P4 for p in parts]), np.concatenate([p.tokens_P for p in parts]))


def documents_per_window(cards: Sequence[Card], weights: Sequence[float], window_documents: int) -> list[Fraction]:
    """x_s, exactly: documents of each source in a window, summing to `window_documents`. Raises ConfigError."""
    if len(cards) != len(weights) or not cards:
        raise ConfigError(f"{len(cards)} sources with {len(weights)} weights; needed: as many, at least one.")
    for card, weight in zip(cards, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"weight {weight} of source {card.source} must be above 0. Leave the source out instead.")
    shares = [Fraction(weight) * card.documents / card.tokens for card, weight in zip(cards, weights, strict=True)]
    return [window_documents * share / sum(shares) for share in shares]


def cut(source: int, documents: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Pieces:
    """Pieces of at most `max_tokens`: whole documents where they fit, else the fewest near-equal pieces.

    The bodies (all but the stored [CLS] and [SEP]) of a document's pieces differ by at most one token.
    """
    assert max_tokens >= 3, "a piece holds [CLS], [SEP] and at least one token"
    lengths = lengths.astype(np.int64)
    if len(lengths) and lengths.min() < 1:
        place = int(documents[lengths.argmin()])
        raise ShardError(f"document {place} of source number {source} has {lengths.min()} tokens by lengths.bin; needed: at least "
                         "1. Look at the folder with data-prep verify.")
    body = lengths - 2
    count = np.where(lengths <= max_tokens, 1, -(-body // (max_tokens - 2)))
    whose = np.repeat(np.arange(len(documents)), count)
    number = np.arange(len(whose)) - np.repeat(np.cumsum(count) - count, count)
    body, count, length = body[whose], count[whose], lengths[whose]
    start = np.where(number == 0, 0, 1 + body * number // count)
    end = np.where(number == count - 1, length, 1 + body * (number + 1) // count)
    tokens = (end - start) + (start > 0) + (end < length)
    return Pieces(np.stack([np.full(len(whose), source), documents[whose], start, end], axis=1), tokens)


def lay_rows(pieces: Pieces, rows: Sequence[Sequence[int]]) -> WindowPlan:
    """The plan in which the given rows of piece numbers follow each other."""
    order = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, rows), dtype=np.int64))]).astype(np.int64)
    tokens = np.concatenate([[0], np.cumsum(pieces.tokens_P[order])])
    return WindowPlan(pieces.pieces_P4[order], starts, np.diff(tokens[starts]).astype(np.int64))
