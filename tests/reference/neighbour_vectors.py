"""Neighbours counted pair by pair in fractions, and their vectors' products from a whole matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def counted(
    documents: Sequence[Sequence[int]], *, window: int, left_out: Sequence[int] = ()
) -> dict[tuple[int, int], Fraction]:
    """(lower id, higher id) -> the sum of 1 / distance over all pairs at most `window` apart."""
    total: Counter = Counter()
    for ids in documents:
        for i, a in enumerate(ids):
            for j in range(i + 1, min(i + window, len(ids) - 1) + 1):
                if a not in left_out and ids[j] not in left_out:
                    total[min(a, ids[j]), max(a, ids[j])] += Fraction(1, j - i)
    return dict(total)


def information(pairs: dict[tuple[int, int], Fraction], *, vocab_size: int) -> np.ndarray:
    """M [V, V]: positive pointwise mutual information, contexts to the power 3/4, the mean of both directions."""
    count = np.zeros((vocab_size, vocab_size))
    for (a, b), n in pairs.items():
        count[a, b] += float(n)
        count[b, a] += float(n)
    total = count.sum(axis=1)
    context = total**0.75 / (total**0.75).sum()
    found = np.zeros_like(count)
    for a, b in zip(*count.nonzero(), strict=True):
        one_way = np.log(count[a, b] / (total[a] * context[b]))
        other_way = np.log(count[a, b] / (total[b] * context[a]))
        found[a, b] = max(0.0, (one_way + other_way) / 2)
    return found


def products(matrix: np.ndarray, *, width: int) -> np.ndarray:
    """E E^T = U |L| U^T [V, V] of the `width` eigenvalues of largest size."""
    values, vectors = np.linalg.eigh(matrix)
    largest = np.argsort(-np.abs(values))[:width]
    return (vectors[:, largest] * np.abs(values[largest])) @ vectors[:, largest].T
