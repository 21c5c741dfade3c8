"""LAMB one number at a time, in plain Python floats (fp64): the slow truth for encoder.optim.lamb."""

from __future__ import annotations

import math


def looped_lamb(
    theta: list[float],
    grads: list[list[float]],
    *,
    lrs: list[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    adapts: bool,
    bias_correction: bool = True,
) -> list[float]:
    """One parameter (flattened) after one update per entry of `grads`; arXiv 1904.00962, algorithm 2, with phi(z) = z."""
    theta, m, v = list(theta), [0.0] * len(theta), [0.0] * len(theta)
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        r = []
        for i in range(len(theta)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i] ** 2
            m_hat = m[i] / (1 - betas[0] ** t) if bias_correction else m[i]
            v_hat = v[i] / (1 - betas[1] ** t) if bias_correction else v[i]
            r.append(m_hat / (math.sqrt(v_hat) + eps) + weight_decay * theta[i])
        weights, update = (math.sqrt(sum(x**2 for x in values)) for values in (theta, r))
        trust = weights / update if adapts and weights > 0 and update > 0 else 1.0
        theta = [x - lr * trust * u for x, u in zip(theta, r)]
    return theta
