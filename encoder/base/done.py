"""The record of a finished run, done.json, counts only with the ledger's last line and the checkpoint that it names.

Imports Python alone and this room: a job's first node may have no packages outside of its container.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from encoder.base.errors import LedgerError
from encoder.base.untrusted import open_regular, read_bytes, read_json

DONE, LEDGER, CHECKPOINTS = "done.json", "ledger.jsonl", "checkpoints"
_CHECKPOINT = re.compile(r"tokens([0-9]{13,18})-i([0-9]{4,18})")
_TAIL_BYTES = 2**16


def read_done(folder: Path, *, with_checkpoint: bool = True) -> dict[str, Any] | None:
    """What done.json of a run folder says, checked to be so; None where there is no such file.

    with_checkpoint: also the checkpoint of its step must be there; a report of a run needs none.

    Raises LedgerError for one that does not count: damaged, of another run, or without what stands behind it.
    """
    path = folder / DONE
    if not path.exists() and not path.is_symlink():
        return None
    done = read_json(path, root=dict, error=LedgerError)
    if type(done.get("step")) is not int or not isinstance(done.get("ledger_hash"), str):
        raise LedgerError(f"{path} has no step or no ledger_hash.")

    said = (done["step"], done["ledger_hash"])
    last = _last_line(folder / LEDGER)
    if last is None:
        raise LedgerError(f"{path} stands without a {LEDGER} of its run.")
    if (last.get("step"), last.get("chain")) != said:
        raise LedgerError(
            f"{folder / LEDGER} ends at step {last.get('step')!s:.20} with"
            f" {str(last.get('chain'))[:32]}, the finished run at step {said[0]} with"
            f" {said[1][:32]}. Lines are missing: restore the file."
        )

    checkpoints = sorted((folder / CHECKPOINTS).glob("tokens*"), reverse=True)
    if with_checkpoint and not any(_stood_at(checkpoint, said) for checkpoint in checkpoints):
        raise LedgerError(
            f"{path} names step {said[0]}, and no whole checkpoint of {folder / CHECKPOINTS} was"
            " saved there."
        )
    return done


def is_done(folder: Path) -> tuple[bool, str]:
    """Whether a run is finished; and where its done.json does not count, why, as one sentence."""
    try:
        return read_done(folder) is not None, ""
    except LedgerError as error:
        return (
            False,
            f"{error} It does not count: start the run again, and what is missing is trained.",
        )


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of the ledger, None where there is none."""
    try:
        with open_regular(path, error=LedgerError) as file:
            file.seek(0, 2)
            # the end of the file holds the last line whole; behind its
            # newline stands an empty part
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().split(b"\n")
        if len(lines) < 2:
            return None
        found = json.loads(lines[-2])
    except (LedgerError, OSError, ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        return found
    return None


def _stood_at(checkpoint: Path, said: tuple[int, str]) -> bool:
    """Whether a committed checkpoint was saved at this step of this ledger."""
    if not _CHECKPOINT.fullmatch(checkpoint.name):
        return False
    try:
        manifest = read_bytes(checkpoint / "MANIFEST.json", error=LedgerError)
        committed = read_bytes(checkpoint / "COMMITTED", error=LedgerError, most_bytes=2**16)
        saved = read_bytes(checkpoint / "progress.json", error=LedgerError)
        progress = read_json(checkpoint / "progress.json", root=dict, error=LedgerError)["progress"]

        # COMMITTED has the manifest's hash, and the manifest has that of progress.json
        told = read_json(checkpoint / "MANIFEST.json", root=dict, error=LedgerError)[
            "progress.json"
        ]["sha256"]
        whole = (
            committed.decode() == hashlib.sha256(manifest).hexdigest()
            and told == hashlib.sha256(saved).hexdigest()
        )
        return whole and (progress["step"], progress["ledger_hash"]) == said
    except (LedgerError, ValueError, KeyError, TypeError):
        return False
