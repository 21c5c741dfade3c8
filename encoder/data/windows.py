"""Windows: a few thousand documents of the mixture, cut to length and packed together, each planned on its own.

Window k takes floor((k+1) x_s) - floor(k x_s) documents of source s, where x_s is the source's share of the window's
documents: proportional to weight / mean length, so that weights are shares of tokens. All in whole numbers, so that
window 10^9 is as exact, and as near, as window 0. Each lane has windows of its own, over its own shards of every
source, so that a reader of one lane needs only those.

    documents longer than the phase allows are cut into near-equal pieces, [CLS] and [SEP] put back:
        stored   C a b c d e f g S     (9 tokens, at most 6)
        pieces   C a b c S'            start 0, end 4      S' and C' are put back, never stored
                 C' d e f g S          start 4, end 9

    where the objective asks for pairs (pairs.py), two pieces are one document, the second without [CLS]:
        stored   C a b. c d. e. S      sentences of 2, 2 and 1 tokens
        pair     C' a b. S' c d. e. S' start 1, end 3; start 3, end 6

    where documents are joined (blocks.py), so are all pieces of a block
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np

from encoder.base.errors import ConfigError, ShardError
from encoder.base.objective import LEAST_PAIR_TOKENS, PairRule
from encoder.base.rng import generator
from encoder.base.tokenizer_json import Frame
from encoder.data.blocks import Blocks, blocks_of
from encoder.data.order import DocumentOrder, deal_shards
from encoder.data.packing import Packing, pack_best_fit
from encoder.data.pairs import WindowSentences, pairs_of
from encoder.data.sentences import SentenceLists
from encoder.data.shard_format import Card

SOURCE, DOCUMENT, START, END = range(4)  # columns of a piece
GOES_ON = -1  # in the place of a label: the piece goes on with what the one before it began
# a step takes as many rows of each lane, so that a lane with 5 % fewer documents
# repeats its own 5 % more often
LANES_APART = 0.05
LEAST_DOCUMENT_TOKENS = 3  # [CLS], [SEP] and one between them
# documents: pieces of one length stay in the order of their documents; mixed: they are shuffled before they are packed
PieceOrder = Literal["mixed", "documents"]
# whether documents are joined to blocks of running text, and where these may end
Join = Literal["none", "anywhere", "sentences"]


class PlannedSource(Protocol):
    """What planning knows of a source: no shard is opened."""

    @property
    def name(self) -> str:
        """In reports and in the order's address."""

    @property
    def card(self) -> Card:
        """Its totals."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""

    @property
    def samples_per_shard(self) -> np.ndarray:
        """Documents of each shard."""

    def sentences_of(self, documents: np.ndarray) -> SentenceLists:
        """Asked for pairs, and for blocks of whole sentences. Raises ShardError where its sentences are not known."""


@dataclass(frozen=True)
class WindowPlan:
    """The rows of one window. P pieces, R rows.

    A piece is (source, document, start, end): stored tokens start to end of that document, with [CLS] put back where
    start > 0 and [SEP] where end is not the document's. One that goes on, as the second of a pair, gets no [CLS]. Of the frame
    `end` a piece gets [SEP] [CLS] where end is not the document's, and nothing before it.
    """

    pieces_P4: np.ndarray  # int64, row after row
    row_starts_R1: np.ndarray  # int64 into the pieces
    tokens_R: np.ndarray  # int64, tokens of each row without padding
    # int8 [P]: the label of the pair, or 0 of the block, that begins
    # with the piece, or GOES_ON; None: each piece is a document
    label_P: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return len(self.tokens_R)

    def pieces(self, row: int) -> np.ndarray:
        """The pieces of a row, int64 [pieces, 4], in the order they are laid."""
        return self.pieces_P4[self._of_row(row)]

    def labels(self, row: int) -> np.ndarray | None:
        """label_P of the pieces of a row."""
        if self.label_P is None:
            return None
        return self.label_P[self._of_row(row)]

    def _of_row(self, row: int) -> slice:
        return slice(self.row_starts_R1[row], self.row_starts_R1[row + 1])


@dataclass(frozen=True, kw_only=True)
class RowGeometry:
    """How long rows and the pieces in them are."""

    row_tokens: int  # capacity of a row
    max_tokens_per_document: int  # longer documents are cut into near-equal pieces; also of a block
    join: Join = "none"  # of training documents to blocks; held-out ones stay apart


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """What decides, beside the shards, which document comes when."""

    weights: Sequence[float]  # of the sources: shares of the tokens
    seed: int  # of the run
    phase: int  # its number
    window_documents: int  # packed together
    lanes: int = 1  # sequences of windows side by side, each over its own shards
    # of a source, whose documents are shuffled together; None: as DocumentOrder has it
    shuffle_shards: int | None = None
    piece_order: PieceOrder = "documents"
    # (number of the source, shard): their pieces are taken out of the rows once these are laid
    left_out: Sequence[tuple[int, int]] = ()


class Windows:
    """The windows of one phase: a pure function of lane and window number. Raises ConfigError as shards_of_lanes does.

    What is left out moves nothing: all else stays where it was.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        *,
        order: DataOrder,
        geometry: RowGeometry,
        pairs: PairRule | None = None,
    ) -> None:
        """
        sources: order.weights has one of each
        order: which document comes when
        geometry: how long rows and pieces are
        pairs: how documents become pairs of sentences; None: they stay documents
        """
        self._sources = sources
        self._pairs = pairs
        self._order = order
        self._geometry = geometry
        self._left_out = frozenset(order.left_out)

        self._documents_per_window = documents_per_window(
            [s.card for s in sources], order.weights, order.window_documents
        )

        # by lane and source: an order over the lane's own shards
        dealt = [shards_of_lanes(s.name, s.samples_per_shard, order.lanes) for s in sources]
        self._orders_of_lane = [
            self._orders_of(lane, shards_of_sources)
            for lane, shards_of_sources in enumerate(zip(*dealt, strict=True))
        ]

    def _orders_of(self, lane: int, shards_of_sources: Sequence[np.ndarray]) -> list[DocumentOrder]:
        orders = []
        for source, shards in zip(self._sources, shards_of_sources, strict=True):
            order = DocumentOrder(
                source.samples_per_shard,
                seed=self._order.seed,
                phase=self._order.phase,
                source=source.name,
                lane=(lane, shards) if self._order.lanes > 1 else None,
                group_shards=self._order.shuffle_shards,
            )
            orders.append(order)
        return orders

    def address(self, window: int, *, lane: int = 0) -> tuple[int, ...]:
        """Where a window stands in the run: (phase, window), with several lanes (phase, lane, window)."""
        # one lane is left out: its masks and rows are those of a run without lanes
        if self._order.lanes == 1:
            return (self._order.phase, window)
        return (self._order.phase, lane, window)

    def documents_before(self, window: int) -> list[int]:
        """How many documents of each source the windows of a lane before this one took."""
        # floor(window x), with x an exact fraction
        return [x.numerator * window // x.denominator for x in self._documents_per_window]

    def epochs_before(self, windows: Sequence[int]) -> dict[str, float]:
        """How often the lane that did so most went through its documents of each source, by name, when each stands at the
        beginning of its window."""
        most = dict.fromkeys((s.name for s in self._sources), 0.0)
        for window, orders in zip(windows, self._orders_of_lane, strict=False):
            documents = self.documents_before(window)
            for source, n, order in zip(self._sources, documents, orders, strict=True):
                most[source.name] = max(most[source.name], n / order.documents_per_epoch)
        return most

    def shards(self, window: int, count: int, *, lane: int = 0, at_most: int) -> list[list[int]]:
        """Of each source the shards that `count` windows of a lane read, soonest first; at least those of its next document."""
        starts = self.documents_before(window)
        ends = self.documents_before(window + count)

        found = []
        for number, order in enumerate(self._orders_of_lane[lane]):
            documents = max(1, ends[number] - starts[number])
            read = order.shards(starts[number], documents, at_most=at_most)
            found.append([shard for shard in read if (number, shard) not in self._left_out])
        return found

    def plan(self, window: int, *, lane: int = 0) -> WindowPlan:
        """The rows of a lane's window, packed and shuffled."""
        before, after = self.documents_before(window), self.documents_before(window + 1)
        documents = [
            order.documents(before[number], after[number] - before[number])
            for number, order in enumerate(self._orders_of_lane[lane])
        ]

        pieces = pieces_of(
            self._sources,
            documents,
            max_tokens=self._geometry.max_tokens_per_document,
            pairs=self._pairs,
            join=self._geometry.join,
            chance=generator(self._order.seed, "pairs", *self.address(window, lane=lane)),
        )

        # best fit decreasing puts the longest pieces into the first rows: rows are shuffled
        packing = self._packing(pieces, window, lane)
        shuffled = generator(
            self._order.seed, "rows", *self.address(window, lane=lane)
        ).permutation(packing.rows)

        plan = lay_rows(pieces, packing, shuffled)
        if self._left_out:
            plan = self._without_left_out(plan)
        return plan

    def _packing(self, pieces: Pieces, window: int, lane: int) -> Packing:
        """Which pieces each row holds.

        A long document's pieces have one length or two. In their order they fill whole rows, so a batch of a few rows is of few
        documents. Shuffled before, a row has about as many documents as pieces; how full it is does not change.
        """
        if self._order.piece_order == "documents":
            return pack_best_fit(pieces.tokens_D, self._geometry.row_tokens)
        mixed_D = generator(
            self._order.seed, "pieces", *self.address(window, lane=lane)
        ).permutation(len(pieces.tokens_D))
        packing = pack_best_fit(pieces.tokens_D[mixed_D], self._geometry.row_tokens)
        return Packing(mixed_D[packing.pieces_P], packing.row_starts_R1)

    def _without_left_out(self, plan: WindowPlan) -> WindowPlan:
        source_P, document_P, start_P, end_P = plan.pieces_P4.T

        # tokens of each piece's document
        length_P = np.zeros(len(plan.pieces_P4), dtype=np.int64)
        for number, source in enumerate(self._sources):
            of_source_P = source_P == number
            length_P[of_source_P] = source.lengths[document_P[of_source_P]]

        kept_P = np.ones(len(plan.pieces_P4), dtype=bool)
        for number, shard in self._left_out:
            samples = self._sources[number].samples_per_shard
            first = int(samples[:shard].sum())
            kept_P &= (
                (source_P != number) | (document_P < first) | (document_P >= first + samples[shard])
            )

        # tokens of each row are counted anew, with what is put back where pieces were cut
        frame = self._sources[0].card.specials.frame
        tokens_P = (end_P - start_P) + put_back(start_P, end_P, length_P, frame)
        label_P = plan.label_P
        if label_P is not None:  # a pair or a block goes as a whole
            begins_P = label_P != GOES_ON
            kept_U = np.logical_and.reduceat(kept_P, np.flatnonzero(begins_P))
            kept_P = kept_U[np.cumsum(begins_P) - 1]
            # put_back counts a [CLS] for each part; one that goes on has none
            tokens_P = tokens_P - ~begins_P
            label_P = label_P[kept_P]

        tokens_P = tokens_P * kept_P
        tokens_R = np.diff(np.concatenate([[0], np.cumsum(tokens_P)])[plan.row_starts_R1])

        return WindowPlan(
            plan.pieces_P4[kept_P],
            np.concatenate([[0], np.cumsum(kept_P)])[plan.row_starts_R1],
            tokens_R,
            label_P,
        )


@dataclass(frozen=True)
class Pieces:
    """What is packed: int64 [P, 4] as in WindowPlan, and the tokens of each document, with what is put back. D documents.

    A document is what attention sees as one: a piece, a pair of two, or a block of any number.
    """

    pieces_P4: np.ndarray
    tokens_D: np.ndarray
    label_D: np.ndarray | None = None  # int8, as in WindowPlan; None: a document is a piece
    starts_D1: np.ndarray | None = None  # int64 into the pieces; None: a document is a piece

    @staticmethod
    def joined(parts: Sequence[Pieces]) -> Pieces:
        return Pieces(
            np.concatenate([p.pieces_P4 for p in parts]),
            np.concatenate([p.tokens_D for p in parts]),
        )

    @staticmethod
    def of_blocks(parts: Sequence[Blocks]) -> Pieces:
        """The blocks of several sources."""
        tokens_D = np.concatenate([p.tokens_B for p in parts])
        counts_D = np.concatenate([np.diff(p.starts_B1) for p in parts])
        return Pieces(
            np.concatenate([p.pieces_P4 for p in parts]),
            tokens_D,
            np.zeros(len(tokens_D), np.int8),
            np.concatenate([[0], np.cumsum(counts_D)]),
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

    # weight / mean length, as a fraction: documents of each source in proportion
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


def pieces_of(
    sources: Sequence[PlannedSource],
    documents: Sequence[np.ndarray],
    *,
    max_tokens: int,
    pairs: PairRule | None,
    chance: np.random.Generator,
    join: Join = "none",
) -> Pieces:
    """Documents as they are packed: cut to length, joined to blocks, or made into pairs of sentences.

    sources, documents: numbers of documents, int64, of each source
    max_tokens: of a piece, a block or a pair
    pairs: the rule; None: documents
    chance: for pairs, belongs to these documents alone
    join: whether documents become blocks, and where these end
    """
    numbered = list(zip(range(len(sources)), sources, documents, strict=True))
    if pairs is None and join == "none":
        return Pieces.joined(
            [
                cut(
                    number,
                    some,
                    source.lengths[some],
                    max_tokens,
                    frame=source.card.specials.frame,
                )
                for number, source, some in numbered
            ]
        )

    for source in sources:
        if source.card.specials.frame != "both_ends":
            asked = "pairs of sentences" if pairs else f"data.join {join}"
            raise ShardError(
                f"{source.name} has [CLS] behind each text; needed for {asked}: a tokenizer whose"
                " [CLS] stands first. Use objective: {name: mlm} without data.join, or other"
                " shards."
            )

    if pairs is None:
        return Pieces.of_blocks(
            [
                blocks_of(
                    number,
                    some,
                    source.lengths[some],
                    max_tokens=max_tokens,
                    sentences=source.sentences_of(some) if join == "sentences" else None,
                )
                for number, source, some in numbered
            ]
        )

    text = WindowSentences.joined(
        [(number, some, source.sentences_of(some)) for number, source, some in numbered]
    )
    made = pairs_of(text, pairs, max_tokens=max_tokens, chance=chance)
    starts_D1 = np.arange(0, len(made.pieces_P4) + 1, 2)
    return Pieces(made.pieces_P4, made.tokens, made.label, starts_D1)


def check_lengths(geometry: RowGeometry, *, pairs: PairRule | None) -> None:
    """A row has room for a document, and a document for its frame and text. Raises ConfigError."""
    max_tokens = geometry.max_tokens_per_document
    row_tokens = geometry.row_tokens
    least = LEAST_DOCUMENT_TOKENS
    if pairs is not None:
        least = LEAST_PAIR_TOKENS
    if not least <= max_tokens <= row_tokens:
        raise ConfigError(
            f"max_tokens_per_document {max_tokens:,} must lie between {least} and "
            f"row_tokens {row_tokens:,}."
        )


def cut(
    source: int,
    documents: np.ndarray,
    lengths: np.ndarray,
    max_tokens: int,
    *,
    frame: Frame = "both_ends",
) -> Pieces:
    """Pieces of at most `max_tokens`: whole documents where they fit, else the fewest near-equal pieces.

    The bodies (all but the stored [CLS] and [SEP]) of a document's pieces differ by at most one token.

    source: its number
    documents: numbers of documents, int64
    lengths: their tokens
    max_tokens: of a piece with its frame
    frame: of the documents
    """
    assert max_tokens >= LEAST_DOCUMENT_TOKENS, "a piece holds [CLS], [SEP] and at least one token"
    lengths = lengths.astype(np.int64)
    if len(lengths) and lengths.min() < 1:
        place = int(documents[lengths.argmin()])
        raise ShardError(
            f"document {place} of source number {source} has {lengths.min()} tokens by lengths.bin;"
            " needed: at least 1. Look at the folder with data-prep verify."
        )

    # whole, or ceil(body / (max_tokens - 2)) pieces, each of which has a frame of its own
    body = lengths - 2
    count = np.where(lengths <= max_tokens, 1, -(-body // (max_tokens - 2)))

    # of each piece: the number of its document, and its own number in the document
    whose = np.repeat(np.arange(len(documents)), count)
    number = np.arange(len(whose)) - np.repeat(np.cumsum(count) - count, count)

    # piece i has the body's tokens floor(i body / count) to floor((i + 1) body / count). The
    # first and the last piece keep the stored frame
    body, count, length = body[whose], count[whose], lengths[whose]
    first = int(frame == "both_ends")
    start = np.where(number == 0, 0, first + body * number // count)
    end = np.where(number == count - 1, length, first + body * (number + 1) // count)

    tokens = (end - start) + put_back(start, end, length, frame)
    return Pieces(
        np.stack([np.full(len(whose), source), documents[whose], start, end], axis=1), tokens
    )


def put_back(
    start_P: np.ndarray, end_P: np.ndarray, length_P: np.ndarray, frame: Frame
) -> np.ndarray:
    """Tokens of the frame that each piece lacks, int64 [P]: [CLS] where it was cut before, [SEP] where behind.

    start_P, end_P: of the pieces
    length_P: of their documents
    frame: end has both behind the text
    """
    behind_P = (end_P < length_P).astype(np.int64)
    if frame == "end":
        return 2 * behind_P
    return (start_P > 0) + behind_P


def lay_rows(pieces: Pieces, packing: Packing, order_R: np.ndarray) -> WindowPlan:
    """The plan in which these rows of a packing follow each other."""
    counts = np.diff(packing.row_starts_R1)[order_R]
    starts = np.concatenate([[0], np.cumsum(counts)])

    # a gather: each row's stretch of the packing, moved to where the row stands now
    moved = np.repeat(packing.row_starts_R1[order_R] - starts[:-1], counts)
    order = packing.pieces_P[moved + np.arange(starts[-1])]

    tokens = np.concatenate([[0], np.cumsum(pieces.tokens_D[order])])
    tokens_R = np.diff(tokens[starts])
    if pieces.starts_D1 is None or pieces.label_D is None:
        return WindowPlan(pieces.pieces_P4[order], starts, tokens_R)

    # the same gather once more: each document's pieces, the first before the others
    parts = np.diff(pieces.starts_D1)[order]
    before = np.concatenate([[0], np.cumsum(parts)])
    place = np.repeat(pieces.starts_D1[order] - before[:-1], parts) + np.arange(before[-1])

    label_P = np.full(len(place), GOES_ON, np.int8)
    label_P[before[:-1]] = pieces.label_D[order]
    return WindowPlan(pieces.pieces_P4[place], before[starts], tokens_R, label_P)
