"""Several JSON files of launch/bench.py as one table for people and one JSON file: python -m benchmarks.merge OUT FILE.json ...

OUT.md and OUT.json are written; the machine and the versions stand above each table's command where they differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import environment_text
from encoder.base.command import run_command
from encoder.base.errors import UserError
from encoder.base.files import write_atomic, write_json


def merge(out: Path, paths: list[Path]) -> None:
    """Raises UserError where a file is not the bench's."""
    if out.with_suffix(".json") in paths:
        raise UserError(
            f"{out.with_suffix('.json')} is read and would be written over. Name another OUT."
        )
    found = [read(path) for path in paths]
    if not found:
        raise UserError("no JSON file of launch/bench.py was given. Needed: OUT FILE.json ...")
    write_json(out.with_suffix(".json"), found)
    write_atomic(
        out.with_suffix(".md"),
        "\n".join(["# Measured", *(line for one in found for line in lines_of(one))]) + "\n",
    )
    print(f"wrote {out.with_suffix('.md')} and {out.with_suffix('.json')}")


def read(path: Path) -> dict[str, Any]:
    """One file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        # looked up for the KeyError alone
        found["tables"], found["command"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no file of launch/bench.py --json ({type(error).__name__}). Leave it out."
        ) from error
    return found


def lines_of(one: dict[str, Any]) -> list[str]:
    """Markdown of one file."""
    lines = [
        "",
        f"`{one['command']}`, commit {one.get('commit') or 'unknown'}",
        "",
        environment_text(one),
    ]
    for table in one["tables"]:
        lines += [
            "",
            f"## {table['title']}",
            "",
            line_of(table["head"]),
            line_of(["---"] * len(table["head"])),
            *(line_of(row) for row in table["rows"]),
            "",
            *(f"* {note.strip()}" for note in table["notes"]),
        ]
    return lines


def line_of(cells: list[str]) -> str:
    """| a | b |"""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(
        run_command(lambda: merge(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]))
        if len(sys.argv) > 2
        else run_command(lambda: merge(Path("unused"), []))
    )
