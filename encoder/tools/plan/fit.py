"""Whether a run fits the ranks it is to have: told before they are held.

Row r of a step goes to rank r mod ranks. A GPU's micro-batches have one shape, so those that rows do not fill cost as much as
full ones:

    288 rows, 64 ranks, 3 rows a micro-batch     2 micro-batches a rank, room for 384 rows: a quarter of the time for nothing
    256 rows, 64 ranks, 2 rows a micro-batch     2 micro-batches a rank, all full
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.runs.config import PhaseConfig, RunConfig

IDLE_SHARE = 0.1  # of the ranks' time in a step, from which on it is said
RANKS_A_NODE = 8  # what whole nodes have: where ranks are a multiple, so are those that are named


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the rows of a step are dealt over the ranks."""

    text: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the busiest rank computes in a step; the others wait for it."""

    micro_batches: int
    rows: int  # that it computes, padding included


def share_of_rows(rows: int, *, ranks: int, micro_batch_rows: int, padded: bool) -> Share:
    """The share of one rank of a step's rows.

    rows: of the step, over all ranks
    ranks: that share them
    micro_batch_rows: of a full micro-batch
    padded: whether one that is not full is filled with padding (encoder.train.build.has_static_shapes)
    """
    micro_batches = math.ceil(rows / (ranks * micro_batch_rows))
    computed = math.ceil(rows / ranks)
    if padded:
        computed = micro_batches * micro_batch_rows
    return Share(micro_batches=micro_batches, rows=computed)


def fit_ranks(run: RunConfig, *, ranks: int, padded: bool) -> Fit:
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
    warnings += idle_warnings(run, ranks=ranks, padded=padded)
    counts = ", ".join(f"{name} {count}" for name, count in rows.items())
    return Fit(
        text=f"rows a step: {counts}; over {counted(ranks, 'rank')}",
        warnings=tuple(warnings),
    )


def idle_warnings(run: RunConfig, *, ranks: int, padded: bool) -> list[str]:
    """A sentence for all phases whose full steps leave ranks without work, and what would not; phases of one batch together."""
    by_rows: dict[int, list[PhaseConfig]] = {}
    for phase in run.phases:
        by_rows.setdefault(run.rows_at(phase, phase.tokens), []).append(phase)
    return [
        _idle_text(run, phases, rows, ranks=ranks, padded=padded)
        for rows, phases in by_rows.items()
        # fewer rows than ranks: that is told by itself
        if rows >= ranks and _idle_share(run, rows, ranks=ranks, padded=padded) > IDLE_SHARE
    ]


def _idle_share(run: RunConfig, rows: int, *, ranks: int, padded: bool) -> float:
    share = share_of_rows(
        rows, ranks=ranks, micro_batch_rows=run.loader.micro_batch_rows, padded=padded
    )
    return 1 - rows / (ranks * share.rows)


def _idle_text(
    run: RunConfig, phases: list[PhaseConfig], rows: int, *, ranks: int, padded: bool
) -> str:
    """What is idle, and the nearest numbers with which nothing is.

    run, phases: that have so many rows
    rows: of a full step
    ranks: that share them
    padded: as share_of_rows
    """
    now = run.loader.micro_batch_rows
    share = share_of_rows(rows, ranks=ranks, micro_batch_rows=now, padded=padded)
    idle = _idle_share(run, rows, ranks=ranks, padded=padded)
    names = ", ".join(phase.name for phase in phases)
    title = "phase" if len(phases) == 1 else "phases"
    dealt = f"{share.rows} on the busiest"
    if padded:
        plural = "" if share.micro_batches == 1 else "es"
        dealt = f"{share.micro_batches} micro-batch{plural} of {counted(now, 'row')} on each"
    micro_batch, left = _micro_batch(rows, ranks=ranks, micro_batch_rows=now, padded=padded)
    good = [
        _batches(run, rows, ranks=ranks, padded=padded),
        _rank_counts(rows, ranks=ranks, micro_batch_rows=now, padded=padded),
        micro_batch if not left else "",
    ]
    found = [
        f"{title} {names}: {rows} rows a step over {ranks} ranks are {dealt}, room for"
        f" {ranks * share.rows}: {idle:.0%} of the ranks' time is idle."
    ]
    if any(good):
        nearest = "; ".join(text for text in good if text)
        found.append(f"Nearest without: {nearest}.")
    if left:
        found.append(f"With less: {micro_batch} ({left:.0%}).")
    return " ".join(found)


def _batches(run: RunConfig, rows: int, *, ranks: int, padded: bool) -> str:
    """The next smaller and the next larger batch that leaves no rank idle.

    run: its row_tokens, lanes and micro-batch decide
    rows: of a full step
    ranks: that share them
    padded: as share_of_rows
    """
    now = run.loader.micro_batch_rows
    # a step has as many rows of every lane
    unit = math.lcm(ranks, run.data.lanes)
    below = range(rows // unit * unit, 0, -unit)
    # at most one more full micro-batch a rank
    above = range(math.ceil(rows / unit) * unit, rows + 2 * unit * now, unit)
    found = []
    for steps in (below, above):
        sizes = ((n, _whole_micro_batch(n, ranks, now=now, padded=padded)) for n in steps)
        if good := next((pair for pair in sizes if pair[1]), None):
            found.append(_with_micro_batch(f"{good[0] * run.data.row_tokens:,}", good[1], now))
    return f"batch_tokens {' or '.join(found)}" if found else ""


def _rank_counts(rows: int, *, ranks: int, micro_batch_rows: int, padded: bool) -> str:
    """The next fewer and the next more ranks that leave none idle; whole nodes where they are now.

    rows: of a full step
    ranks: as now
    micro_batch_rows: as now
    padded: as share_of_rows
    """
    unit = RANKS_A_NODE if ranks % RANKS_A_NODE == 0 else 1
    now = micro_batch_rows
    found = []
    for counts in (range(ranks - unit, 0, -unit), range(ranks + unit, rows + 1, unit)):
        sizes = ((n, _whole_micro_batch(rows, n, now=now, padded=padded)) for n in counts)
        if good := next((pair for pair in sizes if pair[1]), None):
            found.append(_with_micro_batch(str(good[0]), good[1], now))
    return f"{' or '.join(found)} ranks" if found else ""


def _micro_batch(
    rows: int, *, ranks: int, micro_batch_rows: int, padded: bool
) -> tuple[str, float]:
    """The micro-batch, smaller than now, that leaves the least time idle, and the share that is left; empty where none helps.

    rows: of a full step
    ranks: that share them
    micro_batch_rows: as now
    padded: as share_of_rows; without padding a micro-batch decides nothing
    """
    if not padded:
        return "", 0.0
    computed = {
        size: share_of_rows(rows, ranks=ranks, micro_batch_rows=size, padded=True).rows
        for size in range(micro_batch_rows, 0, -1)
    }
    # the first of equals: the largest
    best = min(computed, key=lambda size: computed[size])
    if computed[best] == computed[micro_batch_rows]:
        return "", 0.0
    left = 1 - rows / (ranks * computed[best])
    return f"loader.micro_batch_rows {best}", left


def _whole_micro_batch(rows: int, ranks: int, *, now: int, padded: bool) -> int:
    """The rows of the micro-batches that a step fills on all ranks, or 0.

    rows: of the step
    ranks: that share them
    now: rows of a micro-batch as set; at most halved, for small micro-batches are slow, unless a rank has fewer rows
    padded: as share_of_rows
    """
    if rows % ranks:
        return 0
    if not padded:
        return now
    own = rows // ranks
    if own < now:
        return own
    sizes = range(now, (now - 1) // 2, -1)
    return next((size for size in sizes if own % size == 0), 0)


def _with_micro_batch(text: str, rows: int, now: int) -> str:
    if rows == now:
        return text
    return f"{text} (loader.micro_batch_rows {rows})"
