"""The held-out loss and accuracy of a run: fixed documents and fixed masks, the same at every step, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from encoder.base.batch import TokenBatch


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """This rank's share of one held-out source."""

    name: str
    batches: Sequence[TokenBatch]


def held_out_numbers(
    sets: Sequence[HeldOut], evaluate: Callable[[Sequence[TokenBatch]], tuple[float, int, int]]
) -> dict[str, float]:
    """Mean loss in nats per masked token, and the share of masked tokens whose own logit was the highest.

    `held_out_loss` and `held_out_accuracy` over all sources, with _NAME for each of several. `evaluate` gives (sum of
    losses, masked tokens, hits) over all ranks; the mean over everything is sum / count, never a mean of means. Without a
    masked token both are nan.
    """
    sums = {s.name: evaluate(s.batches) for s in sets}
    shown = {"": tuple(map(sum, zip(*sums.values())))} | ({f"_{name}": s for name, s in sums.items()} if len(sums) > 1 else {})
    return ({f"held_out_loss{end}": _mean(loss_sum, count) for end, (loss_sum, count, _) in shown.items()}
            | {f"held_out_accuracy{end}": _mean(correct, count) for end, (_, count, correct) in shown.items()})


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


def unigram_entropy(counts_V: np.ndarray, special_ids: Sequence[int]) -> float:
    """Entropy in nats of the token frequencies, special tokens left out (they are never predicted).

    The best loss of a model that knows how often each token of this very text occurs and nothing else.
    """
    counts = counts_V.astype(np.float64)
    counts[list(special_ids)] = 0.0
    share = counts[counts > 0] / max(1.0, counts.sum())
    return float(-(share * np.log(share)).sum())
