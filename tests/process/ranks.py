"""Real ranks for tests: a function runs in N processes joined by gloo, and its results come back.

    def ranks_sum(world, *, start): ...          # a function of a module, taking the World and plain values
    results = run_ranks(ranks_sum, 2, start=3)   # [result of rank 0, result of rank 1], through JSON

The processes are forked from one that has imported everything and done nothing: a start takes 0.1 s of CPU, not 10.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.process.imported"])


class Rank:
    """One process, with the words of subprocess.Popen."""

    def __init__(self, *values: Any) -> None:
        self._process = _SERVER.Process(target=_main, args=values)
        self._process.start()
        self.kill, self.wait = self._process.kill, self._process.join

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As returncode."""
        return self._process.exitcode


def run_ranks(function: Callable[..., Any], world_size: int, *, timeout_seconds: float = 300.0, **values: Any) -> list[Any]:
    """What `function(world, **values)` returned on each rank. A rank that fails or hangs ends all, with its error shown."""
    return wait_for(start_ranks(function, world_size, **values), timeout_seconds=timeout_seconds)


def start_ranks(function: Callable[..., Any], world_size: int, **values: Any) -> list[tuple[Rank, Path]]:
    """The processes, under way, and the folder of each one's result, out and err."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank in range(world_size):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
               "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        path = folder / str(rank)
        ranks.append((Rank(env, function.__module__, function.__qualname__, values, str(path)), path))
    return ranks


def wait_for(ranks: list[tuple[Rank, Path]], *, timeout_seconds: float) -> list[Any]:
    """The results of started ranks."""
    end = time.monotonic() + timeout_seconds
    try:
        while any(process.poll() is None for process, _ in ranks):
            failed = [i for i, (process, _) in enumerate(ranks) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                time.sleep(0.5 if failed else 0.0)      # let the others say why, too
                break
            time.sleep(0.02)
    finally:
        for process, _ in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process, _ in ranks]
    if any(codes):
        texts = [f"--- rank {i}, exit code {code}\n{_end_of(path.with_suffix('.err'))}"
                 for i, (code, (_, path)) in enumerate(zip(codes, ranks))]
        raise AssertionError("ranks failed or took too long:\n" + "\n".join(texts))
    results = [json.loads(path.with_suffix(".json").read_text()) for _, path in ranks]
    shutil.rmtree(ranks[0][1].parent)
    return results


def _end_of(path: Path) -> str:
    return path.read_text()[-4000:] if path.exists() else "it ended before it began"


def _main(env: dict[str, str], module: str, name: str, values: dict[str, Any], path: str) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(path + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)

    import torch

    from encoder.base.dist import end_process, join, leave, world_from_env

    code = 1
    try:
        torch.set_num_threads(1)
        world = world_from_env()
        join(world, device=torch.device("cpu"), timeout_seconds=60.0)
        try:
            value = getattr(importlib.import_module(module), name)(world, **values)
            Path(path + ".json").write_text(json.dumps(value))
        finally:
            leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    end_process(code)
