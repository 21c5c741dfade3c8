"""Long context as a picture: loss against context length, loss by position, and the grid of needles."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from encoder.tools.evaluation.context import ContextScores


def draw_context(scores: Mapping[str, ContextScores]) -> bytes:
    """A PNG: two curves of all models, and below them a grid of needles of each model that was asked for them.

    scores: by the model's name
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grids = {name: found for name, found in scores.items() if found.needle}
    rows = 1 + bool(grids)
    columns = max(2, len(grids))
    figure = pyplot.figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    places = figure.add_gridspec(rows, columns)

    by_length = figure.add_subplot(places[0, 0])
    by_position = figure.add_subplot(places[0, 1])
    for name, found in scores.items():
        by_length.plot([*found.loss], [*found.loss.values()], marker="o", label=name)
        by_position.plot([*found.position_loss], [*found.position_loss.values()], label=name)
    by_length.set_xscale("log", base=2)
    by_length.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    by_length.set(title="the same tokens, more before them", xlabel="tokens of context")
    by_length.set_ylabel("nats a masked token")
    by_position.set(title="by position in the longest context", xlabel="first token of a stretch")
    by_length.legend()

    for column, (name, found) in enumerate(grids.items()):
        _grid(figure.add_subplot(places[1, column]), name, found)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return file.getvalue()


def _grid(axes: Any, name: str, found: ContextScores) -> None:
    """Accuracy by depth (down) and length (across), as colours and numbers."""
    lengths = [*found.needle]
    depths = [*next(iter(found.needle.values()))]
    shares = [[found.needle[length].get(depth, 0.0) for length in lengths] for depth in depths]
    axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=f"needle, {name} (chance {found.chance or 0.0:.0%})", xlabel="tokens")
    axes.set_ylabel("depth")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8)
