"""How much of a tensor to work on at once, so that what one operation writes the next finds in the cache.

A core of a server reads memory at about 10 GB/s and computes on its own cache several times as fast.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

# of fp32 for each thread: 1 MiB, of a core's 2; 2^16 and 2^20 are slower
PIECE_ELEMENTS = 2**18


def piece_elements(device: torch.device) -> int:
    """Elements to work on at once: all there are where the device is no CPU."""
    if device.type == "cpu":
        return PIECE_ELEMENTS * torch.get_num_threads()
    return sys.maxsize


def piece_rows(x: Tensor, *, elements: int) -> int:
    """Rows of x to take at once, at least 1, each of so many elements in all that is computed of it."""
    return max(1, min(len(x), piece_elements(x.device) // elements))
