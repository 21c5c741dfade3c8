"""Dropout by address: whether an element falls out is a function of its token's key, the layer, the place and the channel.

The key of a token is a random int64 that the data side derives from (seed, phase, window, row, position). Each place of
each layer has C random odd constants. Element (t, c) is kept when the wrapped product key_t * constant_c, read as a signed number,
is at least the p-quantile of all int64: multiply-shift hashing (Dietzfelbinger et al. 1997). Why this is enough:

- an odd constant is invertible modulo 2^64, so a uniform key gives a uniform product, and the rate is exactly p;
- two tokens have independent keys, so their elements are independent;
- two channels (or layers, or places) a, b of one token depend on each other only through small whole numbers m, n with
  m a + n b = 0 modulo 2^64; for random odd constants such a pair below 1,000 exists with a chance of about 1e-13.

A block that several layers share has one set of constants: its n-th call multiplies the keys with an odd constant of n, so that
all of the above holds between calls, too.

So the same elements fall out on any rank, in any micro-batch, after any resume, with no generator state. Cost: one
outer product and one compare of int64, about as much as the residual addition beside it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from encoder.base.rng import generator

# the output of attention, of the feed-forward, what is between its two matrices, the embedding (of layer 0), and what
# goes into a task's head and out of it (of layer 0)
Place = Literal["attention", "mlp", "mlp_inner", "embedding", "head", "head_output", "last"]


class AddressedDropout(nn.Module):
    """x + dropout(y): the residual addition with dropout of the branch; plain addition in eval mode or with p = 0."""

    constant_C: Tensor  # without elements until they are needed, where p = 0 and on the meta device

    def __init__(self, *, width: int, layer: int, p: float, place: Place = "attention") -> None:
        super().__init__()
        self.p = p
        address: tuple[int | str, ...] = (layer, place)
        # attention's address is older than the other places
        if place == "attention":
            address = (layer,)
        self._width = width
        self._address = address
        # who asks for names and shapes makes no numbers, whatever width a stranger's config says
        constant_C = torch.empty(0, dtype=torch.int64, device="cpu")
        if p > 0.0 and torch.get_default_device().type != "meta":
            constant_C = self._drawn()
        # a function of the address, so not part of a checkpoint
        self.register_buffer("constant_C", constant_C, persistent=False)

    def _drawn(self) -> Tensor:
        draw = generator(0, "dropout", *self._address)
        # odd, so invertible modulo 2^64
        drawn = draw.integers(-(2**63), 2**63, size=self._width, dtype=np.int64) | 1
        return torch.from_numpy(drawn)

    def forward(self, x_TC: Tensor, y_TC: Tensor, key_T: Tensor) -> Tensor:
        """[T, C] + [T, C] -> [T, C]; key_T int64."""
        if not self.training or self.p == 0.0:
            return x_TC + y_TC
        # in bf16 1 / 0.9 itself would be 0.16 % too small
        exact = torch.promote_types(x_TC.dtype, torch.float32)
        factor_TC = self._factor(key_T, exact)

        # compiled it is one pass anyway; uncompiled our own step makes it one
        if torch.compiler.is_compiling():
            return torch.addcmul(x_TC.to(exact), y_TC.to(exact), factor_TC).to(x_TC.dtype)
        return _AddScaled.apply(x_TC, y_TC, factor_TC)

    def alone(self, y_TC: Tensor, key_T: Tensor | None) -> Tensor:
        """dropout(y), where nothing is added: [T, C] -> [T, C]."""
        if not self.training or self.p == 0.0:
            return y_TC
        assert key_T is not None, "training with dropout needs keys"
        exact = torch.promote_types(y_TC.dtype, torch.float32)
        return (y_TC.to(exact) * self._factor(key_T, exact)).to(y_TC.dtype)

    def _factor(self, key_T: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, C]: 1 / (1 - p) where an element is kept, 0 where it falls out."""
        if not len(self.constant_C):
            self.constant_C = self._drawn().to(key_T.device)
        # the product wraps modulo 2^64, as meant; read as signed it is uniform over all int64
        keep_TC = key_T[:, None] * self.constant_C >= quantile_of_int64(self.p)
        return keep_TC.to(dtype) * (1.0 / (1.0 - self.p))


def key_of_call(key_T: Tensor, call: int) -> Tensor:
    """The keys [T] of a block's call number 0, 1, ...; of the first, and so of a block of one layer, the tokens' own."""
    if not call:
        return key_T
    return key_T * _call_constant(call)


@lru_cache(maxsize=4096)
def _call_constant(call: int) -> int:
    return int(generator(0, "dropout", "call", call).integers(-(2**63), 2**63)) | 1


def quantile_of_int64(p: float) -> int:
    """The number below which a share p of all int64 lies."""
    return round(p * 2.0**64) - 2**63


class _AddScaled(torch.autograd.Function):
    """x + y * factor in the factor's precision, rounded once; one pass each way (autograd's addcmul: two)."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, y_TC: Tensor, factor_TC: Tensor) -> Tensor:
        ctx.save_for_backward(factor_TC)
        ctx.y_dtype = y_TC.dtype
        exact = factor_TC.dtype
        return torch.addcmul(x_TC.to(exact), y_TC.to(exact), factor_TC).to(x_TC.dtype)

    @staticmethod
    def backward(ctx: Any, d_TC: Tensor) -> tuple[Tensor, Tensor, None]:
        (factor_TC,) = ctx.saved_tensors
        return d_TC, (d_TC * factor_TC).to(ctx.y_dtype), None
