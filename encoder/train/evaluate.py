"""The held-out loss of a run: fixed documents and fixed masks, the same at every step, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from encoder.base.batch import TokenBatch
from encoder.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """This rank's share of one held-out source."""

    name: str
    batches: Sequence[TokenBatch]


def held_out_losses(
    sets: Sequence[HeldOut], evaluate: Callable[[Sequence[TokenBatch]], tuple[float, int]]
) -> dict[str, float]:
    """Mean loss in nats per masked token: `held_out_loss` over all sources, `held_out_loss_NAME` for each of several.

    `evaluate` gives (sum of losses, masked tokens) over all ranks; the mean over everything is sum / count, never a
    mean of means. Raises ConfigError, the same on all ranks, for a source without a masked token.
    """
    sums = {s.name: evaluate(s.batches) for s in sets}
    empty = next((name for name, (_, count) in sums.items() if count == 0), None)
    if empty is not None:
        raise ConfigError(f"the held-out rows of {empty} have no masked token. Raise evaluation.rows or mask_share.")
    losses = {"held_out_loss": sum(a for a, _ in sums.values()) / sum(n for _, n in sums.values())}
    if len(sums) > 1:
        losses |= {f"held_out_loss_{name}": a / n for name, (a, n) in sums.items()}
    return losses


def unigram_entropy(counts_V: np.ndarray, special_ids: Sequence[int]) -> float:
    """Entropy in nats of the token frequencies, special tokens left out (they are never predicted).

    The best loss of a model that knows how often each token of this very text occurs and nothing else.
    """
    counts = counts_V.astype(np.float64)
    counts[list(special_ids)] = 0.0
    share = counts[counts > 0] / max(1.0, counts.sum())
    return float(-(share * np.log(share)).sum())
