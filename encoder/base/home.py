"""Where the files lie that are no Python: configs/, slurm/ and benchmarks/."""

from __future__ import annotations

from pathlib import Path

# the folder that `encoder` lies in: a clone, or site-packages
PROJECT = Path(__file__).resolve().parents[2]


def home() -> Path:
    """The clone, or what an installed wheel has of it."""
    beside = PROJECT
    shipped = beside / "launch" / "shipped"
    if shipped.is_dir():
        return shipped
    return beside
