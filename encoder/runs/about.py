"""What a run is, for people: written into its start event, read by its report and by the card of its export."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.base.home import PROJECT
from encoder.base.units import short_count
from encoder.data.shard_format import read_card
from encoder.optim.catalog import OPTIMIZERS
from encoder.runs.config import RunConfig
from encoder.runs.folder import EVENTS, read_jsonl

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers")


def about_run(
    run: RunConfig, world: World, device: torch.device, *, parameters: int
) -> dict[str, Any]:
    """Model size, data, machine and versions, as plain values for the start event."""
    return {
        "parameters": parameters,
        "sources": data_facts(run),
        **machine_facts(world, device),
    }


def machine_facts(world: World, device: torch.device) -> dict[str, Any]:
    """Where a run computes, and with what."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU ({platform.machine()})",
        "ranks": world.size,
        "versions": versions(),
    }


def data_facts(run: RunConfig) -> list[dict[str, Any]]:
    """Name, share, documents and tokens of each source, in the order of the run file; none of a source that is gone."""
    found: dict[str, dict[str, Any]] = {}
    for phase in run.phases:
        mixture = run.sources_of(phase)
        for source in mixture:
            try:
                card = read_card(source.folder)
            except (UserError, OSError):
                continue
            # of the mixture's tokens, as weights say
            share = source.weight / sum(s.weight for s in mixture)
            name = source.name or card.source
            # one entry a name: what several phases train on adds up
            entry = found.setdefault(
                name,
                {"name": name, "documents": card.documents, "tokens": card.tokens, "trained": 0.0},
            )
            entry["trained"] += share * phase.tokens
    return [{**entry, "trained": round(entry["trained"])} for entry in found.values()]


def versions() -> dict[str, str]:
    """Of Python and of what decides the numbers; `commit` where this is a clone."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    root = PROJECT
    if (root / ".git").exists():
        try:
            asked = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
            said = subprocess.run(
                asked, capture_output=True, encoding="utf-8", errors="replace", timeout=5
            )
            if said.returncode == 0:
                found["commit"] = said.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return found


def what_was_trained(run: RunConfig, folder: Path) -> dict[str, str]:
    """Model, data, precision, machine and versions of a run folder, a line each."""
    # the last start that has an `about`: not every one wrote it
    events = read_jsonl(folder / EVENTS)
    starts = [e for e in events if e.get("event") in ("start", "resume")]
    told = [e for e in starts if isinstance(e.get("about"), dict)]
    about = {}
    if told:
        about = told[-1]["about"]
    m = run.model
    optimizer = next((w for w, kind in OPTIMIZERS.items() if type(run.optimizer) is kind), "")
    # where no start told it, counted from the shape
    size = about.get("parameters") or m.parameter_counts().total
    lines = {
        "model": (f"{size:,} parameters, " if isinstance(size, int) else "") + m.shape_text,
        "optimizer": f"{optimizer}, seed {run.seed}",
    }
    share = getattr(run.objective, "mask_share", None)
    if share is not None:
        pairs = ""
        if run.objective.pairs:
            pairs = " and pairs of sentences"
        lines["objective"] = f"masked tokens, {share:.0%} of the text{pairs}"
    for source in about.get("sources") or data_facts(run):
        if isinstance(source, dict) and isinstance(source.get("tokens"), int):
            trained = source.get("trained", 0)
            lines[f"data {source.get('name')}"] = (
                f"{short_count(source['tokens'])} tokens in {source.get('documents', 0):,} "
                "documents; of the run "
                f"{short_count(trained)} tokens"
            )
    if starts:
        last = starts[-1]
        lines["precision"] = (
            f"{last.get('precision', run.engine.precision)}, ZeRO stage {last.get('zero_stage', 0)}"
        )
        # each number once, in the order of the starts
        ranks = list(dict.fromkeys(str(e.get("ranks")) for e in starts if "ranks" in e))
        lines["ranks"] = " then ".join(ranks) + (
            f", on {about['device']}" if "device" in about else ""
        )
    if isinstance(about.get("versions"), dict):
        lines["versions"] = ", ".join(
            f"{name} {number}" for name, number in about["versions"].items()
        )
    asked = next((e for e in starts if isinstance(e.get("objective_sha256"), dict)), {})
    for name, sha256 in asked.get("objective_sha256", {}).items():
        lines[str(name)] = f"a stored model, SHA-256 {str(sha256)[:16]}"
    begun = next((e for e in starts if e.get("init_sha256")), None)
    if begun:
        lines["weights from"] = f"a stored model, SHA-256 {str(begun['init_sha256'])[:16]}"
    return lines
