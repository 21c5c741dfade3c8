"""data-prep as real processes: killed at random moments, and held to its memory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.prep import bytes_of, run, settings, texts, write_jsonl

COMMAND = [sys.executable, "-m", "data_prep", "prepare"]


def start(config: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, str(config), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def at_work(process: subprocess.Popen, out: Path) -> float:
    """The time at which a command has begun to work on the source (or has ended)."""
    while process.poll() is None and not (out / ".a.part").exists():
        time.sleep(0.001)
    return time.monotonic()


@pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=pytest.mark.matrix), pytest.param(50, marks=pytest.mark.slow)]
)
def test_random_sigkills_of_prepare_end_byte_identical(tmp_path, kills):
    write_jsonl(tmp_path / "a.jsonl", texts(10_000, longest=200))
    config = settings(tmp_path, shard_bytes=2**15, processes=2, sentences=True)
    chance = random.Random(kills)
    process = start(config, f"out={tmp_path / 'whole'}")
    began = at_work(process, tmp_path / "whole")
    assert process.wait() == 0
    work_seconds, whole = time.monotonic() - began, bytes_of(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".mds")]) > 20
    out, killed, finished, resumed = tmp_path / "shards", 0, 0, 0
    while killed < kills:
        process = start(config)
        at_work(process, out)
        time.sleep(chance.uniform(0, work_seconds))
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        if process.wait() == 0:
            assert bytes_of(out) == whole
            finished += 1
            os.rename(out, tmp_path / f"finished{finished}")
        else:
            killed += 1
            resumed += len(list(out.glob(".a.part/segments/0*"))) > 0
    assert run("prepare", config) == 0
    assert bytes_of(out) == whole
    print(
        f"{killed} kills, {resumed} of them after the first finished segment; {finished + 1} runs"
        " ended"
    )


def peak_memory(process: subprocess.Popen) -> int:
    """The most bytes that one of a command's processes had, while it ran."""
    most = 0

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            try:
                parent = psutil.Process(process.pid)
                most = max(
                    most, *(p.memory_info().rss for p in [parent, *parent.children(recursive=True)])
                )
            except psutil.Error:
                pass
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.wait() == 0, process.stderr.read()
    watcher.join()
    return most


@pytest.mark.parametrize(
    "file_mb, line_mb, limit_mb",
    [(40, 2, 200), pytest.param(5000, 50, 1000, marks=pytest.mark.slow)],
)
def test_memory_is_bounded_whatever_the_size_of_the_file(tmp_path, file_mb, line_mb, limit_mb):
    """The small case has shards of 4 MiB, so that a segment is 16 MiB as the large one's is 256."""
    line = (json.dumps({"text": " ".join(texts(50, longest=200))}) + "\n").encode()
    long = json.dumps({"text": "word and another word " * (line_mb * 2**20 // 22)}).encode() + b"\n"
    with open(tmp_path / "a.jsonl", "wb") as f:
        for half in range(2):
            for _ in range(file_mb * 10**6 // 2 // 2**20):
                f.write(line * (2**20 // len(line)))
            if not half:
                f.write(long)
    shard_bytes = 2**22 if file_mb < 1000 else 2**26
    peak = peak_memory(start(settings(tmp_path, shard_bytes=shard_bytes, processes=2)))
    print(f"peak of one process: {peak / 1e6:.0f} MB")
    assert peak < limit_mb * 1e6
