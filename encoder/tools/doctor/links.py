"""The links between ranks, measured in pairs so that a slow or silent node can be named; and the all-reduce over all of them.

    nodes in a ring, a pair at a time for each node; rank l of a node with rank l of the next, all at once, as all-reduces do

        round 0   node1 = node2     node3 = node4
        round 1   node2 = node3     node4 = node1
        round 2   (only where a ring is odd: its last node with the first)
        inside    rank 0 = rank 1 of every node, rank 2 = rank 3; then rank 1 = rank 2 ...

A pair adds up whole numbers by an all-reduce of its own and holds the sum against what it must be.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MESSAGE_BYTES = {"cpu": 2**22, "cuda": 2**27}        # 4 ms at 1 GB/s; 3 ms at 50 GB/s
REPEATS = 5
SLOW_SECONDS = 0.5
LINK_SECONDS = 6.0                                   # a sum that takes longer: no link

Hinder = Callable[[torch.Tensor], None]              # what is about to be sent: tests are late with it, or damage it


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ranks that measure the link between them."""

    ranks: tuple[int, int]
    inside: bool            # one node has both


def rounds_of(nodes: Sequence[str]) -> list[list[Pair]]:
    """Who measures with whom, round after round; `nodes` has the node of each rank. No rank is twice in a round."""
    ranks_of: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    groups = list(ranks_of.values())
    rounds = [[Pair(ranks=pair, inside=False) for a, b in meetings for pair in zip(groups[a], groups[b])]
              for meetings in ring(len(groups))]
    # inside a node, the chain of its ranks: every second link at a time
    rounds += [[Pair(ranks=(group[i], group[i + 1]), inside=True) for group in groups for i in range(first, len(group) - 1, 2)]
               for first in (0, 1)]
    return [pairs for pairs in rounds if pairs]


def ring(count: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of `count`, in two or three rounds in which each end has one link."""
    links = [(i, (i + 1) % count) for i in range(count)] if count > 2 else [(0, 1)] * (count == 2)
    last = links[-1:] if count % 2 and count > 2 else []
    rest = links[:len(links) - len(last)]
    return [pairs for pairs in (rest[0::2], rest[1::2], last) if pairs]


class Links:
    """Measures this rank's links and the all-reduce of all ranks. Each has a process group of its own: what hangs or breaks in
    one leaves the others whole, and torch's default group is not touched."""

    def __init__(self, store: dist.Store, *, rank: int, device: torch.device, message_bytes: int | None = None,
                 hinder: Hinder | None = None) -> None:
        self._store, self._rank, self._device, self._hinder = store, rank, device, hinder
        self._bytes = message_bytes or MESSAGE_BYTES[device.type]
        # NCCL's watchdog would end the process of whoever waits for a dead peer: an error of the wait is what is wanted
        os.environ.update(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0")

    def measure(self, rounds: Sequence[Sequence[tuple[int, int]]], into: list[dict[str, Any]], *, turn: str = "first") -> None:
        """One view after another of the pairs that have this rank: {"ranks", "by", "gb_per_second"} or {..., "error"}. A view that
        is begun says so until it is made ("open"): the work may be left behind."""
        for number, pairs in enumerate(rounds):
            for ends in pairs:
                if self._rank in ends:
                    view = {"ranks": list(ends), "by": self._rank}
                    into.append(view | {"error": "no answer", "open": True})
                    # the other one may have waited in vain in each round before
                    found = self._reduce(f"{turn} {number} {ends[0]} {ends[1]}", ends, connect_seconds=LINK_SECONDS * (number + 1))
                    into[-1] = view | found

    def all_reduce(self, size: int) -> dict[str, Any]:
        """All ranks at once: {"gb_per_second": bus bandwidth} or {"error"}."""
        return self._reduce("all", range(size), connect_seconds=2 * LINK_SECONDS)

    def _reduce(self, name: str, ranks: Sequence[int], *, connect_seconds: float) -> dict[str, Any]:
        """Sums of whole numbers, which must be exact; the best of some."""
        size = len(ranks)
        mine = pattern(self._rank, self._bytes, self._device)
        right = sum(pattern(rank, self._bytes, self._device) for rank in ranks)
        seconds, wrong = [], False
        try:
            group = self._join(name, ranks.index(self._rank), size, connect_seconds)
            self._sum(group, torch.zeros(1, dtype=torch.int64, device=self._device))       # all are here
            for number in range(REPEATS):
                values = mine.clone()
                if self._hinder:
                    self._hinder(values)
                start = time.perf_counter()
                self._sum(group, values)
                seconds.append(time.perf_counter() - start)
                wrong |= not torch.equal(values, right)
                if number == 0 and self._is_slow(group, seconds[0]):
                    break
        except RuntimeError as error:
            return {"error": f"no answer ({str(error).strip().splitlines()[0][:120]})"}
        if wrong:
            return {"error": "a sum is wrong"}
        return {"gb_per_second": 2 * (size - 1) / size * self._bytes / min(seconds) / 1e9}

    def _is_slow(self, group: Any, seconds: float) -> bool:
        """Whether one sum took so long on any of the ranks that it will do: they must agree on how many they make."""
        slow = torch.tensor([seconds > SLOW_SECONDS], dtype=torch.int64, device=self._device)
        self._sum(group, slow)
        return bool(slow[0])

    def _join(self, name: str, rank: int, size: int, seconds: float) -> Any:
        store, limit = dist.PrefixStore(name, self._store), datetime.timedelta(seconds=seconds)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            return dist.ProcessGroupNCCL(store, rank, size, options)
        return dist.ProcessGroupGloo(store, rank, size, limit)

    def _sum(self, group: Any, values: torch.Tensor) -> None:
        work = group.allreduce([values])
        if self._device.type == "cuda":
            work.wait()
            torch.cuda.synchronize(self._device)
        else:
            work.wait(datetime.timedelta(seconds=LINK_SECONDS))


def pattern(rank: int, message_bytes: int, device: torch.device) -> torch.Tensor:
    """What a rank brings: int64 [message_bytes / 8], another one for each rank; int64 wraps, which is exact."""
    return torch.arange(message_bytes // 8, dtype=torch.int64, device=device) * (2_654_435_761 + rank) + rank
