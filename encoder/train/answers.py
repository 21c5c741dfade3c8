"""What a model under training answers at the places of a data set, in its order, from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encoder.base.batch import TokenBatch
from encoder.base.dist import sum_over_ranks
from encoder.data.examples import Examples, NumberedBatch
from encoder.engine.engine import Engine


def answered(
    engine: Engine,
    batches: Sequence[NumberedBatch],
    ask: Callable[[Any, TokenBatch], Tensor],
    *,
    examples: Examples,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Answers [P, width] on the CPU, the same on every rank, all of which call this.

    engine: whose model answers
    batches: this rank's share of the data set
    ask: (model, batch) -> answers [M, width] at the places of a batch
    examples: the data set
    width: numbers of an answer
    dtype: of what is returned
    """
    answers = engine.predict([made.batch for made in batches], ask)
    found_PK = torch.zeros(len(examples.value_P), width, dtype=dtype)
    for made, answer_MK in zip(batches, answers, strict=True):
        places = torch.from_numpy(examples.places_of(made.numbers_M))
        found_PK[places] = answer_MK.to(dtype)
    # every example is on one rank, and zero on the others
    return sum_over_ranks(found_PK.to(engine.device)).cpu()
