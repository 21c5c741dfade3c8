"""The curves of one or several runs over tokens seen, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.units import short_count

MOST_POINTS = 2000       # of a curve; means of neighbouring steps above that
COLOURS = ("#b5402a", "#2f6db3", "#3a7d44", "#8a5aa8", "#b8860b", "#4a4a4a")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What is drawn of a run: its merged metrics, and the two losses that say what a loss is worth."""

    name: str
    metrics: list[dict[str, Any]]
    entropy: float | None         # unigram entropy of the held-out text, nats
    vocab_size: int
    tokens_before: int = 0        # of the checkpoint that a branch began with: its curve goes on there


def draw(runs: Sequence[Curves], path: Path) -> Path:
    """Loss and accuracy, rate, batch, speed and share of the peak (FLOP a second where no peak is known), as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    used = "mfu" if any("mfu" in m for run in runs for m in run.metrics) else "tflops_per_second"
    figure, at = pyplot.subplot_mosaic([["loss", "loss", "lr"], ["loss", "loss", "step_tokens"],
                                        ["held_out_accuracy", "tokens_per_second", used]], figsize=(12, 9), layout="constrained")
    titles = {"loss": "masked-token loss (nats)", "lr": "learning rate", "step_tokens": "tokens a step",
              "held_out_accuracy": "held-out accuracy", "tokens_per_second": "tokens a second",
              "mfu": "model FLOP utilization", "tflops_per_second": "model TFLOP a second"}
    titles["loss"] = f"{runs[0].name}: {titles['loss']}" if len(runs) == 1 else titles["loss"]
    for key, axis in at.items():
        for run, colour in zip(runs, COLOURS * len(runs)):
            thin = key == "loss"
            axis.plot(*_curve(run, key), lw=0.8 if thin else 1.2, color=colour, alpha=0.45 if thin else 1.0,
                      label=f"{run.name}: training" if thin else None, marker="o" if key == "held_out_accuracy" else None, ms=3)
        axis.set(title=titles[key])
        if key != "loss":                # losses differ by less than their distance from zero
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
        for number, (run, colour) in enumerate(zip(runs, COLOURS * len(runs))):
            colour = "#888" if len(runs) == 1 else colour
            for name, tokens in _phase_starts(run):
                axis.axvline(tokens, lw=0.7, color=colour, alpha=0.6)
                if key == "loss":       # runs one above another: their phases often begin at the same tokens
                    axis.annotate(name, (tokens, 0.03 + 0.04 * number), xycoords=("data", "axes fraction"), fontsize=8,
                                  color=colour, xytext=(3, 0), textcoords="offset points")
    for run, colour in zip(runs, COLOURS * len(runs)):
        x, y = _curve(run, "held_out_loss")
        if len(y):
            at["loss"].plot(x, y, "o-", ms=3.5, lw=1.4, color=colour, label=f"{run.name}: held-out, last {y[-1]:.2f}")
    for size in sorted({run.vocab_size for run in runs}):
        at["loss"].axhline(math.log(size), lw=0.8, ls=":", color="#555", label=f"uniform, ln {size:,} = {math.log(size):.2f}")
    for entropy in sorted({run.entropy for run in runs if run.entropy}):
        at["loss"].axhline(entropy, lw=0.8, ls="--", color="#555", label=f"unigram entropy, held-out text = {entropy:.2f}")
    at["loss"].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _curve(run: Curves, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values where there is one; means of neighbours where there are too many. Held-out values stay as they are."""
    found = [(run.tokens_before + m["tokens"], m[key]) for m in run.metrics if m.get(key) is not None]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    if len(points) > MOST_POINTS and not key.startswith("held_out"):
        points = np.array([part.mean(0) for part in np.array_split(points, MOST_POINTS)])
    return points[:, 0], points[:, 1]


def _phase_starts(run: Curves) -> list[tuple[str, int]]:
    """Phases after the first (of a branch also the first), and the tokens at their beginning."""
    starts: dict[str, int] = {}
    for m in run.metrics:
        starts.setdefault(m["phase"], run.tokens_before + m["tokens"])
    return list(starts.items())[0 if run.tokens_before else 1:]
