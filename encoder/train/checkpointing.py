"""When and what a run saves: in the background while it trains, waited for at ends of phases and before it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoder.base.errors import UserError
from encoder.base.log import say
from encoder.base.schema import to_yaml
from encoder.engine.checkpoint.save import Saved, Saver
from encoder.runs.folder import CHECKPOINTS
from encoder.train.faults import Deadline
from encoder.train.recorder import Recorder
from encoder.train.session import Session
from encoder.train.start import Started, fingerprint


class Checkpointing:
    """The saves of one start."""

    def __init__(
        self,
        session: Session,
        started: Started,
        recorder: Recorder,
        *,
        deadline: Deadline,
        state: Callable[[], dict[str, Any]],
        is_good: Callable[[Path], bool],
    ) -> None:
        """session, started, recorder: of this start
        deadline: is told how long a save takes
        state: what else a checkpoint holds, besides weights, optimizer and progress
        is_good: whether the run could go back to a checkpoint; such a one is kept
        """
        self._session = session
        self._started = started
        self._recorder = recorder
        self._deadline = deadline
        self._state = state
        self._run_yaml = to_yaml(session.run)
        self._stall_seconds = 0.0  # of the save that is under way
        self._saver = Saver(
            session.folder / CHECKPOINTS,
            engine=session.engine,
            incarnation=started.incarnation,
            keep_last=session.run.checkpoints.keep_last,
            is_good=is_good,
        )

    @property
    def ready(self) -> int:
        """This rank's word for a sum over ranks, as Saver.ready: whether its part of a checkpoint is written."""
        return self._saver.ready

    def commit(self) -> None:
        """On every rank, once all are ready."""
        self._committed(self._saver.advance())

    def wait(self) -> None:
        """Until what is being written is committed."""
        self._committed(self._saver.wait())

    def save(self, milestone: str | None = None, *, wait: bool = False) -> None:
        """A checkpoint, with the loss of the fixed batch that a load must give again.

        milestone: the phase whose end it is; it is committed on return, and kept
        wait: commit it before returning
        """
        with self._session.clock.doing("saving"):
            self._save(milestone, wait=wait)

    def _save(self, milestone: str | None, *, wait: bool) -> None:
        session, began = self._session, time.monotonic()
        step = session.progress.step
        session.watchdog.heartbeat(f"saving after step {step}")
        # at most one save is under way
        if self._saver.busy:
            say(f"step {step:>6}  waits for the checkpoint before, which is still being written")
            self.wait()

        # the ledger is durable first: no power cut leaves a checkpoint beyond it
        with session.errors.deferred():
            if self._recorder.ledger:
                self._recorder.ledger.sync()
        session.errors.agree()

        loss = fingerprint(session.course, session.engine, session.device)
        if not math.isfinite(loss):  # the same on all ranks
            where = f"the weights after step {step} give a loss of {loss} on the fixed batch"
            if wait or milestone:
                raise UserError(
                    f"{where}: they are not saved, the checkpoints before them stay."
                    f" {session.course.lower_rate_text(session.progress)}."
                )

            # no reason to end: the steps to come may be judged bad, and the run goes back
            say(f"step {step:>6}  not saved: {where}")
            return

        saved = self._saver.start(
            session.progress,
            run_yaml=self._run_yaml,
            milestone=milestone,
            extra={
                # what a load must give again, then what a resume is held against or goes on with
                "fingerprint_loss": loss,
                "fingerprint_precision": session.run.engine.precision,
                **session.course.to_plain(),
                **self._state(),
            },
        )
        if wait or milestone or not session.run.checkpoints.background:
            # a position that was committed already comes back as saved at once
            saved = saved or self._saver.wait()
        self._stall_seconds = time.monotonic() - began
        self._committed(saved)

    def _committed(self, saved: Saved | None) -> None:
        if saved is not None:
            self._deadline.saved(saved.seconds)
            self._recorder.saved(saved, stall_seconds=self._stall_seconds)

    def close(self) -> None:
        """The writing thread ended; safe after any error."""
        self._saver.close()
