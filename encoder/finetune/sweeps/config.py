"""A sweep file: one task, a grid of its settings, seeds, and how the best setting is chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from encoder.base.schema import LocalText, PathText

# what a sweep sets itself, and where it is said instead
OWN_KEYS = {
    "name": "a point is named by its settings",
    "out": "set out of the sweep: points are folders below it",
    "seed": "list seeds",
    "body": "set start_from",
}


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """By which number settings are compared."""

    # or loss; default: the first metric of the task
    metric: str | None = None
    of: str | None = None  # data set; default: the only one of data.dev
    by: Literal["mean", "median"] = "mean"  # of the seeds


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The whole sweep file."""

    other_words: ClassVar[dict[str, str]] = {}

    base: PathText  # the task file
    # points are folders below it; default: runs/sweeps/ and the sweep file's name
    out: LocalText = ""
    # dotted settings of the task, each with a list of values; every combination is a point of each seed
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()  # of every combination; default: the task's own
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    # fresh ones, trained once the best combination is chosen: the number to report
    confirm_seeds: tuple[int, ...] = ()
    # another sweep file: each point starts from that one's chosen combination of the same seed
    after: Annotated[str, "path"] | None = None

    def mistakes(self) -> Iterator[str]:
        """All that can be seen in the file alone."""
        for key in ("seeds", "confirm_seeds"):
            yield from _twice(getattr(self, key), key=key)
        both = [seed for seed in self.confirm_seeds if seed in self.seeds]
        if both:
            yield (
                f"confirm_seeds and seeds both have {both[0]}; needed: fresh ones, which had no part"
                " in the choice."
            )
        if "start_from" in self.grid and self.after:
            yield "after and grid.start_from both say the start. Leave one out."
        for key, values in self.grid.items():
            if key in OWN_KEYS:
                yield f"grid.{key} is the sweep's own. Instead: {OWN_KEYS[key]}."
            inside = next((other for other in self.grid if other.startswith(f"{key}.")), None)
            if inside:
                yield f"grid has {key} and {inside}, which is a part of it. Leave one out."
            if not values:
                yield f"grid.{key} is empty; needed: a list of values."
            yield from _twice([value_text(value) for value in values], key=f"grid.{key}")


def number_of(value: Any) -> Any:
    """1e-5, which YAML reads as text, as the number that it is meant to be; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def value_text(value: Any) -> str:
    """A value as it stands in names: 1e-05, true, cosine; a longer one as JSON."""
    value = number_of(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _twice(values: Sequence[Any], *, key: str) -> Iterator[str]:
    twice = next((value for value in values if list(values).count(value) > 1), None)
    if twice is not None:
        yield f"{key} has {twice} twice; each may stand once."
