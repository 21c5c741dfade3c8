"""Where the files lie that are no Python: configs/, slurm/ and benchmarks/."""

from __future__ import annotations

from pathlib import Path


def home() -> Path:
    """The clone, or what an installed wheel has of it."""
    beside = Path(__file__).resolve().parents[2]
    shipped = beside / "launch" / "shipped"
    return shipped if shipped.is_dir() else beside
