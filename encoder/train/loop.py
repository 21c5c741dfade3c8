"""The training loop: phase after phase, step after step, evaluating and saving on the way.

Course           what it trains on, and how far (course.py)
Trainer          this file: phases and steps
Recorder         ledger, metrics, events, what the reader sees
Checkpointing    saves in the background
Recovery         bad steps, and going back to a good checkpoint
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from encoder.base.agreement import DeferredErrors
from encoder.base.allocator import freed_memory
from encoder.base.command import as_typed
from encoder.base.dist import World, join, leave, sum_over_ranks
from encoder.base.done import is_done
from encoder.base.log import say, warn_once
from encoder.base.stopping import StopFlag
from encoder.base.units import Progress
from encoder.data.loader import StepData
from encoder.engine.engine import StepResult
from encoder.runs.folder import DONE
from encoder.runs.ledger import chain
from encoder.runs.phases import enter_next_phase
from encoder.train import build
from encoder.train.checkpointing import Checkpointing
from encoder.train.course import Course, Phase, Steps
from encoder.train.display import ProgressDisplay, open_display
from encoder.train.faults import OK, Deadline
from encoder.train.hints import how_to_go_on
from encoder.train.meters import Clock
from encoder.train.recorder import Recorder
from encoder.train.recovery import Recovery
from encoder.train.session import Session, StepAgreement
from encoder.train.start import Started, start_run
from encoder.train.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: done, or stopped by a signal or its time limit after saving."""

    done: bool
    progress: Progress | None
    signal: int = 0


class StepOutcome(enum.Enum):
    """What follows from a step."""

    CONTINUE = "continue"
    ROLLED_BACK = "rolled back"  # the data go on elsewhere
    STOP = "stop"  # saved, as it was asked to


def done_already(folder: Path, world: World, *, check: Callable[[], None]) -> Outcome | None:
    """Says so where a run folder's run is at its end; None: it is to be trained. Raises what `check` raises.

    folder: of the run
    world: of this rank
    check: that a finished run is the one that is asked for, by settings and by what is still there of its data
    """
    done, problem = is_done(folder)
    if problem and world.first:
        # this command is that start already
        warn_once(problem.replace("start the run again, and what", "what"))
    if not done:
        return None
    # another run's end is no answer
    check()
    say(
        f"{folder} is done already ({DONE} says so): {as_typed('export', folder, 'OUT')}. For a"
        " new run use out=ANOTHER."
    )
    return Outcome(done=True, progress=None)


def train_course(
    course: Course, world: World, device: torch.device, *, clock: Clock, stop: StopFlag
) -> Outcome:
    """Trains a course to its end, or until a signal or its time limit stops it; goes on from the newest checkpoint.

    course: what the run trains on
    world, device: of this rank
    clock: of this start
    stop: listens already
    """
    run = course.run
    folder = Path(run.out)
    # the watchdog speaks before a collective gives up
    hang_minutes = run.faults.watchdog_minutes
    joined = join(world, device=device, timeout_seconds=max(600.0, 60 * (hang_minutes or 0) + 60))
    watchdog = Watchdog(folder, world, hang_minutes=hang_minutes)
    try:
        with watchdog, contextlib.ExitStack() as held:
            build.check_same_precision(run)
            started = start_run(course, world, device, held)
            started.engine.on_forward = watchdog.still_going
            display = held.enter_context(
                open_display(first_rank=world.first, every_steps=run.tracking.print_every_steps)
            )
            session = Session(
                course=course,
                world=world,
                device=device,
                folder=folder,
                engine=started.engine,
                clock=clock,
                watchdog=watchdog,
                errors=DeferredErrors(world),
                progress=started.progress,
            )
            trainer = Trainer(session, started, display)
            try:
                return trainer.train(stop)
            finally:
                trainer.close()
                # a rank that others have left ends at once
                if not watchdog.peer_failed:
                    started.engine.close()
    finally:
        if joined:
            leave(peer_failed=watchdog.peer_failed)


class Trainer:
    """A run under way: its phases and steps."""

    def __init__(self, session: Session, started: Started, display: ProgressDisplay) -> None:
        self.session, self.course = session, session.course
        self.lock = started.lock
        self.last_evaluation = started.last_evaluation
        self.deadline = Deadline(
            session.run.faults.max_hours, started=session.clock.began, env=os.environ
        )
        self.time_is_up = False
        self.save_is_due = False
        self.stop_agreed = False  # by all ranks, in the last step

        self.recorder = Recorder(session, started, display)
        self.recovery = Recovery(session, self.recorder, bad_steps=started.bad_steps)
        self.checkpointing = Checkpointing(
            session,
            started,
            self.recorder,
            deadline=self.deadline,
            state=self._state,
            is_good=self.recovery.is_good,
        )

    def train(self, stop: StopFlag) -> Outcome:
        """Phase after phase; a phase that went back is opened again at another place of its data."""
        if self.lock:
            stop.on_asked = self.lock.say_ending
        self.course.announce()
        while (phase := self.course.phase_at(self.session.progress)) is not None:
            outcome = self._train_phase(phase, stop)
            if outcome is StepOutcome.ROLLED_BACK:
                continue
            if outcome is StepOutcome.STOP:
                return self._stopped(stop)
            self._end_phase(phase)
            # asked to stop in the phase's last step, whose end is saved; after the last phase the
            # run is done all the same
            if self.stop_agreed and self.course.phase_at(self.session.progress) is not None:
                return self._stopped(stop)
        self.session.watchdog.heartbeat("finishing")
        beside = self.course.finish(self.session.engine, self.session.progress)
        self.recorder.done(self.last_evaluation, beside)
        return Outcome(done=True, progress=self.session.progress)

    def _train_phase(self, phase: Phase, stop: StopFlag) -> StepOutcome:
        """Its steps, from where the run stands."""
        session = self.session
        session.watchdog.heartbeat(f"opening phase {phase.name}")
        session.clock.turn_to("starting")
        say(f"phase {self.course.describe(session.progress)}")
        session.engine.module.set_phase_(phase.model)

        with self._open_data() as loader:
            # a resume within the phase has its first evaluation behind it
            if session.progress.phase_step == 0:
                self._begin_phase()
            session.clock.turn_to("training")
            stop.begin()

            while not self.course.is_done(session.progress):
                outcome = self._train_step(loader, stop)
                if outcome is not StepOutcome.CONTINUE:
                    return outcome
        return StepOutcome.CONTINUE

    def _train_step(self, loader: Steps, stop: StopFlag) -> StepOutcome:
        """One step of training, and what is due after it."""
        session, monitor = self.session, self.recovery.monitor
        before, step = session.progress, session.progress.step + 1
        session.watchdog.heartbeat(f"in step {step}")
        data = self._next_batch(loader)
        agreed = self._agree(data, stop)
        assert data is not None, "who has no batch has met an error, and all left with it"
        # asked during the step before, which is done: its batch is the next start's first. A run
        # without any step has nothing to save, and trains one
        if agreed.stop and before.step > 0:
            return self._save_and_stop()

        # the update
        update = self.course.update(before, data)
        # not finite the first time: computing it again could move the weights where it did not then
        if monitor.is_left_out(step):
            result = _left_out(agreed.counts)
        else:
            result = session.engine.step(
                data.micro_batches,
                counts=agreed.counts,
                lr=update.lr,
                max_lr=update.max_lr,
                weight_decay=update.weight_decay,
            )

        # a step that predicts nothing is neither good nor bad: the ledger's count of masked tokens tells it
        fault = OK
        if agreed.predicts:
            fault = monitor.classify(step, loss=result.loss, applied=result.applied)

        session.progress = _after(before, data, agreed, fault)
        with session.errors.deferred():
            self.recorder.step(
                data, result, lr=update.lr, agreed=agreed, fault=fault, monitor=monitor
            )
            self.recorder.epochs(loader, data)

        if monitor.must_go_back:
            session.clock.turn_to("starting")
            self.recovery.go_back(result, wait_for_save=self.checkpointing.wait)
            return StepOutcome.ROLLED_BACK
        freed_memory.give_back()
        return self._evaluate_and_save(before, agreed)

    def _evaluate_and_save(self, before: Progress, agreed: StepAgreement) -> StepOutcome:
        """What is due after a good or a skipped step."""
        progress = self.session.progress
        if self.course.evaluation_is_due(before, progress):
            self.evaluate()
        # the end of a phase saves by itself
        ended = self.course.is_done(progress)
        if agreed.stop and not ended:
            return self._save_and_stop()
        # by the course's clock, or for a going-back that the ledger has later
        if self.course.save_is_due(before, progress) or self.recovery.wants_save(progress.step):
            self.save_is_due = True
        # amid bad steps it stays due: a checkpoint that a run may go back to follows a good one
        if self.save_is_due and not ended and not self.recovery.monitor.in_a_row:
            self.save()
            self.save_is_due = False
        return StepOutcome.CONTINUE

    def _save_and_stop(self) -> StepOutcome:
        if self.lock:
            self.lock.say_ending()
        self.save(wait=True)
        return StepOutcome.STOP

    def _begin_phase(self) -> None:
        """At its first step."""
        self.recovery.monitor.new_phase()
        if self.course.evaluation_begins(self.session.progress):
            self.evaluate()

    def _end_phase(self, phase: Phase) -> None:
        """Its evaluation and its checkpoint, which is kept."""
        self.evaluate()
        # the checkpoint stands at the beginning of the next phase, where a resume begins
        self.session.progress = enter_next_phase(self.session.progress)
        self.save(milestone=phase.name)
        self.save_is_due = False

    def _open_data(self) -> Steps:
        """The phase's steps and what is evaluated, on all ranks or on none."""
        steps: Steps | None = None
        with self.session.errors.deferred():
            steps = self.course.open_data(self.session, self.recorder)

        self.session.errors.agree()
        assert steps is not None, "who could not open them has met an error, and all left with it"
        return steps

    def _next_batch(self, loader: Steps) -> StepData | None:
        with self.session.clock.doing("waiting"), self.session.errors.deferred():
            return loader.next_step()
        return None

    def _agree(self, data: StepData | None, stop: StopFlag) -> StepAgreement:
        """What all ranks know of a step before it, by one all-reduce. Raises what a rank has met."""
        session = self.session
        terms = session.engine.objective.terms
        # one vector for one all-reduce: targets of each loss term, hash, FLOP, then four flags.
        # a rank without a batch sends zeros and its error flag; all leave together below
        counts = [data.counts[term] if data else 0 for term in terms]
        mine = [0, 0]
        if data:
            # as long as documents are; padding is no work
            mine = [data.row_hash, int(sum(self.course.flops(b) for b in data.micro_batches))]
        # rank zero's clock alone decides: clocks of machines differ
        time_is_near = session.world.first and self.deadline.is_near()
        flags = [
            stop.asked,
            session.errors.first is not None,
            self.checkpointing.ready,
            time_is_near,
        ]
        summed = sum_over_ranks(
            torch.tensor([*counts, *mine, *flags], dtype=torch.int64, device=session.device)
        ).tolist()

        # int64 sums wrap: the sum of the rows' hashes does not depend on the dealing
        batch_hash, flops, stops, errors, saves_ready, time_is_up = summed[len(terms) :]
        if errors:
            session.errors.agree()
        # a failed write counts for all ranks, so that all go to meet it (Saver.ready)
        if saves_ready >= session.world.size:
            self.checkpointing.commit()
        self.time_is_up = time_is_up > 0
        self.stop_agreed = stops > 0 or self.time_is_up
        return StepAgreement(
            counts=dict(zip(terms, summed)),
            batch_hash=batch_hash,
            flops=flops,
            stop=self.stop_agreed,
        )

    def evaluate(self) -> None:
        """What the course evaluates; nothing twice at one step of a phase."""
        session, progress = self.session, self.session.progress
        # at the start of a phase the step is the same, but length and thetas are others
        if self.last_evaluation.get("step") == progress.step and progress.phase_step:
            return
        session.watchdog.heartbeat(f"evaluating after step {progress.step}")
        with session.clock.doing("evaluating"):
            found = self.course.evaluate(session.engine, progress)
        if found is None:
            return
        finite = {
            name: value if math.isfinite(value) else None for name, value in found.numbers.items()
        }
        self.last_evaluation = {"step": progress.step, **finite}
        self.recorder.evaluated(found)
        # amid bad steps nothing is saved, so these weights could not be kept; the end is saved always
        is_saved = self.course.is_done(progress) or not self.recovery.monitor.in_a_row
        if is_saved and self.course.keeps(found, progress):
            self.save_is_due = True

    def save(self, milestone: str | None = None, *, wait: bool = False) -> None:
        """A checkpoint; a milestone, and one that is waited for, is committed on return."""
        # a checkpoint on the way shows that the run got on after going back; one to stop does not
        if not wait:
            self.recovery.monitor.went_back = False
        self.checkpointing.save(milestone, wait=wait)

    def _state(self) -> dict[str, object]:
        """What a checkpoint holds of the loop."""
        return {
            "last_held_out": self.last_evaluation,
            "bad_steps": self.recovery.monitor.to_plain(),
        }

    def _stopped(self, stop: StopFlag) -> Outcome:
        session, progress = self.session, self.session.progress
        if self.time_is_up and not stop.asked:
            number, name = 0, f"its time limit ({self.deadline.of})"
            cause: dict[str, str | int] = {"limit": self.deadline.of}
        else:
            number = stop.signal or signal.SIGTERM
            name = stop.cause or signal.Signals(number).name
            cause = {"signal": int(number)}
        say(
            f"stopped by {name} after step {progress.step};"
            f" {how_to_go_on(session.folder, session.world, verb=self.course.verb)}"
        )
        if self.recorder.tracker:
            self.recorder.tracker.event("stopped", step=progress.step, **cause)
        return Outcome(done=False, progress=progress, signal=int(number))

    def close(self) -> None:
        """Threads and files closed; safe after any error."""
        self.checkpointing.close()
        self.recorder.close()


def _after(before: Progress, data: StepData, agreed: StepAgreement, fault: str) -> Progress:
    """The progress after a step, with the next link of the ledger's chain."""
    step, tokens = before.step + 1, before.tokens + data.tokens
    link = chain(
        before.ledger_hash,
        step=step,
        tokens=tokens,
        masked_tokens=agreed.masked_tokens,
        batch_hash=agreed.batch_hash,
        fault=fault,
        other_targets=agreed.other_targets,
    )
    return dataclasses.replace(
        before,
        step=step,
        tokens=tokens,
        phase_step=before.phase_step + 1,
        phase_tokens=before.phase_tokens + data.tokens,
        masked_tokens=before.masked_tokens + agreed.masked_tokens,
        lanes=data.end.lanes,
        ledger_hash=link,
    )


def _left_out(counts: Mapping[str, int]) -> StepResult:
    """A step that moved nothing the first time, too."""
    return StepResult(
        loss=math.nan, grad_norm=math.inf, applied=False, means=dict.fromkeys(counts, math.nan)
    )
