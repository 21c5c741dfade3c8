"""What a run writes down: the ledger (exact, compared on resume), metrics and events; wandb and TensorBoard beside them if asked.

    ledger.jsonl    one line a step: what was trained, as hashes; the same on any ranks and after any resume
    metrics.jsonl   loss, rate, speed, held-out loss: floating point, for curves
    events.jsonl    starts, resumes, checkpoints, stops

A line of the last two carries the `start` that wrote it and the seconds `spent` by that start so far, by kind: a kill
loses no more of where the time went than what passed since the last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from encoder.base.errors import LedgerError
from encoder.base.files import open_to_append, write_atomic
from encoder.base.log import warn_once
from encoder.base.units import Progress
from encoder.train.config import TrackingConfig
from encoder.train.meters import Clock

LEDGER, METRICS, EVENTS = "ledger.jsonl", "metrics.jsonl", "events.jsonl"
RUN_FILE, DONE, CHECKPOINTS = "run.yaml", "done.json", "checkpoints"       # what else a run folder holds
TENSORBOARD = "tensorboard"


def chain(previous: str, *, step: int, tokens: int, masked_tokens: int, batch_hash: int, fault: str = "",
          other_targets: Mapping[str, int] | None = None) -> str:
    """The next link: a hash over the previous link, what this step trained on and, if it was bad, how (16 hex digits).

    previous: the link before; "" before the first step
    step: number of the step, from 1
    tokens: of the run, after the step
    masked_tokens: targets of the objective's first loss term in the step
    batch_hash: int64, of all rows of the step
    fault: what was bad, or ""
    other_targets: of further loss terms, by name
    """
    link = f"{previous}|{step}|{tokens}|{masked_tokens}|{batch_hash & (2**64 - 1):016x}"
    for name, count in (other_targets or {}).items():
        link += f"|{name}={count}"
    if fault:
        link += f"|{fault}"
    return hashlib.blake2b(link.encode(), digest_size=8).hexdigest()


def chain_back(previous: str, *, step: int, weights_of_step: int, lanes: Sequence[Sequence[int]]) -> str:
    """The link of going back after a step: to which weights, and from where in the data on."""
    link = f"{previous}|back|{step}|{weights_of_step}|{json.dumps([list(place) for place in lanes])}"
    return hashlib.blake2b(link.encode(), digest_size=8).hexdigest()


class Ledger:
    """Append-only proof of what was trained. Steps done again after a resume must give the lines already there."""

    def __init__(self, folder: Path, *, resumed_at: Progress, parent: dict[str, Any] | None = None) -> None:
        """Lines after the resumed step become witnesses; a branch's first line is its parent, from whose chain it goes on.

        Raises LedgerError if the ledger does not lead to the resumed step.
        """
        self.path = folder / LEDGER
        self.repeated_steps = 0
        lines = read_jsonl(self.path)
        follow_chain(lines, self.path)
        here = {i: line["chain"] for i, line in enumerate(lines, 1) if line["step"] == resumed_at.step}     # also of going back
        done = next((i for i, link in here.items() if link == resumed_at.ledger_hash), 0)
        if here and not done:
            raise LedgerError(f"{self.path} step {resumed_at.step} has chain {', '.join(here.values())}, the checkpoint has "
                              f"{resumed_at.ledger_hash}. The folder mixes two runs: start again with another out.")
        if resumed_at.step and not done:
            lines, done = self._start_again(folder, resumed_at), 1
        elif parent and not lines:
            lines, done = [{"parent": parent, "step": 0, "chain": resumed_at.ledger_hash}], 1
        self._witness = {(line["step"], "back" in line): line for line in lines[done:]}
        # a new file under the old name: a start of this run that still lives elsewhere writes on into the old one
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open_to_append(self.path)

    def recorded(self) -> list[tuple[int, str, int]]:
        """Steps that will be done again: number, what was bad, and the step whose weights were taken after it (-1: none)."""
        return [(step, line.get("fault", ""), self._witness.get((step, True), {}).get("weights_of_step", -1))
                for (step, back), line in sorted(self._witness.items()) if not back]

    def write(self, progress: Progress, *, phase: str, rows: int, tokens: int, masked_tokens: int, batch_hash: int,
              fault: str = "", other_targets: Mapping[str, int] | None = None) -> None:
        """One step's line; a step that is already there must agree. Raises LedgerError.

        progress: after the step
        phase: its name
        rows: of the step, over all ranks
        tokens: of the step, without padding
        masked_tokens, batch_hash, fault, other_targets: as of chain()
        """
        line: dict[str, Any] = {
            "step": progress.step, "phase": phase, "rows": rows, "tokens": tokens, "masked_tokens": masked_tokens}
        if other_targets:
            line["other_targets"] = dict(other_targets)
        line |= {
            "tokens_seen": progress.tokens,
            "next": [list(place) for place in progress.lanes],      # (window, row) of each lane
            "batch": f"{batch_hash & (2**64 - 1):016x}"}
        if fault:
            line["fault"] = fault
        line["chain"] = progress.ledger_hash
        self._add(line)

    def write_back(self, progress: Progress, *, weights_of_step: int) -> None:
        """After a step: the weights are again those of an earlier one, and the data go on at `progress`. Raises LedgerError."""
        self._add({"back": True, "step": progress.step, "weights_of_step": weights_of_step,
                   "next": [list(place) for place in progress.lanes], "chain": progress.ledger_hash})

    def _add(self, line: dict[str, Any]) -> None:
        witness = self._witness.pop((line["step"], "back" in line), None)
        if witness is not None:
            if witness != line:
                key = next(k for k in {**line, **witness} if witness.get(k) != line.get(k))
                raise LedgerError(
                    f"step {line['step']} has {key} {line.get(key)}, but {self.path} recorded {witness.get(key)} "
                    "before the stop. The shards or the settings changed: put them back, or use another out."
                )
            self.repeated_steps += "back" not in line
            return
        _append(self._file, line)

    def sync(self) -> None:
        """Make the lines durable: before a checkpoint is, so that no power cut leaves a checkpoint beyond its ledger."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the lines durable and close the file."""
        self.sync()
        self._file.close()

    def _start_again(self, folder: Path, resumed_at: Progress) -> list[dict[str, Any]]:
        """The ledger was lost or cut: what is left is put aside, and a new one goes on from the checkpoint's chain."""
        aside = folder / f"ledger.before-step-{resumed_at.step}.jsonl"
        if self.path.exists():
            os.replace(self.path, aside)
        warn_once(f"{self.path} did not reach step {resumed_at.step} of the checkpoint; what there was is in {aside.name}. "
                  "A new ledger goes on from the checkpoint.")
        return [{"restart": True, "step": resumed_at.step, "chain": resumed_at.ledger_hash}]


def follow_chain(lines: list[dict[str, Any]], path: Path) -> None:
    """Follows the hash chain from the first line to the last. Raises LedgerError where it breaks.

    The first line is step 1, or the restart of a ledger that was lost, or the parent of a branch.
    """
    link, step, seen = "", 0, 0
    for number, line in enumerate(lines, 1):
        try:
            if number == 1 and (line.get("restart") or line.get("parent")):
                link, step, seen = line["chain"], line["step"], None if line.get("restart") else 0
                continue
            step += "back" not in line
            if "back" in line:
                link = chain_back(link, step=step, weights_of_step=line["weights_of_step"], lanes=line["next"])
                follows = True
            else:
                link = chain(link, step=step, tokens=line["tokens_seen"], masked_tokens=line["masked_tokens"],
                             batch_hash=int(line["batch"], 16), fault=line.get("fault", ""),
                             other_targets=line.get("other_targets"))
                follows = seen is None or line["tokens_seen"] == seen + line["tokens"]
                seen = line["tokens_seen"]
            follows = follows and line["step"] == step and line["chain"] == link
        except (KeyError, ValueError, TypeError):
            follows = False
        if not follows:
            raise LedgerError(f"{path} line {number}: the chain breaks at step {line.get('step')}. "
                              "The file was edited or belongs to another run: put it back, or start again with another out.")


class Tracker:
    """Metrics and events of rank zero; other ranks have none. `start` is the number of this start of the run."""

    def __init__(self, folder: Path, config: TrackingConfig, *, clock: Clock, start: int, run_name: str,
                 settings: dict[str, Any]) -> None:
        _drop_torn_tail(folder / METRICS)
        _drop_torn_tail(folder / EVENTS)
        self._metrics = open_to_append(folder / METRICS)
        self._events = open_to_append(folder / EVENTS)
        self._clock, self._start = clock, start
        self._wandb = _start_wandb(folder, config.wandb_project, run_name, settings) if config.wandb_project else None
        self._tensorboard = _start_tensorboard(folder) if config.tensorboard else None

    def metrics(self, step: int, **values: Any) -> None:
        """Numbers of a step. After a resume a step may stand twice: the later line counts."""
        _append(self._metrics, {"step": step, **values, **self._time()})
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self._wandb is not None:
            self._log_to_wandb(numbers, step)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def event(self, what: str, **values: Any) -> None:
        """Something that happened, with the time of day (UTC)."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _append(self._events, {"time": stamp, "event": what, **values, **self._time()})

    def _log_to_wandb(self, numbers: dict[str, Any], step: int) -> None:
        import wandb

        try:
            self._wandb.log(numbers, step=step)
        except (wandb.errors.Error, OSError) as error:
            warn_once(f"wandb gets no more of this start ({' '.join(str(error).split())[:200]}); {METRICS} has all of it")
            self._wandb = None

    def _time(self) -> dict[str, Any]:
        return {"start": self._start, "spent": {kind: round(s, 3) for kind, s in self._clock.seconds().items()}}

    def close(self) -> None:
        """Close the files, the wandb run and the TensorBoard file."""
        self._metrics.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a torn last line (a kill while writing) is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise LedgerError(f"{path} line {len(lines) + 1} is no JSON. Restore the file, or remove it.") from error
        if not isinstance(lines[-1], dict) or not lines[-1]:
            raise LedgerError(f"{path} line {len(lines)} is no record. Restore the file, or remove it.")
    return lines


def merged_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order of steps; one line a step and phase, later values over earlier ones."""
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(read_jsonl(path), 1):
        if not isinstance(line.get("step"), int):
            raise LedgerError(f"{path} line {number} has no step. Restore the file, or remove that line.")
        there = merged.setdefault((line["step"], line.get("phase", "")), {})
        # a bad step that is done again is not computed: its loss of the first time stays
        there.update({k: v for k, v in line.items() if v is not None or k not in there})
    return sorted(merged.values(), key=lambda line: line["step"])


def _append(file: IO[str], line: dict[str, Any]) -> None:
    """A line, handed to the system. Raises OSError with the file's name, which a full disk does not say."""
    try:
        file.write(json.dumps(line) + "\n")
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _drop_torn_tail(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _start_tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder / TENSORBOARD))


def _start_wandb(folder: Path, project: str, name: str, settings: dict[str, Any]) -> Any:
    import wandb

    logged_in = bool(os.environ.get("WANDB_API_KEY")) or wandb.api.api_key is not None
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    # the same run folder goes on in the same wandb run; another folder of the same name does not
    identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
    told = dict(project=project, name=name, config=settings, dir=str(folder), resume="allow",
                id=f"{re.sub('[^a-zA-Z0-9_.-]+', '-', name)[:100]}-{identity}")
    try:
        return wandb.init(mode=mode, **told)
    except (wandb.errors.Error, OSError) as error:       # no run ends for want of its curves elsewhere
        warn_once(f"wandb does not answer ({' '.join(str(error).split())[:200]}); it is written to {folder / 'wandb'}, "
                  "and goes up with: wandb sync")
    try:
        return wandb.init(mode="offline", **told)
    except (wandb.errors.Error, OSError) as error:
        warn_once(f"wandb cannot be used ({' '.join(str(error).split())[:200]}); {METRICS} has all of it")
        return None
