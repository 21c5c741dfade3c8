"""What a run is, for people: written into its start event, read by its report and by the card of its export."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.base.home import PROJECT
from encoder.base.units import short_count
from encoder.data.shard_format import read_card
from encoder.models.contract import ModelConfig
from encoder.optim.catalog import OPTIMIZERS
from encoder.runs.config import RunConfig
from encoder.runs.folder import EVENTS, read_jsonl

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers")
FIRST_VECTORS = "init_embeddings"  # in events, under about: what was counted before the first step


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
    starts = starts_of(folder)
    about = newest_about(starts)
    optimizer = next((w for w, kind in OPTIMIZERS.items() if type(run.optimizer) is kind), "")
    lines = {
        "model": model_line(about, run.model),
        "optimizer": f"{optimizer}, seed {run.seed}",
        "objective": run.objective.task_text,
    }
    if counted := first_vectors_of(starts):
        lines["rows of tokens"] = (
            f"{counted['rows']:,} began with their neighbours in"
            f" {short_count(counted['tokens'])} tokens, {counted['attention']}"
        )
    for source in about.get("sources") or data_facts(run):
        if isinstance(source, dict) and isinstance(source.get("tokens"), int):
            trained = source.get("trained", 0)
            lines[f"data {source.get('name')}"] = (
                f"{short_count(source['tokens'])} tokens in {source.get('documents', 0):,} "
                "documents; of the run "
                f"{short_count(trained)} tokens"
            )
    lines |= machine_lines(starts, precision=run.engine.precision)
    asked = next((e for e in starts if isinstance(e.get("objective_sha256"), dict)), {})
    for name, sha256 in asked.get("objective_sha256", {}).items():
        lines[str(name)] = f"a stored model, SHA-256 {str(sha256)[:16]}"
    return lines | weights_lines(starts)


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's starts."""
    return [e for e in read_jsonl(folder / EVENTS) if e.get("event") in ("start", "resume")]


def first_vectors_of(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the start that counted neighbours told of them; {} where none did. A resume counts nothing."""
    told = [e["about"].get(FIRST_VECTORS) for e in starts if isinstance(e.get("about"), dict)]
    return next((found for found in reversed(told) if isinstance(found, dict)), {})


def newest_about(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the last start told that told anything: not every one did."""
    told = [e["about"] for e in starts if isinstance(e.get("about"), dict)]
    return told[-1] if told else {}


def model_line(about: Mapping[str, Any], model: ModelConfig) -> str:
    """Parameters and shape; where no start told their number, it is counted from the shape."""
    size = about.get("parameters") or model.parameter_counts().total
    return (f"{size:,} parameters, " if isinstance(size, int) else "") + model.shape_text


def machine_lines(starts: Sequence[dict[str, Any]], *, precision: str) -> dict[str, str]:
    """Precision, stage, ranks, device and versions of a run's starts; `precision` is the settings'."""
    if not starts:
        return {}
    about, last = newest_about(starts), starts[-1]
    # each number once, in the order of the starts
    ranks = list(dict.fromkeys(str(e.get("ranks")) for e in starts if "ranks" in e))
    device = f", on {about['device']}" if "device" in about else ""
    lines = {
        "precision": f"{last.get('precision', precision)}, ZeRO stage {last.get('zero_stage', 0)}",
        "ranks": " then ".join(ranks) + device,
    }
    if isinstance(about.get("versions"), dict):
        versions = [f"{name} {number}" for name, number in about["versions"].items()]
        lines["versions"] = ", ".join(versions)
    return lines


def weights_lines(starts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What model the weights came from, where they did."""
    begun = next((e for e in starts if e.get("init_sha256")), None)
    if begun is None:
        return {}
    return {"weights from": f"a stored model, SHA-256 {str(begun['init_sha256'])[:16]}"}
