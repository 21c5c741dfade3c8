"""The held-out loss of stored models, all by the same documents, masks and code, and the time to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from encoder.base.batch import TermSum, TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.world import World
from encoder.models.hf.parity import our_model
from encoder.objectives.mlm import MLM, mlm_loss
from encoder.runs.config import RunConfig
from encoder.runs.facts import DataFacts
from encoder.runs.weights import read_model
from encoder.train.build import make_held_out
from encoder.train.evaluate import held_out_numbers

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model on its way."""

    tokens: int
    seconds: float  # of training
    loss: float  # held out


class Judge:
    """Asks models the held-out documents of a run, cut as its last phase cuts them, in fp32."""

    def __init__(self, run: RunConfig, facts: DataFacts) -> None:
        if run.evaluation is None:
            raise ConfigError(
                f"{run.name} has no held-out text; needed: evaluation.sources, to judge by."
            )
        self._sets = make_held_out(run, facts, World(), CPU, run.phases[-1])

    def loss_of(self, stored: Path) -> float:
        """Of a checkpoint or a Hugging Face folder. Raises UserError for what is neither."""
        found = read_model(stored)
        model = our_model(found.weights, found.config)

        def evaluate(batches: Sequence[TokenBatch]) -> dict[str, TermSum]:
            with torch.no_grad():
                terms = [mlm_loss(model, batch) for batch in batches]
            return {
                MLM: TermSum(
                    sum=sum(float(term.sum) for term in terms),
                    count=sum(int(term.count) for term in terms),
                    correct=sum(int(term.correct) for term in terms),
                )
            }

        return held_out_numbers(self._sets, evaluate)["held_out_loss"]


def seconds_to(points: Sequence[Point], loss: float) -> float | None:
    """When a curve was down at a loss, on straight lines between its points; None: it never was.

    seconds 10, 20     losses 6, 4     to a loss of 5: 15
    """
    before: Point | None = None
    for point in points:
        if point.loss <= loss:
            if before is None:
                return point.seconds
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None
