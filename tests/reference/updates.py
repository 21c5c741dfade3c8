"""The weights of a small set of parameters after some updates, by the slow truth of each optimizer, whole and in fp64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from encoder.optim.adamw import AdamWConfig
from encoder.optim.lamb import LambConfig
from encoder.optim.muon import MuonConfig
from tests.reference.looped_adamw import looped_adamw
from tests.reference.looped_lamb import looped_lamb
from tests.reference.looped_stable_adamw import looped_stable_adamw
from tests.reference.svd_muon import svd_muon


def slow_updates(
    start: Mapping[str, torch.Tensor],
    grads: Sequence[Mapping[str, torch.Tensor]],
    config,
    *,
    lrs: list[float],
    max_lr: float,
    hidden_matrices: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """`grads` holds one gradient a step and parameter; matrices decay, vectors and biases do not."""
    return {
        name: (
            torch.as_tensor(
                _slow(
                    name,
                    theta.double(),
                    [g[name].double() for g in grads],
                    config,
                    lrs,
                    max_lr,
                    hidden_matrices,
                ),
                dtype=torch.float64,
            ).view(theta.shape)
        )
        for name, theta in start.items()
    }


def _slow(name, theta, grads, config, lrs, max_lr, hidden_matrices):
    weight_decay = config.weight_decay if theta.ndim > 1 and not name.endswith(".bias") else 0.0
    if isinstance(config, AdamWConfig) and config.bias_correction:
        return _by_torch(theta, grads, config, lrs, weight_decay)
    if isinstance(config, MuonConfig) and name in hidden_matrices:
        return svd_muon(
            theta.numpy(),
            [g.numpy() for g in grads],
            matrices=hidden_matrices[name],
            lrs=lrs,
            max_lr=max_lr,
            momentum=config.momentum,
            weight_decay=weight_decay,
            scale=config.matrix_scale,
            matrix_lr=config.matrix_lr,
        )
    flat = theta.flatten().tolist(), [g.flatten().tolist() for g in grads]
    told = dict(lrs=lrs, betas=config.betas, eps=config.eps, weight_decay=weight_decay)
    told["bias_correction"] = config.bias_correction
    if isinstance(config, AdamWConfig):
        return np.array(looped_adamw(*flat, **told))
    if isinstance(config, LambConfig):
        return np.array(
            looped_lamb(*flat, **told, adapts=theta.ndim > 1 and not name.endswith(".bias"))
        )
    return np.array(looped_stable_adamw(*flat, **told, max_lr=max_lr))


def _by_torch(theta, grads, config, lrs, weight_decay):
    theta = theta.clone().requires_grad_()
    judge = torch.optim.AdamW(
        [theta], lr=1.0, betas=config.betas, eps=config.eps, weight_decay=weight_decay
    )
    for g, lr in zip(grads, lrs):
        theta.grad = g.clone()
        judge.param_groups[0]["lr"] = lr
        judge.step()
    return theta.detach()
