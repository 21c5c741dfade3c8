"""Planned rows to one micro-batch: read the pieces, mask them, lay everything end to end.

What a row contains, its masks and its token keys are functions of the row's address alone. Padding, the micro-batch
and the other rows never enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, cast

import numpy as np
import torch

from encoder.base.batch import IGNORE, Targets, TokenBatch
from encoder.base.errors import DamagedShard
from encoder.base.objective import MaskedRow, Masker, RowPairs, RowTargets
from encoder.base.rng import address_key, generator, splitmix64
from encoder.base.world import World
from encoder.data.shard_format import SpecialIds
from encoder.data.shards import Source
from encoder.data.windows import DOCUMENT, GOES_ON, SOURCE, RowGeometry

# Static shapes: cu_seqlens has room for one document in 128 tokens (web text has one in 500 to
# 1,000), doubled until it suffices; each unused entry costs attention kernels an empty block
TOKENS_PER_SEQLEN = 128


@dataclass(frozen=True)
class RowSpec:
    """One row to be assembled."""

    # Windows.address and row, or ("held_out", source, row): keys masks and dropout
    address: tuple[int | str, ...]
    number: int  # in its step, counted over all ranks
    pieces_P4: np.ndarray  # int64, as in WindowPlan
    label_P: np.ndarray | None = None  # int8, as in WindowPlan
    # tokens of the phase before this row: what schedules of masks go by
    phase_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A micro-batch, and the hash of its rows: int64, summed with wrapping."""

    batch: TokenBatch
    row_hash: int

    def __getstate__(self) -> dict[str, Any]:
        # from a worker tensors travel as arrays through its pipe: seven tensors in shared
        # memory would cost the main process 1 ms in handles and 2 ms in waiting, whatever their
        # size, and need room in /dev/shm
        arrays = {name: tensor.numpy() for name, tensor in self.batch.tensors().items()}
        bare = self.batch.with_tensors(dict.fromkeys(arrays, cast(torch.Tensor, None)))
        return {"row_hash": self.row_hash, "bare": bare, "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in state["arrays"].items()}
        object.__setattr__(self, "row_hash", state["row_hash"])
        object.__setattr__(self, "batch", state["bare"].with_tensors(tensors))

    def pin_memory(self) -> Assembled:
        """The same in page-locked memory; torch's DataLoader asks for it by this name."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.batch.tensors().items()}
        return Assembled(batch=self.batch.with_tensors(pinned), row_hash=self.row_hash)


@dataclass(frozen=True)
class _Row:
    masked: MaskedRow
    lengths_P: list[int]
    token_key_T: np.ndarray
    hash: int


@dataclass(frozen=True, kw_only=True)
class Assembler:
    """Makes micro-batches of at most `micro_batch_rows` rows. Picklable: worker processes hold a copy.

    With `static_shapes` every micro-batch has micro_batch_rows * row_tokens tokens and the same number of targets,
    the padding at its end in segments of at most `max_tokens_per_document`. Without, tokens and targets are padded
    to the next multiple of `shape_step`, and a micro-batch without a row has so many.
    """

    sources: Sequence[Source]  # of one tokenizer
    masker: Masker
    seed: int  # of the run
    geometry: RowGeometry
    micro_batch_rows: int
    static_shapes: bool
    shape_step: int = 1

    @property
    def specials(self) -> SpecialIds:
        """The special ids of the sources."""
        return self.sources[0].card.specials

    def assemble(self, specs: Sequence[RowSpec]) -> Assembled:
        """The micro-batch of these rows. Raises ShardError for a shard that cannot be read, DamagedShard for one that is wrong."""
        # a row without pieces: all that it had was left out
        rows = [self._row(spec) for spec in specs if len(spec.pieces_P4)]
        tokens = sum(len(r.masked.ids) for r in rows)

        # static shapes: rows times their capacity; else about what
        # the rows hold, and never an empty tensor
        total = _next_multiple(max(tokens, 1), self.shape_step)
        if self.static_shapes:
            total = self.micro_batch_rows * self.geometry.row_tokens

        # padding is cut into documents as text is, so that max_seqlen holds for it, too
        lengths = list(chain.from_iterable(r.lengths_P for r in rows))
        lengths += self._padding_segments(total - tokens)
        starts_S1 = np.concatenate([[0], np.cumsum(lengths)])
        row_starts = np.cumsum([0, *(len(r.masked.ids) for r in rows)])

        # the place of each token in its document: its place in the
        # micro-batch less the document's start
        positions_T = np.arange(total) - np.repeat(starts_S1[:-1], lengths)

        seqlens = len(starts_S1)
        longest = max(lengths)
        if self.static_shapes:
            # unused entries repeat the total: empty documents behind the last
            seqlens = self._seqlens_room(len(starts_S1))
            longest = self.geometry.max_tokens_per_document

        batch = TokenBatch(
            ids_T=_filled([r.masked.ids for r in rows], total, self.specials.pad_id),
            positions_T=torch.from_numpy(positions_T.astype(np.int32)),
            cu_seqlens_S1=_filled([starts_S1], seqlens, total, dtype=np.int32),
            max_seqlen=longest,
            targets={term: self._targets(term, rows, row_starts) for term in self.masker.terms},
            token_key_T=_filled([r.token_key_T for r in rows], total, 0),
            segments_T=self._segments(rows, total),
            tokens=tokens,
        )
        return Assembled(batch=batch, row_hash=wrap_int64(sum(r.hash for r in rows)))

    def _targets(self, term: str, rows: Sequence[_Row], row_starts: np.ndarray) -> Targets:
        # a row's targets, moved to where the row stands in the micro-batch
        index = [
            r.masked.targets[term].index + start for r, start in zip(rows, row_starts, strict=False)
        ]
        value = [r.masked.targets[term].value for r in rows]
        count = sum(len(part) for part in index)

        # targets have a room of their own; unused places get IGNORE, which no loss counts
        room = _next_multiple(count, self.shape_step)
        if self.static_shapes:
            of_row = self.masker.capacity(term, self.geometry.row_tokens)
            room = self.micro_batch_rows * of_row
        return Targets(
            index_M=_filled(index, room, 0), value_M=_filled(value, room, IGNORE), count=count
        )

    def _segments(self, rows: Sequence[_Row], total: int) -> torch.Tensor | None:
        if not self.masker.has_segments:
            return None
        parts = [r.masked.segments for r in rows if r.masked.segments is not None]
        assert len(parts) == len(rows), "a masker that has segments gives them for every row"
        return _filled(parts, total, 0)

    def _row(self, spec: RowSpec) -> _Row:
        parts: list[np.ndarray] = []
        goes_on_P = _goes_on(spec)
        laid_P = [
            self._lay_piece(parts, *piece, goes_on=goes_on)
            for piece, goes_on in zip(spec.pieces_P4.tolist(), goes_on_P, strict=True)
        ]

        # of pairs and blocks the document is all its parts: attention and
        # positions go over [CLS] A [SEP] B [SEP]
        pairs, lengths = _joined(spec, laid_P, has_pairs=self.masker.pairs is not None)
        ids = np.concatenate(parts, dtype=np.int64)
        assert len(ids) <= self.geometry.row_tokens, "a row was planned above its capacity"

        self._check_ids(ids, spec)
        place = spec.address

        # the address keys all that is drawn: neither rank nor
        # micro-batch nor the other rows enter
        masked = self.masker.mask(
            ids,
            generator(self.seed, "mlm", *place),
            lengths=lengths,
            phase_tokens=spec.phase_tokens,
            **pairs,
        )
        masked = replace(
            masked,
            targets={term: self._in_room(term, masked.targets[term]) for term in self.masker.terms},
        )

        # one key per token: SplitMix64 over a counter that begins at
        # the row's key and wraps at 2^64
        with np.errstate(over="ignore"):
            counters = address_key(self.seed, "dropout", *place)[0] + np.arange(
                len(ids), dtype=np.uint64
            )
        return _Row(
            masked,
            lengths,
            splitmix64(counters).view(np.int64),
            _row_hash(spec.number, masked, lengths),
        )

    def _in_room(self, term: str, targets: RowTargets) -> RowTargets:
        # room is counted by row, not by micro-batch, so that what is predicted does
        # not depend on the micro-batch
        room = self.masker.capacity(term, self.geometry.row_tokens)
        return RowTargets(targets.index[:room], targets.value[:room])

    def _lay_piece(
        self,
        parts: list[np.ndarray],
        source: int,
        document: int,
        start: int,
        end: int,
        *,
        goes_on: bool,
    ) -> int:
        """Append a piece's ids, with [CLS] and [SEP] put back where it was cut; returns its length.

        parts: what is laid already
        source, document, start, end: the piece
        goes_on: it is no first of a pair or block, and has no [CLS]
        """
        ids = self.sources[source].read(document)
        first = len(parts)
        # cut at its front: what stands before every document is put back, but not inside one
        if start > 0 and not goes_on and self.specials.before:
            parts.append(np.array(self.specials.before))
        parts.append(ids[start:end])
        if end < len(ids) and self.specials.behind:
            parts.append(np.array(self.specials.behind))
        return sum(len(part) for part in parts[first:])

    def _check_ids(self, ids: np.ndarray, spec: RowSpec) -> None:
        vocab_size = self.sources[0].card.vocab_size
        if ids.max() < vocab_size and ids.min() >= 0:
            return

        # rare: the documents are read once more, to name the one that is wrong
        for source, document in spec.pieces_P4[:, [SOURCE, DOCUMENT]].tolist():
            read = self.sources[source].read(document)
            wrong = read[(read >= vocab_size) | (read < 0)]
            if len(wrong):
                raise DamagedShard(
                    f"{self.sources[source].file_of(document)} holds id {wrong[0]}, its vocabulary"
                    f" has {vocab_size:,}. Copy or prepare the shard again.",
                    source=self.sources[source].name,
                    shard=self.sources[source].shard_of(document),
                )

    def _padding_segments(self, padding: int) -> list[int]:
        whole, rest = divmod(padding, self.geometry.max_tokens_per_document)
        return [self.geometry.max_tokens_per_document] * whole + [rest] * (rest > 0)

    def _seqlens_room(self, needed: int) -> int:
        room = max(2, self.micro_batch_rows * self.geometry.row_tokens // TOKENS_PER_SEQLEN)
        # doubled, so that few shapes occur and each recurs
        while room < needed:
            room *= 2
        return room


def _next_multiple(number: int, step: int) -> int:
    return -(-number // step) * step


def _goes_on(spec: RowSpec) -> list[bool]:
    """Which pieces go on with the document that one before them began."""
    if spec.label_P is None:
        return [False] * len(spec.pieces_P4)
    return (spec.label_P == GOES_ON).tolist()


def _joined(
    spec: RowSpec, laid_P: list[int], *, has_pairs: bool
) -> tuple[dict[str, RowPairs], list[int]]:
    """The masker's argument `pairs`, left out for a row without pairs; and the lengths of the row's documents."""
    if spec.label_P is None:
        return {}, laid_P

    # a document is the pieces from one that begins it up to the next
    laid = np.array(laid_P, dtype=np.int64)
    first = np.flatnonzero(spec.label_P != GOES_ON)
    lengths = np.add.reduceat(laid, first).tolist()
    if not has_pairs:
        return {}, lengths
    return {"pairs": RowPairs(spec.label_P[first].astype(np.int64), laid[first])}, lengths


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """Which rank this is, and how its rows are laid out: nothing here changes what a row is."""

    world: World = field(default_factory=World)
    micro_batch_rows: int  # rows in one forward
    static_shapes: bool  # whether micro-batches are padded to one shape
    shape_step: int = 1  # where they are not: of what tokens and targets are a multiple


def deal(
    specs: Sequence[RowSpec], *, rank: int, world_size: int, micro_batch_rows: int, lanes: int = 1
) -> list[list[RowSpec]]:
    """This rank's micro-batches of a step: row r goes to rank r mod world; every rank gets the same number of them.

        5 rows, 2 ranks, 2 rows a micro-batch:     rank 0  [0 2] [4]     rank 1  [1 3] []

    Row r is of lane r mod lanes. Ranks that follow each other (a node's) serve lanes that follow each other, as far as
    lanes and ranks have a common divisor g: rank group 0 of g has lane group 0 of g, dealt inside it as above.

        8 rows, 4 ranks, 2 lanes:     lane 0  rank 0 [0 4]  rank 1 [2 6]     lane 1  rank 2 [1 5]  rank 3 [3 7]
    """
    assert lanes == 1 or len(specs) % lanes == 0, "a step has as many rows of every lane"

    # inside its group a rank takes every group_ranks-th row of the group's lanes
    own = lanes_of(rank, world_size=world_size, lanes=lanes)
    group_ranks = world_size // math.gcd(lanes, world_size)
    mine = [s for s in specs if s.number % lanes in own][rank % group_ranks :: group_ranks]
    # rounded up over all ranks: each runs as many micro-batches, the
    # last ones perhaps without a row
    count = -(-len(specs) // (world_size * micro_batch_rows))
    return [list(mine[i * micro_batch_rows : (i + 1) * micro_batch_rows]) for i in range(count)]


def lanes_of(rank: int, *, world_size: int, lanes: int) -> range:
    """The lanes whose rows `deal` gives to a rank, alone or with the other ranks of its group."""
    # groups divide ranks and lanes evenly: rank r is in group floor(r groups / world_size)
    groups = math.gcd(lanes, world_size)
    group = rank * groups // world_size
    return range(group * lanes // groups, (group + 1) * lanes // groups)


def wrap_int64(number: int) -> int:
    """The number modulo 2^64 as a signed 64-bit integer: what adding int64 tensors gives."""
    return (number + 2**63) % 2**64 - 2**63


def _row_hash(number: int, masked: MaskedRow, lengths_P: Sequence[int]) -> int:
    """Of the row's number, where its documents end, the ids after masking, each term's targets, and the segments."""
    digest = blake2b(np.array([number, *lengths_P], dtype="<i8").data, digest_size=8)

    # only what is there is hashed: further terms and segments leave no mark where there are none.
    # Each further term begins with its length
    first, *others = masked.targets.values()
    parts = [masked.ids, *first]
    for targets in others:
        parts += [np.array([len(targets.index)]), *targets]
    if masked.segments is not None:
        parts.append(masked.segments)

    for part in parts:
        digest.update(part.astype("<u4").data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _filled(
    parts: Sequence[np.ndarray], size: int, fill: int, *, dtype: type = np.int64
) -> torch.Tensor:
    """The parts end to end, and `fill` behind them, [size]."""
    whole: np.ndarray = np.empty(size, dtype=dtype)
    at = 0
    for part in parts:
        whole[at : at + len(part)] = part
        at += len(part)
    whole[at:] = fill
    return torch.from_numpy(whole)
