"""Growth as the formulas say it, index by index, each tensor by its own rule; knows nothing of encoder.models.growth."""

from __future__ import annotations

import numpy as np

# what was published: new layer i of ModernBERT-large <- this layer of ModernBERT-base
BASE_TO_LARGE = [
    0,
    1,
    2,
    2,
    3,
    4,
    5,
    6,
    6,
    7,
    8,
    9,
    9,
    10,
    11,
    12,
    13,
    13,
    14,
    15,
    16,
    16,
    17,
    18,
    19,
    20,
    20,
    21,
]


def axis_source(k: int, *, n: int, big: int, mode: str) -> int | None:
    """Where entry k of an axis of `big` comes from in an axis of `n`; None: from nowhere."""
    offset = (big - n) // 2
    if mode == "middle":
        return (k - offset) % n
    if mode == "edge":
        return k % n
    return k - offset if offset <= k < offset + n else None


def tile(source: np.ndarray, fresh: np.ndarray, *, mode: str) -> np.ndarray:
    """One matrix or vector, entry by entry."""
    out = fresh.copy()
    for place in np.ndindex(*fresh.shape):
        there = tuple(
            axis_source(k, n=n, big=big, mode=mode)
            for k, n, big in zip(place, source.shape, fresh.shape, strict=True)
        )
        if None not in there:
            out[place] = source[there]
    return out


def tile_blocks(source: np.ndarray, fresh: np.ndarray, *, blocks: int, mode: str) -> np.ndarray:
    """A matrix that is several, one under the other."""
    return np.concatenate(
        [
            tile(a, b, mode=mode)
            for a, b in zip(np.split(source, blocks), np.split(fresh, blocks), strict=True)
        ]
    )


def grown(
    source: dict[str, np.ndarray],
    fresh: dict[str, np.ndarray],
    *,
    layers: list[int],
    gated: bool,
    mode: str,
    copy_final_norm: bool = True,
) -> dict[str, np.ndarray]:
    """All weights of the new model. `layers`: the old layer of each new one; `fresh`: the new model's own initial weights."""
    out = dict(fresh)
    for name in fresh:
        parts = name.split(".")
        there = (
            ".".join([*parts[:2], str(layers[int(parts[2])]), *parts[3:]])
            if parts[1] == "layers"
            else name
        )
        if there not in source or (name.startswith("model.final_norm") and not copy_final_norm):
            continue
        blocks = 1
        if "Wqkv" in name:
            blocks = 3
        elif "Wi" in name and gated:
            blocks = 2
        out[name] = tile_blocks(source[there], fresh[name], blocks=blocks, mode=mode)
    return out


def round_half_even(numerator: int, denominator: int) -> int:
    """The nearest whole number, a half to the even one, in whole numbers alone."""
    whole, rest = divmod(numerator, denominator)
    if 2 * rest == denominator:
        return whole + whole % 2
    return whole + (2 * rest > denominator)
