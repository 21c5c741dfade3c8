"""The order of documents: document i of a source, for any i, without a permutation of all documents.

    epoch        i // N
    shards       permuted by (seed, "order", phase, source, epoch), taken in groups of 8, or as many as a run asks for
    documents    permuted inside their group by (seed, "order", phase, source, epoch, group)

Every epoch visits every document exactly once; a reader touches only the shards of one group at a time.
Each of several lanes has an order of its own over its share of the shards; its number stands in the addresses above after
the source.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from encoder.base.rng import generator

# 0.5 GiB of 64 MiB shards: some 400,000 web documents shuffled together, in 3 ms
SHARDS_PER_GROUP = 8


def deal_shards(samples_per_shard: np.ndarray, lanes: int) -> list[np.ndarray]:
    """The shards of each lane, int64, ascending: the largest first, each to the lane that has the fewest documents.

    Ties go to the lower shard and the lower lane (longest processing time: Graham 1969, Bounds on Multiprocessing Timing
    Anomalies). 60,000 shards take 0.03 s.
    """
    if lanes == 1:
        return [np.arange(len(samples_per_shard))]
    dealt: list[list[int]] = [[] for _ in range(lanes)]

    # a heap of (documents, lane): its head is the lane with the fewest, the lower number in ties
    held = [(0, lane) for lane in range(lanes)]
    samples = samples_per_shard.tolist()
    # sorted by the negative counts: the largest first, stable, so that ties keep their order
    for shard in np.argsort(-np.asarray(samples_per_shard, dtype=np.int64), kind="stable").tolist():
        documents, lane = held[0]
        dealt[lane].append(shard)
        heapq.heapreplace(held, (documents + samples[shard], lane))
    return [np.sort(np.array(shards, dtype=np.int64)) for shards in dealt]


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in order, and where each group begins."""

    number: int
    shards: np.ndarray  # int64, the lane's shard numbers, permuted
    group_starts: np.ndarray  # int64 [groups + 1], in documents of the epoch


class DocumentOrder:
    """The order of one source in one phase. Remembers the epoch and the groups it used last, nothing else.

    `samples_per_shard` int64 [shards] of the whole source; documents are numbered through the shards in stored order.
    `lane`: its number and its shards of deal_shards, None where there is one lane. `group_shards`: whose documents are
    shuffled together; None: SHARDS_PER_GROUP.
    """

    def __init__(
        self,
        samples_per_shard: np.ndarray,
        *,
        seed: int,
        phase: int,
        source: str,
        lane: tuple[int, np.ndarray] | None = None,
        group_shards: int | None = None,
    ) -> None:
        samples = np.asarray(samples_per_shard, dtype=np.int64)

        # document numbers go over the whole source, also where a lane has a share of its shards
        self._ends = np.cumsum(samples)
        self._starts = self._ends - samples
        self._shards = np.arange(len(samples))
        # one lane is left out of the address: its order is that of a run without lanes
        self._address: tuple[str | int, ...] = ("order", phase, source)
        if lane is not None:
            number, self._shards = lane
            self._address += (f"lane {number}",)
        self._samples = samples[self._shards]

        self._seed, self._group_shards = seed, group_shards or SHARDS_PER_GROUP

        self.documents_per_epoch = int(self._samples.sum())
        assert self.documents_per_epoch > 0, "an empty source has no order"
        self._epoch: _Epoch | None = None
        self._groups: dict[tuple[int, int], np.ndarray] = {}

    def documents(self, start: int, count: int) -> np.ndarray:
        """Document numbers int64 [count] at places start to start + count of the endless order."""
        parts = [np.empty(0, dtype=np.int64)]
        used = {}
        while count > 0:
            # one turn for each group that the stretch touches; it may cross groups and epochs
            number, place = divmod(start, self.documents_per_epoch)
            epoch = self._epoch_of(number)
            group = int(np.searchsorted(epoch.group_starts, place, side="right")) - 1
            inside = place - int(epoch.group_starts[group])

            key = (number, group)
            documents = self._groups.get(key)
            if documents is None:
                documents = self._shuffled(epoch, group)
            used[key] = documents

            part = documents[inside : inside + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)

        # one group, or two at a border: the next stretch begins in the last
        self._groups = used or self._groups
        return np.concatenate(parts, dtype=np.int64)

    def shards(self, start: int, count: int, *, at_most: int) -> list[int]:
        """The shards whose groups the places start to start + count touch, soonest first: `at_most`, or a group more."""
        # a dict as a set that keeps its order
        found: dict[int, None] = {}
        end = start + count
        while start < end and len(found) < min(at_most, len(self._samples)):
            number, place = divmod(start, self.documents_per_epoch)
            epoch = self._epoch_of(number)
            group = int(np.searchsorted(epoch.group_starts, place, side="right")) - 1

            # documents are shuffled inside a group, so a stretch in it may need any of its shards
            found.update(
                dict.fromkeys(
                    epoch.shards[
                        group * self._group_shards : (group + 1) * self._group_shards
                    ].tolist()
                )
            )

            # to the first document of the next group
            start += int(epoch.group_starts[group + 1]) - place
        return list(found)

    def _epoch_of(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            order = generator(self._seed, *self._address, number).permutation(len(self._samples))

            # group g ends with shard min((g + 1) size, shards) - 1 of the permuted ones
            ends = np.cumsum(self._samples[order])
            size = self._group_shards
            last_of_group = np.minimum(np.arange(size, len(order) + size, size), len(order)) - 1
            self._epoch = _Epoch(
                number, self._shards[order], np.concatenate([[0], ends[last_of_group]])
            )
        return self._epoch

    def _shuffled(self, epoch: _Epoch, group: int) -> np.ndarray:
        # the numbers of all documents in the group's shards, shard by shard, then shuffled
        first_shard = group * self._group_shards
        shards = epoch.shards[first_shard : first_shard + self._group_shards]
        documents = np.concatenate([np.arange(self._starts[s], self._ends[s]) for s in shards])
        generator(self._seed, *self._address, epoch.number, group).shuffle(documents)

        # kept in 4 bytes where they suffice: 2 MB a group of the 2T mixture, for each source and
        # lane. Shuffled in 8, which numpy does in two thirds of the time: 5 ms
        if self._ends[-1] < 2**32:
            return documents.astype(np.uint32)
        return documents
