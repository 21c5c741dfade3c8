"""What a run writes down: the ledger (exact, compared on resume), metrics and events; wandb beside them if asked.

    ledger.jsonl    one line a step: what was trained, as hashes; the same on any ranks and after any resume
    metrics.jsonl   loss, rate, speed, held-out loss: floating point, for curves
    events.jsonl    starts, resumes, checkpoints, stops
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from encoder.base.errors import LedgerError
from encoder.base.log import warn_once
from encoder.base.units import Progress

LEDGER, METRICS, EVENTS = "ledger.jsonl", "metrics.jsonl", "events.jsonl"


def chain(previous: str, *, step: int, tokens: int, masked_tokens: int, batch_hash: int) -> str:
    """The next link: a hash over the previous link and what this step trained on (16 hex digits)."""
    link = f"{previous}|{step}|{tokens}|{masked_tokens}|{batch_hash & (2**64 - 1):016x}"
    return hashlib.blake2b(link.encode(), digest_size=8).hexdigest()


class Ledger:
    """Append-only proof of what was trained. Steps done again after a resume must give the lines already there."""

    def __init__(self, folder: Path, *, resumed_at: Progress) -> None:
        """Lines after the resumed step become witnesses. Raises LedgerError if the ledger does not lead there."""
        self.path = folder / LEDGER
        self.repeated_steps = 0
        lines = read_jsonl(self.path)
        self._witness = {line["step"]: line for line in lines if line["step"] > resumed_at.step}
        last = next((line for line in lines if line["step"] == resumed_at.step), None)
        if resumed_at.step and last is None:
            warn_once(f"{self.path} has no line for step {resumed_at.step}; the ledger starts again there.")
        if last is not None and last["chain"] != resumed_at.ledger_hash:
            raise LedgerError(f"{self.path} step {resumed_at.step} has chain {last['chain']}, the checkpoint has "
                              f"{resumed_at.ledger_hash}. The folder mixes two runs: start again with another out.")
        _drop_torn_tail(self.path)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(
        self, progress: Progress, *, phase: str, rows: int, tokens: int, masked_tokens: int, batch_hash: int
    ) -> None:
        """One step's line; a step that is already there must agree. Raises LedgerError."""
        line = {"step": progress.step, "phase": phase, "rows": rows, "tokens": tokens, "masked_tokens": masked_tokens,
                "tokens_seen": progress.tokens, "next_window": progress.window, "next_row": progress.row,
                "batch": f"{batch_hash & (2**64 - 1):016x}", "chain": progress.ledger_hash}
        witness = self._witness.pop(progress.step, None)
        if witness is not None:
            if witness != line:
                key = next(k for k in line if witness.get(k) != line[k])
                raise LedgerError(
                    f"step {progress.step} has {key} {line[key]}, but {self.path} recorded {witness.get(key)} "
                    "before the stop. The shards or the settings changed: put them back, or use another out."
                )
            self.repeated_steps += 1
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Make the lines durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Tracker:
    """Metrics and events of rank zero; other ranks have none."""

    def __init__(self, folder: Path, *, wandb_project: str | None, run_name: str, settings: dict[str, Any]) -> None:
        _drop_torn_tail(folder / METRICS)
        _drop_torn_tail(folder / EVENTS)
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")
        self._events = open(folder / EVENTS, "a", encoding="utf-8")
        self._wandb = _start_wandb(folder, wandb_project, run_name, settings) if wandb_project else None

    def metrics(self, step: int, **values: Any) -> None:
        """Numbers of a step. After a resume a step may stand twice: the later line counts."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=step)

    def event(self, what: str, **values: Any) -> None:
        """Something that happened, with the time of day (UTC)."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._events.write(json.dumps({"time": stamp, "event": what, **values}) + "\n")
        self._events.flush()

    def close(self) -> None:
        """Close the files and the wandb run."""
        self._metrics.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a torn last line (a kill while writing) is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise LedgerError(f"{path} line {len(lines) + 1} is no JSON. Restore the file, or remove it.") from error
    return lines


def metrics_by_step(path: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl as step -> values; where a step stands twice, the later line wins key by key."""
    merged: dict[int, dict[str, Any]] = {}
    for line in read_jsonl(path):
        merged.setdefault(line["step"], {}).update(line)
    return dict(sorted(merged.items()))


def _drop_torn_tail(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _start_wandb(folder: Path, project: str, name: str, settings: dict[str, Any]) -> Any:
    import wandb

    logged_in = bool(os.environ.get("WANDB_API_KEY")) or wandb.api.api_key is not None
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    return wandb.init(project=project, name=name, config=settings, dir=str(folder), mode=mode, resume="allow", id=name)
