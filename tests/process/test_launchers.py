"""What ranks do when their launcher is asked to end or is killed: they save, leave, and no process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from encoder.base.dist import free_port
from encoder.engine.checkpoint.read import newest_checkpoint
from encoder.runs.folder import CHECKPOINTS, EVENTS, METRICS, read_jsonl
from tests.helpers.shards import random_documents, write_source
from tests.process.test_killed_run import RUN

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 180
LINGER_SECONDS = 30
SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2", "KILL")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen after a signal."""

    saved: bool  # a checkpoint was made and the stop recorded
    rank_seconds: float  # until the last rank had ended
    code: int | None  # the launcher's exit code; None: it did not end
    left: int  # processes of the run that still were there after LINGER_SECONDS

    def __str__(self) -> str:
        return (
            f"{'saved' if self.saved else 'not saved'}, ranks gone after {self.rank_seconds:.1f} s,"
            f" exit code {self.code}, {self.left} left behind"
        )


def processes_of(out: Path) -> list[psutil.Process]:
    """All processes that name the run folder, and their children."""
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        if (
            f"out={out}" in (process.info["cmdline"] or [])
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ):
            found[process.pid] = process
    return [*found.values()]


def is_rank(process: psutil.Process) -> bool:
    """Whether it trains: a launcher's command line names a launcher, too."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return not any(
        os.path.basename(word) in ("deepspeed", "torchrun") or word == "deepspeed.launcher.launch"
        for word in words
    )


def start(launcher: str, folder: Path, out: Path) -> subprocess.Popen:
    """Two ranks of a run that goes on for long, in a session of their own."""
    script = [
        str(ROOT / "launch" / "pretrain.py"),
        str(folder / "run.yaml"),
        f"out={out}",
        "checkpoints.every_tokens=100M",
        "evaluation.every_tokens=100M",
        "loader.workers=0",
    ]
    head = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    }[launcher]
    return subprocess.Popen(
        [str(BIN / head[0]), *head[1:], *script],
        start_new_session=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=open(f"{out}.out", "wb"),
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        },
    )


def signalled(launcher: str, name: str, to: str, folder: Path) -> Seen:
    """Starts a run, waits for its third step, sends the signal to the launcher, its inner `launch` or the group."""
    out = folder / f"{launcher}-{name}-{to}"
    process = start(launcher, folder, out)
    try:
        until = time.monotonic() + START_SECONDS
        while (
            len(read_jsonl(out / METRICS)) < 3
            and time.monotonic() < until
            and process.poll() is None
        ):
            time.sleep(0.05)
        assert len(read_jsonl(out / METRICS)) >= 3, Path(f"{out}.out").read_text()[-2000:]
        number = getattr(signal, f"SIG{name}")
        began = time.monotonic()
        if to == "group":
            os.killpg(process.pid, number)
        elif to == "launch":
            inner = next(p for p in processes_of(out) if "deepspeed.launcher.launch" in p.cmdline())
            inner.send_signal(number)
        else:
            process.send_signal(number)
        while time.monotonic() - began < LINGER_SECONDS and any(
            is_rank(p) for p in processes_of(out)
        ):
            time.sleep(0.1)
        ended = time.monotonic()
        # DeepSpeed's inner launcher looks for its ranks once a second
        while (
            process.poll() is None or processes_of(out)
        ) and time.monotonic() - began < LINGER_SECONDS:
            time.sleep(0.1)
        stops = [line for line in read_jsonl(out / EVENTS) if line.get("event") == "stopped"]
        return Seen(
            saved=bool(stops) and newest_checkpoint(out / CHECKPOINTS) is not None,
            rank_seconds=ended - began,
            code=process.poll(),
            left=len(processes_of(out)),
        )
    finally:
        for one in processes_of(out):
            one.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("launchers")
    write_source(root / "a", random_documents(120, seed=1, longest=60), vocab_size=64)
    write_source(root / "held", random_documents(30, seed=2, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root, tokens="100M"))
    return root


@pytest.mark.parametrize(
    ("launcher", "name"),
    [pytest.param("torchrun", "KILL", marks=pytest.mark.matrix), ("deepspeed", "TERM")],
)
def test_ranks_save_and_leave_when_their_launcher_is_gone(folder, launcher, name):
    seen = signalled(launcher, name, "alone", folder)
    assert seen.saved and seen.rank_seconds < 10 and seen.left == 0, str(seen)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_signal_to_every_launcher_leaves_no_rank_behind(folder):
    """The table of docs/faults.md, printed; a group that is killed saves nothing, where the ranks belong to it."""
    kinds = [
        ("torchrun", "alone"),
        ("torchrun", "group"),
        ("deepspeed", "alone"),
        ("deepspeed", "launch"),
        ("deepspeed", "group"),
    ]
    bad = []
    for launcher, to in kinds:
        for name in SIGNALS:
            seen = signalled(launcher, name, to, folder)
            print(f"| `{launcher}` | {name} | {to} | {seen} |", flush=True)
            if seen.left or seen.rank_seconds > 15 or not (seen.saved or name == "KILL"):
                bad.append(f"{launcher} {name} {to}: {seen}")
    assert not bad, "\n".join(bad)
