"""tf-idf: what words in common give, to compare with and to mine negatives by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def tfidf_scores(
    questions: Sequence[str], passages: Sequence[str]
) -> Callable[[int, int], np.ndarray]:
    """Cosines of tf-idf vectors of words, for ranking.rank: 1 + log of the count, and idf of the passages."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, lowercase=True)
    x_DV = vectorizer.fit_transform(passages).T.tocsr()
    q_QV = vectorizer.transform(questions)

    def score(start: int, end: int) -> np.ndarray:
        return np.asarray((q_QV[start:end] @ x_DV).todense())

    return score
