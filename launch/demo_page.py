"""The demo's page: the report of its run, with the kill and the answers in it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from encoder.tools.report.report import Section, write_report


def write_demo_page(run: Path, answers_file: Path, proof: Sequence[tuple[str, str]]) -> Path:
    """Writes report.html and loss.png into the run folder; returns the page. Raises LedgerError.

    run: the run folder.
    answers_file: what fill-mask wrote with --json.
    proof: what the ledger proves, as rows of (what, how much).
    """
    rows = []
    for answer in json.loads(answers_file.read_text(encoding="utf-8")):
        # the answers to the text's first [MASK]
        likeliest = [
            f"{token.strip() or token!r} {share:.0%}" for token, share in answer["masks"][0]
        ]
        rows.append((answer["text"], *likeliest))
    killed = Section(title="Killed and resumed", head=("", ""), rows=proof)
    answers = Section(
        title="Fill-mask, from the exported folder",
        head=("text", "1", "2", "3", "4", "5"),
        rows=rows,
    )
    return write_report([run], run, sections=[killed, answers])


def result_text(run: Path, *, vocabulary: int) -> str:
    """The held-out loss of a finished run, and what it would be without learning."""
    done = json.loads((run / "done.json").read_text(encoding="utf-8"))
    without = (
        f"unigram entropy of the same text {done['unigram_entropy']:.3f}, uniform"
        f" {math.log(vocabulary):.2f}"
    )
    return f"held-out masked loss {done['held_out_loss']:.3f} nats   ({without})"
