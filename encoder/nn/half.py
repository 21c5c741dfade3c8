"""Where torch adds up gradients in half precision, so that we must not let it."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_are_rounded(x: Tensor) -> bool:
    """Whether torch would add up what a kernel reduces over tokens in x's own dtype: its CPU kernels of LayerNorm and of embeddings
    do (2.11), those of CUDA add in fp32."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
