"""A training that is shown while it runs, and killed in its middle as a power cut would."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.runs.folder import CHECKPOINTS, EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from launch.shown_commands import ShownCommands, check_code, say, timed

LOOK_SECONDS = 0.3
# done again after a resume, so that there is something to compare
STEPS_BEYOND_CHECKPOINT = 3


@dataclass(frozen=True, kw_only=True)
class Training:
    """A command that trains, and what is known of its run."""

    command: str
    run: Path  # the run folder
    log: Path  # takes what the ranks say
    tokens: int  # of the whole run


def train(training: Training, shell: ShownCommands, *, kill_at: float | None = None) -> int:
    """Runs a training to its end, or kills it; returns the last step in its ledger. Raises UserError where it fails.

    training: the command and its run.
    shell: where it runs.
    kill_at: share of the tokens at which every process gets SIGKILL; None: never.
    """
    shell.show(training.command)
    with timed(), open(training.log, "ab") as log, _display(training.tokens) as show:
        process = subprocess.Popen(
            shlex.split(training.command),
            env=shell.env,
            cwd=shell.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _watch(process, training, kill_at, show)
        except BaseException:
            # Ctrl-C, too: no rank goes on in the background
            kill_tree(process.pid)
            raise
    lines = read_jsonl(training.run / LEDGER)
    return lines[-1]["step"] if lines else 0


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it, parents first so that no launcher can tidy up."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def _watch(
    process: subprocess.Popen, training: Training, kill_at: float | None, show: Callable[..., None]
) -> None:
    """Shows how it stands until it ends or is killed."""
    while process.poll() is None:
        time.sleep(LOOK_SECONDS)
        now = _now(training.run)
        if now is None:
            continue
        show(**now)
        if (
            kill_at is not None
            and now["tokens"] >= kill_at * training.tokens
            and _is_beyond_checkpoint(training.run)
        ):
            kill_tree(process.pid)
            process.wait()
            return
    if process.returncode != 0:
        tail = training.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        # what the ranks said went to the log
        print("\n".join(tail), file=sys.stderr)
    check_code(process.returncode, training.command)


def _now(run: Path) -> dict[str, Any] | None:
    """Phase, tokens, losses and speed; None before the first step was written."""
    metrics = merged_metrics(run / METRICS) if (run / METRICS).exists() else []
    trained = [m for m in metrics if m.get("loss") is not None]
    if not trained:
        return None
    held_out = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
    return {
        # the ledger has a line for each step
        "tokens": read_jsonl(run / LEDGER)[-1]["tokens_seen"],
        "phase": trained[-1]["phase"],
        "loss": f"{trained[-1]['loss']:.2f}",
        "held_out": f"{held_out[-1]:.2f}" if held_out else "-",
        "speed": f"{trained[-1]['tokens_per_second']:,.0f}",
    }


def _is_beyond_checkpoint(run: Path) -> bool:
    """Whether some steps were done since the newest save, so that a resume has something to do again."""
    if not any((run / CHECKPOINTS).glob("*/COMMITTED")):
        return False
    saves = [e["step"] for e in read_jsonl(run / EVENTS) if e["event"] == "checkpoint"]
    return (
        bool(saves) and read_jsonl(run / LEDGER)[-1]["step"] >= saves[-1] + STEPS_BEYOND_CHECKPOINT
    )


@contextlib.contextmanager
def _display(tokens: int) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line each tenth elsewhere; gives the function that shows."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console()
    if not console.is_terminal:
        yield _lines(tokens)
        return
    facts = "loss {task.fields[loss]}  held-out {task.fields[held_out]}  {task.fields[speed]} tok/s"
    columns = (
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(30),
        TextColumn("{task.percentage:>3.0f} %  " + facts),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task(
            "training", total=tokens, phase="starting", loss="-", held_out="-", speed="-"
        )
        yield lambda tokens, **facts: bar.update(task, completed=tokens, **facts)


def _lines(total: int) -> Callable[..., None]:
    """A function that says a line for each tenth of the tokens."""
    said = -1

    def show(*, tokens: int, phase: str, loss: str, held_out: str, speed: str) -> None:
        nonlocal said
        if int(10 * tokens / total) > said:
            said = int(10 * tokens / total)
            say(
                f"{phase:<10} {min(1.0, tokens / total):4.0%}  loss {loss}  held-out {held_out} "
                f" {speed} tok/s"
            )

    return show
