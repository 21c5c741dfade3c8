"""How fast a run goes: tokens and model FLOP per second over the last steps, share of the device's peak, time left."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

from encoder.base.batch import TokenBatch

# dense bf16 with fp32 accumulation, FLOP per second, by the makers' data sheets (theirs "with sparsity" halved), for the
# whole device: a MIG slice has another name, and is not found
BF16_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
}


def bf16_peak(device: torch.device) -> float | None:
    """FLOP per second that the device can do at most in bf16, or None where this is not known."""
    return BF16_PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def document_lengths(batch: TokenBatch) -> np.ndarray:
    """Lengths of a micro-batch's documents, int64; for one on the CPU. What lies behind `tokens` is padding.

        cu_seqlens 0 5 8 10 10     tokens 8     ->     5 3
    """
    ends = batch.cu_seqlens_S1.numpy().astype(np.int64)
    return np.diff(ends[ends <= batch.tokens])


class SpeedMeter:
    """Rates over the last `span` steps (evaluation and saving are not counted: call `pause` after them).

    `peak` is what all ranks' devices can do at most in FLOP per second, or None where this is not known.
    """

    def __init__(self, *, peak: float | None = None, span: int = 50) -> None:
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=span)
        self._peak = peak
        self._since = time.perf_counter()

    def step(self, tokens: int, flops: float) -> None:
        """A step with this many tokens and model FLOP, over all ranks, ended now."""
        now = time.perf_counter()
        self._steps.append((now - self._since, tokens, flops))
        self._since = now

    def pause(self) -> None:
        """What passed since the last step belongs to no step."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self._per_second(1)

    @property
    def tflops_per_second(self) -> float:
        """10^12 model FLOP a second, all ranks together."""
        return self._per_second(2) / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization (PaLM, Chowdhery et al. 2022, appendix B): the share of the peak, 0 to 1."""
        return self._per_second(2) / self._peak if self._peak else None

    def seconds_for(self, tokens: int) -> float:
        """Seconds until this many more tokens are done at the present speed."""
        speed = self.tokens_per_second
        return tokens / speed if speed else 0.0

    def _per_second(self, column: int) -> float:
        seconds = sum(s[0] for s in self._steps)
        return sum(s[column] for s in self._steps) / seconds if seconds else 0.0
