"""The held-out loss and accuracy of a run: fixed documents and fixed masks, the same at every step, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from encoder.base.batch import TermSum, TokenBatch


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """This rank's share of one held-out source."""

    name: str
    batches: Sequence[TokenBatch]


def held_out_numbers(
    sets: Sequence[HeldOut], evaluate: Callable[[Sequence[TokenBatch]], dict[str, TermSum]]
) -> dict[str, float]:
    """Mean loss in nats per target, and the share of targets whose own logit was the highest.

        held_out_loss, held_out_accuracy                  of the first loss term over all sources
        held_out_loss_web, held_out_accuracy_web          of each of several sources
        held_out_loss_sop, held_out_accuracy_sop          of each further loss term, over all sources
        held_out_auc_rtd                                  of each term of yes or no

    The mean over everything is sum / count, never a mean of means. Without a target both are nan; a further term that no
    source asks about is left out.

    sets: this rank's batches of each source
    evaluate: the sums of each loss term over all ranks
    """
    # [source][loss term] -> sums over all ranks; every source has the same terms
    sums = {s.name: evaluate(s.batches) for s in sets}
    first, *others = next(iter(sums.values()))

    # the ends of the numbers' names, each with its sums
    shown = {"": _added([s[first] for s in sums.values()])}
    if len(sums) > 1:
        shown |= {f"_{name}": s[first] for name, s in sums.items()}
    for term in others:
        summed = _added([s[term] for s in sums.values()])
        # no target anywhere: the text has no such pairs, say
        if summed.count:
            shown[f"_{term}"] = summed
    losses = {f"held_out_loss{end}": _ratio(s.sum, s.count) for end, s in shown.items()}
    accuracies = {f"held_out_accuracy{end}": _ratio(s.correct, s.count) for end, s in shown.items()}
    areas = {
        f"held_out_auc{end}": area_under_curve(s.scores)
        for end, s in shown.items()
        if s.scores is not None
    }
    return losses | accuracies | areas


def area_under_curve(scores_2B: torch.Tensor) -> float:
    """How often a target yes has a higher logit than a target no, those of one bin half; nan without one of both.

    scores_2B: targets no and yes by bins of their logits, ascending

    It is the area under the ROC curve (Hanley and McNeil 1982). Bins of 1 / 32 are as good as the logits to about 1e-3.
    """
    no_B, yes_B = scores_2B.to(torch.float64)
    # of each bin: the targets no in lower ones, and half of its own
    below_B = no_B.cumsum(0) - no_B / 2
    pairs = float(no_B.sum() * yes_B.sum())
    return _ratio(float((yes_B * below_B).sum()), pairs)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def silent_sources(numbers: dict[str, float], sources: Sequence[str]) -> list[str]:
    """The sources without a target."""
    # such a source has a nan; with one source it is the number of the whole
    whole = numbers["held_out_accuracy"]
    return [name for name in sources if math.isnan(numbers.get(f"held_out_accuracy_{name}", whole))]


def held_out_text(
    numbers: dict[str, float],
    sources: Sequence[str],
    *,
    terms: Sequence[str],
    entropy: float | None,
    phase: str | None,
) -> str:
    """One line for people.

    numbers: as held_out_numbers gives them
    sources: the names of the held-out sources
    terms: of the loss
    entropy: of the held-out text's tokens, where it is known
    phase: the phase that begins with this evaluation, where it is another one than before
    """
    beside = ""
    if entropy is not None:
        beside = f" (unigram entropy {entropy:.2f})"
    as_of = ""
    if phase:
        as_of = f" as phase {phase} asks"
    whole = (
        f"held-out loss{as_of} {numbers['held_out_loss']:.3f}{beside} "
        f"accuracy {numbers['held_out_accuracy']:.1%}"
    )
    # of each of several sources, and of each further loss term
    shown = [*(sources if len(sources) > 1 else []), *terms[1:]]
    of_each = [_term_text(numbers, name) for name in shown if f"held_out_loss_{name}" in numbers]
    return "  ".join([whole, *of_each])


def _term_text(numbers: dict[str, float], name: str) -> str:
    loss, accuracy = (numbers[f"held_out_{kind}_{name}"] for kind in ("loss", "accuracy"))
    area = numbers.get(f"held_out_auc_{name}")
    behind = "" if area is None else f" AUC {area:.3f}"
    return f"{name} {loss:.3f} {accuracy:.1%}{behind}"


def _added(sums: Sequence[TermSum]) -> TermSum:
    scores = [s.scores for s in sums if s.scores is not None]
    return TermSum(
        sum=sum(s.sum for s in sums),
        count=sum(s.count for s in sums),
        correct=sum(s.correct for s in sums),
        scores=torch.stack(scores).sum(0) if scores else None,
    )


def unigram_entropy(counts_V: np.ndarray, special_ids: Sequence[int]) -> float:
    """Entropy in nats of the token frequencies, special tokens left out (they are never predicted).

    The best loss of a model that knows how often each token of this very text occurs and nothing else.
    """
    # -sum p ln p over ids that occur: 0 ln 0 is 0
    counts = counts_V.astype(np.float64)
    counts[list(special_ids)] = 0.0
    share = counts[counts > 0] / max(1.0, counts.sum())
    return float(-(share * np.log(share)).sum())
