"""The points of a sweep: a combination of the grid and a seed, a run folder, and the task that is trained in it.

    grid {lr.peak: [1e-5, 3e-5], epochs: [2, 3]}  seeds [1, 2]

    OUT/lr.peak=1e-05,epochs=2,seed=1
    OUT/lr.peak=1e-05,epochs=2,seed=2
    OUT/lr.peak=1e-05,epochs=3,seed=1     ...

A name holds letters, digits and .=,_+- alone; what does not fit is a hash. So a longer list of values or seeds adds
folders, and names of the others stay.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from encoder.base.done import is_done
from encoder.base.errors import ConfigError, UserError
from encoder.base.file_kinds import refuse_other_kinds
from encoder.base.schema import Mistakes, brief, from_mapping, read_mapping
from encoder.finetune.best import Judge, one_of_metrics
from encoder.finetune.checks import check_finished_rows, check_task, differences_from
from encoder.finetune.config import FineTuneConfig, one_of_dev, read_task
from encoder.finetune.stored import is_task
from encoder.finetune.sweeps.config import OWN_KEYS, SweepConfig, number_of, value_text
from encoder.runs.foreign_files import check_folder
from encoder.runs.weights import model_facts

LONGEST_NAME = 120  # letters; a folder's name has room for 255 bytes
MOST_POINTS = 100_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One combination of the grid."""

    values: tuple[tuple[str, Any], ...]  # (dotted key, value)

    @cached_property
    def name(self) -> str:
        """lr.peak=1e-05,epochs=2; empty where there is no grid."""
        text = ",".join(f"{key}={value_text(value)}" for key, value in self.values)
        safe = re.sub(r"[^A-Za-z0-9.=,_+-]+", "-", text)
        if safe == text and len(text) <= LONGEST_NAME:
            return text
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{safe[: LONGEST_NAME - 9].rstrip('-.,=')}-{digest}"

    @property
    def text(self) -> str:
        """For people."""
        return self.name or "the task as it is"

    @property
    def overrides(self) -> list[str]:
        """For `read_task`."""
        return [f"{key}={json.dumps(number_of(value))}" for key, value in self.values]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    setting: Setting
    seed: int
    folder: Path
    confirms: bool = False  # of a seed that had no part in the choice

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file that was read and found in order."""

    path: Path
    config: SweepConfig
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    judge: Judge
    base: FineTuneConfig
    after: Sweep | None = None

    @property
    def out(self) -> Path:
        """The folder of its points."""
        return Path(self.config.out)

    @property
    def name(self) -> str:
        """In lines for people."""
        return self.path.stem

    def point(self, setting: Setting, seed: int, *, confirms: bool = False) -> Point:
        """A run of it."""
        parts = [setting.name] if setting.name else []
        name = ",".join([*parts, f"seed={seed}"])
        return Point(setting=setting, seed=seed, folder=self.out / name, confirms=confirms)

    def points(self) -> list[Point]:
        """Those of the choice, seed by seed: a sweep that is stopped early has whole seeds."""
        return [self.point(setting, seed) for seed in self.seeds for setting in self.settings]

    def confirming(self, chosen: Setting) -> list[Point]:
        """Those of the number that is reported."""
        return [self.point(chosen, seed, confirms=True) for seed in self.config.confirm_seeds]

    def task(self, point: Point, *, start_from: str | None = None) -> FineTuneConfig:
        """What is trained at a point; as `overrides`. Raises ConfigError."""
        return read_task(self.config.base, self.overrides(point, start_from=start_from))

    def overrides(self, point: Point, *, start_from: str | None = None) -> list[str]:
        """What a point puts over the task file.

        point: of this sweep
        start_from: of the point that it comes after; None: the task's own
        """
        overrides = [
            *point.setting.overrides,
            f"seed={point.seed}",
            f"out={json.dumps(str(point.folder))}",
            f"name={json.dumps(f'{self.base.name} {point.name}')}",
        ]
        if start_from is not None:
            overrides.append(f"start_from={json.dumps(start_from)}")
        return overrides


def read_sweeps(paths: Sequence[Path], overrides: Sequence[str] = ()) -> list[Sweep]:
    """Sweep files, each behind the one that it comes after. Raises ConfigError with the mistakes of all.

    paths: of the files
    overrides: key=value, put over each of them
    """
    read: dict[Path, Sweep] = {}
    mistakes: list[str] = []
    for path in paths:
        try:
            _read_with_those_before(path, overrides, read, below=())
        except UserError as error:
            mistakes += [*error.mistakes] if isinstance(error, Mistakes) else [str(error)]
    _raise(list(dict.fromkeys(mistakes)), where=str(paths[0]) if len(paths) == 1 else "")
    places = [sweep.out.resolve() for sweep in read.values()]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"two sweeps have the out {twice}; needed: a folder for each.")
    return [*read.values()]


def _read_with_those_before(
    path: Path, overrides: Sequence[str], read: dict[Path, Sweep], *, below: tuple[Path, ...]
) -> Sweep:
    """Into `read`, in the order in which they are trained.

    path: of a sweep file
    overrides: key=value
    read: so far
    below: the files that come after it
    """
    whole = path.resolve()
    if whole in below:
        raise ConfigError(f"{path} comes after itself. Take its after out.")
    if whole in read:
        return read[whole]
    config = _read_config(path, overrides)
    after = None
    if config.after:
        after = _read_with_those_before(Path(config.after), (), read, below=(*below, whole))
    read[whole] = _checked(path, config, after)
    return read[whole]


def _read_config(path: Path, overrides: Sequence[str]) -> SweepConfig:
    mapping = read_mapping(path, overrides)
    if "task" in mapping:
        raise ConfigError(
            f"{path} is a task file; needed: a sweep file, with base: {path} and seeds. One run"
            " alone: tessera finetune."
        )
    refuse_other_kinds(mapping, "sweep", path=path)
    mapping.setdefault("out", f"runs/sweeps/{path.stem}")
    return from_mapping(SweepConfig, mapping, where=str(path))


def _checked(path: Path, config: SweepConfig, after: Sweep | None) -> Sweep:
    """All that can be seen before a point starts. Raises ConfigError with all mistakes."""
    base = read_task(config.base)
    found = [*config.mistakes(), *_values_refused(config)]
    for look in (_check_of, _check_metric, _check_after, _check_out):
        found += _refusals(lambda look=look: look(config, base, after))
    settings = tuple(combinations(config)) if not found else ()
    seeds = config.seeds or (base.seed,)
    if len(settings) * len(seeds) > MOST_POINTS:
        found.append(f"{len(settings) * len(seeds):,} points are too many.")
    _raise([f"{path}: {text}" for text in found])
    sweep = Sweep(
        path=path,
        config=config,
        settings=settings,
        seeds=seeds,
        judge=Judge(of=_check_of(config, base, after), metric=_check_metric(config, base, after)),
        base=base,
        after=after,
    )
    _raise([f"{path}: {text}" for text in dict.fromkeys(_points_refused(sweep))])
    return sweep


def combinations(config: SweepConfig) -> Iterator[Setting]:
    """Every value of each key with every value of the others; the last key changes first."""
    for values in itertools.product(*config.grid.values()):
        yield Setting(values=tuple(zip(config.grid, values, strict=True)))


def _values_refused(config: SweepConfig) -> Iterator[str]:
    """Each value of the grid alone in the task: a word that nobody knows is told once."""
    for key, values in config.grid.items():
        for value in values if key not in OWN_KEYS else ():
            alone = Setting(values=((key, value),))
            try:
                read_task(config.base, alone.overrides)
            except ConfigError as error:
                yield f"grid.{key}: {str(error).removeprefix(f'{config.base}: ')}"
                # another value of an unknown key says the same
                if " is unknown." in str(error):
                    break


def _check_of(config: SweepConfig, base: FineTuneConfig, _after: Sweep | None) -> str:
    """The data set that settings are compared on."""
    return one_of_dev(config.choose.of, base.data.dev_names, key="choose.of")


def _check_metric(config: SweepConfig, base: FineTuneConfig, _after: Sweep | None) -> str:
    """The metric that they are compared by."""
    metrics = base.task.metric_names()
    return one_of_metrics(config.choose.metric, metrics, key="choose.metric")


def _check_after(config: SweepConfig, base: FineTuneConfig, after: Sweep | None) -> None:
    """The sweep before has a point of each seed."""
    if after is None:
        return
    needed = [*(config.seeds or (base.seed,)), *config.confirm_seeds]
    there = [*after.seeds, *after.config.confirm_seeds]
    lacking = [seed for seed in needed if seed not in there]
    if lacking:
        raise ConfigError(
            f"seed {lacking[0]} is none of {after.path}: {', '.join(map(str, there))}. A point"
            " starts from that sweep's point of its own seed; add it there."
        )


MARK = "sweep.yaml"  # of a sweep's folder


def _check_out(config: SweepConfig, _base: FineTuneConfig, _after: Sweep | None) -> None:
    """The folder is a sweep's, or is not there yet."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out {out} is a file; needed: a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise ConfigError(
            f"out {out} holds files, and no sweep; needed: a folder that does not exist, is empty,"
            " or holds this sweep. Set another out."
        )


def _points_refused(sweep: Sweep) -> Iterator[str]:
    """What is wrong with points: their settings together, their files, or a folder that was trained with others."""
    starts: set[str] = set()
    files: set[str] = set()
    # SHA-256 of rows: points have mostly the same ones
    known: dict[Hashable, str] = {}
    for point in [*sweep.points(), *_confirming_any(sweep)]:
        try:
            task = sweep.task(point)
        except ConfigError as error:
            yield f"{point.setting.text}: {str(error).removeprefix(f'{sweep.config.base}: ')}"
            continue
        yield from _refusals(lambda point=point: check_folder(point.folder))
        # the same files and starts are looked at once
        named = repr((task.data, task.faults, task.task, task.evaluate))
        if named not in files:
            files.add(named)
            yield from _refusals(lambda task=task: check_task(task))
        if sweep.after is None and task.start_from not in starts:
            starts.add(task.start_from)
            yield from _refusals(lambda task=task: _check_start(Path(task.start_from)))
        if changed := _changed(task, point, sweep):
            key, old, new = changed[0]
            yield (
                f"{point.folder} was trained with other settings: {key} was {brief(old)}, now"
                f" {brief(new)}. Put it back, or set another out."
            )
        # what counts as done is of these rows, too
        elif is_done(point.folder)[0]:
            found = _refusals(lambda task=task: check_finished_rows(task, known=known))
            yield from (f"{point.folder}: {text}" for text in found)


def _confirming_any(sweep: Sweep) -> list[Point]:
    """Of every setting: which one is chosen is not known yet. Those whose folders are there alone matter."""
    found = [point for setting in sweep.settings for point in sweep.confirming(setting)]
    return [point for point in found if point.folder.exists()]


def _changed(task: FineTuneConfig, point: Point, sweep: Sweep) -> list[tuple[str, Any, Any]]:
    changed = differences_from(task, point.folder)
    # which point it starts from is known when that one is chosen
    return [change for change in changed if not (sweep.after and change[0] == "start_from")]


def _check_start(path: Path) -> None:
    """There is a model. Raises UserError."""
    if not is_task(path):
        model_facts(path)


def _refusals(look: Any) -> list[str]:
    try:
        look()
    except Mistakes as error:
        return [*error.mistakes]
    except UserError as error:
        return [str(error)]
    return []


def _raise(mistakes: Sequence[str], *, where: str = "") -> None:
    if len(mistakes) > 1:
        raise Mistakes(mistakes, where=where)
    if mistakes:
        raise ConfigError(mistakes[0])
