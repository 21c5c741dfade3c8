"""Where a run stands in its phases, and what its steps will be: pure functions of tokens seen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

from encoder.base.units import Progress
from encoder.optim.schedule import highest_at
from encoder.runs.config import PhaseConfig, RunConfig


class PlannedStep(NamedTuple):
    """One step as the schedules foresee it, with rows `fill` full."""

    phase: int
    step: int  # 1-based, whole run
    phase_tokens: int  # seen before the step
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
    if progress.phase_step == 0 and progress.phase > 0:
        return progress.phase - 1
    return progress.phase


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase that follow each other and are of one size."""

    phase: int
    first_step: int  # 1-based, whole run
    first_tokens: int  # of the phase, seen before the first of them
    rows: int
    tokens: int  # of each step
    steps: int


class PlannedSteps(Sequence[PlannedStep]):
    """All steps of a run by their number, worked out when asked for: 10^9 of them take as much room as one.

    `stretches` has an entry for each phase and for each size of its batch warm-up.
    """

    def __init__(self, run: RunConfig, stretches: Sequence[Stretch]) -> None:
        self.stretches = tuple(stretches)
        self._run, self._firsts = run, [s.first_step - 1 for s in stretches]

    def __len__(self) -> int:
        last = self.stretches[-1]
        return last.first_step - 1 + last.steps

    @overload
    def __getitem__(self, index: int) -> PlannedStep: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PlannedStep]: ...

    def __getitem__(self, index: int | slice) -> PlannedStep | Sequence[PlannedStep]:
        """Step `index` + 1 of the run. Raises IndexError beyond the last one."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        # the last stretch that begins at or before the step
        number = bisect_right(self._firsts, index) - 1
        return self._step(self.stretches[number], index - self._firsts[number])

    def __iter__(self) -> Iterator[PlannedStep]:
        for stretch in self.stretches:
            for place in range(stretch.steps):
                yield self._step(stretch, place)

    def indices(self, phase: int, *, until_tokens: int | None = None) -> range:
        """Of the steps of a phase; of those alone before which it had at most `until_tokens`."""
        own = [s for s in self.stretches if s.phase == phase]
        first, end = own[0].first_step - 1, own[-1].first_step - 1 + own[-1].steps
        if until_tokens is None:
            return range(first, end)

        # phase_tokens rise with the number: the steps in question end where a bisection says
        return range(
            first,
            bisect_right(range(end), until_tokens, lo=first, key=lambda i: self[i].phase_tokens),
        )

    def peak_lr(self, phase: int) -> float:
        """The highest rate of a phase's steps: schedules rise to one point and fall from there."""
        own = self.indices(phase)
        settings = self._run.phases[phase]
        highest = highest_at(settings.lr, phase_tokens=settings.tokens)
        top = self.indices(phase, until_tokens=highest)[-1]
        # a step's rate is taken at its middle, so the highest is beside `top` or at an end
        return max(
            self[i].lr
            for i in {own[0], own[-1], *range(max(own[0], top - 1), min(own[-1], top + 1) + 1)}
        )

    def _step(self, stretch: Stretch, place: int) -> PlannedStep:
        seen = stretch.first_tokens + place * stretch.tokens
        return PlannedStep(
            phase=stretch.phase,
            step=stretch.first_step + place,
            phase_tokens=seen,
            rows=stretch.rows,
            tokens=stretch.tokens,
            lr=lr_at(
                self._run.phases[stretch.phase], phase_tokens=seen, step_tokens=stretch.tokens
            ),
        )


def planned_steps(run: RunConfig, *, fills: Sequence[float] | None = None) -> PlannedSteps:
    """All steps of a run, with rows that are as full as `fills` says of each phase (0 to 1; the true tokens follow from the
    documents). tests/reference/planned_steps.py walks through them one by one."""
    stretches, step = [], 1
    for index, phase in enumerate(run.phases):
        fill, seen = fills[index] if fills else 1.0, 0
        while seen < phase.tokens:
            rows, rise = run.rows_at(phase, seen), run.next_rise(phase, seen)
            # as the loader counts them: without the padding of rows that are not full
            tokens = max(1, int(rows * run.data.row_tokens * fill))
            end = phase.tokens if rise is None else min(rise, phase.tokens)
            # rounded up: the step that reaches the end is of this size, too
            steps = -(-(end - seen) // tokens)
            stretches.append(
                Stretch(
                    phase=index,
                    first_step=step,
                    first_tokens=seen,
                    rows=rows,
                    tokens=tokens,
                    steps=steps,
                )
            )
            step, seen = step + steps, seen + steps * tokens
    return PlannedSteps(run, stretches)
