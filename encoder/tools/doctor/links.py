"""All-reduce bandwidth of neighbouring nodes, by which a slow or silent node is named; and that of all ranks.

    nodes in a ring; all ranks of two neighbours in one all-reduce, every second pair at a time

        round 0   node1 + node2     node3 + node4
        round 1   node2 + node3     node4 + node1
        round 2   (an odd ring alone: its last node with the first)

Each node is measured with two others, at two moments. All sums are of whole numbers and must be exact.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

MESSAGE_BYTES = {"cpu": 2**22, "cuda": 2**27}  # 4 ms at 1 GB/s; 3 ms at 50 GB/s
REPEATS = 3
SUM_SECONDS = 6.0  # an all-reduce that takes longer counts as no answer

# called with what is about to be sent: tests hold it back or damage it
FaultInjection = Callable[[torch.Tensor], None]
# seconds from any start; tests give a rank its own, for how fast a busy machine sends is anybody's guess
Clock = Callable[[], float]


def ring(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The pairs of neighbours, in two or three rounds; no node is twice in a round."""
    count = len(nodes)
    if count < 3:
        return [[(nodes[0], nodes[1])]] if count == 2 else []
    pairs = [(nodes[i], nodes[(i + 1) % count]) for i in range(count)]
    # an even ring takes two rounds; in an odd one the last pair needs a third
    even = count - count % 2
    rounds = [pairs[0:even:2], pairs[1:even:2], pairs[even:]]
    return [pairs for pairs in rounds if pairs]


class Links:
    """Measures the all-reduces that this rank is part of.

    Each has a process group of its own: one that hangs or breaks leaves the others whole. torch's default group is not touched.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        device: torch.device,
        message_bytes: int | None = None,
        inject_fault: FaultInjection | None = None,
        clock: Clock = time.perf_counter,
        sum_seconds: float = SUM_SECONDS,
    ) -> None:
        self._store = store
        self._rank = rank
        self._device = device
        self._bytes = message_bytes or MESSAGE_BYTES[device.type]
        self._inject_fault = inject_fault
        self._clock = clock
        self._sum_seconds = sum_seconds
        # NCCL's watchdog would end the process of whoever waits for a dead peer; needed is an error of the wait
        os.environ.update(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0")

    def neighbours(self, node_of_rank: Sequence[str], into: list[dict[str, Any]]) -> None:
        """Appends {"nodes", "gb_per_second"} or {"nodes", "error"} for each pair that has this rank's node.

        A measurement that is under way has an error already: the caller may leave it behind.
        """
        own = node_of_rank[self._rank]
        for number, pairs in enumerate(ring(list(dict.fromkeys(node_of_rank)))):
            for pair in pairs:
                if own not in pair:
                    continue
                # every rank of both nodes: the sum crosses the link between them
                ranks = [rank for rank, node in enumerate(node_of_rank) if node in pair]
                into.append({"nodes": list(pair), "error": "no answer"})
                # the neighbour may have waited in vain in each round before
                found = self._all_reduce(
                    f"round {number} {pair}",
                    ranks,
                    connect_seconds=self._sum_seconds * (number + 1),
                )
                into[-1] = {"nodes": list(pair), **found}

    def all(self, size: int) -> dict[str, Any]:
        """All ranks at once: {"gb_per_second"} or {"error"}."""
        return self._all_reduce("all", range(size), connect_seconds=2 * self._sum_seconds)

    def _all_reduce(
        self, name: str, ranks: Sequence[int], *, connect_seconds: float
    ) -> dict[str, Any]:
        """Bus bandwidth (bytes x 2 (n - 1) / n, over the seconds), the best of some."""
        size = len(ranks)
        mine = pattern(self._rank, self._bytes, self._device)
        expected = sum(pattern(rank, self._bytes, self._device) for rank in ranks)
        seconds = []
        exact = True
        try:
            group = self._connect(name, ranks.index(self._rank), size, connect_seconds)
            # a barrier: all are here
            self._sum(group, torch.zeros(1, dtype=torch.int64, device=self._device))
            for _ in range(REPEATS):
                values = mine.clone()
                if self._inject_fault:
                    self._inject_fault(values)
                start = self._clock()
                self._sum(group, values)
                seconds.append(self._clock() - start)
                exact &= torch.equal(values, torch.as_tensor(expected))
        except RuntimeError as error:
            return {"error": f"no answer ({str(error).strip().splitlines()[0][:120]})"}
        if not exact:
            return {"error": "a sum is wrong"}
        # a ring all-reduce sends each byte 2 (n - 1) / n times
        return {"gb_per_second": 2 * (size - 1) / size * self._bytes / min(seconds) / 1e9}

    def _connect(self, name: str, rank: int, size: int, seconds: float) -> Any:
        # keys of their own: several groups share one store
        store = dist.PrefixStore(name, self._store)
        timeout = datetime.timedelta(seconds=seconds)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(store, rank, size, options)
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    def _sum(self, group: Any, values: torch.Tensor) -> None:
        work = group.allreduce([values])
        if self._device.type == "cuda":
            work.wait()
            torch.cuda.synchronize(self._device)
        else:
            work.wait(datetime.timedelta(seconds=self._sum_seconds))


def pattern(rank: int, message_bytes: int, device: torch.device) -> torch.Tensor:
    """What a rank sends: int64 [message_bytes / 8], another one for each rank; int64 wraps, which is exact."""
    return (
        torch.arange(message_bytes // 8, dtype=torch.int64, device=device) * (2_654_435_761 + rank)
        + rank
    )
