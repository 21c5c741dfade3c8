"""What passes between the data side and an objective: one row of clean tokens in, a question out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row as the model sees it, and what it is asked. T tokens of the row without padding, M predicted positions.

        clean           [CLS]  the   cat   sat  [SEP]
        ids             [CLS]  the [MASK]  sat  [SEP]
        predict_index   2
        predict_target  cat
    """

    ids: np.ndarray               # int64 [T], after masking
    predict_index: np.ndarray     # int64 [M] into the row, ascending
    predict_target: np.ndarray    # int64 [M], the clean ids there


class Corrupt(Protocol):
    """A question maker. It is sent to worker processes, so it must survive pickling."""

    def __call__(self, ids: np.ndarray, generator: np.random.Generator, *, phase_tokens: int) -> Question:
        """The question of a row int64 [T] before which the phase had `phase_tokens` tokens; the same arguments give the
        same question."""

    def capacity(self, tokens: int) -> int:
        """Predicted positions to make room for in a row of `tokens` tokens; a question has more once in 10^9 rows."""
