"""Which point is next: what is done, what failed, what waits for a point that it starts from, what another process trains.

    grid x seeds  ->  the chosen setting x confirm_seeds
    a sweep       ->  the sweeps that come after it, each point behind that of its seed

It looks at folders alone, so that a killed sweep, a second machine or a job of an array goes on where the others stand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from encoder.base.done import is_done
from encoder.base.errors import UserError
from encoder.base.files import write_atomic
from encoder.base.schema import brief
from encoder.finetune.checks import differences_from
from encoder.finetune.sweeps.points import Point, Setting, Sweep
from encoder.finetune.sweeps.results import FAILED, chosen_of, failure_of, results_of

BUSY_SECONDS = 5.0  # until a point is tried again that another process trains


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of the points every `count`-th, from `index` on: a job of an array."""

    index: int = 0  # from 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A point to be trained now."""

    sweep: Sweep
    point: Point
    start_from: str | None  # of the point that it comes after

    @property
    def name(self) -> str:
        """For people, and among those of other sweeps."""
        return f"{self.sweep.name}: {self.point.name}"


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What a point starts from, if that is there."""

    ready: bool
    path: str | None = None
    failure: str = ""


class Board:
    """The points of some sweeps, as far as they are known, and how they stand in this start."""

    def __init__(self, sweeps: Sequence[Sweep], *, part: Part | None = None) -> None:
        """sweeps: each behind the one that it comes after
        part: of the points that are this start's; None: all are
        """
        self.sweeps = sweeps
        self._part = part or Part()
        self.done: set[Path] = set()
        self.failed: dict[Path, str] = {}
        self.given: set[Path] = set()
        self._not_before: dict[Path, float] = {}
        # of another part, but a point of this one starts from them
        self._needed: set[Path] = set()
        self._chosen: dict[Path, Setting | None] = {}
        # done before this start, and found to be of today's settings
        self._looked_at: set[Path] = set()

    def take(self) -> Job | None:
        """A point to be trained now; None: there is none at the moment."""
        while True:
            needed = len(self._needed)
            for sweep in self.sweeps:
                for point in self.own(sweep):
                    job = self._job(sweep, point)
                    if job is not None:
                        self.given.add(point.folder)
                        return job
            # a point that is needed may be one of a sweep that was gone through
            if len(self._needed) == needed:
                return None

    def own(self, sweep: Sweep) -> list[Point]:
        """The known points that this start trains."""
        groups = [sweep.points()]
        if self._is_chosen(sweep) and (chosen := self._chosen[sweep.out]):
            groups.append(sweep.confirming(chosen))
        return [
            point
            for points in groups
            for number, point in enumerate(points)
            if number % self._part.count == self._part.index or point.folder in self._needed
        ]

    def is_done(self, point: Point) -> bool:
        """Whether it was trained to its end, in this start or before."""
        return self._stands(point) == "done"

    def ended(self, job: Job, *, failure: str = "") -> None:
        """A point that was given is done, or failed."""
        self.given.discard(job.point.folder)
        if failure:
            self._fail(job.point, failure)
        else:
            self.done.add(job.point.folder)

    def is_busy(self, job: Job) -> None:
        """Another process trains it: it is looked at again later."""
        self.given.discard(job.point.folder)
        self._not_before[job.point.folder] = time.monotonic() + BUSY_SECONDS

    def put_back(self, job: Job) -> None:
        """It was stopped."""
        self.given.discard(job.point.folder)

    @property
    def waits(self) -> bool:
        """Whether a point may come up later, though none is under way here: another process trains it, or one before it."""
        return any(self._stands(point) == "" for sweep in self.sweeps for point in self.own(sweep))

    @property
    def elsewhere(self) -> int:
        """Points of the choice that other parts have not finished."""
        return sum(
            self._stands(point) == "" and not failure_of(point.folder)
            for sweep in self.sweeps
            for point in sweep.points()
        )

    def chosen(self, sweep: Sweep) -> Setting | None:
        """The best setting, once all of them were tried."""
        return self._chosen[sweep.out] if self._is_chosen(sweep) else None

    def _job(self, sweep: Sweep, point: Point) -> Job | None:
        stands = self._stands(point)
        if (
            stands in ("given", "failed")
            or self._not_before.get(point.folder, 0) > time.monotonic()
        ):
            return None
        if stands == "done" and sweep.after is None:
            return None
        start = self._start_of(sweep, point)
        if start.failure:
            self._fail(point, start.failure)
            return None
        if stands == "done":
            self._check_start(sweep, point, start)
            return None
        if not start.ready:
            return None
        return Job(sweep=sweep, point=point, start_from=start.path)

    def _stands(self, point: Point) -> str:
        if point.folder in self.failed:
            return "failed"
        if point.folder in self.given:
            return "given"
        if point.folder not in self.done and is_done(point.folder)[0]:
            self.done.add(point.folder)
        return "done" if point.folder in self.done else ""

    def _start_of(self, sweep: Sweep, point: Point) -> _Start:
        """The point of the sweep before, of the same seed and of its chosen setting."""
        before = sweep.after
        if before is None:
            return _Start(ready=True)
        setting: Setting | None = before.settings[0]
        if len(before.settings) > 1:
            self._needed |= {other.folder for other in before.points()}
            if not self._is_chosen(before):
                return _Start(ready=False)
            setting = self._chosen[before.out]
            if setting is None:
                text = f"not trained: nothing is chosen in {before.path}, for seeds of it failed"
                return _Start(ready=False, failure=text)
        assert setting is not None, "one of several was chosen above"
        start = before.point(setting, point.seed)
        self._needed.add(start.folder)
        stands = self._stands(start)
        if stands == "failed":
            text = f"not trained: {start.folder}, which it starts from, failed"
            return _Start(ready=False, failure=text)
        return _Start(ready=stands == "done", path=str(start.folder))

    def _check_start(self, sweep: Sweep, point: Point, start: _Start) -> None:
        """A point that is done started where it would start now."""
        if not start.ready or point.folder in self._looked_at:
            return
        self._looked_at.add(point.folder)
        try:
            task = sweep.task(point, start_from=start.path)
            changed = differences_from(task, point.folder)
        except UserError as error:
            self._fail(point, str(error))
            return
        if changed:
            key, old, new = changed[0]
            self._fail(
                point,
                f"{point.folder} was trained with other settings: {key} was {brief(old)}, now"
                f" {brief(new)}. Set another out.",
            )

    def _is_chosen(self, sweep: Sweep) -> bool:
        """Whether all points of the choice were tried; then what is chosen is known."""
        if sweep.out in self._chosen:
            return True
        own = {point.folder for point in self._of_choice(sweep)}
        for point in sweep.points():
            stands = self._stands(point)
            tried = stands in ("done", "failed")
            # of another part: its folder says so
            if point.folder not in own and stands == "":
                tried = bool(failure_of(point.folder))
            if not tried:
                return False
        self._chosen[sweep.out] = chosen_of(sweep, results_of(sweep))
        return True

    def _of_choice(self, sweep: Sweep) -> list[Point]:
        return [
            point
            for number, point in enumerate(sweep.points())
            if number % self._part.count == self._part.index or point.folder in self._needed
        ]

    def _fail(self, point: Point, text: str) -> None:
        self.failed[point.folder] = text
        self.done.discard(point.folder)
        # a run that is done stays what it is
        if not is_done(point.folder)[0]:
            point.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(point.folder / FAILED, f"{text}\n")
