"""Windows: a few thousand documents of the mixture, cut to length and packed together, each planned on its own.

Window k takes floor((k+1) x_s) - floor(k x_s) documents of source s, where x_s is the source's share of the window's
documents: proportional to weight / mean length, so that weights are shares of tokens. All in whole numbers, so that
window 10^9 is as exact, and as near, as window 0. Each lane has windows of its own, over its own shards of every
source, so that a reader of one lane needs only those.

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
from typing import Protocol

import numpy as np

from encoder.base.errors import ConfigError, ShardError
from encoder.base.rng import generator
from encoder.data.order import DocumentOrder, deal_shards
from encoder.data.packing import Packing, pack_best_fit
from encoder.data.shard_format import Card

SOURCE, DOCUMENT, START, END = range(4)  # columns of a piece
# a step takes as many rows of each lane, so that a lane with 5 % fewer documents repeats its own 5 % more often
LANES_APART = 0.05


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

    pieces_P4: np.ndarray  # int64, row after row
    row_starts_R1: np.ndarray  # int64 into the pieces
    tokens_R: np.ndarray  # int64, tokens of each row without padding

    @property
    def rows(self) -> int:
        return len(self.tokens_R)

    def pieces(self, row: int) -> np.ndarray:
        """The pieces of a row, int64 [pieces, 4], in the order they are laid."""
        return self.pieces_P4[self.row_starts_R1[row] : self.row_starts_R1[row + 1]]


class Windows:
    """The windows of one phase: a pure function of lane and window number. Raises ConfigError as shards_of_lanes does.

    `shuffle_shards`: of each source, whose documents are shuffled together (None: as DocumentOrder has it).
    The pieces of shards in `left_out`, as (number of the source, shard), are taken out of their rows once these are laid:
    all else stays where it was.
    """

    def __init__(
        self,
        *,
        sources: Sequence[PlannedSource],
        weights: Sequence[float],
        seed: int,
        phase: int,
        max_tokens_per_document: int,
        row_tokens: int,
        window_documents: int,
        lanes: int = 1,
        left_out: Sequence[tuple[int, int]] = (),
        shuffle_shards: int | None = None,
    ) -> None:
        self._sources, self._left_out = sources, frozenset(left_out)
        self._documents_per_window = documents_per_window(
            [s.card for s in sources], weights, window_documents
        )
        dealt = [shards_of_lanes(s.name, s.samples_per_shard, lanes) for s in sources]
        self._orders_of_lane = [
            [
                DocumentOrder(
                    s.samples_per_shard,
                    seed=seed,
                    phase=phase,
                    source=s.name,
                    lane=(lane, shards[lane]) if lanes > 1 else None,
                    group_shards=shuffle_shards,
                )
                for s, shards in zip(sources, dealt, strict=True)
            ]
            for lane in range(lanes)
        ]
        self._seed, self._phase, self._lanes = seed, phase, lanes
        self._max_tokens, self._row_tokens = max_tokens_per_document, row_tokens

    def address(self, window: int, *, lane: int = 0) -> tuple[int, ...]:
        """Where a window stands in the run: (phase, window), with several lanes (phase, lane, window)."""
        return (self._phase, *((lane,) if self._lanes > 1 else ()), window)

    def documents_before(self, window: int) -> list[int]:
        """How many documents of each source the windows of a lane before this one took."""
        return [x.numerator * window // x.denominator for x in self._documents_per_window]

    def epochs_before(self, windows: Sequence[int]) -> dict[str, float]:
        """How often the lane that did so most went through its documents of each source, by name, when each stands at the
        beginning of its window."""
        epochs = [
            [
                n / order.documents_per_epoch
                for n, order in zip(self.documents_before(w), orders, strict=True)
            ]
            for w, orders in zip(windows, self._orders_of_lane, strict=False)
        ]
        return {
            s.name: max(of_lanes)
            for s, of_lanes in zip(self._sources, zip(*epochs, strict=True), strict=True)
        }

    def shards(self, window: int, count: int, *, lane: int = 0, at_most: int) -> list[list[int]]:
        """Of each source the shards that `count` windows of a lane read, soonest first; at least those of its next document."""
        places = zip(
            self._orders_of_lane[lane],
            self.documents_before(window),
            self.documents_before(window + count),
        )
        return [
            [
                shard
                for shard in order.shards(start, max(1, end - start), at_most=at_most)
                if (number, shard) not in self._left_out
            ]
            for number, (order, start, end) in enumerate(places)
        ]

    def plan(self, window: int, *, lane: int = 0) -> WindowPlan:
        """The rows of a lane's window, packed and shuffled."""
        parts = []
        before, after = self.documents_before(window), self.documents_before(window + 1)
        for number, order in enumerate(self._orders_of_lane[lane]):
            documents = order.documents(before[number], after[number] - before[number])
            parts.append(
                cut(number, documents, self._sources[number].lengths[documents], self._max_tokens)
            )
        pieces = Pieces.joined(parts)
        packing = pack_best_fit(pieces.tokens_P, self._row_tokens)
        shuffled = generator(self._seed, "rows", *self.address(window, lane=lane)).permutation(
            packing.rows
        )
        plan = lay_rows(pieces, packing, shuffled)
        return self._without_left_out(plan) if self._left_out else plan

    def _without_left_out(self, plan: WindowPlan) -> WindowPlan:
        source_P, document_P, start_P, end_P = plan.pieces_P4.T
        kept_P, length_P = (
            np.ones(len(plan.pieces_P4), dtype=bool),
            np.zeros(len(plan.pieces_P4), dtype=np.int64),
        )
        for number, source in enumerate(self._sources):
            length_P[source_P == number] = source.lengths[document_P[source_P == number]]
        for number, shard in self._left_out:
            samples = self._sources[number].samples_per_shard
            first = int(samples[:shard].sum())
            kept_P &= (
                (source_P != number) | (document_P < first) | (document_P >= first + samples[shard])
            )
        tokens_P = ((end_P - start_P) + (start_P > 0) + (end_P < length_P)) * kept_P
        tokens_R = np.diff(np.concatenate([[0], np.cumsum(tokens_P)])[plan.row_starts_R1])
        return WindowPlan(
            plan.pieces_P4[kept_P],
            np.concatenate([[0], np.cumsum(kept_P)])[plan.row_starts_R1],
            tokens_R,
        )


@dataclass(frozen=True)
class Pieces:
    """Pieces before packing: int64 [P, 4] as in WindowPlan, and the tokens of each with what is put back."""

    pieces_P4: np.ndarray
    tokens_P: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Pieces]) -> Pieces:
        return Pieces(
            np.concatenate([p.pieces_P4 for p in parts]),
            np.concatenate([p.tokens_P for p in parts]),
        )


def documents_per_window(
    cards: Sequence[Card], weights: Sequence[float], window_documents: int
) -> list[Fraction]:
    """x_s, exactly: documents of each source in a window, summing to `window_documents`. Raises ConfigError."""
    if len(cards) != len(weights) or not cards:
        raise ConfigError(
            f"{len(cards)} sources with {len(weights)} weights; needed: as many, at least one."
        )
    for card, weight in zip(cards, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(
                f"weight {weight} of source {card.source} must be above 0. Leave the source out"
                " instead."
            )
    shares = [
        Fraction(weight) * card.documents / card.tokens
        for card, weight in zip(cards, weights, strict=True)
    ]
    return [window_documents * share / sum(shares) for share in shares]


def shards_of_lanes(source: str, samples_per_shard: np.ndarray, lanes: int) -> list[np.ndarray]:
    """The shards of a source that each lane has. Raises ConfigError for lanes without one, and more than LANES_APART apart."""
    shards = len(samples_per_shard)
    if shards < lanes:
        raise ConfigError(
            f"source {source} has {shards} shards for {lanes} lanes; needed: a shard for each. Set"
            f" data.lanes to {shards} or less, or prepare smaller shards."
        )
    dealt = deal_shards(samples_per_shard, lanes)
    documents = [int(samples_per_shard[own].sum()) for own in dealt]
    if min(documents) < (1 - LANES_APART) * max(documents):
        raise ConfigError(
            f"source {source} has {shards} shards, which make {lanes} lanes of {min(documents):,}"
            f" to {max(documents):,} documents; needed: at most {LANES_APART:.0%} apart. Set"
            " data.lanes lower, or prepare smaller shards."
        )
    return dealt


def cut(source: int, documents: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Pieces:
    """Pieces of at most `max_tokens`: whole documents where they fit, else the fewest near-equal pieces.

    The bodies (all but the stored [CLS] and [SEP]) of a document's pieces differ by at most one token.
    """
    assert max_tokens >= 3, "a piece holds [CLS], [SEP] and at least one token"
    lengths = lengths.astype(np.int64)
    if len(lengths) and lengths.min() < 1:
        place = int(documents[lengths.argmin()])
        raise ShardError(
            f"document {place} of source number {source} has {lengths.min()} tokens by lengths.bin;"
            " needed: at least 1. Look at the folder with data-prep verify."
        )
    body = lengths - 2
    count = np.where(lengths <= max_tokens, 1, -(-body // (max_tokens - 2)))
    whose = np.repeat(np.arange(len(documents)), count)
    number = np.arange(len(whose)) - np.repeat(np.cumsum(count) - count, count)
    body, count, length = body[whose], count[whose], lengths[whose]
    start = np.where(number == 0, 0, 1 + body * number // count)
    end = np.where(number == count - 1, length, 1 + body * (number + 1) // count)
    tokens = (end - start) + (start > 0) + (end < length)
    return Pieces(
        np.stack([np.full(len(whose), source), documents[whose], start, end], axis=1), tokens
    )


def lay_rows(pieces: Pieces, packing: Packing, order_R: np.ndarray) -> WindowPlan:
    """The plan in which these rows of a packing follow each other."""
    counts = np.diff(packing.row_starts_R1)[order_R]
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = packing.pieces_P[
        np.repeat(packing.row_starts_R1[order_R] - starts[:-1], counts) + np.arange(starts[-1])
    ]
    tokens = np.concatenate([[0], np.cumsum(pieces.tokens_P[order])])
    return WindowPlan(pieces.pieces_P4[order], starts, np.diff(tokens[starts]))
