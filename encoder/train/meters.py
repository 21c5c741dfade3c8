"""Where a run's time goes, and how fast it is: seconds by kind, tokens and model FLOP a second, share of the peak, memory."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from encoder.base.batch import TokenBatch

# dense bf16 with fp32 accumulation, FLOP per second, by the makers' data sheets (theirs "with sparsity" halved), for the
# whole device: a MIG slice has another name, and is not found
BF16_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def bf16_peak(device: torch.device) -> float | None:
    """FLOP per second that the device can do at most in bf16, or None where this is not known."""
    if device.type == "cuda":
        return BF16_PEAKS.get(torch.cuda.get_device_name(device))
    return None


def document_lengths(batch: TokenBatch) -> np.ndarray:
    """Lengths of a micro-batch's documents, int64; for one on the CPU. What lies behind `tokens` is padding.

    cu_seqlens 0 5 8 10 10     tokens 8     ->     5 3
    """
    # behind `tokens` come the end of the padding, T, and repeats of T
    ends = batch.cu_seqlens_S1.numpy().astype(np.int64)
    return np.diff(ends[ends <= batch.tokens])


def memory_bytes(device: torch.device) -> int:
    """The most that torch held on this GPU so far; on a CPU what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # here: a machine that only measures on a GPU need not have it

    return psutil.Process().memory_info().rss


class Clock:
    """Seconds of one start of a run by what they went to; every moment since `began` belongs to exactly one kind.

    `began` is the time of day (seconds, Unix) at which the start began, usually its process; what passed since then until
    now was starting. From here on a clock that nobody sets.
    """

    # waiting: for data
    KINDS = ("starting", "training", "waiting", "evaluating", "saving")

    def __init__(self, *, began: float) -> None:
        self.began, self._kind, self._since = began, "starting", time.perf_counter()
        self._seconds = dict.fromkeys(self.KINDS, 0.0) | {"starting": max(0.0, time.time() - began)}

    def turn_to(self, kind: str) -> None:
        """From now on time is of this kind."""
        now = time.perf_counter()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Time of this kind inside, of the kind before it after."""
        before = self._kind
        self.turn_to(kind)
        try:
            yield
        finally:
            self.turn_to(before)

    def seconds(self) -> dict[str, float]:
        """So far, by kind."""
        # to the same kind: books what has passed since the last turn
        self.turn_to(self._kind)
        return dict(self._seconds)


class SpeedMeter:
    """Rates over the last `span` steps, by the clock's seconds of training and of waiting for data alone.

    `peak` is what all ranks' devices can do at most in FLOP per second, or None where this is not known.
    """

    def __init__(self, clock: Clock, *, peak: float | None = None, span: int = 50) -> None:
        self._steps: deque[tuple[float, float, int, float]] = deque(maxlen=span)
        self._clock, self._peak, self._before = clock, peak, clock.seconds()

    def step(self, tokens: int, flops: float) -> None:
        """A step with this many tokens and model FLOP, over all ranks, ended now."""
        # these two kinds are steps: saves and evaluations between them do not slow the rate
        before, self._before = self._before, self._clock.seconds()
        training, waiting = (self._before[kind] - before[kind] for kind in ("training", "waiting"))
        self._steps.append((training + waiting, waiting, tokens, flops))

    @property
    def waiting_share(self) -> float:
        """Of the time of steps, 0 to 1: waiting for data."""
        return self._per_second(1)

    @property
    def tokens_per_second(self) -> float:
        return self._per_second(2)

    @property
    def tflops_per_second(self) -> float:
        """10^12 model FLOP a second, all ranks together."""
        return self._per_second(3) / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization (PaLM, Chowdhery et al. 2022, appendix B): the share of the peak, 0 to 1."""
        if self._peak:
            return self._per_second(3) / self._peak
        return None

    def seconds_for(self, tokens: int) -> float:
        """Seconds until this many more tokens are done at the present speed."""
        speed = self.tokens_per_second
        if speed:
            return tokens / speed
        return 0.0

    def _per_second(self, column: int) -> float:
        # sums over sums: a long step counts for as long as it took
        seconds = sum(s[0] for s in self._steps)
        if seconds:
            return sum(s[column] for s in self._steps) / seconds
        return 0.0
