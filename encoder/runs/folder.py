"""What a run folder holds: the names of its files, and how its lines are read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from encoder.base.done import CHECKPOINTS, DONE, LEDGER
from encoder.base.errors import LedgerError, UserError

__all__ = [
    "CHECKPOINTS",
    "DONE",
    "ERRORS",
    "EVENTS",
    "HANGS",
    "LEDGER",
    "METRICS",
    "RUN_FILE",
    "TENSORBOARD",
    "append_line",
    "drop_torn_tail",
    "flat",
    "merged_metrics",
    "read_jsonl",
    "read_metrics",
]

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
RUN_FILE = "run.yaml"
TENSORBOARD = "tensorboard"
HANGS, ERRORS = "hangs", "errors"  # folders: where ranks hung, and what ended them


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a torn last line (a kill while writing) is left out."""
    if not path.exists():
        return []
    lines = []
    # the last part follows the last line break: empty, or a torn line
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise LedgerError(
                f"{path} line {len(lines) + 1} is no JSON. Restore the file, or remove it."
            ) from error
        if not isinstance(lines[-1], dict) or not lines[-1]:
            raise LedgerError(
                f"{path} line {len(lines)} is no record. Restore the file, or remove it."
            )
    return lines


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The merged metrics of a run folder, at least one line. Raises UserError where there is none, LedgerError."""
    lines = merged_metrics(folder / METRICS)
    if not lines:
        raise UserError(
            f"{folder} holds no {METRICS} with a line in it; needed: the folder of a run that has"
            " begun."
        )
    return lines


def merged_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order of steps; one line a step and phase, later values over earlier ones."""
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(read_jsonl(path), 1):
        if not isinstance(line.get("step"), int):
            raise LedgerError(
                f"{path} line {number} has no step. Restore the file, or remove that line."
            )
        # a step has several lines: of training, of evaluation, of a later start that did it again
        there = merged.setdefault((line["step"], line.get("phase", "")), {})
        # a bad step that is done again is not computed: its loss of the first time stays
        there.update({k: v for k, v in line.items() if v is not None or k not in there})
    return sorted(merged.values(), key=lambda line: line["step"])


def flat(values: Mapping[str, Any], key: str = "") -> list[tuple[str, Any]]:
    """Names and values of a line, those of inner tables as `outer.inner`."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += flat(value, f"{key}{name}.")
        else:
            pairs.append((f"{key}{name}", value))
    return pairs


def append_line(file: IO[str], line: dict[str, Any]) -> None:
    """A line, handed to the system. Raises OSError with the file's name, which a full disk does not say."""
    try:
        file.write(json.dumps(line) + "\n")
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def drop_torn_tail(path: Path) -> None:
    """Cuts off a last line that a kill left unfinished."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
