"""A draw from softmax(logits / T) by addressed noise: a function of the token's key and of the logits, and of nothing else.

    score[v] = logits[v] / T + g[v]        g = -log(-log(1 - u))        the highest score is a draw (Gumbel 1954)
    u[v]     = splitmix64(key + v)         a number in (0, 1) for each token and each entry of the vocabulary

So a resume, another micro-batch and another number of ranks draw with the same noise. The draw itself is the same up to the
rounding of the logits: in fp32 two scores are so near about once in a million draws, in bf16 about once in a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoder.base.pieces import piece_rows
from encoder.base.rng import address_seed

# splitmix64's constants (Steele, Lea and Flood 2014), as signed numbers
_STEP, _FIRST, _SECOND = (
    int(np.uint64(constant).astype(np.int64))
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
# sets this use of a token's key apart from dropout's
_USE = address_seed(0, "gumbel")
UNFIT = 1000.0  # taken off a logit that is not to be drawn, as ELECTRA's code has it
# numbers of noise at once where no cache bounds them: 0.3 GB with all that is on the way
MOST_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """How positions draw. M of them."""

    key_M: Tensor  # int64, of the tokens
    temperature: float = 1.0  # T, above 0
    # whether a position's own target cannot be drawn
    leaves_target_out: bool = False


def draw_from_logits(
    logits_mV: Tensor,
    bias_V: Tensor | None,
    target_m: Tensor,
    key_m: Tensor,
    *,
    temperature: float,
    leaves_target_out: bool,
) -> Tensor:
    """Ids [m], each drawn from softmax((logits + bias) / T). The logits stay as they are; no host waits.

    logits_mV: computed in fp32 where they are not fp64
    bias_V: fp32 or fp64; None for none
    target_m: int64; at what is no id nothing is left out
    key_m: int64, of the tokens
    temperature: T
    leaves_target_out: a position's target loses UNFIT of its logit first
    """
    exact = torch.promote_types(logits_mV.dtype, torch.float32)
    words = logits_mV.shape[1]
    drawn_m = torch.empty_like(target_m)
    steps_V = (torch.arange(words, device=logits_mV.device) + 1) * _STEP
    # a few positions at a time: of each number of noise there are three on the way
    rows = min(piece_rows(logits_mV, elements=6 * words), max(1, MOST_ELEMENTS // words))
    for start in range(0, len(target_m), rows):
        part = slice(start, start + rows)
        # a copy: the loss turns the logits into their gradient after this
        scores_rV = logits_mV[part].to(exact, copy=True)
        if bias_V is not None:
            scores_rV += bias_V
        if leaves_target_out:
            _lower_targets_(scores_rV, target_m[part])
        if temperature != 1.0:
            scores_rV /= temperature
        scores_rV += gumbel_noise(key_m[part], steps_V, dtype=exact)
        drawn_m[part] = scores_rV.argmax(1)
    return drawn_m


def gumbel_noise(key_m: Tensor, steps_V: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Gumbel numbers [m, V]: of token key and (v + 1) times splitmix64's step.

    The uniform number has 63 bits and is rounded once: near 0 it keeps all of its digits, so the largest numbers do, too.
    """
    z_mV = (key_m ^ _USE)[:, None] + steps_V
    z_mV = (z_mV ^ _shifted(z_mV, 30)).mul_(_FIRST)
    z_mV = (z_mV ^ _shifted(z_mV, 27)).mul_(_SECOND)
    # its last shift only changes low bits, which are rounded away
    uniform_mV = _shifted(z_mV, 1).to(dtype).mul_(2.0**-63)
    # -log(1 - u) is exponential; 1 for u would be infinite, whose score is the lowest
    return uniform_mV.neg_().log1p_().neg_().log_().neg_()


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros in front: torch's own shift brings the sign."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _lower_targets_(scores_rV: Tensor, target_r: Tensor) -> None:
    # word 0 stands in for what is no id, and loses nothing
    is_id_r1 = (target_r >= 0)[:, None]
    lower_r1 = torch.where(is_id_r1, -UNFIT, 0.0).to(scores_rV.dtype)
    scores_rV.scatter_add_(1, target_r[:, None].where(is_id_r1, 0), lower_r1)
