"""The loss's turn of a piece of logits into its gradient as one Triton kernel: reads the logits twice, writes the gradient once.

    one program a position      top and sum of exponentials on the way through the vocabulary
                                then, in the logits' place, exp(logit - logsumexp) (1 + 2 z logsumexp) - onehot(target)

Its twin is the loop over torch's operations in encoder.nn.loss, which passes over the fp32 logits nine times: at V = 50,368 that is
6 GB of memory traffic for 2,048 positions, where this moves 0.6 GB (both counted, not measured). Without a GPU it runs in Triton's
interpreter (tests/unit/nn/test_loss_kernel.py).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from encoder.base.batch import IGNORE

BLOCK_WORDS = 4096  # of the vocabulary at once: 16 a thread
WARPS = 8


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def turn_into_gradient_(
    logits_mV: Tensor,
    target_m: Tensor,
    bias_V: Tensor | None,
    d_bias_V: Tensor | None,
    *,
    z_loss_weight: float,
) -> tuple[Tensor, Tensor]:
    """Logits [m, V] (fp32 or half, rows of one stride) become the gradient of their loss; bias_V fp32 is added to them first.

    Returns -log softmax(logits)[target] and logsumexp^2, fp32 [m]; both and the gradient are 0 where the target is IGNORE. All of
    it is computed in fp32 and the gradient rounded once; d_bias_V, fp32, has its sum over the positions added, here of the rounded.
    """
    cross_entropy_m, squares_m = torch.empty(
        (2, len(target_m)), dtype=torch.float32, device=logits_mV.device
    ).unbind()
    if len(target_m):
        words = logits_mV.shape[1]

        # one program a position; without a bias any pointer will do, it is never read
        _kernel()[(len(target_m),)](
            logits_mV,
            logits_mV if bias_V is None else bias_V,
            target_m,
            cross_entropy_m,
            squares_m,
            words,
            logits_mV.stride(0),
            z_loss_weight,
            HAS_BIAS=bias_V is not None,
            IGNORED=IGNORE,
            # a power of two, as tl.arange asks; a small vocabulary fits one block
            BLOCK=min(BLOCK_WORDS, 1 << (words - 1).bit_length()),
            num_warps=WARPS,
        )
    if d_bias_V is not None:
        d_bias_V += logits_mV.sum(0, dtype=d_bias_V.dtype)
    return cross_entropy_m, squares_m


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def turn(
        logits,
        bias,
        targets,
        cross_entropies,
        squares,
        words,
        stride,
        z_loss_weight,
        HAS_BIAS: tl.constexpr,
        IGNORED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        # int64: of many rows the product may pass 2^31
        logits += row.to(tl.int64) * stride
        target = tl.load(targets + row)
        place = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        for start in range(0, words, BLOCK):
            inside = start + place < words
            x = tl.load(logits + start + place, mask=inside, other=float("-inf")).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias + start + place, mask=inside, other=0.0)

            # online: where a higher logit comes, the sum so far is scaled to it
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        log_total = tl.log(total)
        logsumexp = top + log_total

        # IGNORE is no address: word 0 is read instead, and nothing of it counts
        counts = target != IGNORED
        safe = tl.where(counts, target, 0)
        at_target = tl.load(logits + safe).to(tl.float32)
        if HAS_BIAS:
            at_target += tl.load(bias + safe)
        tl.store(cross_entropies + row, tl.where(counts, log_total - (at_target - top), 0.0))
        tl.store(squares + row, tl.where(counts, logsumexp * logsumexp, 0.0))
        scale = tl.where(counts, (1.0 + 2.0 * z_loss_weight * logsumexp) / total, 0.0)
        onehot = tl.where(counts, 1.0, 0.0)

        # all threads have read the target's logit before one of them writes over it
        tl.debug_barrier()
        for start in range(0, words, BLOCK):
            inside = start + place < words
            x = tl.load(logits + start + place, mask=inside, other=float("-inf")).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias + start + place, mask=inside, other=0.0)
            d = tl.exp(x - top) * scale - tl.where(start + place == safe, onehot, 0.0)
            tl.store(logits + start + place, d.to(logits.dtype.element_ty), mask=inside)

    return turn
