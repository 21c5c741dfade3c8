"""The curves of a plan as a picture: rate, decay, batch, mask share, length and RoPE theta over the tokens of each phase.

A column a phase, all of one width, for the last one has a fortieth of the published tokens; warm-ups that would be too
narrow to see have a column of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.errors import UserError
from encoder.base.units import short_count
from encoder.runs.config import RunConfig
from encoder.runs.phases import PlannedStep, PlannedSteps

MADE_BY = "tessera plan"  # in the picture: what says so may be written over
POINTS = 3000  # of a column, at most: more than it has pixels
NARROW = 0.1  # of a phase: warm-ups shorter than that are also drawn apart


@dataclass(frozen=True, kw_only=True)
class Column:
    """A stretch of a phase."""

    title: str
    phase: int
    end_tokens: int  # from the phase's first token
    steps: Sequence[PlannedStep]


def columns_of(run: RunConfig, steps: PlannedSteps) -> list[Column]:
    """The phases in order, each after its warm-ups where these are short; at most POINTS steps in each."""
    columns = []
    for index, phase in enumerate(run.phases):
        # the longer of the two warm-ups, of the rate and of the batch
        warm_up = max(
            getattr(phase.lr, "warmup_tokens", 0),
            phase.batch_warmup.over_tokens if phase.batch_warmup else 0,
        )
        # a fifth beyond the warm-up, to see what follows
        end = warm_up * 6 // 5
        if 0 < warm_up < NARROW * phase.tokens:
            columns.append(
                Column(
                    title=f"{phase.name}, its warm-ups",
                    phase=index,
                    end_tokens=end,
                    steps=_thinned(steps, steps.indices(index, until_tokens=end)),
                )
            )
        columns.append(
            Column(
                title=phase.name,
                phase=index,
                end_tokens=phase.tokens,
                steps=_thinned(steps, steps.indices(index)),
            )
        )
    return columns


def draw_plan(run: RunConfig, steps: PlannedSteps, path: Path) -> None:
    """Writes the curves of `steps` as PNG. Raises UserError where the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = columns_of(run, steps)
    figure, axes = pyplot.subplots(
        4,
        len(columns),
        figsize=(3.6 * len(columns), 8.4),
        layout="constrained",
        sharey="row",
        sharex="col",
        squeeze=False,
    )
    figure.suptitle(
        f"{run.name}: {len(steps):,} steps, {short_count(sum(p.tokens for p in run.phases))}"
        " tokens",
        fontsize=11,
    )
    for number, column in enumerate(columns):
        rate, batch, share, length = axes[:, number]
        # a step is drawn at its middle, where its rate is taken
        phase, x = run.phases[column.phase], [s.phase_tokens + s.tokens // 2 for s in column.steps]
        rate.set_title(f"{column.title}\n{short_count(column.end_tokens)} tokens", fontsize=9)
        rate.plot(x, [s.lr for s in column.steps], color="#444")
        relative_to = f" at {phase.max_lr:g}" if phase.max_lr else ""
        rate.annotate(
            f"peak {phase.lr.peak:g}\nweight decay {run.weight_decay_of(phase):g}{relative_to}",
            (0.97, 0.5),
            ha="right",
            xycoords="axes fraction",
            fontsize=8,
            color="#666",
        )
        batch.step(
            x, [s.rows * run.data.row_tokens for s in column.steps], color="#444", where="mid"
        )
        share.plot(
            x, [run.mask_share_of(phase).at(s.phase_tokens) for s in column.steps], color="#3a7d44"
        )
        length.plot((0, column.end_tokens), (phase.max_tokens_per_document,) * 2, color="#444")
        texts = ", ".join(
            f"{label} {text}" for label, text in run.model_of(phase).phase_texts.items()
        )
        length.annotate(
            f"documents up to {phase.max_tokens_per_document:,}\n{texts}",
            (0.03, 0.4),
            xycoords="axes fraction",
            fontsize=8,
            color="#666",
        )
        length.set(xlim=(0, column.end_tokens))
        length.xaxis.set_major_locator(MaxNLocator(4))
        length.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))

    # rows share an axis, so the left column labels all of them
    for axis, label in zip(
        axes[:, 0],
        ("learning rate", "tokens a step", "mask share", "longest document"),
        strict=True,
    ):
        axis.set(ylabel=label, ylim=(0, axis.get_ylim()[1] * 1.05))
    for axis in (*axes[1], *axes[3]):
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    _save(figure, path)
    pyplot.close(figure)


def _thinned(steps: PlannedSteps, own: range) -> list[PlannedStep]:
    every = max(1, len(own) // POINTS)
    # the last step always, whatever the stride
    return [steps[i] for i in (*own[::every], own[-1])]


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110, format="png", metadata={"Software": MADE_BY})
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Name another file."
        ) from error
