"""The slow truth for the layers: one dense mask over all tokens, one loss over the whole vocabulary, rotation by pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from encoder.base.batch import IGNORE


def dense_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, lengths: list[int], radius: int | None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with every pair of tokens written out: same document, and |i - j| <= radius if given."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    sees = document[:, None] == document[None, :]
    if radius is not None:
        sees &= (place[:, None] - place[None, :]).abs() <= radius
    scores = torch.einsum("qhd,khd->hqk", q_THD, k_THD) / math.sqrt(q_THD.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v_THD)


def whole_vocabulary_loss(
    h_MC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    *,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Sum of -log p(target) + z_loss_weight * logsumexp^2 with all logits in memory."""
    counts = target_M != IGNORE
    logits = (h_MC @ weight_VC.T + (0 if bias_V is None else bias_V))[counts]
    z_loss = z_loss_weight * logits.logsumexp(-1).square().sum()
    return z_loss - logits.log_softmax(-1).gather(1, target_M[counts][:, None]).sum()


def rotate_pair_by_pair(x_THD: Tensor, positions_T: Tensor, *, theta: float) -> Tensor:
    """Each (x_j, x_{j + D/2}) as a complex number, times exp(i position theta^(-2j/D)), in fp64."""
    half = x_THD.shape[-1] // 2
    out = torch.empty_like(x_THD, dtype=torch.float64)
    for j in range(half):
        angle = positions_T.double()[:, None] * theta ** (-2 * j / (2 * half))
        turned = torch.complex(x_THD[..., j].double(), x_THD[..., j + half].double()) * torch.polar(
            torch.ones_like(angle), angle
        )
        out[..., j], out[..., j + half] = turned.real, turned.imag
    return out
