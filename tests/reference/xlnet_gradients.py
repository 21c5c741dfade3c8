"""XLNet's training step one number at a time, in plain Python floats: clip by the global norm, decay by layer, Adam."""

from __future__ import annotations

import math
import re


def xlnet_steps(
    weights: dict[str, list[float]],
    grads: list[dict[str, list[float]]],
    *,
    layers: int,
    layer_decay: float,
    clip: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> dict[str, list[float]]:
    """Weights (flattened, by our names) after one step per entry of `grads`; zihangdai/xlnet model_utils.py, without decay."""
    theta = {name: list(values) for name, values in weights.items()}
    m = {name: [0.0] * len(values) for name, values in weights.items()}
    v = {name: [0.0] * len(values) for name, values in weights.items()}
    for step in grads:
        norm = math.sqrt(sum(g * g for values in step.values() for g in values))
        clipped = {name: [g * clip / max(norm, clip) for g in step[name]] for name in step}
        for name, values in clipped.items():
            for layer in range(layers):
                if re.match(rf"model\.layers\.{layer}\.", name):
                    factor = layer_decay ** (layers - 1 - layer)
                    clipped[name] = [g * factor for g in values]
        for name, values in clipped.items():
            for i, g in enumerate(values):
                m[name][i] = betas[0] * m[name][i] + (1 - betas[0]) * g
                v[name][i] = betas[1] * v[name][i] + (1 - betas[1]) * g * g
                theta[name][i] -= lr * m[name][i] / (math.sqrt(v[name][i]) + eps)
    return theta
