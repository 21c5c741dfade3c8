"""A run as a picture and one HTML page: loss, held-out loss, learning rate, batch, speed, events."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.errors import LedgerError, UserError
from encoder.base.schema import from_mapping, read_mapping
from encoder.base.units import short_count
from encoder.train.config import RunConfig, schedule_word
from encoder.train.tracking import DONE, EVENTS, LEDGER, METRICS, RUN_FILE, follow_chain, merged_metrics, read_jsonl


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table added to the page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""


def write_report(folder: Path, *, sections: Sequence[Section] = ()) -> Path:
    """Writes loss.png and report.html into a run folder; returns the page. Raises UserError, LedgerError."""
    metrics = merged_metrics(folder / METRICS)
    if not metrics:
        raise UserError(f"{folder} holds no {METRICS} with a line in it; needed: the folder of a run that has begun.")
    run = from_mapping(RunConfig, read_mapping(folder / RUN_FILE), where=str(folder / RUN_FILE))
    done = _read_done(folder)
    steps = verify_ledger(folder)
    picture = draw(metrics, folder / "loss.png", title=run.name, entropy=done.get("unigram_entropy"),
                   vocab_size=run.model.vocab_size)
    held_out = _last_held_out(metrics)
    facts = [("steps", f"{metrics[-1]['step']:,}"), ("tokens", short_count(metrics[-1]["tokens"])),
             ("state", "done" if done else "not done yet"),
             *((k.replace("_", " "), f"{v:.2%}" if "accuracy" in k else f"{v:.3f} nats") for k, v in held_out.items()),
             *([("unigram entropy of the held-out text", f"{done['unigram_entropy']:.3f} nats")]
               if done.get("unigram_entropy") else []),
             ("ledger", f"{steps:,} steps, chain unbroken" + (f", {done['ledger_hash']}" if done else ""))]
    phases = [[p.name, short_count(p.tokens), f"{p.max_tokens_per_document:,}", f"{p.global_rope_theta:,.0f}",
               schedule_word(p), f"{p.lr.peak:g}"] for p in run.phases]
    events = [[e.get("time", ""), e.get("event", ""),
               ", ".join(f"{k} {v}" for k, v in e.items() if k not in ("time", "event"))] for e in read_jsonl(folder / EVENTS)]
    page = _page(run.name, picture, [
        Section(title="Result", head=("", ""), rows=facts),
        *sections,
        Section(title="Phases", head=("phase", "tokens", "length", "global RoPE theta", "schedule", "peak rate"), rows=phases),
        Section(title="Events", head=("time (UTC)", "event", "details"), rows=events)])
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _last_held_out(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """What the last evaluation found: losses and accuracies by name."""
    found = next((m for m in reversed(metrics) if "held_out_loss" in m), {})
    return {k: v for k, v in found.items() if k.startswith(("held_out_loss", "held_out_accuracy"))}


def verify_ledger(folder: Path) -> int:
    """Follows the ledger's hash chain to its end, which a finished run knows; returns the last step. Raises LedgerError."""
    lines = read_jsonl(folder / LEDGER)
    follow_chain(lines, folder / LEDGER)
    last = lines[-1] if lines else {"step": 0, "chain": ""}
    done = _read_done(folder)
    if not lines and (folder / METRICS).exists():
        raise LedgerError(f"{folder} has metrics but no line in {LEDGER}. Lines are missing: restore the file.")
    if done:
        if (last["step"], last["chain"]) != (done["step"], done["ledger_hash"]):
            raise LedgerError(f"{folder / LEDGER} ends at step {last['step']} with {last['chain']}, the finished run at step "
                              f"{done['step']} with {done['ledger_hash']}. Lines are missing: restore the file.")
    return last["step"]


def _read_done(folder: Path) -> dict[str, Any]:
    path = folder / DONE
    if not path.exists():
        return {}
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        return {**done, "step": done["step"], "ledger_hash": done["ledger_hash"]}
    except (ValueError, TypeError, KeyError) as error:
        raise LedgerError(f"{path} is damaged. Remove it and start the run again: it is written anew.") from error


def draw(metrics: list[dict[str, Any]], path: Path, *, title: str, entropy: float | None, vocab_size: int) -> Path:
    """Four curves over tokens seen, as PNG."""
    import math

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5), layout="constrained", width_ratios=(2, 1))
    (loss, rate), (speed, batch) = axes
    trained = [(m["tokens"], m) for m in metrics if m.get("loss") is not None]
    held_out = [(m["tokens"], m["held_out_loss"]) for m in metrics if "held_out_loss" in m]
    x = [t for t, _ in trained]
    loss.plot(x, [m["loss"] for _, m in trained], lw=0.8, color="#9bb7d4", label="training loss, each step")
    if held_out:
        loss.plot(
            *zip(*held_out, strict=True), "o-", ms=3.5, lw=1.4, color="#b5402a", label=f"held-out loss, last {held_out[-1][1]:.2f}"
        )
    loss.axhline(
        math.log(vocab_size),
        lw=0.8,
        ls=":",
        color="#555",
        label=f"uniform, ln {vocab_size:,} = {math.log(vocab_size):.2f}",
    )
    if entropy:
        loss.axhline(entropy, lw=0.8, ls="--", color="#555", label=f"unigram entropy, held-out text = {entropy:.2f}")
    loss.set(title=f"{title}: masked-token loss (nats)", ylim=(0, None))
    loss.legend(fontsize=8, frameon=False)
    rate.plot(x, [m["lr"] for _, m in trained], color="#444")
    rate.set(title="learning rate", ylim=(0, None))
    speed.plot(x, [m["tokens_per_second"] for _, m in trained], color="#3a7d44")
    speed.set(title="tokens a second", ylim=(0, None))
    batch.step(x, [m["step_tokens"] for _, m in trained], color="#444")
    batch.set(title="tokens a step", ylim=(0, None))
    starts = {}
    for tokens, m in trained:
        starts.setdefault(m["phase"], tokens)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
        for name, tokens in list(starts.items())[1:]:
            axis.axvline(tokens, lw=0.7, color="#aaa")
            if axis is loss:
                axis.annotate(name, (tokens, 0.03), xycoords=("data", "axes fraction"), fontsize=8, color="#666",
                              xytext=(3, 0), textcoords="offset points")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _page(name: str, picture: Path, sections: Sequence[Section]) -> str:
    image = base64.b64encode(picture.read_bytes()).decode()
    body = "".join(_table(s) for s in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(name)}</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .9rem .2rem 0;text-align:left;"
        "vertical-align:top;border-bottom:1px solid #eee}img{max-width:100%}h2{font-size:1.1rem;margin-bottom:.2rem}"
        f"code{{white-space:pre-wrap}}</style><h1>{html.escape(name)}</h1><img alt='loss, rate, speed, batch' "
        f"src='data:image/png;base64,{image}'>{body}</html>\n"
    )


def _table(section: Section) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in section.head) if any(section.head) else ""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in section.rows)
    text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    return f"<h2>{html.escape(section.title)}</h2>{text}<table>{'<tr>' + head + '</tr>' if head else ''}{rows}</table>"
