"""The best evaluation of a run: by which number, when it was, and the checkpoint that holds its weights.

evaluate: {keep: best, metric: accuracy, of: dev}

step     10     20     30     40
dev     0.81   0.84   0.84   0.82      the best is step 20: of equals the earlier
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.errors import CheckpointError, ConfigError, nearest
from encoder.base.schema import from_mapping
from encoder.base.units import Progress
from encoder.engine.checkpoint.folder import tokens_of
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.finetune.config import FineTuneConfig, one_of_dev
from encoder.finetune.metrics import CHOSEN, LOWER_IS_BETTER
from encoder.runs.folder import CHECKPOINTS


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A number of an evaluation, and which way is better."""

    of: str  # data set
    metric: str

    @property
    def name(self) -> str:
        """As an evaluation calls it: dev_accuracy."""
        return f"{self.of}_{self.metric}"

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.of} {self.metric}"

    def better(self, value: float, than: float) -> bool:
        """Strictly: of equals the earlier one stays."""
        return value < than if self.metric in LOWER_IS_BETTER else value > than


def judge_of(task: FineTuneConfig) -> Judge | None:
    """What `keep: best` is judged by; None: the last weights are kept. Raises ConfigError."""
    evaluate = task.evaluate
    if evaluate.keep == "last":
        return None
    return Judge(
        of=one_of_dev(evaluate.of, task.data.dev_names, key="evaluate.of"),
        metric=one_of_metrics(evaluate.metric, task.task.metric_names(), key="evaluate.metric"),
    )


def one_of_metrics(name: str | None, metrics: Sequence[str], *, key: str) -> str:
    """The metric of this name, or the loss; without a name the first. Raises ConfigError.

    name: as it was given
    metrics: that are measured; what is chosen on a dev set judges nothing
    key: of the setting, for messages
    """
    judges = [*(metric for metric in metrics if metric not in CHOSEN), "loss"]
    name = name or judges[0]
    if name in CHOSEN:
        raise ConfigError(
            f"{key} is {name}, which is chosen and measures nothing; needed: {' or '.join(judges)}."
        )
    if name not in judges:
        raise ConfigError(f"{key} is {name}. {nearest(name, judges)}")
    return name


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation so far."""

    step: int
    tokens: int  # in the name of its checkpoint
    ledger_hash: str  # of its weights
    value: float


class BestKeeper:
    """Looks at each evaluation of a run; its state is in every checkpoint."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.best: Best | None = None

    def takes(self, numbers: Mapping[str, float], progress: Progress) -> bool:
        """Whether this evaluation is the best so far; it then counts as it. One without a finite number is none."""
        value = numbers[self.judge.name]
        if not math.isfinite(value):
            return False
        if self.best is not None and not self.judge.better(value, self.best.value):
            return False
        self.best = Best(
            step=progress.step,
            tokens=progress.tokens,
            ledger_hash=progress.ledger_hash,
            value=value,
        )
        return True

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint, which holds the best one's as well."""
        if self.best is None:
            return {}
        return {"best": dataclasses.asdict(self.best), "stands_on_tokens": [self.best.tokens]}

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """What `to_plain` gave to the checkpoint that the run goes on from; nothing where it had no best yet."""
        self.best = None
        if saved.get("best") is not None:
            self.best = from_mapping(Best, saved["best"], where="best of the checkpoint")

    @property
    def text(self) -> str:
        """`best dev accuracy 0.8532, of step 20`."""
        if self.best is None:
            return f"no {self.judge.text} is a number: the last weights are kept"
        return f"best {self.judge.text} {self.best.value:.4f}, of step {self.best.step:,}"


def best_checkpoint(run: Path, best: Best) -> Path:
    """Where the best weights of a run folder are. Raises CheckpointError."""
    found = newest_checkpoint(
        run / CHECKPOINTS, fits=lambda folder: tokens_of(folder) == best.tokens
    )
    if found is None or read_progress(found)[0].ledger_hash != best.ledger_hash:
        raise CheckpointError(
            f"{run / CHECKPOINTS} has lost the best weights, those of step {best.step:,}. Put their"
            " checkpoint back, or train anew with another out."
        )
    return found
