"""The table of a sweep: a row for each setting, what is chosen, what fresh seeds give, and how much luck is in the best.

OUT/table.json    everything, of every data set and metric, with the points' own numbers
OUT/table.md      the number that settings are chosen by
OUT/table.csv     a line for each setting, data set and metric
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from encoder.base.files import write_atomic, write_json
from encoder.base.tables import as_markdown, as_text
from encoder.base.units import counted
from encoder.finetune.best import Judge
from encoder.finetune.sweeps.points import Setting, Sweep
from encoder.finetune.sweeps.results import (
    SettingResult,
    Summary,
    chosen_of,
    expected_best,
    result_of,
    results_of,
)

COLUMNS = ("n", "mean", "std", "median", "min", "max", "failed", "collapsed", "to do")
TABLE = "table"


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """What is told of a sweep."""

    sweep: Sweep
    results: tuple[SettingResult, ...]  # of the choice
    chosen: Setting | None
    confirmed: SettingResult | None  # fresh seeds of the chosen setting

    @property
    def rows(self) -> list[list[str]]:
        """The head, then the settings; a star at the chosen one."""
        head = [f"{self.sweep.judge.text} of", *COLUMNS]
        return [head, *(self._row(found) for found in self.results)]

    @property
    def lines(self) -> list[str]:
        """What stands below."""
        return [*self._choice_lines(), *self._confirmed_lines(), *self._expected_lines()]

    def as_text(self) -> str:
        """For a terminal."""
        return "\n".join([as_text(self.rows), *self.lines])

    def as_markdown(self) -> str:
        """For a page."""
        return as_markdown(self.rows) + "\n" + "\n".join(f"- {line}" for line in self.lines) + "\n"

    def as_csv(self) -> str:
        """A line for each setting, data set and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["setting", "seeds", "set", "metric", *COLUMNS])
        for found, seeds in self._groups():
            for judge in self._judges(found):
                cells = _cells(found, judge, form=repr)
                writer.writerow([found.setting.text, seeds, judge.of, judge.metric, *cells])
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        judge, config = self.sweep.judge, self.sweep.config
        values = [value for found in self.results for value in found.values(judge)]
        return {
            "sweep": str(self.sweep.path),
            "base": config.base,
            "choose": {"metric": judge.metric, "of": judge.of, "by": config.choose.by},
            "chosen": self.chosen.name if self.chosen else None,
            "settings": [self._plain(found, seeds) for found, seeds in self._groups()],
            "expected_best_of_runs": {
                str(runs): expected_best(values, runs, judge=judge) for runs in _runs(values)
            },
        }

    def _groups(self) -> Iterator[tuple[SettingResult, str]]:
        yield from ((found, "choice") for found in self.results)
        if self.confirmed:
            yield self.confirmed, "fresh"

    def _judges(self, found: SettingResult) -> list[Judge]:
        """Of all numbers that its points have."""
        pairs = [
            (of, metric)
            for result in found.done
            for of, numbers in result.numbers.items()
            for metric in numbers
        ]
        return [Judge(of=of, metric=metric) for of, metric in dict.fromkeys(pairs)]

    def _plain(self, found: SettingResult, seeds: str) -> dict[str, Any]:
        numbers: dict[str, dict[str, Any]] = {}
        for judge in self._judges(found):
            summary = found.summary(judge)
            plain = dataclasses.asdict(summary) if summary else None
            numbers.setdefault(judge.of, {})[judge.metric] = plain
        return {
            "name": found.setting.name,
            "values": dict(found.setting.values),
            "seeds": seeds,
            "failed": found.failed,
            "collapsed": found.collapsed(self.sweep.judge.of),
            "to_do": found.missing,
            "numbers": numbers,
            "points": [
                {
                    "folder": str(result.point.folder),
                    "seed": result.point.seed,
                    "done": result.done,
                    "failure": result.failure,
                    "numbers": result.numbers,
                    "constant": list(result.constant),
                }
                for result in found.points
            ],
        }

    def _row(self, found: SettingResult) -> list[str]:
        star = " *" if self.chosen and found.setting.name == self.chosen.name else ""
        return [found.setting.text + star, *_cells(found, self.sweep.judge)]

    def _choice_lines(self) -> list[str]:
        by, judge = self.sweep.config.choose.by, self.sweep.judge
        rule = f"chosen (*) by the {by} of {judge.text} over seeds"
        if len(self.results) == 1:
            return []
        if self.chosen:
            return [f"{rule}: {self.chosen.text}"]
        missing = sum(found.missing for found in self.results)
        if missing:
            return [f"nothing is chosen yet: {counted(missing, 'point')} to be trained"]
        return ["nothing is chosen: every setting has a seed without a number"]

    def _confirmed_lines(self) -> list[str]:
        found = self.confirmed
        if found is None:
            return []
        seeds = ", ".join(str(result.point.seed) for result in found.points)
        lines = []
        for judge in self._judges(found):
            if judge.metric == self.sweep.judge.metric and (summary := found.summary(judge)):
                lines.append(f"fresh seeds {seeds}: {judge.text} {_summary_text(summary)}")
        if found.failed or found.missing:
            lines.append(
                f"fresh seeds {seeds}: {found.failed} failed, {found.missing} to be trained"
            )
        return lines

    def _expected_lines(self) -> list[str]:
        """How high the best of so many runs lies by chance and search together."""
        judge = self.sweep.judge
        values = [value for found in self.results for value in found.values(judge)]
        if len(values) < 2:
            return []
        parts = [
            f"{runs}: {expected_best(values, runs, judge=judge):.4f}" for runs in _runs(values)
        ]
        return [f"best {judge.text} to be expected of runs of this grid  {'  '.join(parts)}"]


def table_of(sweep: Sweep) -> SweepTable:
    """From the folders as they are. Raises CheckpointError for one that cannot be read."""
    results = results_of(sweep)
    chosen = chosen_of(sweep, results)
    confirmed = None
    if chosen and (points := sweep.confirming(chosen)):
        looked = tuple(result_of(point) for point in points)
        confirmed = SettingResult(setting=chosen, points=looked)
    return SweepTable(sweep=sweep, results=tuple(results), chosen=chosen, confirmed=confirmed)


def write_table(table: SweepTable) -> None:
    """Writes table.json, table.md and table.csv to the sweep's folder."""
    out = table.sweep.out
    write_json(out / f"{TABLE}.json", table.as_json())
    write_atomic(out / f"{TABLE}.md", f"# {table.sweep.name}\n\n{table.as_markdown()}")
    write_atomic(out / f"{TABLE}.csv", table.as_csv())


def _runs(values: Sequence[float]) -> list[int]:
    """1, 2, 4, ... and all of them."""
    doubled = [2**k for k in range(len(values).bit_length()) if 2**k < len(values)]
    return [*doubled, len(values)] if values else []


def _cells(found: SettingResult, judge: Judge, *, form: Any = "{:.4f}".format) -> list[str]:
    summary = found.summary(judge)
    if summary is None:
        numbers = ["0", *["-"] * 5]
    else:
        std = "-" if summary.std is None else form(summary.std)
        rest = [form(x) for x in (summary.median, summary.least, summary.most)]
        numbers = [str(summary.n), form(summary.mean), std, *rest]
    return [*numbers, str(found.failed), str(found.collapsed(judge.of)), str(found.missing)]


def _summary_text(summary: Summary) -> str:
    std = "" if summary.std is None else f" (std {summary.std:.4f})"
    return (
        f"mean {summary.mean:.4f}{std}, median {summary.median:.4f}, {summary.least:.4f} to"
        f" {summary.most:.4f}, n {summary.n}"
    )
