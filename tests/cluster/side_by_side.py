"""Runs the cluster's tests in two processes, each with a Slurm of its own: most of their time they wait for Slurm's clocks.

    python tests/cluster/side_by_side.py [words for pytest]

Exit code: 0 where every file passed, or had a reason to be skipped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
AT_A_TIME = 2  # four ranks, which is what two cores can take
FIRST = (
    "test_interrupted.py",
    "test_submit.py",
    "test_bad_endings.py",
)  # the longest, or one would be left alone at the end


def main(words: list[str]) -> int:
    """Prints what each file's run said when it has ended; returns the worst exit code."""
    began = time.monotonic()
    rest = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in FIRST)
    files = [HERE / name for name in (*FIRST, *rest)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        codes = list(pool.map(lambda path: run(path, words), files))
    print(
        f"{codes.count(0)} of {len(files)} files of tests passed in"
        f" {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return max(codes)


def run(path: Path, words: list[str]) -> int:
    """One file's tests; the exit code of pytest."""
    command = [sys.executable, "-m", "pytest", "--cluster", "-m", "cluster", str(path), *words]
    done = subprocess.run(
        command,
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, end="", flush=True)
    return abs(done.returncode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
