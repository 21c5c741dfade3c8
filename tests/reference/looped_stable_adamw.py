"""StableAdamW one number at a time, in plain Python floats (fp64): the slow truth for encoder.optim.stable_adamw."""

from __future__ import annotations

import math


def looped_stable_adamw(
    theta: list[float],
    grads: list[list[float]],
    *,
    lrs: list[float],
    max_lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
) -> list[float]:
    """One parameter (flattened) after one update per entry of `grads`; fact sheet section 3.4, line by line."""
    theta, m, v = list(theta), [0.0] * len(theta), [0.0] * len(theta)
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        b1 = betas[0] * (1 - betas[0] ** (t - 1)) / (1 - betas[0] ** t)
        b2 = betas[1] * (1 - betas[1] ** (t - 1)) / (1 - betas[1] ** t)
        if not bias_correction:
            b1, b2 = betas
        total = 0.0
        for i in range(len(theta)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            total += g[i] ** 2 / max(v[i], eps**2)
        rms = math.sqrt(total / len(theta))
        eta = lr / max(1.0, rms)
        for i in range(len(theta)):
            theta[i] = theta[i] * (1 - eta / max_lr * weight_decay) - eta * m[i] / (
                math.sqrt(v[i]) + eps
            )
    return theta
