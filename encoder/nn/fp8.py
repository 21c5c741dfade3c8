"""Linear layers whose three matmuls run in FP8: E4M3 for weights and activations, E5M2 for gradients, one scale a tensor
(Micikevicius et al. 2022, FP8 Formats for Deep Learning).

    y = x W^T        d_x = d_y W        d_W = d_y^T x        each of quantized(a) quantized(b) times both scales, the sum in fp32

A scale maps the largest absolute value of a tensor, as it is now, to the format's largest: nothing overflows, nothing is remembered
from step to step, so a resumed run is the run. Weights, their gradients and the optimizer keep their precision. A layer keeps its
input for the backward pass in one byte an element.

On CUDA (compute capability 8.9 and up) torch._scaled_mm computes it; on a CPU the same 8-bit numbers are multiplied in
fp32, whose sums are exact to 1e-7. Hopper's units keep 13 bits of fraction while they add (by reports, not measured
here): sums of equal signs are good to about 1e-4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.errors import ConfigError
from encoder.nn.half import product_dtype

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of both sides of a matrix: the tensor cores' demand
LEAST_SCALE = 1e-30  # of a tensor of zeros


class Fp8Linear(nn.Linear):
    """nn.Linear, its matmuls in FP8; the output in autocast's dtype, else the input's."""

    @classmethod
    def of(cls, linear: nn.Linear, *, name: str) -> Fp8Linear:
        """On the same parameters. Raises ConfigError for sides that the hardware cannot take."""
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ConfigError(
                f"fp8 layers: {name} is {linear.out_features} x {linear.in_features}; needed:"
                f" multiples of {MULTIPLE}. Change hidden_size or intermediate_size, or use"
                " engine.fp8: off."
            )

        # no memory of its own: it works on the parameters of the layer whose place it takes
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False)
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, O]."""
        dtype = product_dtype(x.device, x.dtype)
        out = _Products.apply(x, self.weight, dtype)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out


def to_fp8_(module: nn.Module) -> None:
    """Every nn.Linear in it, from now on; parameters and their names stay. Raises ConfigError as Fp8Linear.of,
    before any is changed."""
    # all first: a layer that cannot be taken must leave none of the others changed
    made = {
        name: Fp8Linear.of(child, name=name)
        for name, child in module.named_modules()
        if type(child) is nn.Linear
    }
    for name, linear in made.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, linear)


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits and its scale, fp32 and 0-d: x is about q times scale. What is not finite makes it all not finite."""
    most = torch.finfo(dtype).max
    scale = (x.detach().abs().amax().float() / most).clamp(min=LEAST_SCALE)
    return (x.float() / scale).clamp(-most, most).to(dtype), scale


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_OC: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = quantized(x_TC, FORWARD)
        w8, w_scale = quantized(weight_OC, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x_TC.dtype, weight_OC.dtype
        return _product(x8, w8.t(), x_scale, w_scale, dtype)

    @staticmethod
    def backward(ctx: Any, d_TO: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        d8, d_scale = quantized(d_TO, BACKWARD)
        d_x = _product(d8, _by_columns(w8), d_scale, w_scale, x_dtype)

        # the tokens are the sum's length here; bytes of zero are 0.0 in both formats
        if short := -len(d8) % MULTIPLE:
            d8 = _with_rows_of_zeros(d8, short)
            x8 = _with_rows_of_zeros(x8, short)
        d_weight = _product(d8.t().contiguous(), _by_columns(x8), d_scale, x_scale, w_dtype)
        return d_x, d_weight, None


def _with_rows_of_zeros(x8: Tensor, rows: int) -> Tensor:
    # padding knows no 8-bit floats
    return F.pad(x8.view(torch.uint8), (0, 0, 0, rows)).view(x8.dtype)


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a row-major, b column-major: what the tensor cores read."""
    if a.device.type == "cuda":
        return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)

    # torch's own on a CPU takes 50 ms for 64 x 64 x 128
    with torch.autocast(a.device.type, enabled=False):
        product = a.float() @ b.float()
        return (product * (a_scale * b_scale)).to(dtype)


def _by_columns(x: Tensor) -> Tensor:
    # the same values and shape, laid column by column
    return x.t().contiguous().t()
