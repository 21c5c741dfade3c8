"""Real ranks for tests: a function runs in N processes joined by gloo, and its results come back.

    def ranks_sum(world, *, start): ...          # a function of a module, taking the World and plain values
    results = run_ranks(ranks_sum, 2, start=3)   # [result of rank 0, result of rank 1], through JSON

A start takes 0.1 s of CPU, not 10: the processes are forked from one that has imported everything (nursery.py).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoder.base.dist import free_port

ROOT = Path(__file__).resolve().parents[2]


@functools.lru_cache(None)
def _nursery() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.process.nursery"], cwd=ROOT, stdin=subprocess.PIPE
    )
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # the last registered is called first
    return process


class Rank:
    """One process, with the words of subprocess.Popen."""

    def __init__(self, path: Path, **order: Any) -> None:
        self._path = path
        server = _nursery()
        server.stdin.write(json.dumps({**order, "path": str(path)}).encode() + b"\n")
        server.stdin.flush()
        self.pid = int(self._said(".pid"))

    def poll(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        file = self._path.with_suffix(".code")
        return int(file.read_text()) if file.exists() else None

    @property
    def returncode(self) -> int | None:
        """As poll."""
        return self.poll()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        # it may have ended, and its code not be written yet
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return int(self._said(".code"))

    def _said(self, suffix: str) -> str:
        file = self._path.with_suffix(suffix)
        while not file.exists():
            assert _nursery().poll() is None, "the process that forks ranks has ended"
            time.sleep(0.005)
        return file.read_text()


def run_ranks(
    function: Callable[..., Any], world_size: int, *, timeout_seconds: float = 300.0, **values: Any
) -> list[Any]:
    """What `function(world, **values)` returned on each rank. A rank that fails or hangs ends all, with its error shown."""
    return wait_for(start_ranks(function, world_size, **values), timeout_seconds=timeout_seconds)


def start_ranks(
    function: Callable[..., Any], world_size: int, **values: Any
) -> list[tuple[Rank, Path]]:
    """The processes, under way, and the folder of each one's result, out and err."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    port, second_port = str(free_port()), str(free_port())
    ranks = []
    for rank in range(world_size):
        env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            # for a function that opens a store of its own
            "SECOND_PORT": second_port,
            "OMP_NUM_THREADS": "1",
        }
        path = folder / str(rank)
        ranks.append(
            (
                Rank(
                    path,
                    env=env,
                    module=function.__module__,
                    name=function.__qualname__,
                    values=values,
                ),
                path,
            )
        )
    return ranks


def wait_for(ranks: list[tuple[Rank, Path]], *, timeout_seconds: float) -> list[Any]:
    """The results of started ranks."""
    end = time.monotonic() + timeout_seconds
    try:
        while any(process.poll() is None for process, _ in ranks):
            failed = [i for i, (process, _) in enumerate(ranks) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                time.sleep(0.5 if failed else 0.0)  # let the others say why, too
                break
            time.sleep(0.02)
    finally:
        for process, _ in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process, _ in ranks]
    if any(codes):
        texts = [
            f"--- rank {i}, exit code {code}\n{_end_of(path.with_suffix('.err'))}"
            for i, (code, (_, path)) in enumerate(zip(codes, ranks))
        ]
        raise AssertionError("ranks failed or took too long:\n" + "\n".join(texts))
    results = [json.loads(path.with_suffix(".json").read_text()) for _, path in ranks]
    shutil.rmtree(ranks[0][1].parent)
    return results


def _end_of(path: Path) -> str:
    return path.read_text()[-4000:] if path.exists() else "it ended before it began"
