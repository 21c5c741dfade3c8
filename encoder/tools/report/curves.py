"""The curves of one or several runs over tokens seen, as one picture."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from encoder.base.units import short_count

MOST_POINTS = 2000  # of a curve; means of neighbouring steps above that
SMOOTH_FROM = 20  # fewer steps are drawn as they are
TITLES = {  # what a curve is, and the unit of its axis
    "lr": ("learning rate", "rate"),
    "step_tokens": ("batch", "tokens a step"),
    "tokens_per_second": ("speed", "tokens/s, all ranks"),
    "mfu": ("model FLOP utilization", "share of the devices' bf16 peak"),
    "tflops_per_second": ("model FLOP a second", "FLOP/s, all ranks"),
}
COLOURS = ("#b5402a", "#2f6db3", "#3a7d44", "#8a5aa8", "#b8860b", "#4a4a4a")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a run's evaluations measure: names in its metrics, and words for people."""

    loss: str = "held_out_loss"
    loss_title: str = "masked-token loss"
    loss_unit: str = "nats a masked token"
    score: str = "held_out_accuracy"
    score_title: str = "held-out accuracy"
    score_unit: str = "share of the masked tokens"
    set_name: str = "held-out"  # what is evaluated


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What is drawn of a run: its merged metrics, and the two losses that say what a loss is worth."""

    name: str
    metrics: list[dict[str, Any]]
    entropy: float | None  # unigram entropy of the held-out text, nats
    vocab_size: int | None  # None: its loss is not over a vocabulary
    evaluated: Evaluated = Evaluated()
    # of the checkpoint that a branch began with: its curve goes on there
    tokens_before: int = 0


def draw(runs: Sequence[Curves]) -> bytes:
    """Loss and accuracy, rate, batch, speed and share of the peak (FLOP a second where no peak is known), as PNG.

    The loss of each step is faint, its running mean over about a twentieth of the steps is drawn over it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    # a share of the peak where it is known for any run, or else FLOP a second
    used = "tflops_per_second"
    if any("mfu" in m for m in chain.from_iterable(run.metrics for run in runs)):
        used = "mfu"
    figure, at = pyplot.subplot_mosaic(
        [
            ["loss", "loss", "lr"],
            ["loss", "loss", "step_tokens"],
            ["score", "tokens_per_second", used],
        ],
        figsize=(13, 9.5),
        layout="constrained",
    )
    colours = list(zip(runs, COLOURS * len(runs)))
    # runs of several kinds side by side: the first one's words
    words = runs[0].evaluated
    titles = {
        "loss": (words.loss_title, words.loss_unit),
        "score": (words.score_title, words.score_unit),
        **TITLES,
    }
    for key, axis in at.items():
        for run, colour in colours:
            if key == "loss":
                _draw_loss(axis, run, colour)
            else:
                marker = "o" if key == "score" else None
                own = run.evaluated.score if key == "score" else key
                axis.plot(*_curve(run, own), lw=1.2, color=colour, marker=marker, ms=3)
        title, unit = titles[key]
        alone = ""
        if key == "loss" and len(runs) == 1:
            alone = f"{_literal(runs[0].name)}: "
        axis.set_title(f"{alone}{title}", fontsize=10)
        axis.set_xlabel("tokens seen", fontsize=8)
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
        # losses differ by less than their distance from zero, a correlation may lie below it
        if key not in ("loss", "score"):
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
        if key in ("tokens_per_second", "step_tokens"):
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
        if key == "tflops_per_second":
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(1e12 * v)))
        if key in ("score", "mfu"):
            axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        for number, (run, colour) in enumerate(colours):
            colour = "#888" if len(runs) == 1 else colour
            for name, tokens in _phase_starts(run):
                axis.axvline(tokens, lw=0.7, color=colour, alpha=0.6)
                # runs one above another: their phases often begin at the same tokens
                if key == "loss":
                    axis.annotate(
                        _literal(name),
                        (tokens, 0.03 + 0.04 * number),
                        xycoords=("data", "axes fraction"),
                        fontsize=8,
                        color=colour,
                        xytext=(3, 0),
                        textcoords="offset points",
                    )

    # two marks for the loss: guessing evenly, and guessing by how often a token occurs
    for size in sorted({run.vocab_size for run in runs if run.vocab_size}):
        at["loss"].axhline(
            math.log(size),
            lw=0.8,
            ls=":",
            color="#555",
            label=f"uniform, ln {size:,} = {math.log(size):.2f}",
        )
    for entropy in sorted({run.entropy for run in runs if run.entropy}):
        at["loss"].axhline(
            entropy,
            lw=0.8,
            ls="--",
            color="#555",
            label=f"unigram entropy, held-out text = {entropy:.2f}",
        )
    at["loss"].legend(fontsize=8, frameon=False)

    png = io.BytesIO()
    with warnings.catch_warnings():
        # of a name's letters that no font here has: they are drawn as boxes
        warnings.simplefilter("ignore")
        figure.savefig(png, dpi=110, format="png")
    pyplot.close(figure)
    return png.getvalue()


def _draw_loss(axis: Any, run: Curves, colour: str) -> None:
    name = _literal(run.name)
    x, y = _curve(run, "loss")
    alone = len(y) < SMOOTH_FROM
    axis.plot(
        x,
        y,
        lw=1.2 if alone else 0.7,
        color=colour,
        alpha=0.8 if alone else 0.3,
        label=f"{name}: training, each step" if alone else None,
    )
    if len(y) >= SMOOTH_FROM:
        smooth = running_mean(y, over=max(8, len(y) // 20))
        axis.plot(
            x,
            smooth,
            lw=1.4,
            color=colour,
            alpha=0.9,
            label=f"{name}: training, running mean, last {smooth[-1]:.2f}",
        )
    x, y = _curve(run, run.evaluated.loss)
    if len(y):
        axis.plot(
            x,
            y,
            "o--",
            ms=4,
            lw=1.0,
            color=colour,
            mec="white",
            mew=0.5,
            label=f"{name}: {_literal(run.evaluated.set_name)}, last {y[-1]:.2f}",
        )


def running_mean(values: np.ndarray, *, over: int) -> np.ndarray:
    """An exponential mean over about so many values, from the first one on without a bias to zero.

    1 3 5 over 3   ->   1, 2.33, 3.86
    """
    # the mean over `over` values of a plain window has the same average age
    keep = 1.0 - 2.0 / (over + 1)
    total = weight = 0.0
    means = np.empty(len(values))
    for i, value in enumerate(values):
        total = keep * total + (1.0 - keep) * float(value)
        # the sum of the weights so far, below 1: divided by it the mean has no bias to zero
        weight = keep * weight + (1.0 - keep)
        means[i] = total / weight
    return means


def _literal(name: str) -> str:
    """A name as matplotlib draws it letter by letter: no formula, no hidden label, one short line."""
    line = " ".join(name.split())
    if len(line) <= 60:
        line = line
    else:
        line = f"{line[:57]}..."
    # a leading underscore hides a label, a dollar begins a formula
    if line.startswith("_"):
        return f"\u200b{line}".replace("$", r"\$")
    return line.replace("$", r"\$")


def _curve(run: Curves, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values where there is one; means of neighbours where there are too many. Held-out values stay as they are."""
    found = [
        (run.tokens_before + m["tokens"], m[key])
        for m in run.metrics
        if isinstance(m.get(key), (int, float)) and isinstance(m.get("tokens"), int)
    ]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    kept = key in (run.evaluated.loss, run.evaluated.score)
    if len(points) > MOST_POINTS and not kept:
        points = np.array([part.mean(0) for part in np.array_split(points, MOST_POINTS)])
    return points[:, 0], points[:, 1]


def _phase_starts(run: Curves) -> list[tuple[str, int]]:
    """Phases after the first (of a branch also the first), and the tokens at their beginning."""
    starts: dict[str, int] = {}
    for m in run.metrics:
        starts.setdefault(m["phase"], run.tokens_before + m["tokens"])
    return list(starts.items())[0 if run.tokens_before else 1 :]
