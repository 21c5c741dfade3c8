"""Planned rows to one micro-batch: read the pieces, ask the question, lay everything end to end.

What a row contains, its masks and its dropout keys are functions of the row's address alone. Padding, the micro-batch
and the other rows never enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from encoder.base.batch import IGNORE, TokenBatch
from encoder.base.errors import DamagedShard
from encoder.base.question import Corrupt, Question
from encoder.base.rng import address_key, generator, splitmix64
from encoder.data.shards import Source
from encoder.data.windows import DOCUMENT, SOURCE

# Static shapes: cu_seqlens has room for one document in 128 tokens (web text has one in 500 to 1,000), doubled until it
# suffices; each unused entry costs attention kernels an empty block
TOKENS_PER_SEQLEN = 128


@dataclass(frozen=True)
class RowSpec:
    """One row to be assembled."""

    address: tuple[int | str, ...]     # Windows.address and row, or ("held_out", source, row): keys masks and dropout
    number: int                        # in its step, counted over all ranks
    pieces_P4: np.ndarray              # int64, as in WindowPlan
    phase_tokens: int = 0              # tokens of the phase before this row: what schedules of masks go by


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A micro-batch, and the hash of its rows: int64, summed with wrapping."""

    batch: TokenBatch
    row_hash: int

    def __getstate__(self) -> dict[str, Any]:
        # from a worker tensors travel as arrays through its pipe: seven tensors in shared memory would cost the main
        # process 1 ms in handles and 2 ms in waiting, whatever their size, and need room in /dev/shm
        return {"row_hash": self.row_hash, "batch": {name: value.numpy() if isinstance(value, torch.Tensor) else value
                                                     for name, value in vars(self.batch).items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        batch = TokenBatch(**{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                              for name, value in state["batch"].items()})
        object.__setattr__(self, "row_hash", state["row_hash"])
        object.__setattr__(self, "batch", batch)

    def pin_memory(self) -> Assembled:
        """The same in page-locked memory; torch's DataLoader asks for it by this name."""
        pinned = {name: value.pin_memory() if isinstance(value, torch.Tensor) else value
                  for name, value in vars(self.batch).items()}
        return Assembled(batch=TokenBatch(**pinned), row_hash=self.row_hash)


@dataclass(frozen=True)
class _Row:
    question: Question
    lengths_P: list[int]
    dropout_key_T: np.ndarray
    hash: int


@dataclass(frozen=True, kw_only=True)
class Assembler:
    """Makes micro-batches of at most `micro_batch_rows` rows. Picklable: worker processes hold a copy.

    With `static_shapes` every micro-batch has micro_batch_rows * row_tokens tokens and the same number of predicted
    positions, the padding at its end in segments of at most `max_tokens_per_document`. Without, it has no padding, and
    one padding token where it has no row.
    """

    sources: Sequence[Source]
    corrupt: Corrupt
    seed: int
    pad_id: int
    cls_id: int
    sep_id: int
    max_tokens_per_document: int
    row_tokens: int
    micro_batch_rows: int
    static_shapes: bool

    def assemble(self, specs: Sequence[RowSpec]) -> Assembled:
        """The micro-batch of these rows. Raises ShardError for a shard that cannot be read, DamagedShard for one that is wrong."""
        rows = [self._row(spec) for spec in specs if len(spec.pieces_P4)]      # none: all it had was left out
        tokens = sum(len(r.question.ids) for r in rows)
        total = self.micro_batch_rows * self.row_tokens if self.static_shapes else max(tokens, 1)
        lengths = [n for r in rows for n in r.lengths_P] + self._padding_segments(total - tokens)
        starts_S1 = np.concatenate([[0], np.cumsum(lengths)])
        row_starts = np.cumsum([0, *(len(r.question.ids) for r in rows)])
        positions_T = np.arange(total) - np.repeat(starts_S1[:-1], lengths)
        index_parts = [r.question.predict_index + s for r, s in zip(rows, row_starts, strict=False)]
        masked_tokens = sum(len(part) for part in index_parts)
        predicted, seqlens = masked_tokens, len(starts_S1)
        if self.static_shapes:
            predicted = self.micro_batch_rows * self.corrupt.capacity(self.row_tokens)
            seqlens = self._seqlens_room(seqlens)
        batch = TokenBatch(
            ids_T=_filled([r.question.ids for r in rows], total, self.pad_id),
            positions_T=torch.from_numpy(positions_T.astype(np.int32)),
            cu_seqlens_S1=_filled([starts_S1], seqlens, total, dtype=np.int32),
            max_seqlen=self.max_tokens_per_document if self.static_shapes else max(lengths),
            predict_index_M=_filled(index_parts, predicted, 0),
            predict_target_M=_filled([r.question.predict_target for r in rows], predicted, IGNORE),
            dropout_key_T=_filled([r.dropout_key_T for r in rows], total, 0),
            masked_tokens=masked_tokens, tokens=tokens)
        return Assembled(batch=batch, row_hash=wrap_int64(sum(r.hash for r in rows)))

    def _row(self, spec: RowSpec) -> _Row:
        parts: list[np.ndarray] = []
        lengths = [self._lay_piece(parts, *piece) for piece in spec.pieces_P4.tolist()]
        ids = np.concatenate(parts, dtype=np.int64)
        assert len(ids) <= self.row_tokens, "a row was planned above its capacity"
        self._check_ids(ids, spec)
        place = spec.address
        question = self.corrupt(ids, generator(self.seed, "mlm", *place), phase_tokens=spec.phase_tokens)
        # room is counted by row, not by micro-batch, so that what is asked does not depend on the micro-batch
        room = self.corrupt.capacity(self.row_tokens)
        if len(question.predict_index) > room:
            question = replace(question, predict_index=question.predict_index[:room],
                               predict_target=question.predict_target[:room])
        with np.errstate(over="ignore"):
            counters = address_key(self.seed, "dropout", *place)[0] + np.arange(len(ids), dtype=np.uint64)
        return _Row(question, lengths, splitmix64(counters).view(np.int64), _row_hash(spec.number, question, lengths))

    def _lay_piece(self, parts: list[np.ndarray], source: int, document: int, start: int, end: int) -> int:
        """Append a piece's ids, with [CLS] and [SEP] put back where it was cut; returns its length."""
        ids = self.sources[source].read(document)
        if start > 0:
            parts.append(np.array([self.cls_id]))
        parts.append(ids[start:end])
        if end < len(ids):
            parts.append(np.array([self.sep_id]))
        return (end - start) + (start > 0) + (end < len(ids))

    def _check_ids(self, ids: np.ndarray, spec: RowSpec) -> None:
        vocab_size = self.sources[0].card.vocab_size
        if ids.max() < vocab_size and ids.min() >= 0:
            return
        for source, document in spec.pieces_P4[:, [SOURCE, DOCUMENT]].tolist():
            read = self.sources[source].read(document)
            wrong = read[(read >= vocab_size) | (read < 0)]
            if len(wrong):
                raise DamagedShard(f"{self.sources[source].file_of(document)} holds id {wrong[0]}, its vocabulary has "
                                   f"{vocab_size:,}. Copy or prepare the shard again.",
                                   source=self.sources[source].name, shard=self.sources[source].shard_of(document))

    def _padding_segments(self, padding: int) -> list[int]:
        whole, rest = divmod(padding, self.max_tokens_per_document)
        return [self.max_tokens_per_document] * whole + [rest] * (rest > 0)

    def _seqlens_room(self, needed: int) -> int:
        room = max(2, self.micro_batch_rows * self.row_tokens // TOKENS_PER_SEQLEN)
        while room < needed:
            room *= 2
        return room


def deal(specs: Sequence[RowSpec], *, rank: int, world_size: int, micro_batch_rows: int,
         lanes: int = 1) -> list[list[RowSpec]]:
    """This rank's micro-batches of a step: row r goes to rank r mod world; every rank gets the same number of them.

        5 rows, 2 ranks, 2 rows a micro-batch:     rank 0  [0 2] [4]     rank 1  [1 3] []

    Row r is of lane r mod lanes. Ranks that follow each other (a node's) serve lanes that follow each other, as far as
    lanes and ranks have a common divisor g: rank group 0 of g has lane group 0 of g, dealt inside it as above.

        8 rows, 4 ranks, 2 lanes:     lane 0  rank 0 [0 4]  rank 1 [2 6]     lane 1  rank 2 [1 5]  rank 3 [3 7]
    """
    assert lanes == 1 or len(specs) % lanes == 0, "a step has as many rows of every lane"
    own = lanes_of(rank, world_size=world_size, lanes=lanes)
    group_ranks = world_size // math.gcd(lanes, world_size)
    mine = [s for s in specs if s.number % lanes in own][rank % group_ranks::group_ranks]
    count = -(-len(specs) // (world_size * micro_batch_rows))
    return [list(mine[i * micro_batch_rows:(i + 1) * micro_batch_rows]) for i in range(count)]


def lanes_of(rank: int, *, world_size: int, lanes: int) -> range:
    """The lanes whose rows `deal` gives to a rank, alone or with the other ranks of its group."""
    groups = math.gcd(lanes, world_size)
    group = rank * groups // world_size
    return range(group * lanes // groups, (group + 1) * lanes // groups)


def wrap_int64(number: int) -> int:
    """The number modulo 2^64 as a signed 64-bit integer: what adding int64 tensors gives."""
    return (number + 2**63) % 2**64 - 2**63


def _row_hash(number: int, question: Question, lengths_P: Sequence[int]) -> int:
    """Of the row's number, where its documents end, the ids after masking, the positions asked and the ids before."""
    digest = blake2b(np.array([number, *lengths_P], dtype="<i8"), digest_size=8)
    for part in (question.ids, question.predict_index, question.predict_target):
        digest.update(part.astype("<u4"))
    return int.from_bytes(digest.digest(), "little", signed=True)


def _filled(parts: Sequence[np.ndarray], size: int, fill: int, *, dtype: type = np.int64) -> torch.Tensor:
    """The parts end to end, and `fill` behind them, [size]."""
    whole, at = np.empty(size, dtype=dtype), 0
    for part in parts:
        whole[at:at + len(part)] = part
        at += len(part)
    whole[at:] = fill
    return torch.from_numpy(whole)
