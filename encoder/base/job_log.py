"""What a SLURM job of a run writes down, RUN/slurm/JOBID.jsonl, as its readers take it.

Imports Python alone: a job's first node may have no packages outside of its container.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may not be there."""
    return whole_records(path.read_bytes().split(b"\n")) if path.exists() else []


def whole_records(lines: list[bytes]) -> list[dict[str, Any]]:
    """The JSON lines that are whole: a kill cuts the last one short, a window the first."""
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
