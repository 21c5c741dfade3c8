"""The ledger of a run that was killed against the ledger of the run that went on: the same batches, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from encoder.base.files import write_json
from encoder.runs.folder import EVENTS, LEDGER, read_jsonl
from encoder.tools.report.report import verify_ledger


def keep_ledger(run: Path, file: Path) -> None:
    """Write down what stands in the ledger now, before the run goes on."""
    lines = read_jsonl(run / LEDGER)
    write_json(file, {"steps": lines[-1]["step"] if lines else 0, "ledger": lines})


def compare_ledgers(run: Path, file: Path) -> list[tuple[str, str]]:
    """(what, how much) of a run that went on, as rows of a table.

    Raises LedgerError where the chain of hashes breaks, and ends the command where the ledger does not go on from the kept one.
    """
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    before = kept["ledger"]
    whole = read_jsonl(run / LEDGER)
    if whole[: len(before)] != before:
        raise SystemExit("error: the ledger of the resumed run does not continue the first one's")
    resumed = next((e["step"] for e in read_jsonl(run / EVENTS) if e["event"] == "resume"), 0)
    # steps that the first run had done and the second did again, from its checkpoint on
    again = kept["steps"] - resumed
    steps = verify_ledger(run)
    return [
        ("killed with SIGKILL after step", f"{kept['steps']:,}"),
        ("resumed from the checkpoint of step", f"{resumed:,}"),
        ("steps done twice, hashes equal", f"{again:,} of {again:,}"),
        (
            "ledger",
            (
                f"{steps:,} steps in one unbroken chain, the first {len(before):,} from before the"
                " kill"
            ),
        ),
    ]
