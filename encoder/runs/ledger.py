"""The ledger of a run: append-only proof of what was trained on, a hash chain with a line for each step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder.base.errors import LedgerError
from encoder.base.files import open_to_append, write_atomic
from encoder.base.log import warn_once
from encoder.base.units import Progress
from encoder.runs.folder import LEDGER, append_line, read_jsonl


def chain(
    previous: str,
    *,
    step: int,
    tokens: int,
    masked_tokens: int,
    batch_hash: int,
    fault: str = "",
    other_targets: Mapping[str, int] | None = None,
) -> str:
    """The next link: a hash over the previous link, what this step trained on and, if it was bad, how (16 hex digits).

    previous: the link before; "" before the first step
    step: number of the step, from 1
    tokens: of the run, after the step
    masked_tokens: targets of the objective's first loss term in the step
    batch_hash: int64, of all rows of the step
    fault: what was bad, or ""
    other_targets: of further loss terms, by name
    """
    # an int64 as 16 hex digits of its two's complement, so that a negative hash has no sign
    link = f"{previous}|{step}|{tokens}|{masked_tokens}|{batch_hash & (2**64 - 1):016x}"
    # a run of one loss term has nothing here
    for name, count in (other_targets or {}).items():
        link += f"|{name}={count}"
    if fault:
        link += f"|{fault}"
    return hashlib.blake2b(link.encode(), digest_size=8).hexdigest()


def chain_back(
    previous: str, *, step: int, weights_of_step: int, lanes: Sequence[Sequence[int]]
) -> str:
    """The link of going back after a step: to which weights, and from where in the data on."""
    link = (
        f"{previous}|back|{step}|{weights_of_step}|{json.dumps([list(place) for place in lanes])}"
    )
    return hashlib.blake2b(link.encode(), digest_size=8).hexdigest()


class Ledger:
    """Append-only proof of what was trained. Steps done again after a resume must give the lines already there."""

    def __init__(
        self, folder: Path, *, resumed_at: Progress, parent: dict[str, Any] | None = None
    ) -> None:
        """Lines after the resumed step become witnesses; a branch's first line is its parent, from whose chain it goes on.

        Raises LedgerError if the ledger does not lead to the resumed step.
        """
        self.path = folder / LEDGER
        self.repeated_steps = 0

        lines = read_jsonl(self.path)
        follow_chain(lines, self.path)
        # number of the line -> its link; going back has a line with the number of its step, too
        here = {
            i: line["chain"] for i, line in enumerate(lines, 1) if line["step"] == resumed_at.step
        }
        # how many lines lead to where the run stands: what follows will be done again
        done = next((i for i, link in here.items() if link == resumed_at.ledger_hash), 0)
        if here and not done:
            raise LedgerError(
                f"{self.path} step {resumed_at.step} has chain {', '.join(here.values())}, the"
                f" checkpoint has {resumed_at.ledger_hash}. The folder mixes two runs: start again"
                " with another out."
            )
        if resumed_at.step and not done:
            lines, done = self._start_again(folder, resumed_at), 1
        elif parent and not lines:
            lines, done = [{"parent": parent, "step": 0, "chain": resumed_at.ledger_hash}], 1

        # a step and a going-back after it share a number, so the key has both
        self._witness = {(line["step"], "back" in line): line for line in lines[done:]}
        # a new file under the old name: a start of this run that still lives elsewhere writes on into the old one
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open_to_append(self.path)

    def recorded(self) -> list[tuple[int, str, int]]:
        """Steps that will be done again: number, what was bad, and the step whose weights were taken after it (-1: none)."""
        return [
            (
                step,
                line.get("fault", ""),
                self._witness.get((step, True), {}).get("weights_of_step", -1),
            )
            for (step, back), line in sorted(self._witness.items())
            if not back
        ]

    def write(
        self,
        progress: Progress,
        *,
        phase: str,
        rows: int,
        tokens: int,
        masked_tokens: int,
        batch_hash: int,
        fault: str = "",
        other_targets: Mapping[str, int] | None = None,
    ) -> None:
        """One step's line; a step that is already there must agree. Raises LedgerError.

        progress: after the step
        phase: its name
        rows: of the step, over all ranks
        tokens: of the step, without padding
        masked_tokens, batch_hash, fault, other_targets: as of chain()
        """
        line: dict[str, Any] = {
            "step": progress.step,
            "phase": phase,
            "rows": rows,
            "tokens": tokens,
            "masked_tokens": masked_tokens,
        }
        if other_targets:
            line["other_targets"] = dict(other_targets)
        # next: (window, row) of each lane
        line |= {
            "tokens_seen": progress.tokens,
            "next": [list(place) for place in progress.lanes],
            "batch": f"{batch_hash & (2**64 - 1):016x}",
        }
        if fault:
            line["fault"] = fault
        line["chain"] = progress.ledger_hash
        self._add(line)

    def write_back(self, progress: Progress, *, weights_of_step: int) -> None:
        """After a step: the weights are again those of an earlier one, and the data go on at `progress`. Raises LedgerError."""
        self._add(
            {
                "back": True,
                "step": progress.step,
                "weights_of_step": weights_of_step,
                "next": [list(place) for place in progress.lanes],
                "chain": progress.ledger_hash,
            }
        )

    def _add(self, line: dict[str, Any]) -> None:
        witness = self._witness.pop((line["step"], "back" in line), None)
        # done again: it must be the line that is there, and is not written a second time
        if witness is not None:
            if witness != line:
                key = next(k for k in {**line, **witness} if witness.get(k) != line.get(k))
                raise LedgerError(
                    f"step {line['step']} has {key} {line.get(key)}, but {self.path} recorded"
                    f" {witness.get(key)} before the stop. The shards or the settings changed: put"
                    " them back, or use another out."
                )
            self.repeated_steps += "back" not in line
            return
        append_line(self._file, line)

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
        warn_once(
            f"{self.path} did not reach step {resumed_at.step} of the checkpoint; what there was is"
            f" in {aside.name}. A new ledger goes on from the checkpoint."
        )
        return [{"restart": True, "step": resumed_at.step, "chain": resumed_at.ledger_hash}]


def follow_chain(lines: list[dict[str, Any]], path: Path) -> None:
    """Follows the hash chain from the first line to the last. Raises LedgerError where it breaks.

    The first line is step 1, or the restart of a ledger that was lost, or the parent of a branch.
    """
    # seen: tokens before the line; None where a restart does not tell them
    link = ""
    step = 0
    seen: int | None = 0
    for number, line in enumerate(lines, 1):
        try:
            if number == 1 and (line.get("restart") or line.get("parent")):
                link, step, seen = line["chain"], line["step"], None if line.get("restart") else 0
                continue
            # going back is no step of its own
            step += "back" not in line
            if "back" in line:
                link = chain_back(
                    link, step=step, weights_of_step=line["weights_of_step"], lanes=line["next"]
                )
                follows = True
            else:
                link = chain(
                    link,
                    step=step,
                    tokens=line["tokens_seen"],
                    masked_tokens=line["masked_tokens"],
                    batch_hash=int(line["batch"], 16),
                    fault=line.get("fault", ""),
                    other_targets=line.get("other_targets"),
                )
                follows = seen is None or line["tokens_seen"] == seen + line["tokens"]
                seen = line["tokens_seen"]
            follows = follows and line["step"] == step and line["chain"] == link
        except (KeyError, ValueError, TypeError):
            follows = False
        if not follows:
            raise LedgerError(
                f"{path} line {number}: the chain breaks at step {line.get('step')}. The file was"
                " edited or belongs to another run: put it back, or start again with another out."
            )
