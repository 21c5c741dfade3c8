"""AdamW one number at a time, in plain Python floats (fp64), with and without bias correction."""

from __future__ import annotations

import math


def looped_adamw(
    theta: list[float],
    grads: list[list[float]],
    *,
    lrs: list[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
) -> list[float]:
    """One parameter (flattened) after one update per entry of `grads`; google-research/bert optimization.py, line by line."""
    theta = list(theta)
    m = [0.0] * len(theta)
    v = [0.0] * len(theta)
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        over_m = 1 - betas[0] ** t if bias_correction else 1.0
        over_v = 1 - betas[1] ** t if bias_correction else 1.0
        for i in range(len(theta)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i] ** 2
            update = (m[i] / over_m) / (math.sqrt(v[i] / over_v) + eps)
            update += weight_decay * theta[i]
            theta[i] -= lr * update
    return theta
