"""Labelled examples to steps: an epoch is a permutation of them, a step the next so many, packed without padding.

    epoch 1    3 0 4 1 2        steps of 2 examples    [3 0] [4 1] [2]      position (epoch, index): 0 0, 0 2, 0 4, 1 0

The order is a function of (seed, epoch), dropout of (seed, epoch, example, token). Ranks and micro-batches decide only who
computes an example, and beside which others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from types import TracebackType

import numpy as np
import torch

from encoder.base.batch import Targets, TokenBatch, counts_of, nothing_to_predict
from encoder.base.rng import address_key, generator, splitmix64
from encoder.base.world import World
from encoder.data.assembly import wrap_int64
from encoder.data.loader import DataPosition, StepData
from encoder.data.packing import Packing, pack_best_fit


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where examples are asked, if not each at its first token. P places of N examples.

    words     [CLS] John Sm ith ran [SEP]          tokens 1 2 4           each by itself
    span      [CLS] who [SEP] John ran [SEP]       all tokens             one of them is picked
    choice    [CLS] a [SEP] [CLS] b c [SEP]        tokens 0 3             one of them; each begins a document
    """

    starts_N1: np.ndarray  # int64 into the places
    token_P: np.ndarray  # int32, ascending: the token of the example
    grouped: bool = False  # one of an example's places is picked: what is asked of it counts once
    documents: bool = False  # each place begins a document of its own

    def of(self, numbers_M: np.ndarray) -> np.ndarray:
        """Places of some examples, in their order: int64."""
        starts = self.starts_N1
        parts = [np.arange(starts[n], starts[n + 1]) for n in numbers_M]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Encoded rows of one data set, in its order. N of them, A tokens in all, asked at P places."""

    name: str
    ids_A: np.ndarray  # int32, all examples end to end
    starts_N1: np.ndarray  # int64 into ids_A
    # int64 [P] classes, float32 [P, K] numbers, or int8 [P, K] whether a place is to be picked
    value_P: np.ndarray
    segments_A: np.ndarray | None = None  # int8; None: the model has no segments
    places: Places | None = None  # None: each is asked at its first token, and P is N
    cut: int = 0  # examples that were longer than allowed

    def __len__(self) -> int:
        return len(self.starts_N1) - 1

    @cached_property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each."""
        return np.diff(self.starts_N1)

    @property
    def document_lengths_D(self) -> np.ndarray:
        """Tokens of each document: of an example, or of each of its choices."""
        places = self.places
        if places is None or not places.documents:
            return self.lengths_N
        first_D = np.repeat(self.starts_N1[:-1], np.diff(places.starts_N1)) + places.token_P
        return np.diff(first_D, append=self.starts_N1[-1])

    def documents_of(self, numbers_M: np.ndarray) -> np.ndarray:
        """Documents of some examples, in their order: int64."""
        if self.places is None or not self.places.documents:
            return numbers_M
        return self.places.of(numbers_M)

    @property
    def asked(self) -> int:
        """What a loss over all of them is divided by."""
        each = self.places is not None and not self.places.grouped
        return len(self.value_P) if each else len(self)

    def places_of(self, numbers_M: np.ndarray) -> np.ndarray:
        """Places at which some examples are asked, in their order: int64."""
        return numbers_M if self.places is None else self.places.of(numbers_M)

    def some(self, first: int, end: int) -> Examples:
        """Those from `first` to before `end`, of texts that are asked at their first tokens and have no segments."""
        assert self.places is None and self.segments_A is None, "places and segments are not cut"
        begin, stop = self.starts_N1[first], self.starts_N1[end]
        return Examples(
            name=self.name,
            ids_A=self.ids_A[begin:stop],
            starts_N1=self.starts_N1[first : end + 1] - begin,
            value_P=self.value_P[first:end],
        )

    @cached_property
    def sha256(self) -> str:
        """Hex digest of ids, lengths, targets, segments and places: what a resume is held against."""
        digest = sha256()
        parts = [self.ids_A, self.starts_N1, self.value_P]
        if self.segments_A is not None:
            parts.append(self.segments_A)
        if self.places is not None:
            parts += [self.places.starts_N1, self.places.token_P]
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ExampleDealing:
    """Who computes what: nothing here changes what a step is."""

    world: World
    micro_batch_tokens: int  # of one forward, unless one example is longer


@dataclass(frozen=True, kw_only=True)
class NumberedBatch:
    """A micro-batch of some examples, and their numbers in the data set. M of them."""

    batch: TokenBatch
    numbers_M: np.ndarray  # int64


class ExampleSteps:
    """The steps of a fine-tuning from a position on, without end (encoder.train.course.Steps)."""

    def __init__(
        self,
        examples: Examples,
        *,
        term: str,
        seed: int,
        epochs: int,
        batch_examples: int,
        dealing: ExampleDealing,
        start: DataPosition,
    ) -> None:
        """examples: that are gone through
        term: the loss term whose targets they have
        seed: of order and dropout
        epochs: how many there are; the steps themselves have no end
        batch_examples: of a step over all ranks; the last one of an epoch may have fewer
        dealing: who computes what
        start: where the run stands
        """
        self._examples, self._term, self._seed = examples, term, seed
        self._epochs = epochs
        self._batch_examples, self._dealing = batch_examples, dealing
        self._position = DataPosition(
            lanes=start.lanes or ((0, 0),), phase_tokens=start.phase_tokens
        )
        self._order: tuple[int, np.ndarray] | None = None  # of an epoch

    def next_step(self) -> StepData:
        """The next step; a function of the position."""
        start = self._position
        ((epoch, index),) = start.lanes
        numbers = self.order_of(epoch)[index : index + self._batch_examples]
        lengths = self._examples.lengths_N[numbers]

        mine = [
            self._micro_batch(numbers[packed], epoch=epoch)
            for packed in deal_examples(lengths, self._dealing)
        ]
        # every rank hashes what it computes, by the place in the step
        places = {int(number): place for place, number in enumerate(numbers)}
        hashes = [
            _example_hash(self._examples, int(number), places[int(number)])
            for made in mine
            for number in made.numbers_M
        ]

        tokens = int(lengths.sum())
        after = index + len(numbers)
        place = (epoch + 1, 0) if after == len(self._examples) else (epoch, after)
        self._position = DataPosition(lanes=(place,), phase_tokens=start.phase_tokens + tokens)
        batches = [made.batch for made in mine]
        return StepData(
            micro_batches=batches,
            rows=len(numbers),
            tokens=tokens,
            counts=counts_of(batches),
            row_hash=wrap_int64(sum(hashes)),
            start=start,
            end=self._position,
            fill=1.0,
        )

    def epochs_at(self, position: DataPosition) -> dict[str, float]:
        """How often the examples were gone through."""
        ((epoch, index),) = position.lanes or ((0, 0),)
        # behind the last epoch none begins
        return {self._examples.name: min(epoch, self._epochs - 1) + index / len(self._examples)}

    def __enter__(self) -> ExampleSteps:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Nothing is held."""

    def order_of(self, epoch: int) -> np.ndarray:
        """Numbers of all examples in the order of an epoch, int64 [N]."""
        if self._order is None or self._order[0] != epoch:
            draw = generator(self._seed, "examples", epoch)
            self._order = epoch, draw.permutation(len(self._examples))
        return self._order[1]

    def _micro_batch(self, numbers_M: np.ndarray, *, epoch: int) -> NumberedBatch:
        return micro_batch(
            self._examples,
            numbers_M,
            term=self._term,
            keys_of=lambda number: address_key(self._seed, "dropout", "examples", epoch, number),
        )


def in_order(examples: Examples, *, term: str, dealing: ExampleDealing) -> list[NumberedBatch]:
    """This rank's micro-batches of all examples, once; their numbers say which is which.

    examples: of one data set
    term: the loss term whose targets they have
    dealing: who computes what
    """
    return [
        micro_batch(examples, numbers, term=term)
        for numbers in deal_examples(examples.lengths_N, dealing)
        if len(numbers)
    ]


def deal_examples(lengths_N: np.ndarray, dealing: ExampleDealing) -> list[np.ndarray]:
    """This rank's micro-batches of some examples, as places among them; every rank gets as many, the last perhaps empty.

    They are packed best-fit into as few micro-batches as the ranks can share, all about as full.

    lengths_N: tokens of each
    dealing: who computes what
    """
    ranks, longest = dealing.world.size, int(lengths_N.max())
    capacity = max(dealing.micro_batch_tokens, longest)
    packing = pack_best_fit(lengths_N, capacity)
    rounds = -(-packing.rows // ranks)

    # 1 rank of 4 with all the work would leave 3 idle: a smaller capacity, as long as
    # no further round is needed
    even = max(longest, -(-int(lengths_N.sum()) // (ranks * rounds)))
    while even < capacity:
        tried = pack_best_fit(lengths_N, even)
        if tried.rows <= ranks * rounds:
            packing = tried
            break
        even += -(-even // 16)

    rows = _rows_of(packing)
    mine = rows[dealing.world.rank :: ranks]
    return mine + [np.empty(0, dtype=np.int64)] * (rounds - len(mine))


def _rows_of(packing: Packing) -> list[np.ndarray]:
    ends = packing.row_starts_R1
    # in a micro-batch the examples stand in their order
    return [np.sort(packing.pieces_P[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def micro_batch(
    examples: Examples,
    numbers_M: np.ndarray,
    *,
    term: str,
    keys_of: Callable[[int], np.ndarray] | None = None,
) -> NumberedBatch:
    """Some examples end to end, with the targets of their places.

    examples: of one data set
    numbers_M: which of them; none: a batch that asks nothing
    term: the loss term
    keys_of: the key of an example that its tokens' keys follow from; None: no dropout is drawn
    """
    if not len(numbers_M):
        return NumberedBatch(batch=nothing_to_predict([term]), numbers_M=numbers_M)
    lengths = examples.lengths_N[numbers_M]
    starts_M1 = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts_M1[-1])
    # number of each token in its example
    token_T = np.arange(total) - np.repeat(starts_M1[:-1], lengths)
    keys_T = np.zeros(total, dtype=np.int64)
    if keys_of is not None:
        firsts = np.array([keys_of(int(number))[0] for number in numbers_M], dtype=np.uint64)
        # a key for each token: SplitMix64 over a counter that begins at the example's, modulo 2^64
        with np.errstate(over="ignore"):
            counters_T = np.repeat(firsts, lengths) + token_T.astype(np.uint64)
        keys_T = splitmix64(counters_T).view(np.int64)

    segments_T = None
    if examples.segments_A is not None:
        segments_T = torch.from_numpy(_taken(examples.segments_A, examples, numbers_M, np.int64))
    targets = _targets(examples, numbers_M, starts_M1[:-1])
    starts_S1 = starts_M1
    if examples.places is not None and examples.places.documents:
        starts_S1 = np.append(targets.index_M.numpy(), total)
    lengths_S = np.diff(starts_S1)
    positions_T = np.arange(total) - np.repeat(starts_S1[:-1], lengths_S)
    batch = TokenBatch(
        ids_T=torch.from_numpy(_taken(examples.ids_A, examples, numbers_M, np.int64)),
        positions_T=torch.from_numpy(positions_T.astype(np.int32)),
        cu_seqlens_S1=torch.from_numpy(starts_S1.astype(np.int32)),
        max_seqlen=int(lengths_S.max()),
        targets={term: targets},
        token_key_T=torch.from_numpy(keys_T),
        tokens=total,
        segments_T=segments_T,
    )
    return NumberedBatch(batch=batch, numbers_M=numbers_M)


def _targets(examples: Examples, numbers_M: np.ndarray, starts_M: np.ndarray) -> Targets:
    """Of some examples that begin at these tokens of a batch."""
    places = examples.places
    places_P = examples.places_of(numbers_M)
    value_P = torch.from_numpy(examples.value_P[places_P])
    if places is None:
        return Targets(
            index_M=torch.from_numpy(starts_M.copy()), value_M=value_P, count=len(numbers_M)
        )
    counts_M = np.diff(places.starts_N1)[numbers_M]
    index_P = np.repeat(starts_M, counts_M) + places.token_P[places_P]
    group_P = np.repeat(np.arange(len(numbers_M)), counts_M)
    return Targets(
        index_M=torch.from_numpy(index_P),
        value_M=value_P,
        count=len(numbers_M) if places.grouped else len(places_P),
        group_M=torch.from_numpy(group_P) if places.grouped else None,
    )


def _taken(
    flat_A: np.ndarray, examples: Examples, numbers_M: Sequence[int] | np.ndarray, dtype: type
) -> np.ndarray:
    starts = examples.starts_N1
    parts = [flat_A[starts[n] : starts[n + 1]] for n in numbers_M]
    return np.concatenate(parts).astype(dtype)


def _example_hash(examples: Examples, number: int, place: int) -> int:
    """Of its place in the step, its ids, its targets, its segments and where it is asked."""
    start, end = examples.starts_N1[number], examples.starts_N1[number + 1]
    digest = blake2b(np.array([place, end - start], dtype="<i8").data, digest_size=8)
    digest.update(examples.ids_A[start:end].astype("<u4").data)
    places_P = examples.places_of(np.array([number]))
    digest.update(np.ascontiguousarray(examples.value_P[places_P]).tobytes())
    if examples.segments_A is not None:
        digest.update(examples.segments_A[start:end].tobytes())
    if examples.places is not None:
        digest.update(examples.places.token_P[places_P].tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
