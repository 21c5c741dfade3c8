"""Two sweeps compared example by example: is a difference larger than what another draw of the rows would give?

    rows          1    2    3    4        right, mean over the seeds of each sweep
    ours        1.0  0.8  0.0  1.0
    theirs      1.0  0.2  0.0  0.8        difference of the means: 0.2

The rows are drawn again with replacement 10,000 times, the same ones for both (the paired bootstrap). Rows that both answer alike
say nothing, so less rows are needed than for two means alone. Seeds are averaged before: what they differ by is in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.errors import ConfigError
from encoder.base.rng import generator
from encoder.finetune.kinds import squad
from encoder.finetune.predict import PREDICTIONS
from encoder.finetune.sweeps.results import SettingResult
from encoder.finetune.sweeps.table import SweepTable
from encoder.runs.folder import read_jsonl

DRAWS = 10_000
DRAWN_TOGETHER = 2_000_000  # row numbers in memory at a time


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two sweeps differ on a data set."""

    rows: int
    ours: float  # mean of the rows' numbers
    theirs: float
    low: float  # of the middle 95 % of all draws' differences
    high: float
    p: float  # two-sided: how often a draw turns the sign round, times two

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{self.ours:.4f} and {self.theirs:.4f}, difference {self.ours - self.theirs:+.4f}, 95 % of"
            f" draws {self.low:+.4f} to {self.high:+.4f}, p {self.p:.3f} ({self.rows:,} rows,"
            f" {DRAWS:,} draws)"
        )


def compare(ours: SweepTable, theirs: SweepTable, *, of: str) -> Comparison:
    """The chosen settings of two sweeps, by the predictions of their fresh seeds, or of all seeds where there are none.

    Raises ConfigError where nothing is chosen yet, or the rows are not the same.

    ours, theirs: two sweeps over the same data set
    of: its name
    """
    first, second = (_predictions(table, of) for table in (ours, theirs))
    if [line.get("target") for line in first[0]] != [line.get("target") for line in second[0]]:
        raise ConfigError(
            f"{ours.sweep.name} and {theirs.sweep.name} have other rows in {of}; needed: the same"
            " file in both, row by row."
        )
    return paired_bootstrap(
        *(np.mean([rows_right(lines) for lines in runs], axis=0) for runs in (first, second))
    )


def paired_bootstrap(ours_N: np.ndarray, theirs_N: np.ndarray) -> Comparison:
    """Of two numbers for each of N rows (Efron and Tibshirani 1993, chapter 13; draws are the same in every call)."""
    difference_N = ours_N - theirs_N
    count, draw = len(difference_N), generator(0, "paired bootstrap")
    together = max(1, DRAWN_TOGETHER // count)
    means: list[np.ndarray] = []
    for first in range(0, DRAWS, together):
        some = min(together, DRAWS - first)
        means.append(difference_N[draw.integers(0, count, (some, count))].mean(axis=1))
    means_D = np.concatenate(means)
    turned = min((means_D <= 0).mean(), (means_D >= 0).mean())
    low, high = np.quantile(means_D, [0.025, 0.975])
    return Comparison(
        rows=count,
        ours=float(ours_N.mean()),
        theirs=float(theirs_N.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2.0 * float(turned)),
    )


def rows_right(lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A number of each predicted row, by its target; the larger the better.

    label, labels, choice    1 where it is the target, else 0
    value                    minus the squared error
    answer                   F1 of its words, the best over the right answers (SQuAD)
    tags                     the share of the row's words that have the right tag

    Raises ConfigError for lines without any of these.
    """
    said = next((key for key in _BY_ROW if key in lines[0]), None)
    if said is None:
        raise ConfigError(
            f"predictions have {', '.join(lines[0])}; needed: one of {', '.join(_BY_ROW)}."
        )
    return np.array([_BY_ROW[said](line[said], line["target"]) for line in lines], dtype=float)


def _same(given: Any, target: Any) -> float:
    return float(given == target)


def _minus_squared_error(given: float, target: float) -> float:
    return -((given - target) ** 2)


def _share_of_words(given: Sequence[str], target: Sequence[str]) -> float:
    right = [tag == other for tag, other in zip(given, target, strict=True)]
    return float(np.mean(right)) if right else 1.0


_BY_ROW: dict[str, Callable[[Any, Any], float]] = {
    "label": _same,
    "labels": _same,
    "choice": _same,
    "value": _minus_squared_error,
    "answer": squad.f1,
    "tags": _share_of_words,
}


def _predictions(table: SweepTable, of: str) -> list[list[dict[str, Any]]]:
    """Of each run that counts. Raises ConfigError."""
    chosen: SettingResult | None = table.confirmed
    if chosen is None and table.chosen:
        chosen = next(found for found in table.results if found.setting == table.chosen)
    if chosen is None or not chosen.done:
        raise ConfigError(
            f"nothing is chosen in {table.sweep.path} yet; needed: all its points. Train them first."
        )
    paths = [result.point.folder / PREDICTIONS / f"{of}.jsonl" for result in chosen.done]
    lacking = next((path for path in paths if not path.is_file()), None)
    if lacking:
        raise ConfigError(f"{lacking} is not there. Known sets: {_names(paths[0].parent)}.")
    return [read_jsonl(path) for path in paths]


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.jsonl")))
