"""What a run writes down and shows while it trains: its settings, ledger, metrics, events, and a line for the reader.

Rank zero writes; the other ranks have a recorder that only keeps the meter of speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from encoder.base.errors import ShardError
from encoder.base.files import write_atomic, write_json
from encoder.base.log import say, warn_once
from encoder.base.schema import to_plain
from encoder.base.units import Progress, short_bytes, short_count, short_seconds
from encoder.base.untrusted import read_bytes
from encoder.data.loader import StepData
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.save import Saved
from encoder.engine.engine import StepResult
from encoder.runs.folder import DONE, EVENTS
from encoder.runs.foreign_files import write_run_file
from encoder.runs.ledger import Ledger
from encoder.train.course import Evaluation, Steps
from encoder.train.display import ProgressDisplay
from encoder.train.faults import NOT_FINITE, SPIKE, StepMonitor
from encoder.train.meters import SpeedMeter, bf16_peak, memory_bytes
from encoder.train.quarantine import LostShard
from encoder.train.session import Session, StepAgreement
from encoder.train.start import Started
from encoder.train.tracker import Tracker

_FAULT_TEXTS = {
    NOT_FINITE: "the gradient is not finite, nothing moved",
    SPIKE: "the loss is a spike",
}


class Recorder:
    """The ledger, the tracker and the display of one start."""

    def __init__(self, session: Session, started: Started, display: ProgressDisplay) -> None:
        self._session = session
        self._display = display
        self._has_shown = False
        self.ledger: Ledger | None = None
        self.tracker: Tracker | None = None

        run, world = session.run, session.world
        # the peak is that of bf16: a share of it says nothing of a run in fp32 or fp64
        peak = bf16_peak(session.device) if run.engine.precision in ("bf16", "autocast") else None
        self.speed = SpeedMeter(session.clock, peak=peak and peak * world.size)
        if world.first:
            with session.errors.deferred():
                self._open(started)
        session.errors.agree()

    def _open(self, started: Started) -> None:
        session, run = self._session, self._session.run
        write_run_file(session.folder, run)
        # an export needs no shards
        write_atomic(
            session.folder / TOKENIZER, read_bytes(session.course.tokenizer_json, error=ShardError)
        )
        origin = session.course.origin()
        self.ledger = Ledger(
            session.folder, resumed_at=session.progress, parent=origin.get("parent")
        )
        self.tracker = Tracker(
            session.folder,
            run.tracking,
            clock=session.clock,
            start=started.incarnation,
            run_name=run.name,
            settings=to_plain(run),
        )
        about = session.course.about(parameters=session.engine.parameter_count)
        self.tracker.event(
            "resume" if started.resumed else "start",
            step=session.progress.step,
            ranks=session.world.size,
            began=round(session.clock.began, 3),
            zero_stage=run.engine.zero_stage,
            precision=run.engine.precision,
            about=about,
            **origin,
        )

    def step(
        self,
        data: StepData,
        result: StepResult,
        *,
        lr: float,
        agreed: StepAgreement,
        fault: str,
        monitor: StepMonitor,
    ) -> None:
        """A step's line in the ledger and in the metrics, and what the reader sees.

        data: this rank's batches, and the rows and tokens of the step
        result: what the step did
        lr: its learning rate
        agreed: what all ranks knew before it
        fault: what was bad, or ""
        monitor: how many bad steps there were in a row
        """
        progress, phase = self._session.progress, self._session.phase

        # a step that is left out, or that asks nothing, takes no time worth a rate
        computed = agreed.predicts and not monitor.is_left_out(progress.step)
        if computed:
            self.speed.step(data.tokens, agreed.flops)
        if not agreed.predicts:
            self._say_nothing_masked(data)

        if self.ledger:
            self.ledger.write(
                progress,
                phase=phase.name,
                rows=data.rows,
                tokens=data.tokens,
                masked_tokens=agreed.masked_tokens,
                batch_hash=agreed.batch_hash,
                fault=fault,
                other_targets=agreed.other_targets,
            )
        if fault:
            self._bad_step(result, fault, monitor)
        memory = memory_bytes(self._session.device)
        if self.tracker:
            self.tracker.metrics(
                progress.step,
                phase=phase.name,
                tokens=progress.tokens,
                loss=_finite(result.loss),
                **_by_term(result),
                lr=lr,
                rows=data.rows,
                step_tokens=data.tokens,
                fill=round(data.fill, 4),
                grad_norm=_finite(result.grad_norm),
                tokens_per_second=round(self.speed.tokens_per_second, 1),
                tflops_per_second=round(self.speed.tflops_per_second, 6),
                memory_bytes=memory,
                **self._mfu(),
            )
        self._show(data, result, lr=lr, memory=memory)

    def _mfu(self) -> dict[str, float]:
        if self.speed.mfu is None:
            return {}
        return {"mfu": round(self.speed.mfu, 4)}

    def _bad_step(self, result: StepResult, fault: str, monitor: StepMonitor) -> None:
        progress, phase = self._session.progress, self._session.phase
        if self.tracker:
            self.tracker.event(
                "bad_step",
                step=progress.step,
                fault=fault,
                in_a_row=monitor.in_a_row,
                loss=_finite(result.loss),
                grad_norm=_finite(result.grad_norm),
            )
        again = ""
        if monitor.is_recorded(progress.step):
            again = ", says the ledger"
        say(
            f"step {progress.step:>6}  {phase.name}  bad: {_FAULT_TEXTS[fault]}{again}  loss"
            f" {result.loss:.3f}  gradient norm {result.grad_norm:.3g}  {monitor.in_a_row} in a row"
        )

    def _show(self, data: StepData, result: StepResult, *, lr: float, memory: int) -> None:
        progress, speed = self._session.progress, self.speed

        # of this phase and those to come; a phase's last step may pass its end
        left = self._session.course.tokens_left(progress)
        mfu = self._mfu()
        computing = f"{speed.tflops_per_second:.4g} TFLOP/s"
        if mfu:
            computing = f"mfu {mfu['mfu']:.0%}"
        columns = [
            f"step {progress.step:>6}",
            self._session.phase.name,
            f"{short_count(progress.tokens):>7} tokens",
            f"loss {result.loss:.3f}{_terms_text(result.means)}",
            f"lr {lr:.2e}",
            f"batch {short_count(data.tokens)}",
            f"{short_count(speed.tokens_per_second)} tok/s",
            computing,
            f"waiting {speed.waiting_share:.0%}",
            short_bytes(memory),
            f"left {short_seconds(speed.seconds_for(left))}",
        ]
        # the first step of a phase or of a start, which a person waits to see, and the last one
        self._display.show(
            "  ".join(columns),
            step=progress.step,
            share=progress.tokens / (progress.tokens + left),
            now=progress.phase_step == 1 or not self._has_shown or left == 0,
        )
        self._has_shown = True

    def _say_nothing_masked(self, data: StepData) -> None:
        step = self._session.progress.step
        warn_once(
            f"step {step} has no masked token in its {data.tokens:,} tokens: it moves nothing, and"
            f" the run goes on. {EVENTS} has every such step; a larger batch_tokens or mask_share"
            " makes them rarer"
        )
        if self.tracker:
            self.tracker.event("nothing_asked", step=step, tokens=data.tokens)

    def epochs(self, loader: Steps, data: StepData) -> None:
        """The sources of which an epoch began in a step."""
        # an epoch begins with a window: within one nothing is looked up
        windows_before = [window for window, _ in data.start.lanes]
        windows_after = [window for window, _ in data.end.lanes]
        if self.tracker is None or windows_before == windows_after:
            return
        before = loader.epochs_at(data.start)
        step = self._session.progress.step
        for source, epochs in loader.epochs_at(data.end).items():
            if int(epochs) > int(before[source]):
                say(f"step {step:>6}  epoch {int(epochs) + 1} of {source} begins")
                self.tracker.event("epoch", step=step, source=source, epoch=int(epochs) + 1)

    def evaluated(self, evaluation: Evaluation) -> None:
        """The numbers of an evaluation, said and written."""
        session, progress = self._session, self._session.progress
        for warning in evaluation.warnings:
            warn_once(warning)
        say(f"step {progress.step:>6}  {evaluation.text}")
        if self.tracker:
            with session.errors.deferred():
                self.tracker.metrics(
                    progress.step,
                    phase=session.phase.name,
                    tokens=progress.tokens,
                    **{name: _finite(value) for name, value in evaluation.numbers.items()},
                )

    def shard_lost(self, lost: LostShard) -> None:
        """A shard that is left out from now on."""
        warn_once(
            f"{lost.file} of source {lost.source} is left out from step {lost.from_step} on,"
            f" {lost.documents:,} documents of {short_count(lost.tokens)} tokens an epoch:"
            f" {lost.reason}"
        )
        if self.tracker:
            values = dataclasses.asdict(lost)
            self.event("quarantine", step=values.pop("from_step"), **values)

    def saved(self, saved: Saved, *, stall_seconds: float) -> None:
        """A checkpoint that was committed, and how long training waited for it."""
        p = saved.progress
        end = ""
        if saved.milestone:
            end = f", the end of {saved.milestone}"
        say(
            f"step {self._session.progress.step:>6}  saved {saved.path.name} (step {p.step}{end}):"
            f" {short_bytes(saved.bytes)} in {short_seconds(saved.seconds)}, training waited"
            f" {short_seconds(stall_seconds)}"
        )
        self.event(
            "checkpoint",
            step=p.step,
            tokens=p.tokens,
            name=saved.path.name,
            bytes=saved.bytes,
            seconds=round(saved.seconds, 3),
            stall_seconds=round(stall_seconds, 3),
        )

    def went_back(self, weights: Progress, name: str) -> None:
        """After bad steps: the weights are again those of an earlier step."""
        progress = self._session.progress
        say(
            f"step {progress.step:>6}  back to the weights of step {weights.step} ({name}); the"
            " data go on behind the bad steps"
        )
        with self._session.errors.deferred():
            if self.ledger:
                self.ledger.write_back(progress, weights_of_step=weights.step)
        self.event("back", step=progress.step, weights_of_step=weights.step, name=name)

    def done(self, last_evaluation: dict[str, Any], beside: dict[str, Any]) -> None:
        """The run is at its end.

        last_evaluation: its numbers, and its step
        beside: what the course says of its end
        """
        session, p = self._session, self._session.progress
        # rank zero
        if self.ledger is not None and self.tracker is not None:
            with session.errors.deferred():
                self.ledger.sync()
                self.tracker.event("done", step=p.step, tokens=p.tokens)
                results = {key: value for key, value in last_evaluation.items() if key != "step"}
                write_json(
                    session.folder / DONE,
                    {
                        "step": p.step,
                        "tokens": p.tokens,
                        "ledger_hash": p.ledger_hash,
                        **beside,
                        **results,
                    },
                )
        session.errors.agree()
        say(f"done: {p.step} steps, {short_count(p.tokens)} tokens, ledger {p.ledger_hash}")
        for line in session.course.what_comes_next():
            say(line)

    def event(self, what: str, **values: Any) -> None:
        """A line of the events, on rank zero."""
        if self.tracker:
            with self._session.errors.deferred():
                self.tracker.event(what, **values)

    def close(self) -> None:
        """Files closed; safe after any error, also on a full disk, which was said already."""
        for writer in (self.ledger, self.tracker):
            if writer:
                with contextlib.suppress(OSError):
                    writer.close()


def _by_term(result: StepResult) -> dict[str, float | None]:
    """The mean of each of several loss terms."""
    if len(result.means) == 1:
        return {}
    return {f"loss_{name}": _finite(mean) for name, mean in result.means.items()}


def _terms_text(means: Mapping[str, float]) -> str:
    """` (mlm 6.904, nsp 0.341)` of several loss terms, before their weights."""
    if len(means) == 1:
        return ""
    parts = [f"{name} {mean:.3f}" for name, mean in means.items()]
    return f" ({', '.join(parts)})"


def _finite(value: float) -> float | None:
    if math.isfinite(value):
        return value
    return None
