"""Cross entropy over a large vocabulary, in pieces: the logits of all positions never stand in memory at once.

The gradients are computed with the loss, piece by piece, while a piece's logits are still warm:
    d loss / d logits = softmax(logits) (1 + 2 z logsumexp(logits)) - onehot(target)
so the backward pass only scales three stored gradients. Memory: one piece of logits instead of M x V, turned in place
into shifted logits, their exponentials and the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoder.base.batch import IGNORE, SummedLoss

# Positions of one piece. Every piece reads and writes the whole [V, C] gradient, so few positions waste the product:
# on CPU at V = 50,368 pieces of 41 took twice the time of 256, and 768 at most a fifth less (at V = 8,192 any from 64 up
# took the same). CUDA by reasoning, not measured: at 2,048 the gradient's traffic (0.4 GB) takes less than half the time
# of its product (158 GFLOP), and the fp32 piece is 0.4 GB.
PIECE_POSITIONS = {"cpu": 256, "cuda": 2048}


def cross_entropy_sum(h_MC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, target_M: Tensor, *,
                      z_loss_weight: float = 0.0) -> SummedLoss:
    """Sums over positions of -log softmax(h W^T + b)[target]; positions with target IGNORE contribute exactly zero.

    h_MC [M, C], weight_VC [V, C], bias_V [V] or None, target_M int64 [M]. The sums are fp64 for fp64 weights, else fp32.
    Without gradients `correct` counts the positions whose target has the highest logit; with them it is zero.
    `total` has z_loss_weight * logsumexp(logits)^2 added at each of these positions (PaLM, Chowdhery et al. 2022,
    section 5; ST-MoE, Zoph et al. 2022, section 3.3, eq. 5, for a router's logits).
    Matrix products run in the autocast dtype where autocast is on, else in the weight's; the rest in fp32 or fp64.
    """
    device = h_MC.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
    return SummedLoss(*_CrossEntropySum.apply(h_MC, weight_VC, bias_V, target_M, z_loss_weight, product,
                                              torch.is_grad_enabled()))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MC, weight_VC, bias_V, target_M, z_loss_weight, product, with_gradients):
        exact = torch.float64 if weight_VC.dtype == torch.float64 else torch.float32
        piece = PIECE_POSITIONS[h_MC.device.type]
        cross_entropy, squares = torch.zeros((2,), dtype=exact, device=h_MC.device).unbind()
        correct = torch.zeros((), dtype=torch.int64, device=h_MC.device)
        with torch.autocast(h_MC.device.type, enabled=False):
            h, weight = h_MC.to(product), weight_VC.to(product)
            bias = None if bias_V is None else bias_V.to(exact)
            if with_gradients:
                d_h = torch.empty_like(h_MC)
                d_weight = torch.zeros_like(weight_VC, dtype=exact)
                d_bias = None if bias is None else torch.zeros_like(bias)
            for start in range(0, len(target_M), piece):
                h_mC, target_m = h[start:start + piece], target_M[start:start + piece]
                counts_m1 = (target_m != IGNORE)[:, None]
                safe_m1 = target_m[:, None].where(counts_m1, 0)
                logits_mV = (h_mC @ weight.T).to(exact)
                if bias is not None:
                    logits_mV.add_(bias)
                if not with_gradients:      # evaluation alone: a pass over the piece
                    correct += ((logits_mV.argmax(1, keepdim=True) == safe_m1) & counts_m1).sum()
                top_m1 = logits_mV.amax(1, keepdim=True)
                at_target_m1 = logits_mV.sub_(top_m1).gather(1, safe_m1)
                e_mV = logits_mV.exp_()
                sum_m1 = e_mV.sum(1, keepdim=True)
                log_sum_m1 = sum_m1.log()
                cross_entropy += (log_sum_m1 - at_target_m1).where(counts_m1, 0).sum()
                logsumexp_m1 = log_sum_m1.add_(top_m1)
                squares += logsumexp_m1.square().where(counts_m1, 0).sum()
                if with_gradients:
                    scale_m1 = ((1 + 2 * z_loss_weight * logsumexp_m1) / sum_m1).where(counts_m1, 0)
                    d_mV = e_mV.mul_(scale_m1).scatter_add_(1, safe_m1, -counts_m1.to(exact))
                    if bias is not None:
                        d_bias += d_mV.sum(0)
                    d_mV = d_mV.to(product)
                    d_h[start:start + piece] = d_mV @ weight
                    d_weight += d_mV.T @ h_mC
                    del d_mV
                del logits_mV, e_mV      # or they stand beside the next piece's: 0.6 GB on CUDA, where activations are most
        if with_gradients:
            ctx.save_for_backward(d_h, d_weight.to(weight_VC.dtype), None if bias is None else d_bias.to(bias_V.dtype))
        count = (target_M != IGNORE).sum()
        ctx.mark_non_differentiable(cross_entropy, count, correct)
        # without z-loss its squares, which may overflow, have no say
        total = cross_entropy + z_loss_weight * squares if z_loss_weight else cross_entropy.clone()
        return total, cross_entropy, count, correct

    @staticmethod
    def backward(ctx, d_total, *_):
        return *(None if d is None else scaled(d, d_total) for d in ctx.saved_tensors), None, None, None, None


def scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """A new tensor, gradient times scale (0-d), rounded once.

    The scale (ranks / masked tokens) stays exact: rounded to bf16 first it would be off by up to 0.4 %, and by another amount on
    another number of ranks.
    """
    exact = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(exact) * scale.to(torch.promote_types(scale.dtype, torch.float32))).to(gradient.dtype)
