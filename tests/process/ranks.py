"""Real ranks for tests: a function runs in N processes joined by gloo, and its results come back.

    def ranks_sum(world, *, start): ...          # a function of a module, taking the World and plain values
    results = run_ranks(ranks_sum, 2, start=3)   # [result of rank 0, result of rank 1], through JSON
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: Callable[..., Any], world_size: int, *, timeout_seconds: float = 120.0, **values: Any) -> list[Any]:
    """What `function(world, **values)` returned on each rank. A rank that fails or hangs ends all, with its error shown."""
    return wait_for(start_ranks(function, world_size, **values), timeout_seconds=timeout_seconds)


def start_ranks(function: Callable[..., Any], world_size: int, **values: Any) -> list[tuple[subprocess.Popen, Path]]:
    """The processes, under way, and the folder of each one's result, out and err."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank in range(world_size):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
               "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.process.ranks", function.__module__, function.__qualname__,
                   json.dumps(values), str(folder / f"{rank}.json")]
        with open(folder / f"{rank}.out", "wb") as out, open(folder / f"{rank}.err", "wb") as err:
            ranks.append((subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err), folder / str(rank)))
    return ranks


def wait_for(ranks: list[tuple[subprocess.Popen, Path]], *, timeout_seconds: float) -> list[Any]:
    """The results of started ranks."""
    end = time.monotonic() + timeout_seconds
    try:
        while any(process.poll() is None for process, _ in ranks):
            failed = [i for i, (process, _) in enumerate(ranks) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                time.sleep(0.5 if failed else 0.0)      # let the others say why, too
                break
            time.sleep(0.05)
    finally:
        for process, _ in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process, _ in ranks]
    if any(codes):
        texts = [f"--- rank {i}, exit code {code}\n{path.with_suffix('.err').read_text()[-4000:]}"
                 for i, (code, (_, path)) in enumerate(zip(codes, ranks))]
        raise AssertionError("ranks failed or took too long:\n" + "\n".join(texts))
    results = [json.loads(path.with_suffix(".json").read_text()) for _, path in ranks]
    shutil.rmtree(ranks[0][1].parent)
    return results


def _main() -> None:
    module, name, values, result = sys.argv[1:]
    import torch

    from encoder.base.dist import end_process, join, leave, world_from_env

    torch.set_num_threads(1)
    world = world_from_env()
    join(world, device=torch.device("cpu"), timeout_seconds=60.0)
    try:
        value = getattr(importlib.import_module(module), name)(world, **json.loads(values))
        Path(result).write_text(json.dumps(value))
    finally:
        leave()
    end_process(0)


if __name__ == "__main__":
    _main()
