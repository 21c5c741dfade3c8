"""Which tokens stand near each other, counted over documents in whole numbers: their order does not matter.

    window 2, document a b a c      a b: 2 + 2    a c: 2    a a: 1    b c: 1      in units of 1 / 2

A pair that stands d apart counts 1 / d (Pennington et al. 2014, GloVe), here lcm(1 .. window) / d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from encoder.base.errors import ConfigError, DamagedShard
from encoder.data.order import DocumentOrder, deal_shards

# the run file knows MOST_WINDOW: it needs no reader of shards
if TYPE_CHECKING:
    from encoder.data.shards import Source

# counted at a time: keys of 2^20 tokens are 8 MB for each distance
STRETCH_TOKENS = 2**20
# units are whole up to here, and their sums far from 2^63
MOST_WINDOW = 16


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Pairs of tokens and what they count, each pair once, the lower id first; P pairs."""

    vocab_size: int
    first_P: np.ndarray  # int64, first <= second
    second_P: np.ndarray  # int64
    count_P: np.ndarray  # int64, above 0, in units of 1 / lcm(1 .. window)
    tokens: int  # that were counted


def count_neighbours(
    documents: Iterable[np.ndarray],
    *,
    window: int,
    vocab_size: int,
    left_out: Sequence[int] = (),
) -> Neighbours:
    """What stands at most `window` tokens apart in the same document. Raises ConfigError for a window that cannot be counted.

    documents: ids of each, int [n]
    window: tokens on either side
    vocab_size: ids are below it
    left_out: ids that are no text, such as [CLS]; they take their place, and count nothing
    """
    if not 1 <= window <= MOST_WINDOW:
        raise ConfigError(f"a window of {window} tokens; needed: 1 to {MOST_WINDOW}.")
    unit = math.lcm(*range(1, window + 1))
    outside = np.zeros(vocab_size, dtype=bool)
    outside[list(left_out)] = True

    # half as wide sorts in half the time
    key = np.int32 if vocab_size**2 <= 2**31 else np.int64
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    tokens = 0
    for ids_T in _stretches(documents, gap=window):
        # the gaps between documents are -1, as is what is left out
        ids_T = np.where((ids_T < 0) | outside[ids_T], -1, ids_T)
        tokens += int((ids_T >= 0).sum())
        found = [(keys, counts)]
        for distance in range(1, window + 1):
            a_N, b_N = ids_T[:-distance], ids_T[distance:]
            are_text_N = (a_N >= 0) & (b_N >= 0)
            a_N, b_N = a_N[are_text_N], b_N[are_text_N]
            pairs_N = np.minimum(a_N, b_N) * vocab_size + np.maximum(a_N, b_N)
            once, times = np.unique(pairs_N.astype(key), return_counts=True)
            found.append((once.astype(np.int64), times * (unit // distance)))
        keys, counts = _added(found)
    return Neighbours(
        vocab_size=vocab_size,
        first_P=keys // vocab_size,
        second_P=keys % vocab_size,
        count_P=counts,
        tokens=tokens,
    )


def first_documents(
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    seed: int,
    tokens: int,
    lanes: int = 1,
    shuffle_shards: int | None = None,
    skip_damaged: bool = False,
) -> Iterator[np.ndarray]:
    """The documents that a run's first phase begins with, source after source, each its share of `tokens` and none twice.

    sources: of the mixture
    weights: their shares
    seed: of the run
    tokens: in all; a source, or a lane of it, with less than its share gives all of it
    lanes, shuffle_shards: of the run's data order
    skip_damaged: leave out documents of damaged shards, which training will name; else DamagedShard is raised
    """
    for source, weight in zip(sources, weights, strict=True):
        share = tokens * weight / sum(weights) / lanes
        for lane, shards in enumerate(deal_shards(source.samples_per_shard, lanes)):
            order = DocumentOrder(
                source.samples_per_shard,
                seed=seed,
                phase=0,
                source=source.name,
                lane=(lane, shards) if lanes > 1 else None,
                group_shards=shuffle_shards,
            )
            left, place = share, 0
            while left > 0 and place < order.documents_per_epoch:
                (number,) = order.documents(place, 1).tolist()
                place += 1
                try:
                    ids = source.read(number)
                except DamagedShard:
                    if not skip_damaged:
                        raise
                    continue
                left -= len(ids)
                yield ids


def _stretches(documents: Iterable[np.ndarray], *, gap: int) -> Iterator[np.ndarray]:
    """Documents behind each other with -1 between them, int64, so many together that a stretch is worth its numpy calls."""
    between = np.full(gap, -1, dtype=np.int64)
    parts: list[np.ndarray] = []
    tokens = 0
    for ids in documents:
        parts += [ids.astype(np.int64), between]
        tokens += len(ids)
        if tokens >= STRETCH_TOKENS:
            yield np.concatenate(parts)
            parts, tokens = [], 0
    if parts:
        yield np.concatenate(parts)


def _added(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys, each once, with the sums of their counts."""
    keys = np.concatenate([keys for keys, _ in found])
    counts = np.concatenate([counts for _, counts in found])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    begins = np.flatnonzero(np.diff(keys, prepend=-1))
    if not len(begins):
        return keys, counts
    return keys[begins], np.add.reduceat(counts, begins)
