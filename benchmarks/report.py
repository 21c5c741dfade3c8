"""What a bench says: tables on the terminal, the same as JSON, and the machine they were made on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from encoder.base.files import write_json

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "flash-attn",
    "torch-optimi",
    "mosaicml-streaming",
    "tokenizers",
    "numpy",
)
# of /proc/cpuinfo, those that tell speeds
FLAGS = (
    "amx_bf16",
    "amx_int8",
    "avx512_bf16",
    "avx512f",
    "avx2",
    "bf16",
    "sve",
)


class Report:
    """Prints each table when it is known and writes all of them to `path`, if there is one, so that a stop loses nothing."""

    def __init__(self, path: Path | None, *, command: str, device: torch.device) -> None:
        self.path = path
        self.tables: list[dict[str, Any]] = []
        self._facts = {"command": command, **environment(device)}
        print(environment_text(self._facts), flush=True)

    def add(
        self,
        title: str,
        *,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        notes: Sequence[str] = (),
        figures: Any = None,
    ) -> None:
        """A table for people, its notes, and the numbers behind it."""
        self.tables.append(
            {
                "title": title,
                "head": [*head],
                "rows": [[*row] for row in rows],
                "notes": [*notes],
                "figures": figures,
            }
        )
        print(f"\n{title}\n{aligned(head, rows)}", *notes, sep="\n", flush=True)
        if self.path:
            write_json(self.path, {**self._facts, "tables": self.tables})


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    lines = [[*head], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Date, processor, card, versions: what must stand beside a number."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "cpu": _cpu_name(),
        "cpu_flags": [f for f in FLAGS if f in _cpu_words("flags")],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "card_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
        }
    return facts


def environment_text(facts: dict[str, Any]) -> str:
    """The machine in a line."""
    card = (
        f"{facts['card']} {facts['card_gib']} GiB, CUDA {facts['cuda']}, "
        if "card" in facts
        else ""
    )
    versions = ", ".join(f"{p} {facts[p]}" for p in PACKAGES if p in facts)
    return (
        f"{facts['date']}, {card}{facts['cpu']} ({', '.join(facts['cpu_flags'])}), {facts['cores']}"
        f" cores, {facts['threads']} threads, load {facts['load']}, Python {facts['python']},"
        f" {versions}"
    )


def _cpu_words(key: str) -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            # ARM calls its flags features
            if line.split(":")[0].strip().lower() in (key, "features" if key == "flags" else key):
                return line.partition(":")[2].split()
    return []


def _cpu_name() -> str:
    return " ".join(_cpu_words("model name")) or platform.processor() or platform.machine()


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            check=True,
            encoding="utf-8",
            errors="replace",
            capture_output=True,
        ).stdout.strip()
    return None
