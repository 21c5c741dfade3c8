"""Where a run's wall time went: parts that sum to it exactly, over all of its starts.

    start 1   |starting|training, waiting, evaluating, saving ... x                    killed at x
    start 2                                       ^ resumes here     stopped |starting|training ...
                                                  |... wasted ...|

A start ends, for this count, with its last line: what passed from there to the next start is `stopped`. Times are whole
milliseconds, so that sums are exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from encoder.base.errors import LedgerError
from encoder.runs.folder import EVENTS, METRICS, read_jsonl
from encoder.train.meters import Clock

WHAT_IS = {
    "training": "steps, without the wait for their data",
    "waiting": "for data, on rank zero",
    "evaluating": "held-out loss and accuracy",
    "saving": "what training waited for",
    "starting": "from the process to the first step, opening phases, going back",
    "wasted": (
        "training, waiting and evaluating of steps that a later start did again or that going back"
        " undid"
    ),
    "stopped": "from a start's last line to the next start",
    "twice": "taken off: a start that began before the one before it had written its last line",
}


@dataclass(kw_only=True)
class _Start:
    began_ms: int = 0
    step: int = 0  # where it went on from
    # (step, ms by kind so far)
    steps: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    spent_ms: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Clock.KINDS, 0))
    backs: list[tuple[int, int]] = field(default_factory=list)  # (step, weights of step)

    def add(self, spent: Mapping[str, float]) -> dict[str, int]:
        """What the start had spent by some line: in the end, by the last one."""
        now = {kind: round(1000 * spent[kind]) for kind in Clock.KINDS}
        # lines of two files: the latest is the one with most time
        self.spent_ms = max(self.spent_ms, now, key=lambda ms: sum(ms.values()))
        return now

    @property
    def end_ms(self) -> int:
        return self.began_ms + sum(self.spent_ms.values())


def wall_ms(folder: Path) -> dict[str, int]:
    """Milliseconds by what they went to (the keys of WHAT_IS) and `wall time`, their exact sum: from the first start's beginning
    to the last one's last line. Nothing for a run without such records. Raises LedgerError for a damaged file.
    """
    starts = _read(folder)
    if not starts:
        return {}
    parts = dict.fromkeys(WHAT_IS, 0)
    # what a start wasted moves from its kinds to `wasted`: the sum stays
    for i, start in enumerate(starts):
        for kind, ms in start.spent_ms.items():
            parts[kind] += ms
        for kind, ms in _wasted(start, starts[i + 1 :]).items():
            parts[kind] -= ms
            parts["wasted"] += ms
    for before, after in zip(starts, starts[1:]):
        # below zero: the later start began before the earlier one wrote its last line
        gap = after.began_ms - before.end_ms
        parts["stopped" if gap >= 0 else "twice"] += gap
    return {**parts, "wall time": starts[-1].end_ms - starts[0].began_ms}


def _read(folder: Path) -> list[_Start]:
    found: dict[int, _Start] = defaultdict(_Start)
    for name, take in ((EVENTS, _take_event), (METRICS, _take_metrics)):
        for number, line in enumerate(read_jsonl(folder / name), 1):
            try:
                if "spent" in line:
                    take(found, line)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise LedgerError(
                    f"{folder / name} line {number} has times that cannot be read. Restore the"
                    " file, or remove that line."
                ) from error
    # without a beginning its lines cannot be placed on the wall clock
    return [start for _, start in sorted(found.items()) if start.began_ms]


def _take_event(found: dict[int, _Start], e: Mapping[str, Any]) -> None:
    start = found[int(e["start"])]
    start.add(e["spent"])
    if "began" in e:
        start.began_ms = round(1000 * e["began"])
        start.step = int(e["step"])
    if e["event"] == "back":
        start.backs.append((int(e["step"]), int(e["weights_of_step"])))


def _take_metrics(found: dict[int, _Start], m: Mapping[str, Any]) -> None:
    if m["start"] in found:
        start = found[m["start"]]
        start.steps.append((m["step"], start.add(m["spent"])))


def _wasted(start: _Start, later: list[_Start]) -> dict[str, int]:
    """Of a start's time: what led to its lines of steps that do not count."""
    # steps beyond the earliest place that a later start went on from were done again
    kept = min((s.step for s in later), default=None)
    backs = list(chain.from_iterable(s.backs for s in (start, *later)))
    wasted: dict[str, int] = defaultdict(int)
    before: Mapping[str, Any] = dict.fromkeys(Clock.KINDS, 0)
    for step, now in start.steps:
        # done again, or between a going-back and the weights that it went back to
        if (
            kept is not None
            and step > kept
            or any(weights_of_step < step <= at for at, weights_of_step in backs)
        ):
            for kind in ("training", "waiting", "evaluating"):
                wasted[kind] += now[kind] - before[kind]
        before = now
    return wasted
