"""Cross entropy over a large vocabulary, in pieces: the logits of all positions never stand in memory at once.

The gradients are computed with the loss, piece by piece, while a piece's logits are still warm:
    d loss / d logits = softmax(logits) (1 + 2 z logsumexp(logits)) - onehot(target)
so the backward pass only scales three stored gradients. Memory: one piece of logits instead of M x V, turned in place
into their gradient, and one in fp32, turned in place into shifted logits, their exponentials and the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.batch import IGNORE, SCORE_BINS, LossTerm
from encoder.base.pieces import piece_rows
from encoder.nn import loss_kernel
from encoder.nn.half import product_dtype
from encoder.nn.sampling import Draws, draw_from_logits

# Positions of one piece. Every piece reads and writes the whole [V, C] gradient, so few positions waste the product; on a CPU 512
# took what 1,024 did. CUDA by reasoning, not measured: at 2,048 the gradient's traffic (0.4 GB) takes less than half the time of
# its product (158 GFLOP), and the fp32 piece is 0.4 GB.
PIECE_POSITIONS = {"cpu": 512, "cuda": 2048}


def cross_entropy_sum(
    h_MC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    *,
    z_loss_weight: float = 0.0,
) -> LossTerm:
    """Sums over positions of -log softmax(h W^T + b)[target]; positions with target IGNORE contribute exactly zero.

    h_MC [M, C], weight_VC [V, C], bias_V [V] or None, target_M int64 [M]. The sums are fp64 for fp64 weights, else fp32.
    Without gradients `correct` counts the positions whose target has the highest logit; with them it is zero.
    `total` has z_loss_weight * logsumexp(logits)^2 added at each of these positions (PaLM, Chowdhery et al. 2022,
    section 5; ST-MoE, Zoph et al. 2022, section 3.3, eq. 5, for a router's logits).
    Matrix products run in the autocast dtype where autocast is on, else in the weight's; the rest in fp32 or fp64.
    """
    return _cross_entropy(h_MC, weight_VC, bias_V, target_M, z_loss_weight, None)[0]


def drawn_cross_entropy_sum(
    h_MC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    draws: Draws,
    *,
    z_loss_weight: float = 0.0,
) -> tuple[LossTerm, Tensor]:
    """As cross_entropy_sum, and ids [M] drawn from the same softmax while a piece's logits are there; they have no gradient.

    h_MC, weight_VC, bias_V, target_M, z_loss_weight: as there; what is drawn at a target IGNORE means nothing
    draws: the keys of the positions, and the temperature
    """
    return _cross_entropy(h_MC, weight_VC, bias_V, target_M, z_loss_weight, draws)


def _cross_entropy(
    h_MC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    z_loss_weight: float,
    draws: Draws | None,
) -> tuple[LossTerm, Tensor]:
    product = product_dtype(h_MC.device, weight_VC.dtype)
    how = _How(z_loss_weight, product, torch.is_grad_enabled(), draws)
    *sums, drawn_M = _CrossEntropySum.apply(h_MC, weight_VC, bias_V, target_M, how)
    return LossTerm(*sums), drawn_M


def class_loss_sum(logits_MK: Tensor, target_M: Tensor) -> LossTerm:
    """Sums of -log softmax(logits)[target] over few classes, whose logits fit in memory; targets IGNORE contribute zero.

    logits_MK: [M, K], computed in fp32 where they are not fp64
    target_M: int64 [M], a class or IGNORE
    """
    logits_MK = logits_MK.to(torch.promote_types(logits_MK.dtype, torch.float32))
    total = F.cross_entropy(logits_MK, target_M, ignore_index=IGNORE, reduction="sum")
    correct = torch.zeros((), dtype=torch.int64, device=logits_MK.device)
    if not torch.is_grad_enabled():
        correct = (logits_MK.argmax(dim=-1) == target_M).sum()
    return LossTerm(total, total.detach(), (target_M != IGNORE).sum(), correct)


def yes_no_sum(logits_M: Tensor, yes_M: Tensor, target_M: Tensor) -> LossTerm:
    """Sums over positions of -log sigmoid(+-logit); positions with target IGNORE contribute exactly zero.

    logits_M: [M], computed in fp32 where they are not fp64
    yes_M: bool [M], what is right
    target_M: int64 [M]; IGNORE, or anything else

    Without gradients `correct` counts the positions whose logit has the right sign, and `scores` how many of either answer
    have which logit.
    """
    logits_M = logits_M.to(torch.promote_types(logits_M.dtype, torch.float32))
    counts_M = target_M != IGNORE
    losses_M = F.binary_cross_entropy_with_logits(
        logits_M, yes_M.to(logits_M.dtype), reduction="none"
    )
    total = losses_M.where(counts_M, 0.0).sum()
    correct = torch.zeros((), dtype=torch.int64, device=logits_M.device)
    scores = None
    if not torch.is_grad_enabled():
        correct = (((logits_M > 0) == yes_M) & counts_M).sum()
        scores = score_counts(logits_M, yes_M, counts_M)
    return LossTerm(total, total.detach(), counts_M.sum(), correct, scores=scores)


def score_counts(logits_M: Tensor, yes_M: Tensor, counts_M: Tensor) -> Tensor:
    """int64 [2, SCORE_BINS]: of the positions that count, how many no (0) and yes (1) have a logit in each bin.

    logits_M: [M]; bins are 1 / 32 wide and reach from -16 to 16, what is beyond is in the first and the last
    yes_M, counts_M: bool [M]
    """
    bin_M = ((logits_M.clamp(-16.0, 16.0) + 16.0) * 32.0).to(torch.int64).clamp(max=SCORE_BINS - 1)
    counts_2B = torch.zeros(2 * SCORE_BINS, dtype=torch.int64, device=logits_M.device)
    place_M = bin_M + SCORE_BINS * yes_M.to(torch.int64)
    return counts_2B.index_add_(0, place_M, counts_M.to(torch.int64)).view(2, SCORE_BINS)


def pick_loss_sum(logits_MK: Tensor, right_MK: Tensor, group_M: Tensor, *, groups: int) -> LossTerm:
    """Sums over groups of -log softmax(logits)[right], the softmax over the group's rows; of K such picks the mean.

    logits_MK: [M, K], computed in fp32 where they are not fp64
    right_MK: [M, K], 1 at the row that is right, once in each group and column
    group_M: int64 [M], ascending from 0
    groups: how many there are, at least one
    """
    logits_MK = logits_MK.to(torch.promote_types(logits_MK.dtype, torch.float32))
    nothing_GK = logits_MK.new_zeros(groups, logits_MK.shape[1])
    index_MK = group_M[:, None].expand_as(logits_MK)
    top_GK = nothing_GK.scatter_reduce(0, index_MK, logits_MK.detach(), "amax", include_self=False)
    shares_MK = (logits_MK - top_GK.index_select(0, group_M)).exp()
    logsumexp_GK = nothing_GK.index_add(0, group_M, shares_MK).log() + top_GK
    right_GK = nothing_GK.index_add(0, group_M, logits_MK * right_MK.to(logits_MK.dtype))
    total = (logsumexp_GK - right_GK).mean(dim=1).sum()
    correct = (right_GK >= top_GK).all(dim=1).sum()
    return LossTerm(total, total.detach(), correct.new_tensor(groups), correct)


class _How(NamedTuple):
    """How the cross entropy is computed."""

    z_loss_weight: float
    product: torch.dtype  # of the matrix products
    with_gradients: bool
    draws: Draws | None  # None: nothing is drawn


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_MC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        how: _How,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        z_loss_weight, product, with_gradients, draws = how
        exact = torch.promote_types(weight_VC.dtype, torch.float32)
        piece = PIECE_POSITIONS[h_MC.device.type]
        drawn_M = torch.zeros_like(target_M)

        # the kernel computes in fp32 and always makes the gradient
        by_kernel = (
            with_gradients
            and h_MC.device.type == "cuda"
            and exact == torch.float32
            and loss_kernel.available()
        )
        cross_entropy, squares = torch.zeros((2,), dtype=exact, device=h_MC.device).unbind()
        correct = torch.zeros((), dtype=torch.int64, device=h_MC.device)
        with torch.autocast(h_MC.device.type, enabled=False):
            h, weight = h_MC.to(product), weight_VC.to(product)
            bias = None if bias_V is None else bias_V.to(exact)
            d_weight = d_bias = None
            # d_h is written once; the others are summed over pieces, so in fp32 or fp64
            if with_gradients:
                d_h = torch.empty_like(h_MC)
                if bias is not None:
                    d_bias = torch.zeros_like(bias)
            for start in range(0, len(target_M), piece):
                h_mC, target_m = h[start : start + piece], target_M[start : start + piece]
                logits_mV = h_mC @ weight.T
                if not with_gradients:  # evaluation alone: a pass over the logits
                    correct += _hits(logits_mV, bias, target_m)
                if draws is not None:
                    drawn_M[start : start + piece] = draw_from_logits(
                        logits_mV,
                        bias,
                        target_m,
                        draws.key_M[start : start + piece],
                        temperature=draws.temperature,
                        leaves_target_out=draws.leaves_target_out,
                    )
                if by_kernel:
                    sums = loss_kernel.turn_into_gradient_(
                        logits_mV, target_m, bias, d_bias, z_loss_weight=z_loss_weight
                    )
                else:
                    sums = turn_into_gradient_(
                        logits_mV,
                        target_m,
                        bias,
                        d_bias,
                        z_loss_weight=z_loss_weight,
                        sums_alone=not with_gradients,
                    )
                cross_entropy += sums[0].sum()
                squares += sums[1].sum()
                if with_gradients:  # in the place of the logits stands their gradient
                    d_h[start : start + piece] = logits_mV @ weight
                    d_weight = added_product(d_weight, logits_mV.T, h_mC, dtype=exact)
                # or it stands beside the next piece's, where activations are most
                del logits_mV
        if with_gradients:
            given_d_bias = None
            if d_bias is not None and bias_V is not None:
                given_d_bias = d_bias.to(bias_V.dtype)
            if d_weight is None:  # no positions
                d_weight = torch.zeros_like(weight_VC)
            ctx.save_for_backward(d_h, d_weight.to(weight_VC.dtype), given_d_bias)
        count = (target_M != IGNORE).sum()
        ctx.mark_non_differentiable(cross_entropy, count, correct, drawn_M)
        total = cross_entropy.clone()
        # without z-loss its squares, which may overflow, have no say
        if z_loss_weight:
            total += z_loss_weight * squares
        return total, cross_entropy, count, correct, drawn_M

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_h, d_weight, d_bias = ctx.saved_tensors
        if d_bias is not None:
            d_bias = scaled(d_bias, d_total)
        return scaled(d_h, d_total), scaled(d_weight, d_total), d_bias, None, None


def turn_into_gradient_(
    logits_mV: Tensor,
    target_m: Tensor,
    bias_V: Tensor | None,
    d_bias_V: Tensor | None,
    *,
    z_loss_weight: float,
    sums_alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """As loss_kernel's, of any dtype: fp64 logits are turned and summed in fp64, others in fp32; d_bias_V is of that dtype.
    With sums_alone the logits are only used up.

    A few positions at a time: their fp32 logits, exponentials and gradient stay in a CPU's cache, which takes 0.75 of the time at
    V = 8,192 and 0.65 at V = 50,368.
    """
    exact = torch.promote_types(logits_mV.dtype, torch.float32)
    words = logits_mV.shape[1]
    rows = piece_rows(logits_mV, elements=words)
    cross_entropy_m1, squares_m1 = torch.empty(
        (2, len(target_m), 1), dtype=exact, device=logits_mV.device
    ).unbind()

    # halves are turned in a buffer of a few rows, fp32 and fp64 logits where they lie
    in_place = logits_mV.dtype == exact
    if not in_place:
        size = (min(rows, len(logits_mV)), words)
        buffer_rV = torch.empty(size, dtype=exact, device=logits_mV.device)
    for logits_rV, target_r, cross_entropy_r1, squares_r1 in zip(
        *(x.split(rows) for x in (logits_mV, target_m, cross_entropy_m1, squares_m1)), strict=True
    ):
        turned_rV = logits_rV
        if not in_place:
            turned_rV = buffer_rV[: len(logits_rV)].copy_(logits_rV)

        # gather needs a valid index: word 0 stands in for IGNORE, and its row is zeroed later
        counts_r1 = (target_r != IGNORE)[:, None]
        safe_r1 = target_r[:, None].where(counts_r1, 0)
        if bias_V is not None:
            turned_rV.add_(bias_V)

        # shifted by the highest logit: no exponential overflows, and logsumexp gets it back
        top_r1 = turned_rV.amax(1, keepdim=True)
        at_target_r1 = turned_rV.sub_(top_r1).gather(1, safe_r1)
        sum_r1 = turned_rV.exp_().sum(1, keepdim=True)
        log_sum_r1 = sum_r1.log()

        # -log softmax(x)[target] = log sum exp(x - top) - (x[target] - top)
        cross_entropy_r1.copy_((log_sum_r1 - at_target_r1).where(counts_r1, 0))
        logsumexp_r1 = log_sum_r1.add_(top_r1)
        squares_r1.copy_(logsumexp_r1.square().where(counts_r1, 0))
        if sums_alone:
            continue

        # exp(x - top) / sum (1 + 2 z logsumexp) - onehot(target), in place
        scale_r1 = ((1 + 2 * z_loss_weight * logsumexp_r1) / sum_r1).where(counts_r1, 0)
        turned_rV.mul_(scale_r1).scatter_add_(1, safe_r1, -counts_r1.to(exact))
        if d_bias_V is not None:
            d_bias_V += turned_rV.sum(0)
        if not in_place:
            logits_rV.copy_(turned_rV)
    return cross_entropy_m1[:, 0], squares_m1[:, 0]


def _hits(logits_mV: Tensor, bias_V: Tensor | None, target_m: Tensor) -> Tensor:
    """How many targets have the highest logit."""
    if bias_V is not None:
        # a copy: the logits are used by the caller after this
        logits_mV = logits_mV + bias_V
    return ((logits_mV.argmax(1) == target_m) & (target_m != IGNORE)).sum()


def added_product(total: Tensor | None, a: Tensor, b: Tensor, *, dtype: torch.dtype) -> Tensor:
    """total + a b in `dtype`, in the place of total (None: a b alone); on CUDA the halves' product is added where it is made.

    On a CPU zeros to add to cost a small batch much: 8 MB of fresh memory take 3 ms, as does a product of 256 positions.
    """
    if a.device.type == "cuda" and a.element_size() == 2 and dtype == torch.float32:
        if total is None:
            total = a.new_zeros((len(a), b.shape[1]), dtype=dtype)
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return total
    product = a @ b
    if total is None:
        return product.to(dtype)
    return total.add_(product)


def scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """A new tensor, gradient times scale (0-d), rounded once.

    The scale (ranks / masked tokens) stays exact: rounded to bf16 first it would be off by up to 0.4 %, and by another amount on
    another number of ranks.
    """
    exact = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(exact) * scale.to(torch.promote_types(scale.dtype, torch.float32))).to(
        gradient.dtype
    )
