"""What the demo's two configurations are told of a demo in another folder than demo/, or of one with less to train."""

from __future__ import annotations

import math
from pathlib import Path

from encoder.base.schema import read_mapping
from encoder.base.units import parse_tokens

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "configs" / "pretrain" / "tiny_cpu.yaml"
# the folder that the configurations name
USUAL = ROOT / "demo"
SOURCES = ("code", "prose")
# a row of 512 tokens has some 150 predictions
LEAST_HELD_OUT_ROWS = 4


def preparation_settings(out: Path) -> list[str]:
    """For configs/prep/demo.yaml: where text and tokenizer are, and where the shards go."""
    if out == USUAL:
        return []
    return [
        f"root={short(out)}/corpus",
        f"tokenizer={short(out)}/tokenizer.json",
        f"out={short(out)}/shards",
    ]


def run_settings(out: Path, *, shrink: float) -> list[str]:
    """For the run file: the run folder, where the shards are, and all amounts divided by `shrink`."""
    settings = [f"out={short(out)}/run"]
    if out != USUAL:
        for i, name in enumerate(SOURCES):
            settings.append(f"data.sources.{i}.path={short(out)}/shards/{name}/train")
            settings.append(f"evaluation.sources.{i}.path={short(out)}/shards/{name}/held_out")
    if shrink != 1.0:
        settings += [
            f"{key}={math.ceil(parse_tokens(amount) / shrink)}"
            for key, amount in _amounts().items()
        ]
        # else a small demo evaluates for longer than it trains
        rows = read_mapping(RUN_FILE)["evaluation"]["rows"]
        settings.append(f"evaluation.rows={max(LEAST_HELD_OUT_ROWS, math.ceil(rows / shrink))}")
    return settings


def short(path: Path) -> Path:
    """A path as it is typed in the project's folder."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _amounts() -> dict[str, int | str]:
    """Every amount of tokens in the run file that shrinks with the run, by dotted key; that of a step does not."""
    mapping = read_mapping(RUN_FILE)
    found = {
        f"{key}.every_tokens": mapping[key]["every_tokens"] for key in ("checkpoints", "evaluation")
    }
    found["init_embeddings.tokens"] = mapping["init_embeddings"]["tokens"]
    for i, phase in enumerate(mapping["phases"]):
        found[f"phases.{i}.tokens"] = phase["tokens"]
        if "warmup_tokens" in phase["lr"]:
            found[f"phases.{i}.lr.warmup_tokens"] = phase["lr"]["warmup_tokens"]
        if "batch_warmup" in phase:
            found[f"phases.{i}.batch_warmup.over_tokens"] = phase["batch_warmup"]["over_tokens"]
    return found
