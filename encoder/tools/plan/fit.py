"""Whether a run fits the ranks it is to have: told before they are held."""

from __future__ import annotations

import math
from dataclasses import dataclass

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.runs.config import RunConfig

IDLE_SHARE = 0.1  # of the ranks' time in a step, from which on it is said


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the rows of a step are dealt over the ranks."""

    text: str
    warnings: tuple[str, ...]


def fit_ranks(run: RunConfig, *, ranks: int) -> Fit:
    """The rows of each phase's full steps over the ranks. Raises ConfigError where some ranks would never get a row."""
    rows = {phase.name: run.rows_at(phase, phase.tokens) for phase in run.phases}
    name, most = max(rows.items(), key=lambda item: item[1])
    if most < ranks:
        tokens = ranks * run.data.row_tokens
        raise ConfigError(
            f"{ranks} ranks, but the largest step (phase {name}) has {most} rows of"
            f" {run.data.row_tokens:,} tokens: {ranks - most} ranks would never have work. Needed:"
            f" at most {most} ranks, batch_tokens of at least {tokens:,}, or shorter rows"
            " (data.row_tokens)."
        )
    warnings = []
    for phase in run.phases:
        first = run.rows_at(phase, 0)
        if first < ranks <= rows[phase.name]:
            warnings.append(
                f"phase {phase.name} begins with {first} rows a step: {ranks - first} of {ranks}"
                " ranks wait until its batch has grown."
            )
        # a step takes as long as the rank with most rows, ceil(rows / ranks)
        share = 1 - rows[phase.name] / (ranks * math.ceil(rows[phase.name] / ranks))
        if share > IDLE_SHARE:
            warnings.append(
                f"phase {phase.name} has {rows[phase.name]} rows a step over {ranks} ranks:"
                f" {share:.0%} of their time is spent waiting. A whole multiple of {ranks} rows"
                " wastes none."
            )
    counts = ", ".join(f"{name} {count}" for name, count in rows.items())
    return Fit(
        text=f"rows a step: {counts}; over {counted(ranks, 'rank')}",
        warnings=tuple(warnings),
    )
