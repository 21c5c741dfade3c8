"""Trains the points of sweeps in a few processes, each of which trains many; a failing point is told, and the others go on.

    this process                             a worker (worker.py), one for each of --parallel
    Board: which point is next   -- order ->  trains it; its lines go to POINT/point.log
    a line for the reader        <- answer -  done, stopped, busy, or failed with a reason

A signal goes on to the workers, which save and leave. A worker that dies takes its point with it, no other one.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from encoder.base.files import write_atomic
from encoder.base.log import note, say
from encoder.base.schema import to_yaml
from encoder.base.stopping import STOP_SIGNALS
from encoder.base.units import counted, short_seconds
from encoder.finetune.sweeps.board import Board, Job, Part
from encoder.finetune.sweeps.points import MARK, Sweep
from encoder.finetune.sweeps.results import FAILED, result_of
from encoder.finetune.sweeps.worker import LOG

LOOK_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a start of some sweeps ended."""

    done: int  # points, those of earlier starts counted
    failed: int
    defects: int  # of those that failed: by no mistake of the input
    elsewhere: int  # points of the choice that are with other parts
    signal: int = 0  # that stopped it; 0: none

    @property
    def code(self) -> int:
        """The exit code: 0 all are done; 2 all that failed are mistakes of the input; 1 others; 128 and the signal."""
        if self.signal:
            return 128 + self.signal
        if self.defects:
            return 1
        return 2 if self.failed else 0


def run_sweeps(sweeps: Sequence[Sweep], *, parallel: int = 1, part: Part | None = None) -> Ended:
    """Trains all points that are not done; goes on where an earlier start stood.

    sweeps: each behind the one that it comes after
    parallel: processes at a time
    part: of the points that are this start's; None: all are
    """
    board = Board(sweeps, part=part)
    for sweep in sweeps:
        sweep.out.mkdir(parents=True, exist_ok=True)
        write_atomic(sweep.out / MARK, to_yaml(sweep.config))
    crew = _Crew(board, parallel=parallel)
    try:
        crew.work()
    finally:
        crew.close()
    return Ended(
        done=len(board.done),
        failed=len(board.failed),
        defects=crew.defects,
        elsewhere=board.elsewhere if part else 0,
        signal=crew.signal,
    )


class _Worker:
    """A process that trains points, and the point that it is at."""

    def __init__(self, number: int, *, count: int) -> None:
        ear, mouth = os.pipe()
        words = ["-m", "encoder.finetune.sweeps.worker", str(mouth), str(number), str(count)]
        # before torch starts: its CPU tensors on huge pages, 7 to 12 % more tokens a second
        env = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ}
        self.process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.PIPE, pass_fds=[mouth], env=env, text=True
        )
        os.close(mouth)
        self.answers = os.fdopen(ear, encoding="utf-8")
        self.number = number
        self.job: Job | None = None
        self.began = 0.0

    def order(self, job: Job | None) -> None:
        """A point to train; None: that was all."""
        order: dict[str, Any] | None = None
        if job is not None:
            self.job, self.began = job, time.monotonic()
            order = {
                "folder": str(job.point.folder),
                "base": job.sweep.config.base,
                "overrides": job.sweep.overrides(job.point, start_from=job.start_from),
            }
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            # it is gone: read as the end of its answers
            pass

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)


class _Crew:
    """The workers of a start."""

    def __init__(self, board: Board, *, parallel: int) -> None:
        self.board, self._parallel = board, parallel
        self.defects = 0
        self.signal = 0
        self._workers: dict[int, _Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in STOP_SIGNALS
            # nohup's stays ignored; a shell's & shields from the keyboard alone
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }

    def work(self) -> None:
        """Until no point is left, or a signal came and all workers have left."""
        waits_aloud = False
        while True:
            if not self.signal:
                self._hand_out()
            busy = [worker for worker in self._workers.values() if worker.job]
            if self.signal and not self._workers:
                return
            if not busy and not self.signal:
                if not self.board.waits:
                    return
                if not waits_aloud:
                    note("waits for points that another process trains")
                    waits_aloud = True
            for key, _ in self._selector.select(LOOK_SECONDS):
                self._hear(key.data)
            if not self._workers:
                time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """All workers have left."""
        for worker in self._workers.values():
            worker.order(None)
        for worker in self._workers.values():
            worker.process.wait()
            worker.answers.close()
        self._selector.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_out(self) -> None:
        """A point for each worker without one, and new workers as long as there are points."""
        for number in range(self._parallel):
            worker = self._workers.get(number)
            if worker is not None and worker.job is not None:
                continue
            job = self.board.take()
            if job is None:
                return
            if worker is None:
                worker = self._workers[number] = _Worker(number, count=self._parallel)
                self._selector.register(worker.answers, selectors.EVENT_READ, worker)
            say(f"begins   {job.name}   {job.point.folder / LOG}")
            worker.order(job)

    def _hear(self, worker: _Worker) -> None:
        line = worker.answers.readline()
        if not line:
            self._has_left(worker)
            return
        answer = json.loads(line)
        job, worker.job = worker.job, None
        assert job is not None, "who answers has had an order"
        seconds = time.monotonic() - worker.began
        ended = answer["ended"]
        if ended == "busy":
            self.board.is_busy(job)
        elif ended == "stopped":
            self.board.put_back(job)
            if not self.signal:
                # by its own time limit, or its process was asked to: it is not tried again in this start
                self._failed(job, "stopped. The same command goes on with it", defect=True)
        elif ended == "failed":
            self._failed(job, answer["failure"], defect=answer["ends"])
        else:
            self.board.ended(job)
            # what an earlier start has left
            (job.point.folder / FAILED).unlink(missing_ok=True)
            self._say_done(job, seconds)

    def _has_left(self, worker: _Worker) -> None:
        """A worker's end: asked for, after a fault of its point, or its death."""
        self._selector.unregister(worker.answers)
        worker.answers.close()
        del self._workers[worker.number]
        code = worker.process.wait()
        if worker.job is None:
            return
        if self.signal:
            self.board.put_back(worker.job)
            return
        self._failed(worker.job, _death(code, worker.job.point.folder), defect=True)

    def _failed(self, job: Job, text: str, *, defect: bool) -> None:
        self.board.ended(job, failure=text)
        self.defects += defect
        note(f"error: {job.name}: {text}")

    def _say_done(self, job: Job, seconds: float) -> None:
        judge = job.sweep.judge
        value = result_of(job.point).number(judge)
        shown = "no number" if value is None else f"{value:.4f}"
        own = [point for sweep in self.board.sweeps for point in self.board.own(sweep)]
        done = sum(point.folder in self.board.done for point in own)
        say(
            f"done     {job.name}   {judge.text} {shown}   {short_seconds(seconds)}"
            f"   {done} of {counted(len(own), 'point')}"
        )

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """The same signal for the workers: a second one ends them at once."""
        if not self.signal:
            note(
                f"{signal.Signals(number).name}: the points under way finish their step and save; a"
                " second one ends them at once"
            )
        self.signal = self.signal or number
        for worker in self._workers.values():
            if worker.job is None:
                worker.order(None)
            worker.send(number)


def _death(code: int, folder: Path) -> str:
    """Why a worker may have died, in words."""
    if code == 3:
        return f"it hung: {folder / 'hangs'} says where"
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name} (of memory, perhaps). See {folder / LOG}"
    return f"its process ended with exit code {code}. See {folder / LOG}"
