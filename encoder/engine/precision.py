"""What `precision: auto` means on a device: autocast where it has units for bf16, else fp32."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "fp64", "autocast", "bf16"]


def precision_on(word: Precision, device: torch.device) -> Precision:
    """The precision that a device trains in: the word itself, unless it is auto."""
    if word != "auto":
        return word
    return "autocast" if computes_bf16(device) else "fp32"


def computes_bf16(device: torch.device) -> bool:
    """If the device has units for bf16 (AMX, AVX512-BF16, ARM's; CUDA from capability 8.0). Others convert to fp32, and back."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    can = torch.cpu.get_capabilities()
    return any(can.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
