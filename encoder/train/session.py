"""What the parts of a run under way share: the run, this rank, the engine, and where the run stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from encoder.base.agreement import DeferredErrors
from encoder.base.dist import World
from encoder.base.units import Progress
from encoder.engine.engine import Engine
from encoder.train.course import Course, Phase, RunSettings
from encoder.train.meters import Clock
from encoder.train.watchdog import Watchdog


@dataclass(kw_only=True)
class Session:
    """One start of a run on this rank. `progress` moves with every step; the rest stays."""

    course: Course
    world: World
    device: torch.device
    folder: Path  # of the run
    engine: Engine
    clock: Clock
    watchdog: Watchdog
    errors: DeferredErrors  # of this rank, until all ranks meet
    progress: Progress

    @property
    def run(self) -> RunSettings:
        """Its settings."""
        return self.course.run

    @property
    def phase(self) -> Phase:
        """The phase that the run is in; the last one once all are done."""
        return self.course.last_phase(self.progress)


@dataclass(frozen=True, kw_only=True)
class StepAgreement:
    """What all ranks know of a step before it, by one all-reduce."""

    counts: dict[str, int]  # targets of each loss term, over all ranks
    batch_hash: int  # int64, of all rows
    flops: int  # model FLOP, over all ranks
    # a rank was asked to stop, or rank zero's time is up: save after this step
    stop: bool

    @property
    def predicts(self) -> bool:
        """Whether the step has any target; else it moves nothing."""
        return any(self.counts.values())

    @property
    def masked_tokens(self) -> int:
        """Targets of the first loss term, as ledger and progress count them."""
        return next(iter(self.counts.values()))

    @property
    def other_targets(self) -> dict[str, int]:
        """Targets of the other loss terms."""
        return dict([*self.counts.items()][1:])
