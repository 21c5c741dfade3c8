"""What the points of a sweep have come to, as their folders say it; and which setting is chosen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encoder.base.done import is_done
from encoder.base.errors import CheckpointError
from encoder.base.untrusted import read_json
from encoder.finetune.best import Judge
from encoder.finetune.predict import RESULT
from encoder.finetune.sweeps.points import Point, Setting, Sweep

# in a point's folder: why its last start failed
FAILED = "failed.txt"


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A point that was looked at."""

    point: Point
    done: bool = False
    failure: str = ""  # of the last start; "" where there was none
    # by data set: metric -> value; null where it was no number
    numbers: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    constant: tuple[str, ...] = ()  # data sets of which every prediction is the same

    def number(self, judge: Judge) -> float | None:
        """The one that settings are compared by."""
        return self.numbers.get(judge.of, {}).get(judge.metric)


def result_of(point: Point) -> PointResult:
    """From its folder. Raises CheckpointError for a result.json that cannot be read, or is no fine-tuning's."""
    if not is_done(point.folder)[0]:
        return PointResult(point=point, failure=failure_of(point.folder))
    path = point.folder / RESULT
    found = read_json(path, error=CheckpointError, root=dict)
    numbers = found.get("metrics")
    if not isinstance(numbers, dict) or not all(isinstance(x, dict) for x in numbers.values()):
        raise CheckpointError(
            f"{path} has no metrics by data set, as a fine-tuning writes them. Put its own file"
            " back, or remove the folder: the point is then trained anew."
        )
    return PointResult(
        point=point,
        done=True,
        numbers=numbers,
        constant=tuple(found.get("constant_predictions", ())),
    )


def failure_of(folder: Path) -> str:
    """Why its last start failed; "" where none did."""
    path = folder / FAILED
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of several seeds."""

    n: int
    mean: float
    std: float | None  # of the sample, n - 1; None of one number
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """None without a number."""
        if not values:
            return None
        return cls(
            n=len(values),
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else None,
            median=statistics.median(values),
            least=min(values),
            most=max(values),
        )


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """All seeds of a setting."""

    setting: Setting
    points: tuple[PointResult, ...]

    @property
    def done(self) -> tuple[PointResult, ...]:
        """Points that were trained to their end."""
        return tuple(found for found in self.points if found.done)

    @property
    def failed(self) -> int:
        """Points whose last start failed, and those whose number is none."""
        return sum(bool(found.failure) for found in self.points)

    @property
    def missing(self) -> int:
        """Points that are to be trained still."""
        return sum(not found.done and not found.failure for found in self.points)

    def collapsed(self, of: str) -> int:
        """Points that give every row of a data set the same answer; they count in all numbers."""
        return sum(of in found.constant for found in self.points)

    def values(self, judge: Judge) -> list[float]:
        """Of the points that have a number."""
        found = [result.number(judge) for result in self.done]
        return [value for value in found if value is not None]

    def summary(self, judge: Judge) -> Summary | None:
        """Of those numbers."""
        return Summary.of(self.values(judge))

    def is_whole(self, judge: Judge) -> bool:
        """Whether every seed has a number."""
        return len(self.values(judge)) == len(self.points)


def results_of(sweep: Sweep) -> list[SettingResult]:
    """Of the choice, setting by setting."""
    return [
        SettingResult(
            setting=setting,
            points=tuple(result_of(sweep.point(setting, seed)) for seed in sweep.seeds),
        )
        for setting in sweep.settings
    ]


def chosen_of(sweep: Sweep, results: Sequence[SettingResult]) -> Setting | None:
    """The setting whose seeds have the best mean or median, of equals the earlier of the grid.

    None as long as a point is to be trained, and where every setting has a seed without a number: a mean over the seeds
    that went well would prefer settings that fail.
    """
    judge = sweep.judge
    if any(found.missing for found in results):
        return None
    best: tuple[float, Setting] | None = None
    for found in results:
        summary = found.summary(judge)
        if summary is None or not found.is_whole(judge):
            continue
        value = getattr(summary, sweep.config.choose.by)
        if best is None or judge.better(value, best[0]):
            best = (value, found.setting)
    return best[1] if best else None


def expected_best(values: Sequence[float], runs: int, *, judge: Judge) -> float:
    """The best number to be expected of so many runs (Dodge et al. 2019, Show Your Work).

        sum over i of v_(i) ((i / N)^n - ((i - 1) / N)^n)        v_(1) <= ... <= v_(N)

    values: N numbers, v
    runs: n
    judge: says whether the best is the highest
    """
    lower_is_better = judge.better(0.0, 1.0)
    ordered = sorted(values, reverse=lower_is_better)
    total = len(ordered)
    return sum(
        value * ((i / total) ** runs - ((i - 1) / total) ** runs)
        for i, value in enumerate(ordered, start=1)
    )
