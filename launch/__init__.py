"""Verbs: what a person runs."""

from __future__ import annotations

from pathlib import Path


def home() -> Path:
    """Where configs/, slurm/ and benchmarks/ lie: the clone, or what an installed wheel has of it."""
    shipped = Path(__file__).resolve().parent / "shipped"
    return shipped if shipped.is_dir() else Path(__file__).resolve().parents[1]
