"""The steps of a run walked through one by one, as the trainer takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from encoder.runs.config import RunConfig
from encoder.runs.phases import PlannedStep, lr_at


def walked_steps(run: RunConfig, *, fills: Sequence[float] | None = None) -> Iterator[PlannedStep]:
    """With rows that are as full as `fills` says of each phase."""
    step = 0
    for index, phase in enumerate(run.phases):
        fill, seen = fills[index] if fills else 1.0, 0
        while seen < phase.tokens:
            rows = run.rows_at(phase, seen)
            tokens = max(1, int(rows * run.data.row_tokens * fill))
            step += 1
            yield PlannedStep(
                phase=index,
                step=step,
                phase_tokens=seen,
                rows=rows,
                tokens=tokens,
                lr=lr_at(phase, phase_tokens=seen, step_tokens=tokens),
            )
            seen += tokens
