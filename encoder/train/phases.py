"""Where a run stands in its phases, and what its steps will be: pure functions of tokens seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from encoder.base.units import Progress
from encoder.train.config import PhaseConfig, RunConfig


class PlannedStep(NamedTuple):
    """One step as the schedules foresee it, with rows `fill` full. A tuple: the recipe of base has 439,360 of them."""

    phase: int
    step: int                # 1-based, whole run
    phase_tokens: int        # seen before the step
    rows: int
    tokens: int
    lr: float


def lr_at(phase: PhaseConfig, *, phase_tokens: int, step_tokens: int) -> float:
    """Learning rate of a step: the schedule at the middle of the step's tokens.

    The midpoint rule makes the sum of rate x tokens equal the schedule's integral on straight stretches whatever the
    batch size, and no step of a warm-up runs at rate 0.
    """
    middle = min(phase_tokens + step_tokens // 2, phase.tokens)
    return phase.lr.at(middle, phase_tokens=phase.tokens)


def current_phase(run: RunConfig, progress: Progress) -> PhaseConfig | None:
    """The phase a run is in, or None when all are done."""
    return run.phases[progress.phase] if progress.phase < len(run.phases) else None


def phase_is_done(run: RunConfig, progress: Progress) -> bool:
    """A phase ends with the first step that reaches its tokens."""
    return progress.phase_tokens >= run.phases[progress.phase].tokens


def enter_next_phase(progress: Progress) -> Progress:
    """The first position of the next phase: its token clock and its data start at zero."""
    return replace(progress, phase=progress.phase + 1, phase_step=0, phase_tokens=0, lanes=())


def phase_of_weights(progress: Progress) -> int:
    """The phase whose theta the model had when it was saved: at the end of a phase the next one is entered but not begun."""
    return progress.phase - 1 if progress.phase_step == 0 and progress.phase > 0 else progress.phase


def planned_steps(run: RunConfig, *, fills: Sequence[float] | None = None) -> Iterator[PlannedStep]:
    """All steps of a run, with rows that are as full as `fills` says of each phase (0 to 1; the true tokens follow from the
    documents)."""
    step = 0
    for index, phase in enumerate(run.phases):
        warm_up = phase.batch_warmup.over_tokens if phase.batch_warmup else 0
        fill = fills[index] if fills else 1.0
        seen, full = 0, run.rows_at(phase, warm_up)
        while seen < phase.tokens:
            rows = run.rows_at(phase, seen) if seen < warm_up else full
            tokens = max(1, int(rows * run.data.row_tokens * fill))
            step += 1
            yield PlannedStep(phase=index, step=step, phase_tokens=seen, rows=rows, tokens=tokens,
                              lr=lr_at(phase, phase_tokens=seen, step_tokens=tokens))
            seen += tokens
