"""Does a grown model start and stay below a randomly initialised one? Trains, grows, trains, and draws the curves.

    python benchmarks/growth/run.py --shards shards --out runs/growth [--picture docs/growth.png]

Needs the shards of configs/prep/four_domains.yaml. Trains small.yaml, grows its last checkpoint to the model of large.yaml
in three ways, and trains large.yaml from the seed and from each of them: the same documents, masks, rates and evaluations.
What is already there is not done again. On one core: about 35 minutes (measured while others used the machine).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from encoder.base.command import CommandLine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WAYS = {  # label -> words of launch/grow.py
    "random": None,
    "grown": ["--layer-map", "modernbert", "--final-norm", "copy"],
    "grown_same_kind": ["--layer-map", "same_kind", "--final-norm", "copy"],
    "grown_norm_ones": ["--layer-map", "modernbert", "--final-norm", "ones"],
}
WORDS = {
    "random": "random (Megatron)",
    "grown": "grown: layer_map modernbert, final_norm copy",
    "grown_same_kind": "grown: layer_map same_kind, final_norm copy",
    "grown_norm_ones": "grown: layer_map modernbert, final_norm ones (as published)",
}


def main() -> None:
    """Everything, then the table on standard output."""
    asked = CommandLine(description=__doc__)
    asked.add_argument(
        "--shards", type=Path, required=True, help="the folder that holds four_domains/"
    )
    asked.add_argument("--out", type=Path, required=True, help="run folders and weights folders")
    asked.add_argument("--picture", type=Path, help="default: OUT/growth.png")
    args = asked.parse_args()
    out, places = args.out.resolve(), _places(args.shards.resolve())
    _launch("pretrain.py", HERE / "small.yaml", f"out={out / 'small'}", *places)
    # the same run file from each start
    for label, words in WAYS.items():
        start = []
        if words:
            start = [f"init_from={out / f'{label}_weights'}"]
            if not (out / f"{label}_weights").exists():
                _launch(
                    "grow.py",
                    out / "small",
                    out / f"{label}_weights",
                    "--run",
                    HERE / "large.yaml",
                    *words,
                )
        _launch("pretrain.py", HERE / "large.yaml", f"out={out / label}", *start, *places)
    curves = {label: _held_out(out / label) for label in WAYS}
    picture = args.picture or out / "growth.png"
    _draw(
        curves, json.loads((out / "random" / "done.json").read_text(encoding="utf-8")), path=picture
    )
    _table(curves)
    print(f"wrote {picture}")


def _places(shards: Path) -> list[str]:
    """Overrides that put the run files' relative shard folders where they are."""
    names = ("web", "books", "science", "code")
    return [
        f"{group}.sources.{i}.path={shards / 'four_domains' / name / split}"
        for group, split in (("data", "train"), ("evaluation", "held_out"))
        for i, name in enumerate(names)
    ]


def _launch(command: str, *words: object) -> None:
    subprocess.run(
        [sys.executable, ROOT / "launch" / command, *map(str, words)], cwd=ROOT, check=True
    )


def _held_out(folder: Path) -> list[tuple[int, float]]:
    """(tokens seen, held-out loss in nats), in the order of training."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["tokens"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]


def _table(curves: dict[str, list[tuple[int, float]]]) -> None:
    print(
        "| tokens | "
        + " | ".join(WORDS[label] for label in curves)
        + " |\n"
        + "|---" * (1 + len(curves))
        + "|"
    )
    for rows in zip(*curves.values(), strict=True):
        # a table line compares losses at the same number of tokens
        assert len({tokens for tokens, _ in rows}) == 1, "the runs saw the same documents"
        print(f"| {rows[0][0]:,} | " + " | ".join(f"{loss:.3f}" for _, loss in rows) + " |")


def _draw(
    curves: dict[str, list[tuple[int, float]]], done: dict[str, float], *, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axis = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    styles = {
        "random": ("#444444", "o-"),
        "grown": ("#b5402a", "o-"),
        "grown_same_kind": ("#2a6fb5", "s--"),
        "grown_norm_ones": ("#3a7d44", "^:"),
    }
    for label, curve in curves.items():
        colour, style = styles[label]
        axis.plot(
            *zip(*curve, strict=True),
            style,
            ms=3.5,
            lw=1.5,
            color=colour,
            label=f"{WORDS[label]}, last {curve[-1][1]:.2f}",
        )
    axis.axhline(
        done["unigram_entropy"],
        lw=0.8,
        ls="--",
        color="#999",
        label=f"unigram entropy {done['unigram_entropy']:.2f}",
    )
    axis.set(
        title="Held-out loss of the larger model, four domains",
        xlabel="tokens seen by the larger model",
        ylabel="nats per masked token (15 % masked)",
    )
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1000:.0f}K"))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
