"""A run folder that is finished, as a run leaves it: ledger, checkpoint and done.json, without the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def finish(
    folder: Path, *, step: int = 5, tokens: int = 50, chain: str = "c" * 32, ledger: bool = True
) -> None:
    """Writes what stands behind done.json, and the file itself; `ledger`: also the ledger's last line."""
    checkpoint = folder / "checkpoints" / f"tokens{tokens:013}-i0009"
    checkpoint.mkdir(parents=True, exist_ok=True)
    progress = json.dumps(
        {"progress": {"step": step, "tokens": tokens, "ledger_hash": chain}, "extra": {}}
    )
    (checkpoint / "progress.json").write_text(progress)
    manifest = json.dumps(
        {
            "progress.json": {
                "bytes": len(progress),
                "sha256": hashlib.sha256(progress.encode()).hexdigest(),
            }
        }
    )
    (checkpoint / "MANIFEST.json").write_text(manifest)
    (checkpoint / "COMMITTED").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    if ledger:
        with open(folder / "ledger.jsonl", "a") as file:
            file.write(
                json.dumps({"step": step, "chain": chain, "tokens_seen": tokens, "phase": "a"})
                + "\n"
            )
    (folder / "done.json").write_text(
        json.dumps({"step": step, "tokens": tokens, "ledger_hash": chain})
    )
