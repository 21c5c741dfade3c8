"""What ends a run before its end, and what it does about bad steps: the time limit, the judge of steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from encoder.base.errors import MachineError
from encoder.base.untrusted import number_in_name
from encoder.runs.faults import FaultConfig

OK, NOT_FINITE, SPIKE = "", "not_finite", "spike"  # what a step was, in the ledger


class Deadline:
    """When the run must have saved and stopped: `max_hours` after the process started, or SLURM's end of the job."""

    SPARE_SECONDS = 10.0
    FIRST_SAVE_SECONDS = 60.0  # while no save was measured

    def __init__(self, max_hours: float | None, *, started: float, env: Mapping[str, str]) -> None:
        """`started` as time.time()."""
        # setting -> end, as time of day: whichever comes first
        ends = {}
        if max_hours is not None:
            ends = {"faults.max_hours": started + 3600 * max_hours}
        if (end := number_in_name(env.get("SLURM_JOB_END_TIME", ""))) is not None:
            ends["SLURM_JOB_END_TIME"] = float(end)
        self.of, self._end = min(ends.items(), key=lambda item: item[1], default=("", math.inf))
        self._save_seconds = self._step_seconds = 0.0
        self._stepped: float | None = None

    def saved(self, seconds: float) -> None:
        """A save took this long from its start to its mark."""
        self._save_seconds = max(self._save_seconds, seconds)

    def is_near(self) -> bool:
        """Asked once a step: whether the next one must be the last. Leaves room for two of the slowest steps, evaluations among
        them, and for two of the slowest saves."""
        now = time.monotonic()
        if self._stepped is not None:
            self._step_seconds = max(self._step_seconds, now - self._stepped)
        self._stepped = now

        # twice the slowest of each, since the next may be slower still
        margin = self.SPARE_SECONDS + 2 * (
            self._step_seconds + (self._save_seconds or self.FIRST_SAVE_SECONDS)
        )
        return time.time() > self._end - margin


class StepMonitor:
    """Says of each step whether it was fine, from what all ranks know alike, and counts the bad ones in a row.

    What the ledger holds of steps that are done again is not judged anew: a step that was not finite is left out without
    computing it, so that the run repeats itself also where a defect of the machine, not the data, was the cause.
    """

    def __init__(
        self, config: FaultConfig, *, recorded: dict[int, str], saved: Mapping[str, Any]
    ) -> None:
        self._config, self._recorded = config, recorded
        self.in_a_row: int = saved.get("in_a_row", 0)
        # and no checkpoint was made on the way since
        self.went_back: bool = saved.get("went_back", False)

        self._losses = deque(
            saved.get("losses", ()), maxlen=config.spike.over_steps if config.spike else 0
        )

    def to_plain(self) -> dict[str, Any]:
        """What a checkpoint saves."""
        return {"in_a_row": self.in_a_row, "went_back": self.went_back, "losses": [*self._losses]}

    @property
    def must_go_back(self) -> bool:
        """Whether the bad steps in a row are too many."""
        return self.in_a_row >= self._config.bad_steps

    def is_left_out(self, step: int) -> bool:
        """Whether a step that is done again moved nothing the first time."""
        return self._recorded.get(step) == NOT_FINITE

    def is_recorded(self, step: int) -> bool:
        """Whether a step is done again, and what it was stands in the ledger."""
        return step in self._recorded

    def classify(self, step: int, *, loss: float, applied: bool) -> str:
        """OK, NOT_FINITE or SPIKE. Raises MachineError, the same on all ranks, where a step was fine and is not finite now."""

        finite = applied and math.isfinite(loss)
        found = self._recorded.get(step)
        # a step done again is what the ledger says; fine then and not finite now is the machine
        if found is None:
            found = NOT_FINITE if not finite else SPIKE if self._is_spike(loss) else OK
        elif not finite and found != NOT_FINITE:
            raise MachineError(
                f"the gradient of step {step} is not finite; it was before the stop, says the"
                " ledger. A defect of the machine is likely: start again, on another one if it"
                " comes back."
            )

        if found == OK:
            self.in_a_row = 0
            self._losses.append(loss)
        elif applied and not math.isfinite(loss):
            # the weights have moved by a loss that is no number: back at once, whatever the count
            self.in_a_row = self._config.bad_steps
        else:
            self.in_a_row += 1
        return found

    def new_phase(self) -> None:
        """Losses of another length, mixture or mask share are no measure."""
        self._losses.clear()

    def gone_back(self) -> None:
        """The weights are those of the last good checkpoint."""
        self.in_a_row, self.went_back = 0, True
        self._losses.clear()

    def _is_spike(self, loss: float) -> bool:
        if not self._config.spike or len(self._losses) < self._config.spike.over_steps:
            return False

        # at least 0.1 % of the median: a flat loss would make a spike of any wiggle
        middle = median(self._losses)
        deviation = max(median(abs(x - middle) for x in self._losses), 1e-3 * middle)
        return loss > middle + self._config.spike.deviations * deviation
