"""Hard negatives: the passages that rank high for a question and are none of its answers.

ranking of a question    p3 0.91  p7 0.80 (answer)  p9 0.78  p2 0.41
most_score_share 0.95    p3 scores above 0.95 x 0.80 and may be an answer itself; p9, too; p2 is the negative
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from encoder.base.rng import generator
from encoder.tools.embedding.config import NegativesConfig
from encoder.tools.embedding.ranking import AT_ONCE
from encoder.tools.embedding.retrieval import NEGATIVE, Corpus, Pairs


def mine(
    score: Callable[[int, int], np.ndarray],
    answers: Sequence[dict[int, int]],
    numbers: Sequence[tuple[int, int]],
    settings: NegativesConfig,
    *,
    seed: int,
) -> list[list[int]]:
    """Of each pair (question, answer) in `numbers` the passages that are its negatives.

    score: of questions from a to b -> [b - a, D]
    answers: of each question
    numbers: pairs
    settings: how many, how deep, how near
    seed: of the passages that fill up where a ranking has too few

    A question has the same negatives in each batch.
    """
    wanted: dict[int, list[int]] = {}
    for place, (question, _) in enumerate(numbers):
        wanted.setdefault(question, []).append(place)
    found: list[list[int]] = [[] for _ in numbers]
    for start in range(0, len(answers), AT_ONCE):
        end = min(start + AT_ONCE, len(answers))
        for question, row_D in zip(range(start, end), score(start, end), strict=True):
            for place in wanted.get(question, ()):
                right = row_D[numbers[place][1]]
                order = np.argsort(-row_D, kind="stable")[: settings.depth]
                near = [
                    int(d)
                    for d in order
                    if d not in answers[question] and row_D[d] <= settings.most_score_share * right
                ]
                found[place] = near[: settings.per_query]
    _fill_up(found, answers, numbers, settings, seed=seed, passages=len(row_D))
    return found


def _fill_up(
    found: list[list[int]],
    answers: Sequence[dict[int, int]],
    numbers: Sequence[tuple[int, int]],
    settings: NegativesConfig,
    *,
    seed: int,
    passages: int,
) -> None:
    """Any passages, where the ranking has no more: every pair must have as many."""
    for place, chosen in enumerate(found):
        taken = {*chosen, *answers[numbers[place][0]]}
        draw = generator(seed, "embed negatives", place)
        while len(chosen) < settings.per_query and len(taken) < passages:
            passage = int(draw.integers(passages))
            if passage not in taken:
                chosen.append(passage)
                taken.add(passage)


def with_negatives(pairs: Pairs, corpus: Corpus, negatives: Sequence[Sequence[int]]) -> Pairs:
    """The pairs with columns negative, or negative_1, negative_2, ..."""
    columns = dict(pairs.columns)
    count = min(len(chosen) for chosen in negatives)
    for k in range(count):
        name = NEGATIVE if count == 1 else f"{NEGATIVE}_{k + 1}"
        columns[name] = [corpus.texts[chosen[k]] for chosen in negatives]
    return Pairs(columns=columns)
