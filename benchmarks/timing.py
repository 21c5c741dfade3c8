"""Several sides timed in turn, round after round, so that what else the machine does hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of one side's counted rounds."""

    seconds: tuple[float, ...]
    # of all threads of the process: neighbours on the machine disturb it less
    cpu_seconds: tuple[float, ...] = ()
    # of the CUDA device, in the rounds, beside what stood there before each
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turn(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    warm_up: int = 2,
) -> dict[str, Timed]:
    """Each side once a round; the first `warm_up` rounds are not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for number in range(warm_up + rounds):
        for name, do in sides.items():
            # kernels run on after their call has returned
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            do()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                # in a first round a peer's optimizer makes its state, which stays
                if number >= warm_up:
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - before)
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - began, time.process_time() - cpu_began))
    return {
        name: Timed(
            seconds=tuple(s for s, _ in taken),
            cpu_seconds=tuple(c for _, c in taken),
            peak_bytes=peaks[name],
        )
        for name, taken in seconds.items()
    }


def paired_ratio(a: Timed, b: Timed) -> tuple[float, float, float]:
    """How many times as fast a is as b, round by round: lowest, median, highest."""
    # of the same round, since the machine's load changes between rounds
    ratios = sorted(slow / fast for fast, slow in zip(a.seconds, b.seconds, strict=True))
    return ratios[0], statistics.median(ratios), ratios[-1]


def cpu_ratio(a: Timed, b: Timed) -> float:
    """The same by CPU time, in the median."""
    return statistics.median(
        slow / fast for fast, slow in zip(a.cpu_seconds, b.cpu_seconds, strict=True)
    )


def ratio_text(ratio: tuple[float, float, float]) -> str:
    """'5.03 (4.88 to 5.20)'."""
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
