"""Which stretch of a text answers a question, from the logits of all its windows; and when none does.

    score of a span     its start's logit + its end's, the best of all windows
    score of none       those of the first token, the lowest of all windows
    no answer           where the score of none is higher than that of the span by more than a threshold

The one place of this rule: the metrics of a data set, its predictions and the page go by it. Devlin et al. 2019 (BERT), 4.2, 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.base.errors import ConfigError

ANSWER_RULE = "answer_rule"  # of config.json


@dataclass(frozen=True, kw_only=True)
class AnswerRule:
    """How answers are read off logits; an exported folder carries it."""

    max_question_tokens: int = 64  # of a question
    overlap_tokens: int = 128  # that a window shares with the one before
    max_answer_tokens: int = 30  # of an answer
    candidates: int = 20  # starts, and ends, that are tried in a window
    max_context: bool = False  # a token counts in the window alone that has most text on both sides
    # no answer where that scores higher by more than this; None: an answer is always given
    no_answer_threshold: float | None = None

    def __post_init__(self) -> None:
        for key in ("max_question_tokens", "max_answer_tokens", "candidates"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} {getattr(self, key)} must be at least 1.")
        if self.overlap_tokens < 0:
            raise ConfigError(f"overlap_tokens {self.overlap_tokens} must be at least 0.")

    def gives_none(self, missing: float) -> bool:
        """Whether there is no answer where the empty one scores higher by `missing`."""
        return self.no_answer_threshold is not None and missing > self.no_answer_threshold


@dataclass(frozen=True, kw_only=True)
class WindowLogits:
    """What a model says of a window: L tokens, the question's among them."""

    logits_L2: np.ndarray  # of start and end
    inside_L: np.ndarray  # bool: of the context
    begin: int  # number of its first token of the context in the context


@dataclass(frozen=True, kw_only=True)
class BestAnswer:
    """The best stretch of all windows; without any possible one it scores as none does."""

    window: int | None  # None: no stretch is possible
    first: int  # token of the window
    last: int
    score: float
    none: float

    @property
    def missing(self) -> float:
        """How much better the empty answer is."""
        return self.none - self.score


def best_answer(windows: Sequence[WindowLogits], rule: AnswerRule) -> BestAnswer:
    """Of all windows of a question; of equal ones the first."""
    counts = _counting(windows) if rule.max_context else [window.inside_L for window in windows]
    none, best = np.inf, BestAnswer(window=None, first=0, last=0, score=-np.inf, none=np.inf)
    for number, (window, may_start_L) in enumerate(zip(windows, counts, strict=True)):
        none = min(none, float(window.logits_L2[0].sum()))
        score, first, last = best_span(
            window.logits_L2,
            may_start_L=may_start_L,
            may_end_L=window.inside_L,
            candidates=rule.candidates,
            most_tokens=rule.max_answer_tokens,
        )
        if score > best.score:
            best = BestAnswer(window=number, first=first, last=last, score=score, none=none)
    score = none if best.window is None else best.score
    return BestAnswer(window=best.window, first=best.first, last=best.last, score=score, none=none)


def _counting(windows: Sequence[WindowLogits]) -> list[np.ndarray]:
    """bool [L] of each window: a token of the context that has the most of it around in this one."""
    places = [np.flatnonzero(window.inside_L) for window in windows]
    best = most_context([len(place) for place in places], [window.begin for window in windows])
    found = []
    for number, (window, place) in enumerate(zip(windows, places, strict=True)):
        counts_L = np.zeros(len(window.inside_L), dtype=bool)
        counts_L[place] = best[window.begin : window.begin + len(place)] == number
        found.append(counts_L)
    return found


def best_span(
    logits_L2: np.ndarray,
    *,
    may_start_L: np.ndarray,
    may_end_L: np.ndarray,
    candidates: int,
    most_tokens: int,
) -> tuple[float, int, int]:
    """Score, start and end of the best span of a window; -inf where none is possible.

    logits_L2: of start and end
    may_start_L, may_end_L: tokens that can be one
    candidates: highest starts and ends that are tried, of all tokens
    most_tokens: of a span
    """
    start_C, end_C = np.argsort(-logits_L2, axis=0, kind="stable")[:candidates].T
    length_CC = end_C[None, :] - start_C[:, None] + 1
    possible_CC = (length_CC >= 1) & (length_CC <= most_tokens)
    possible_CC &= may_start_L[start_C][:, None] & may_end_L[end_C][None, :]
    score_CC = logits_L2[start_C, 0][:, None] + logits_L2[end_C, 1][None, :]
    score_CC = np.where(possible_CC, score_CC, -np.inf)
    best = np.unravel_index(score_CC.argmax(), score_CC.shape)
    return float(score_CC[best]), int(start_C[best[0]]), int(end_C[best[1]])


def most_context(lengths: Sequence[int], begins: Sequence[int] | np.ndarray) -> np.ndarray:
    """For each token of a context the window in which the lesser of its two sides is largest: int64 [tokens].

    lengths, begins: tokens of the context that a window has, and the number of its first

    BERT adds a hundredth of the window's length, and the first of equal windows wins (Devlin et al. 2019, run_squad.py).
    """
    total = int(begins[-1]) + lengths[-1]
    most, best = np.full(total, -np.inf), np.zeros(total, dtype=np.int64)
    for window, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        left = np.arange(length)
        context = np.minimum(left, left[::-1]) + 0.01 * length
        here = slice(int(begin), int(begin) + length)
        best[here] = np.where(context > most[here], window, best[here])
        most[here] = np.maximum(most[here], context)
    return best
