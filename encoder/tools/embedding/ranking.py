"""nDCG@10, MRR@10 and recall of scores, as pytrec_eval counts them; of equal scores the wrong passage comes first.

scores of a question     p3 0.91   p7 0.80   p9 0.80     answer p7
ranks                    p3 1      p9 2      p7 3        nDCG@10 = 1/log2(3 + 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoder.base.errors import ConfigError

RANKED = 100  # passages of each question
DIGITS = 6  # scores that agree in so many are a tie: a batch of other texts moves the seventh
AT_ONCE = 256  # questions
MEASURES = {
    "ndcg_at_10": "ndcg_cut_10",
    "mrr_at_10": "recip_rank",
    "recall_at_1": "recall_1",
    "recall_at_10": "recall_10",
    "recall_at_100": "recall_100",
}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The passages of each question, the best first."""

    passages: list[list[int]]  # at most RANKED of each
    scores: list[list[float]]
    tied: int  # questions of which an answer scores as a wrong passage does


def rank(
    score: Callable[[int, int], np.ndarray],
    answers: Sequence[dict[int, int]],
    *,
    depth: int = RANKED,
) -> Ranked:
    """Orders all passages of each question.

    score: of questions from a to b -> [b - a, D], higher is better
    answers: of each question, number of a passage -> grade
    depth: how many passages are kept
    """
    passages: list[list[int]] = []
    scores: list[list[float]] = []
    tied = 0
    for start in range(0, len(answers), AT_ONCE):
        end = min(start + AT_ONCE, len(answers))
        for row_D, right in zip(score(start, end), answers[start:end], strict=True):
            row_D = np.round(row_D.astype(np.float64), DIGITS)
            grade_D = np.zeros(len(row_D))
            grade_D[[*right]] = [*right.values()]
            # by score, then the lower grade, then the number
            order = np.lexsort((grade_D, -row_D))[:depth]
            passages.append(order.tolist())
            scores.append(row_D[order].tolist())
            tied += int(np.isin(row_D[grade_D == 0], row_D[grade_D > 0]).any())
    return Ranked(passages=passages, scores=scores, tied=tied)


def measure(ranked: Ranked, answers: Sequence[dict[int, int]]) -> dict[str, float]:
    """The mean of each measure over the questions. Raises ConfigError without pytrec_eval."""
    evaluator = _pytrec_eval()
    qrels = {
        str(q): {str(d): grade for d, grade in right.items()} for q, right in enumerate(answers)
    }
    # ranks as scores: pytrec_eval would break ties by the name of a passage
    whole = {
        str(q): {str(d): float(RANKED - rank) for rank, d in enumerate(found)}
        for q, found in enumerate(ranked.passages)
    }
    first = {q: dict([*found.items()][:10]) for q, found in whole.items()}
    wanted = {"ndcg_cut.10", "recip_rank", "recall.1,10,100"}
    of_whole = evaluator.RelevanceEvaluator(qrels, wanted).evaluate(whole)
    of_first = evaluator.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first)
    found = {}
    for name, theirs in MEASURES.items():
        of = of_first if name == "mrr_at_10" else of_whole
        found[name] = float(np.mean([values[theirs] for values in of.values()]))
    return found


def check_installed() -> None:
    """Raises ConfigError where a package of the extra is not here."""
    import importlib.util

    for package in ("sentence_transformers", "accelerate", "datasets", "sklearn", "pytrec_eval"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"embedding training needs {package}, which is not here. Install the extra: pip"
                " install -e '.[embed]'"
            )


def _pytrec_eval() -> Any:
    check_installed()
    import pytrec_eval

    return pytrec_eval
