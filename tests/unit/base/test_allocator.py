"""Freed memory stays with a CPU process, and goes back to the kernel once a minute."""

from __future__ import annotations

import subprocess
import sys

import pytest

from encoder.base import allocator
from encoder.base.allocator import FreedMemory

# a process of its own: the C library's settings are for good
HOLES = """
import sys, torch
from pathlib import Path
from encoder.base import allocator
def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
assert allocator.freed_memory.keep()
# one of two stays: what lies between cannot leave with the heap's end
made = [torch.zeros(2**20) for _ in range(128)]
del made[::2]
kept = resident()
allocator.GIVEN_BACK_SECONDS = 0.0
assert allocator.freed_memory.give_back()
print(kept - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_memory_between_tensors_that_stay_is_kept_and_then_given_back():
    found = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    # 64 of 4 MiB, in KiB
    assert int(found.stdout) > 0.9 * 64 * 4096


def test_it_is_given_back_once_a_minute_and_only_where_it_is_kept(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(allocator.time, "monotonic", lambda: clock[0])
    memory = FreedMemory()
    clock[0] = 100.0
    assert not memory.give_back()

    calls = []
    memory._libc = type("Libc", (), {"malloc_trim": lambda self, rest: calls.append(rest)})()
    given = []
    for clock[0] in (10.0, 59.0, 60.0, 61.0, 119.0, 120.5):
        given.append(memory.give_back())
    assert given == [False, False, True, False, False, True] and calls == [0, 0]
