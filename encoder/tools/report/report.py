"""Runs as a picture and one HTML page: curves, results and where the time went side by side, phases, events."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from encoder.base.done import read_done
from encoder.base.errors import LedgerError, UserError
from encoder.base.files import write_atomic
from encoder.base.units import short_bytes, short_count
from encoder.runs.folder import (
    ERRORS,
    EVENTS,
    HANGS,
    LEDGER,
    METRICS,
    flat,
    read_jsonl,
    read_metrics,
)
from encoder.runs.ledger import follow_chain
from encoder.tools.report.curves import Curves, draw
from encoder.tools.report.goodput import WHAT_IS, wall_ms
from encoder.tools.report.told import Told, told_of

PAGE, PICTURE = "report.html", "loss.png"
MARK = "<meta name='generator' content='tessera report'>"
OLD_MARK = "<img alt='curves over tokens seen'"  # of pages that had none


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table added to the page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a report reads of a run folder."""

    folder: Path
    told: Told
    metrics: list[dict[str, Any]]
    done: dict[str, Any]
    steps: int  # of the ledger, its chain followed
    spent_ms: dict[str, int]


def write_report(folders: Sequence[Path], out: Path, *, sections: Sequence[Section] = ()) -> Path:
    """Writes loss.png and report.html of one or several runs into `out`; returns the page. Raises UserError, LedgerError."""
    runs = [_read_run(folder) for folder in folders]
    names = [run.told.name for run in runs]
    # names of runs, or of their folders, or whole paths: what tells them apart first
    if len(set(names)) < len(names):
        names = [folder.name for folder in folders]
        if len(set(names)) < len(names):
            names = [str(folder) for folder in folders]

    _check_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    picture = draw(
        [
            Curves(
                name=name,
                metrics=run.metrics,
                entropy=run.done.get("unigram_entropy"),
                tokens_before=_tokens_before(run),
                vocab_size=run.told.vocab_size,
                evaluated=run.told.evaluated,
            )
            for name, run in zip(names, runs)
        ]
    )
    # titles name the run where there are several
    of = [f" of {name}" if len(runs) > 1 else "" for name in names]
    page = _page(
        ", ".join(names),
        picture,
        [
            _side_by_side("Result", names, [_facts(run) for run in runs]),
            _side_by_side("What was trained", names, [run.told.trained for run in runs]),
            *sections,
            _side_by_side(
                "Where the time went",
                names,
                [_time_facts(run) for run in runs],
                text="Parts sum to the wall time. "
                + "; ".join(f"{kind}: {what}" for kind, what in WHAT_IS.items())
                + ".",
            ),
            *(
                Section(title=f"Phases{end}", head=run.told.phase_head, rows=run.told.phases)
                for end, run in zip(of, runs)
                if run.told.phases
            ),
            *(
                Section(
                    title=f"Events{end}", head=("time (UTC)", "event", "details"), rows=_events(run)
                )
                for end, run in zip(of, runs)
            ),
        ],
    )
    path = out / PAGE
    write_atomic(path, page)
    write_atomic(out / PICTURE, picture)
    return path


def _check_ours(out: Path) -> None:
    """A page or picture of that name which no report wrote is not written over. Raises UserError."""
    page = out / PAGE
    foreign = None
    if page.exists():
        # a picture alone is foreign: a report writes its page first
        text = page.read_text(encoding="utf-8", errors="replace")
        foreign = None if MARK in text or OLD_MARK in text else page
    elif (out / PICTURE).exists():
        foreign = out / PICTURE
    if foreign:
        raise UserError(
            f"{foreign} was not written by this command. Move it away, or name another folder:"
            " --out FOLDER."
        )


def _read_run(folder: Path) -> _Run:
    metrics = read_metrics(folder)
    done = read_done(folder, with_checkpoint=False) or {}
    return _Run(
        folder=folder,
        told=told_of(folder, metrics, done),
        metrics=metrics,
        done=done,
        steps=verify_ledger(folder),
        spent_ms=wall_ms(folder),
    )


def _facts(run: _Run) -> dict[str, str]:
    entropy, last = run.done.get("unigram_entropy"), run.metrics[-1]
    speeds = [
        m["tokens_per_second"]
        for m in run.metrics
        if isinstance(m.get("tokens_per_second"), (int, float))
    ]
    return {
        "steps": f"{last['step']:,}",
        "tokens": short_count(last["tokens"]),
        "state": _state(run),
        **(
            {"speed": f"{short_count(statistics.median(speeds))} tokens/s, the median of all steps"}
            if speeds
            else {}
        ),
        **run.told.results,
        **({"unigram entropy of the held-out text": f"{entropy:.3f} nats"} if entropy else {}),
        "ledger": (
            f"{run.steps:,} steps, chain unbroken"
            + (f", {run.done['ledger_hash']}" if run.done else "")
        ),
    }


def _state(run: _Run) -> str:
    """Done, stopped, failed, or under way, as far as the run folder tells."""
    if run.done:
        return "done"
    events = [
        e
        for e in read_jsonl(run.folder / EVENTS)
        if e.get("event") in ("start", "resume", "stopped")
    ]
    if events and events[-1]["event"] == "stopped":
        return f"stopped after step {events[-1].get('step')}, not done yet"

    # errors and hangs that are younger than the last start are its own
    found = [*(run.folder / ERRORS).glob("*.txt"), *(run.folder / HANGS).glob("*.txt")]
    began = max((e.get("began", 0) for e in events), default=0)
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and newest.stat().st_mtime > began:
        return f"failed, see {newest.parent.name}/{newest.name}; not done yet"
    return "under way, or killed: not done yet"


def _time_facts(run: _Run) -> dict[str, str]:
    """Seconds to the millisecond, in which they are counted."""
    # at least 1 ms, which only a division needs
    wall = max(1, run.spent_ms.get("wall time", 0))
    return {
        kind: f"{ms / 1000:,.3f} s  ({ms / wall:.1%})"
        for kind, ms in run.spent_ms.items()
        if ms or kind != "twice"
    }


def _shown(name: str) -> str:
    """held_out_loss_web -> held-out loss web"""
    return name.replace("held_out", "held-out").replace("_", " ")


def _detail(name: str, value: Any) -> str:
    """A value of an event, with its unit: bytes 128432 -> 125.4 KiB, stall_seconds 0.126 -> stall 0.126 s."""
    if type(value) not in (int, float):
        return f"{_shown(name)} {value}"
    if name == "bytes":
        return short_bytes(value)
    if name.endswith("seconds"):
        return f"{_shown(name.removesuffix('seconds'))}{value:g} s"
    return f"{_shown(name)} {value:,}"


def _events(run: _Run) -> list[list[str]]:
    rows = []
    for event in read_jsonl(run.folder / EVENTS):
        time = str(event.get("time", "")).replace("T", " ").removesuffix("Z")
        details = [
            _detail(key, value)
            for key, value in flat(event)
            if key not in ("time", "event", "start", "began", "spent")
            and not key.startswith(("about.", "spent."))
        ]
        rows.append([time, event.get("event", ""), ", ".join(details)])
    return rows


def _tokens_before(run: _Run) -> int:
    """Tokens of the checkpoint that the run branched off; zero for a run of its own."""
    # every start of a branch has its parent
    begun = next((e for e in read_jsonl(run.folder / EVENTS) if e.get("parent")), {})
    return begun.get("parent", {}).get("tokens", 0)


def _side_by_side(
    title: str, names: Sequence[str], facts: Sequence[dict[str, str]], text: str = ""
) -> Section:
    """A row for each fact, a column for each run."""
    # every fact that any of the runs has, in the order in which it first comes
    keys = dict.fromkeys(chain.from_iterable(facts))
    rows = []
    for key in keys:
        rows.append([key, *(of_run.get(key, "") for of_run in facts)])
    return Section(
        title=title,
        head=("", *names) if len(names) > 1 else ("", ""),
        text=text,
        rows=rows,
    )


def verify_ledger(folder: Path) -> int:
    """Follows the ledger's hash chain to its end, which a finished run knows; returns the last step. Raises LedgerError."""
    lines = read_jsonl(folder / LEDGER)
    follow_chain(lines, folder / LEDGER)
    last: dict[str, Any] = {"step": 0, "chain": ""}
    if lines:
        last = lines[-1]
    # raises where done.json names a later end than the ledger has
    read_done(folder, with_checkpoint=False)
    if not lines and (folder / METRICS).exists():
        raise LedgerError(
            f"{folder} has metrics but no line in {LEDGER}. Lines are missing: restore the file."
        )
    return last["step"]


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}"
    "td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #eee}"
    "td:first-child{white-space:nowrap}"
    "img{max-width:100%}"
    "h2{font-size:1.1rem;margin-bottom:.2rem}"
    "code{white-space:pre-wrap}"
)


def _page(name: str, picture: bytes, sections: Sequence[Section]) -> str:
    title = html.escape(name)
    # the picture is inside the page, which can be sent as one file
    image = base64.b64encode(picture).decode()
    body = "".join(_table(s) for s in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>{MARK}<title>{title}</title>"
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f"<img alt='curves over tokens seen' src='data:image/png;base64,{image}'>{body}</html>\n"
    )


def _table(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    parts.append("<table>")
    if any(section.head):
        parts.append(_table_row("th", section.head))
    parts += [_table_row("td", row) for row in section.rows]
    parts.append("</table>")
    return "".join(parts)


def _table_row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
