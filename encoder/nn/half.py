"""Which dtype a sum and a matrix product run in."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_are_rounded(x: Tensor) -> bool:
    """Whether torch would add up what a kernel reduces over tokens in x's own dtype: its CPU kernels of LayerNorm and of embeddings
    do (2.11), those of CUDA add in fp32."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def product_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """The dtype of matrix products on a device: that of autocast where it is on, else `own`."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return own
