"""Micro-batches to a device, each copied while the one before it is computed.

copies     | 0 | 1 |     | 2 |     | 3 |           copy i + 1 waits for what computes i - 1: it may lie where i - 1 lay
kernels        |    0    |    1    |    2    |     kernels i wait for copy i
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from encoder.base.batch import TokenBatch


def on_device(batches: Sequence[TokenBatch], device: torch.device) -> Iterator[TokenBatch]:
    """The batches on the device, in order, for kernels of the current stream. Copies from pinned memory (the loader's) run beside
    kernels and nothing waits on the host.

    A batch may be used until the next one is asked for: what still reads it later on the device must be launched by then.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    beside, kernels = _stream(device), torch.cuda.current_stream(device)

    def sent(batch: TokenBatch) -> tuple[TokenBatch, torch.cuda.Event]:
        # memory of the copies' stream is given to later copies alone, and this orders those behind the kernels that read it
        beside.wait_stream(kernels)
        with torch.cuda.stream(beside):
            return batch.to(device, non_blocking=True), beside.record_event()

    # one ahead: the next copy is queued before the kernels of this micro-batch
    coming = [sent(batch) for batch in batches[:1]]
    for i in range(len(batches)):
        ready, copied = coming.pop()
        coming = [sent(batch) for batch in batches[i + 1 : i + 2]]
        kernels.wait_event(copied)
        yield ready


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
