"""Draws the small runs of the families, and prints their table.

python benchmarks/families/draw.py [--results benchmarks/results/families] [--picture docs/families.png]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from encoder.base.command import CommandLine

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]
ROBERTAS = {
    "mini_roberta": ("MiniRoBERTa, code's recipe", "#b5402a", "o-"),
    "mini_roberta_readme": ("MiniRoBERTa, README's recipe", "#2a6fb5", "s-"),
    "roberta_med_small": ("RoBERTa-med-small", "#3a7d44", "^-"),
}
STUDENTS = {
    "ropert_student": ("RoPERT's, taught", "#b5402a", "o-"),
    "ropert_student_alone": ("RoPERT's, alone", "#2a6fb5", "s--"),
    "distilbert": ("BERT's, taught", "#d98c7a", "o-"),
    "distilbert_alone": ("BERT's, alone", "#8fb6dd", "s--"),
}
ELECTRAS = {
    "electra_mini": ("generator of ELECTRA", "#b5402a", "o-"),
    "electra_mini_mlm": ("discriminator's body, masks alone", "#2a6fb5", "s-"),
}
XLNETS = {
    "xlnet": ("without memory", "#2a6fb5", "s-"),
    "xlnet_memory": ("memory of 96 tokens", "#b5402a", "o-"),
}
DOMAINS = ("web", "books", "science", "code")


def main() -> None:
    """The picture, and the table on standard output."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/families")
    asked.add_argument("--picture", type=Path, default=ROOT / "docs/families.png")
    args = asked.parse_args()

    files = sorted(args.results.glob("*.json"))
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    # cost.json is no run
    results = {name: result for name, result in found.items() if "held_out" in result}
    _draw(results, args.picture)
    print(_table(results))


def _table(results: dict[str, Result]) -> str:
    lines = [
        "| run | parameters | tokens | CPU minutes | held-out loss | unigram |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        first = result["held_out"][0]["held_out_loss"]
        last = result["held_out"][-1]["held_out_loss"]
        lines.append(
            f"| `{name}` | {result['parameters']:,} | {result['tokens']:,} |"
            f" {result['cpu_minutes']:.0f} | {first:.2f} to {last:.2f} |"
            f" {result['unigram_entropy']:.2f} |"
        )
    return "\n".join(lines)


def _draw(results: dict[str, Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    # a panel of each group of runs that has a result
    panels = {
        "bert_mini": _bert,
        "minilm_nsp": _next_sentence,
        "ropert_student": _students,
        "ropert_small": _ropert,
        "mini_roberta": _robertas,
        "minilm": _minilm,
        "albert_small": _albert,
        "electra_mini": _electras,
        "xlnet": _xlnets,
    }
    drawn = [panel for name, panel in panels.items() if name in results]
    rows = math.ceil(len(drawn) / 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.6 * rows), layout="constrained")
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, drawn):
        panel(axis, results)
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _tokens(v)))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _tokens(number: float) -> str:
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:.0f}K"


def _bert(axis: Any, results: dict[str, Result]) -> None:
    result = results["bert_mini"]
    _line(axis, result["train"], "loss_mlm", label="training", color="#bbbbbb", lw=1)
    _line(axis, result["held_out"], "held_out_loss", "o-", label="held out", color="#b5402a")
    _unigram(axis, result)
    axis.set(title="BERT-mini: masked tokens", ylabel="nats per masked token")


def _next_sentence(axis: Any, results: dict[str, Result]) -> None:
    names = {
        "bert_mini": ("BERT-mini, passages", "#b5402a"),
        "minilm_nsp": ("from MiniLM, books", "#2a6fb5"),
        "minilm_nsp_domains": ("from MiniLM, four domains", "#3a7d44"),
    }
    for name, (label, colour) in names.items():
        if name in results:
            points = results[name]["held_out"]
            _line(axis, points, "held_out_accuracy_nsp", "o-", label=label, color=colour)
    always = results["minilm_nsp"]["always_1"]
    axis.axhline(always, lw=0.8, ls="--", color="#999", label=f"always 1, of books: {always:.2f}")
    axis.set(title="Next sentence, held out", ylabel="share of right labels", ylim=(0.4, 1))


def _students(axis: Any, results: dict[str, Result]) -> None:
    for name, (label, colour, style) in STUDENTS.items():
        if name in results:
            points = results[name]["held_out"]
            last = points[-1]["held_out_loss"]
            words = f"{label}, last {last:.2f}"
            _line(axis, points, "held_out_loss", style, label=words, color=colour)
    axis.set(title="Students of two layers", ylabel="nats per masked token, held out")


def _ropert(axis: Any, results: dict[str, Result]) -> None:
    result = results["ropert_small"]
    tokens = [point["tokens"] for point in result["held_out"]]
    perplexity = [math.exp(point["held_out_loss"]) for point in result["held_out"]]
    label = f"held out, last {perplexity[-1]:.0f}"
    axis.plot(tokens, perplexity, "o-", ms=3.5, lw=1.5, color="#b5402a", label=label)
    unigram = math.exp(result["unigram_entropy"])
    label = f"unigram {unigram:.0f}"
    axis.axhline(unigram, lw=0.8, ls="--", color="#999", label=label)
    axis.set(title="RoPERT-small, half as wide: 30 % masks", ylabel="perplexity", yscale="log")


def _albert(axis: Any, results: dict[str, Result]) -> None:
    result = results["albert_small"]
    _line(
        axis, result["held_out"], "held_out_accuracy_sop", "o-", label="held out", color="#b5402a"
    )
    # the commoner label is 0 or 1
    always = max(result["always_1"], 1 - result["always_1"])
    axis.axhline(always, lw=0.8, ls="--", color="#999", label=f"always one: {always:.2f}")
    title = "ALBERT, order of sentences, code"
    axis.set(title=title, ylabel="share of right labels", ylim=(0.4, 1))


def _electras(axis: Any, results: dict[str, Result]) -> None:
    _held_out_of(axis, results, ELECTRAS)
    _unigram(axis, results["electra_mini"])
    axis.set(title="ELECTRA at equal FLOP", ylabel="nats per masked token, held out")


def _xlnets(axis: Any, results: dict[str, Result]) -> None:
    _held_out_of(axis, results, XLNETS)
    _unigram(axis, results["xlnet"])
    axis.set(title="XLNet, spans of 6", ylabel="nats per predicted token, held out")


def _held_out_of(axis: Any, results: dict[str, Result], named: dict[str, tuple]) -> None:
    for name, (label, colour, style) in named.items():
        if name in results:
            points = results[name]["held_out"]
            _line(axis, points, "held_out_loss", style, label=label, color=colour)


def _robertas(axis: Any, results: dict[str, Result]) -> None:
    _held_out_of(axis, results, ROBERTAS)
    _unigram(axis, results["mini_roberta"])
    axis.set(title="RoBERTas, web", ylabel="nats per masked token, held out")


def _minilm(axis: Any, results: dict[str, Result]) -> None:
    result = results["minilm"]
    for domain, colour in zip(DOMAINS, ("#2a6fb5", "#b5402a", "#3a7d44", "#8a5aa8"), strict=True):
        key = f"held_out_loss_{domain}"
        _line(axis, result["held_out"], key, "o-", label=domain, color=colour)
    axis.set(title="MiniLM trained on, four domains", ylabel="nats per masked token, held out")


def _unigram(axis: Any, result: Result) -> None:
    entropy = result["unigram_entropy"]
    label = f"unigram entropy {entropy:.2f}"
    axis.axhline(entropy, lw=0.8, ls="--", color="#999", label=label)


def _line(
    axis: Any, points: list[dict[str, float]], key: str, style: str = "-", **how: Any
) -> None:
    """A curve over the tokens.

    axis: of a panel
    points: each has its tokens
    key: what is drawn
    style: marker and line
    how: colour, width, label
    """
    how = {"ms": 3.5, "lw": 1.5, **how}
    axis.plot([p["tokens"] for p in points], [p[key] for p in points], style, **how)


if __name__ == "__main__":
    main()
