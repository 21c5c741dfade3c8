"""EM and F1 of answers as SQuAD's own scripts count them, and the threshold below which no answer is given.

    "The Eiffel Tower!"  ->  eiffel tower        lower case, without ASCII punctuation, without a, an, the; blanks collapsed

Rajpurkar et al. 2016 (1.1) and 2018 (2.0: an empty answer is right where there is none). Shares of 1: the papers' numbers are
100 times these.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(answer: str) -> str:
    """What of an answer is compared."""
    plain = answer.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the answer is one of the right ones; without any right one the empty answer is."""
    return float(normalized(answer) in {normalized(gold) for gold in _real(golds)})


def f1(answer: str, golds: Sequence[str]) -> float:
    """Of the words as bags, the best over the right answers."""
    return max(_f1(normalized(answer).split(), normalized(gold).split()) for gold in _real(golds))


def means(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 and exact match over rows, by the names of the metrics.

    answers: one of each row
    golds: the right ones of each row
    """
    pairs = list(zip(answers, golds, strict=True))
    return {
        "f1": float(np.mean([f1(answer, right) for answer, right in pairs])),
        "exact_match": float(np.mean([exact_match(answer, right) for answer, right in pairs])),
    }


def _real(golds: Sequence[str]) -> Sequence[str]:
    return [gold for gold in golds if normalized(gold)] or [""]


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    same = (Counter(words) & Counter(gold)).total()
    return 2 * same / (len(words) + len(gold))


def best_threshold(score_N: np.ndarray, empty_score_N: np.ndarray, missing_N: np.ndarray) -> float:
    """The threshold t for which the mean score is best, if a question with missing > t gets the empty answer.

    It lies halfway between two questions, or 1 beside the first or the last.

    score_N: of the best span of each question
    empty_score_N: of the empty answer
    missing_N: how much better the model likes the empty answer than the best span
    """
    order = np.argsort(missing_N, kind="stable")
    missing = missing_N[order]
    # totals when the first n of them are answered
    gains = np.cumsum(np.concatenate([[0.0], (score_N - empty_score_N)[order]]))
    # between equal ones there is no threshold
    possible = np.concatenate([[True], missing[1:] > missing[:-1], [True]])
    answered = int(np.where(possible, gains, -np.inf).argmax())
    if answered == 0:
        return float(missing[0] - 1.0)
    if answered == len(missing):
        return float(missing[-1] + 1.0)
    # on no row: other kernels give logits that differ in their last digits
    last, next_one = missing[answered - 1 : answered + 1]
    middle = float(last + (next_one - last) / 2)
    return middle if middle < next_one else float(last)
