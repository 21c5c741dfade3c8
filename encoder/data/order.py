"""The order of documents: document i of a source, for any i, without a permutation of all documents.

    epoch        i // N
    shards       permuted by (seed, "order", phase, source, epoch), taken in groups of 16
    documents    permuted inside their group by (seed, "order", phase, source, epoch, group)

Every epoch visits every document exactly once; a reader touches only the shards of one group at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from encoder.base.rng import generator

SHARDS_PER_GROUP = 16        # 1 GiB of 64 MiB shards: about a million web documents shuffled together
CACHED_GROUPS = 4            # 8 bytes a document; a window touches one group, or two at a border


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in order, and where each group begins."""

    number: int
    shards: np.ndarray             # int64, permuted shard numbers
    group_starts: np.ndarray       # int64 [groups + 1], in documents of the epoch


class DocumentOrder:
    """The order of one source in one phase. Remembers the epoch and the few groups it used last, nothing else.

    `samples_per_shard` int64 [shards]; documents are numbered through the shards in stored order.
    """

    def __init__(self, samples_per_shard: np.ndarray, *, seed: int, phase: int, source: str) -> None:
        self._samples = np.asarray(samples_per_shard, dtype=np.int64)
        self._first_document = np.concatenate([[0], np.cumsum(self._samples)])
        self._address = ("order", phase, source)
        self._seed = seed
        self.documents_per_epoch = int(self._first_document[-1])
        assert self.documents_per_epoch > 0, "an empty source has no order"
        self._epoch: _Epoch | None = None
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def documents(self, start: int, count: int) -> np.ndarray:
        """Document numbers int64 [count] at places start to start + count of the endless order."""
        parts = []
        while count > 0:
            number, place = divmod(start, self.documents_per_epoch)
            epoch = self._epoch_of(number)
            group = int(np.searchsorted(epoch.group_starts, place, side="right")) - 1
            inside = place - int(epoch.group_starts[group])
            part = self._group_of(epoch, group)[inside:inside + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _epoch_of(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            shards = generator(self._seed, *self._address, number).permutation(len(self._samples))
            ends = np.cumsum(self._samples[shards])
            last_of_group = np.minimum(np.arange(SHARDS_PER_GROUP, len(shards) + SHARDS_PER_GROUP, SHARDS_PER_GROUP),
                                       len(shards)) - 1
            self._epoch = _Epoch(number, shards, np.concatenate([[0], ends[last_of_group]]))
        return self._epoch

    def _group_of(self, epoch: _Epoch, group: int) -> np.ndarray:
        key = (epoch.number, group)
        if key not in self._groups:
            shards = epoch.shards[group * SHARDS_PER_GROUP:(group + 1) * SHARDS_PER_GROUP]
            first = self._first_document
            documents = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards])
            generator(self._seed, *self._address, epoch.number, group).shuffle(documents)
            self._groups[key] = documents
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]
