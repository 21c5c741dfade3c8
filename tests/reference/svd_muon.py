"""Muon by its meaning, in fp64: a singular value decomposition, and the quintic on each singular value by itself."""

from __future__ import annotations

import math

import numpy as np


def svd_muon(
    theta: np.ndarray,
    grads: list[np.ndarray],
    *,
    matrices: int,
    lrs: list[float],
    max_lr: float,
    momentum: float,
    weight_decay: float,
    scale: str,
    matrix_lr: float = 1.0,
) -> np.ndarray:
    """One parameter [rows, columns], `matrices` of them one above another, after one update per entry of `grads`.

    Jordan et al. 2024 (momentum summed up as they write it, Nesterov, five steps), Liu et al. 2025 for scale "adam".
    """
    theta, total = theta.astype(np.float64).copy(), np.zeros(theta.shape)
    for g, lr in zip(grads, lrs):
        total = momentum * total + g
        blocks = np.split(g + momentum * total, matrices)
        rows, columns = blocks[0].shape
        factor = (
            0.2 * math.sqrt(max(rows, columns))
            if scale == "adam"
            else math.sqrt(max(1, rows / columns))
        )
        update = np.concatenate([orthogonal(block) for block in blocks])
        theta = theta * (1 - lr / max_lr * weight_decay) - lr * matrix_lr * factor * update
    return theta


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """U f(S) V^T of U S V^T, f being five times the quintic after division by the Frobenius norm."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / max(float(np.sqrt((s**2).sum())), 1e-300)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt
