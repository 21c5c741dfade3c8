"""Rotary positions (Su et al. 2021), half-split: pair (j, j + D/2) of a head turns by position * theta^(-2j/D)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from encoder.base.pieces import piece_rows

# turned in attention, or a table added to the tokens (encoder.nn.embedding)
Positions = Literal["rope", "learned"]


def rope_table(positions_T: Tensor, *, theta: float, head_width: int) -> Tensor:
    """cos and sin of the angles, [2, T, 1, D/2] in fp32; made once per micro-batch and theta.

    Angles are fp32 whatever the model's precision: at position 8,191 a bf16 angle would be off by up to 32 radians.
    """
    pair = torch.arange(0, head_width, 2, device=positions_T.device, dtype=torch.float32)
    # written as transformers and FlexBERT write it: theta^(-2j/D) rounds a third of the frequencies otherwise, which is
    # 1e-4 radians at position 8,191 and was the largest difference between us
    angle_TP = positions_T.to(torch.float32)[:, None] * (1.0 / theta ** (pair / head_width))
    return torch.stack((angle_TP.cos(), angle_TP.sin()))[:, :, None, :]


def split_and_rotate(qkv_T3HD: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each [T, H, D], of a fused projection; query and key turned by their token's angles.

    The turn is computed in fp32 (fp64 for fp64 input) and rounded once, as one autograd step instead of the 14 of plain torch.
    """
    # the compiler fuses this better than it can see through our own step
    if torch.compiler.is_compiling():
        query_THD, key_THD, value_THD = qkv_T3HD.unbind(1)
        # each a tensor of its own: two views of one would come back as views, whose gradients autograd adds up in two zeroed
        # tensors of [T, 2, H, D] outside of what is compiled, 7 memory passes a layer
        return _turned(query_THD, *table), _turned(key_THD, *table), value_THD
    return _SplitAndRotate.apply(qkv_T3HD, table)


def half_split_rows(rows: Tensor, *, heads: int) -> Tensor:
    """Rows of Wq or Wk [H D, ...] of a model that turns pairs (2j, 2j + 1), laid for one that turns (j, j + D/2).

    A score is a sum over pairs, so both models give the same.
    """
    width = len(rows) // heads
    return rows.unflatten(0, (heads, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _turned(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = torch.promote_types(x_THD.dtype, torch.float32)
    a, b = x_THD.to(exact).chunk(2, dim=-1)
    cos, sin = cos.to(exact), sin.to(exact)
    # (a, b) turned by the angle; a and b are the two halves of a head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THD.dtype)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_T3HD: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        query_THD, key_THD, value_THD = qkv_T3HD.unbind(1)
        q_THD, k_THD = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_THD, key_THD)
        )
        _turn((query_THD, key_THD), *table, out=(q_THD, k_THD))
        return q_THD, k_THD, value_THD.clone()

    @staticmethod
    def backward(ctx: Any, dq_THD: Tensor, dk_THD: Tensor, dv_THD: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        cos, sin = table
        tokens, heads, width = dq_THD.shape
        d_qkv = dq_THD.new_empty(tokens, 3, heads, width)

        # the transpose of a turn is the turn back
        _turn((dq_THD, dk_THD), cos, -sin, out=(d_qkv[:, 0], d_qkv[:, 1]))
        d_qkv[:, 2] = dv_THD
        return d_qkv, None


def _turn(
    xs: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, *, out: tuple[Tensor, Tensor]
) -> None:
    """out = xs turned, each [T, H, D], computed in fp32 or fp64 and rounded once to out's dtype.

    Both together, and on a CPU as many tokens at once as stay in a core's cache: there and back 35 ms against 54 for 16,384
    tokens of 4 heads x 64 in bf16, one thread.
    """
    tokens, heads, width = xs[0].shape
    exact = torch.promote_types(xs[0].dtype, torch.float32)
    cos, sin = cos.to(exact), sin.to(exact)

    # two buffers for all pieces, each with the heads of the query beside those of the key
    piece = piece_rows(xs[0], elements=2 * heads * width)
    size = (2, min(piece, tokens), 2 * heads, width)
    straight, turned = xs[0].new_empty(size, dtype=exact)
    with torch.autocast(xs[0].device.type, enabled=False):
        for start in range(0, tokens, piece):
            here = slice(start, start + piece)
            cos_t, sin_t = cos[here], sin[here]
            x = straight[: len(cos_t)]
            y = turned[: len(cos_t)]
            for into, x_THD in zip(x.split(heads, dim=1), xs, strict=True):
                into.copy_(x_THD[here])

            # a cos - b sin and b cos + a sin
            a, b = x.chunk(2, dim=-1)
            turned_a, turned_b = y.chunk(2, dim=-1)
            torch.mul(a, cos_t, out=turned_a).addcmul_(b, sin_t, value=-1)
            torch.mul(b, cos_t, out=turned_b).addcmul_(a, sin_t)
            for y_tHD, into in zip(y.split(heads, dim=1), out, strict=True):
                into[here] = y_tHD
