"""What one rank finds out about its node before a run: versions, files, devices, room. Looks at nothing but its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from encoder.base.command import as_user_error
from encoder.base.dist import World
from encoder.base.errors import DamagedShard, UserError
from encoder.base.files import sha256_of
from encoder.base.home import PROJECT
from encoder.base.schema import to_yaml
from encoder.base.slurm import node_name
from encoder.base.untrusted import number_in_name
from encoder.data.shard_format import CARD
from encoder.data.shards import open_source
from encoder.runs.config import RunConfig
from encoder.train.build import choose_device

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "mosaicml-streaming",
    "numpy",
    "tokenizers",
    "safetensors",
)
# of the sources that all nodes must have alike
ROOT = PROJECT
MATMUL_WIDTH = 512  # 0.3 GFLOP: 20 ms on a core
# relative; TF32, where somebody allows it, is off by more, hence switched off
MATMUL_TOLERANCE = 1e-4
# it takes 1 to 3 s on a sound node of eight, and does not return on some broken ones
NVIDIA_SMI_SECONDS = 15.0


def gather_facts(run: RunConfig, world: World, *, env: Mapping[str, str]) -> dict[str, Any]:
    """Plain values for the judge. What is the same for a whole node is found out by its first rank alone."""
    facts: dict[str, Any] = {
        "rank": world.rank,
        "local_rank": world.local_rank,
        "local_size": world.local_size,
        "node": node_name(env),
        "folder": os.getcwd(),
        "versions": versions(),
        "run_sha256": _sha256(to_yaml(run)),
        "device": look_at_device(run, world),
    }
    if world.local_rank == 0:
        facts["shards"] = look_at_shards(run)
        facts["memory"] = machine_memory(env)
        facts["gpus_allotted"] = env.get("SLURM_GPUS_ON_NODE", "")
    return facts


def versions() -> dict[str, str]:
    """Of what the numbers depend on, and of this program's own sources."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {**found, "sources": sources_sha256()[:12]}


def sources_sha256(root: Path = ROOT) -> str:
    """Hex SHA-256 over the names and bytes of every Python file that a run uses."""
    digest = hashlib.sha256()
    # names and lengths, too, so that no two trees give the same bytes
    for path in sorted((*root.glob("encoder/**/*.py"), *root.glob("launch/*.py"))):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def look_at_shards(run: RunConfig) -> dict[str, dict[str, str]]:
    """By shard folder: the SHA-256 of its card, which names its content, or the error of opening it. The index is held
    against the card, and three documents are read."""
    found: dict[str, dict[str, str]] = {}
    for config in dict.fromkeys(run.all_sources()):
        if config.path in found:
            continue
        try:
            source = open_source(
                config.path,
                name=config.path,
                cache=Path(config.cache) if config.cache else None,
                cache_bytes=config.cache_bytes,
            )
            # first, middle and last: a copy that broke off shows in one of them
            for document in (0, source.documents // 2, source.documents - 1):
                with contextlib.suppress(
                    *(DamagedShard,) if run.loader.on_bad_shard == "quarantine" else ()
                ):
                    source.read(document)
            found[config.path] = {"card": sha256_of(config.folder / CARD)[:12]}
        except (UserError, OSError) as error:
            found[config.path] = {"error": str(as_user_error(error))}
    return found


def look_at_folder(
    folder: Path, nonce: str, *, node: str, wait_seconds: float, first: bool = False
) -> dict[str, Any]:
    """Whether this node sees the file that rank zero (`first`) writes into the run folder, can write one of its own, and how
    many bytes are free there."""
    facts: dict[str, Any] = {"node": node, "seen": True, "place": "it is there", "free": 0}
    theirs, mine = folder / f".doctor-{nonce}", folder / f".doctor-{nonce}-{node}"
    # file systems of several nodes show a new file late
    end = time.monotonic() + wait_seconds
    while not first and not theirs.exists():
        if time.monotonic() > end:
            return facts | {
                "seen": False,
                "place": "the folder is there" if folder.is_dir() else "no such folder is",
            }
        time.sleep(0.2)
    try:
        if first and not folder.exists():
            folder.mkdir(parents=True)
        # rank zero writes both its own files: the one to be seen, and the one every node writes
        for path in (theirs, mine) if first else (mine,):
            path.write_text(node, encoding="utf-8")
        facts["free"] = shutil.disk_usage(folder).free
    except OSError as error:
        facts["error"] = f"{error.strerror or error}"
    return facts


def machine_memory(env: Mapping[str, str]) -> dict[str, int]:
    """Bytes: `free` of the machine, and what SLURM allows the job on this node (0: no limit is known)."""
    allowed = env.get("SLURM_MEM_PER_NODE", "")
    return {
        "free": psutil.virtual_memory().available,
        "allowed": (number_in_name(allowed) or 0) * 2**20,
    }


def look_at_device(run: RunConfig, world: World) -> dict[str, Any]:
    """This rank's device: kind, how many torch sees, free bytes, a matrix product held against the CPU's in fp64."""
    seen = 0
    if run.device != "cpu" and torch.cuda.is_available():
        seen = torch.cuda.device_count()
    facts: dict[str, Any] = {"kind": "none", "seen": seen}
    try:
        device = choose_device(run, world)
        facts["kind"] = device.type
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            facts |= {"name": torch.cuda.get_device_name(device), "free": free, "total": total}
            facts["memory_errors"] = _uncorrected_errors() if world.local_rank == 0 else ""
        wrong = matmul_error(device)
        # `not <=`: nan is wrong as well
        if not wrong <= MATMUL_TOLERANCE:
            facts["error"] = (
                f"a matrix product of {device} is off by {wrong:.1g} of its size; a sound one by"
                " less than 1e-5"
            )
    except (
        UserError,
        RuntimeError,
    ) as error:
        # torch's CUDA errors are RuntimeErrors of several lines
        facts["error"] = str(error).strip().split("\n")[0]
    return facts


def matmul_error(device: torch.device) -> float:
    """The largest error of a fp32 product on the device, relative to the largest element of the fp64 product on the CPU."""
    # TF32 is off by more than the tolerance
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        random = torch.Generator().manual_seed(0)
        a, b = (torch.randn(MATMUL_WIDTH, MATMUL_WIDTH, generator=random) for _ in range(2))
        right = a.double() @ b.double()
        found = (a.to(device) @ b.to(device)).cpu().double()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return float((found - right).abs().max() / right.abs().max())


def _uncorrected_errors() -> str:
    """What nvidia-smi says of the node's memory errors that nothing corrected; empty where there are none or it is not here."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = [
        "nvidia-smi",
        "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=NVIDIA_SMI_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer in {NVIDIA_SMI_SECONDS:.0f} s"
    return memory_errors(done.stdout)


def memory_errors(table: str) -> str:
    """'0, 0' and '1, 3' in lines -> 'GPU 1: 3 uncorrected memory errors'; [N/A] is a device that does not count them."""
    found = []
    for line in table.splitlines():
        index, _, count = (word.strip() for word in line.partition(","))
        if count.isdigit() and int(count):
            found.append(f"GPU {index}: {count} uncorrected memory errors since it was last reset")
    return "; ".join(found)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
