"""The story of a run: build, resume, then step by step through the phases, evaluating and saving on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from encoder.base.agreement import agree_on_errors
from encoder.base.command import as_user_error
from encoder.base.dist import World, join, leave, sum_over_ranks, watched
from encoder.base.done import is_done
from encoder.base.errors import CheckpointError, ShardError, UserError
from encoder.base.files import write_atomic, write_json
from encoder.base.log import outlive_readers, say, warn_once
from encoder.base.schema import to_plain, to_yaml
from encoder.base.stopping import StopFlag
from encoder.base.units import Progress, short_bytes, short_count, short_seconds
from encoder.base.untrusted import read_bytes
from encoder.data.loader import DataPosition, StepData
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import committed_folders
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.engine.checkpoint.save import Saved, Saver
from encoder.engine.engine import StepResult
from encoder.engine.precision import precision_on
from encoder.runs.about import about_run
from encoder.runs.checks import check_settings
from encoder.runs.config import RunConfig, describe_phase, with_engine
from encoder.runs.defaults import settled
from encoder.runs.epochs import count_repeats, many_epochs_text, repeats_text
from encoder.runs.facts import DataFacts, check_data, fetch_cards, named_sources, source_name
from encoder.runs.folder import CHECKPOINTS, DONE, EVENTS, LEDGER
from encoder.runs.foreign_files import write_run_file
from encoder.runs.initial import read_initial
from encoder.runs.ledger import Ledger, chain, chain_back
from encoder.runs.phases import current_phase, enter_next_phase, lr_at, phase_is_done
from encoder.runs.same import check_same_run
from encoder.train import build
from encoder.train.console import Board, open_board
from encoder.train.evaluate import HeldOut, held_out_numbers
from encoder.train.faults import FINE, NOT_FINITE, SPIKE, Deadline, StepJudge
from encoder.train.feed import Feed, LostShard
from encoder.train.hints import how_to_go_on, what_comes_next
from encoder.train.meters import Clock, SpeedMeter, bf16_peak, document_lengths, memory_bytes
from encoder.train.recorder import Tracker
from encoder.train.start import Started, fingerprint, load_verified, start_run
from encoder.train.watch import Watch

_FAULT_TEXTS = {NOT_FINITE: "the gradient is not finite, nothing moved", SPIKE: "the loss is a spike"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: done, or stopped by a signal or its time limit after saving."""

    done: bool
    progress: Progress | None
    signal: int = 0


@dataclass(frozen=True, kw_only=True)
class StepAgreement:
    """What all ranks know of a step before it."""

    counts: dict[str, int]      # targets of each loss term, over all ranks
    batch_hash: int             # int64, of all rows
    flops: int                  # model FLOP, over all ranks
    stop: bool                  # a rank was asked to stop, or rank zero's time is up: save after this step

    @property
    def masked_tokens(self) -> int:
        """Targets of the first loss term, as ledger and progress count them."""
        return next(iter(self.counts.values()))

    @property
    def other_targets(self) -> dict[str, int]:
        """Targets of the other loss terms."""
        return dict([*self.counts.items()][1:])


def pretrain(run: RunConfig, world: World, *, stop: StopFlag | None = None) -> Outcome:
    """Trains a run to its end, or until a signal or its time limit stops it; goes on from the newest checkpoint in `run.out`.

    `stop`: a flag that listens already; None: one that listens from here to the end. Raises UserError.
    """
    if stop is None:
        with StopFlag() as stop:
            return pretrain(run, world, stop=stop)
    outlive_readers()
    with watched(world):
        return _pretrain(run, world, stop)


def _pretrain(run: RunConfig, world: World, stop: StopFlag) -> Outcome:
    folder, clock = Path(run.out), Clock(began=psutil.Process().create_time())
    run.tracking.check_packages()
    check_same_run(run, folder)
    done, problem = is_done(folder)
    if problem and world.first:
        warn_once(problem.replace("start the run again, and what", "what"))
    if done:
        say(f"{folder} is done already ({DONE} says so). For a new run use out=ANOTHER_FOLDER.")
        return Outcome(done=True, progress=None)
    fetch_cards(run, world)
    run = settled(run)
    facts = check_data(run)
    known = check_settings(run)
    run = named_sources(run)
    fresh = run.init_from and not committed_folders(folder / CHECKPOINTS)
    initial = read_initial(run, facts, hashed=world.first) if fresh else None
    device = build.choose_device(run, world)
    run = with_engine(run, precision=precision_on(run.engine.precision, device))
    hang_minutes = run.faults.watchdog_minutes
    # the watch speaks before a collective gives up
    joined = join(world, device=device, timeout_seconds=max(600.0, 60 * (hang_minutes or 0) + 60))
    watch = Watch(folder, world, hang_minutes=hang_minutes)
    try:
        with watch, contextlib.ExitStack() as held:
            build.check_same_precision(run)
            started = start_run(run, facts, world, device, folder, held, initial, known)
            board = held.enter_context(open_board(first_rank=world.first, every_steps=run.tracking.print_every_steps))
            story = _Story(run, facts, world, device, folder, started, watch, clock, board)
            try:
                return story.tell(stop)
            finally:
                story.close()
    finally:
        if joined:
            leave(torn=watch.torn)


class _Story:
    """A run under way: the parts, and where it stands."""

    def __init__(self, run: RunConfig, facts: DataFacts, world: World, device: torch.device, folder: Path,
                 started: Started, watch: Watch, clock: Clock, board: Board) -> None:
        self.run, self.facts, self.world, self.device, self.folder = run, facts, world, device, folder
        self.engine, self.incarnation, self.progress = started.engine, started.incarnation, started.progress
        self.entropy, self.last_held_out, self.init_sha256 = started.entropy, started.last_held_out, started.init_sha256
        self.parent, self.quarantine = started.parent, started.quarantine
        self.lock = started.lock
        self.held_out: list[HeldOut] = []
        self.saver = Saver(folder / CHECKPOINTS, engine=self.engine, incarnation=self.incarnation,
                           keep_last=run.checkpoints.keep_last, is_good=self._is_good)
        self.watch, self.stall_seconds = watch, 0.0      # the stall of the save that is under way
        self.clock, self.board = clock, board
        self.deadline = Deadline(run.faults.max_hours, started=clock.began, env=os.environ)
        self.time_is_up = False
        peak = bf16_peak(device) if run.engine.precision in ("bf16", "autocast") else None
        self.speed = SpeedMeter(clock, peak=peak and peak * world.size)
        self.ledger: Ledger | None = None
        self.tracker: Tracker | None = None
        self.error: UserError | None = None      # met by this rank alone; the others learn of it where all meet next
        if world.first:
            with self.guarded():
                write_run_file(folder, run)
                write_atomic(folder / TOKENIZER, read_bytes(facts.tokenizer_json, error=ShardError))     # an export needs no shards
                self.ledger = Ledger(folder, resumed_at=self.progress, parent=self.parent)
                self.tracker = Tracker(folder, run.tracking, clock=clock, start=self.incarnation, run_name=run.name,
                                       settings=to_plain(run))
                self.tracker.event(
                    "resume" if started.resumed else "start", step=self.progress.step, ranks=world.size,
                    began=round(clock.began, 3), zero_stage=run.engine.zero_stage, precision=run.engine.precision,
                    about=about_run(run, world, device, parameters=self.engine.parameter_count),
                    **({"init_from": run.init_from, "init_sha256": self.init_sha256} if run.init_from else {}),
                    **({"parent": self.parent} if self.parent else {}))
        agree_on_errors(self.error, world)
        recorded = _from_first_rank(self.ledger.recorded() if self.ledger else [], device)
        self.taken_after = {step: weights_of_step for step, _, weights_of_step in recorded if weights_of_step >= 0}
        self.judge = StepJudge(run.faults, recorded={step: fault for step, fault, _ in recorded}, saved=started.bad_steps)

    def tell(self, stop: StopFlag) -> Outcome:
        """Phase after phase, step after step."""
        if self.lock:
            stop.on_asked = self.lock.say_ending
        repeats = count_repeats(self.run)
        say(f"epochs: {repeats_text(repeats)}")
        if many := many_epochs_text(repeats):
            warn_once(many)
        save_is_due = False
        while (phase := current_phase(self.run, self.progress)) is not None:
            self.watch.mark(f"opening phase {phase.name}")
            self.clock.turn_to("starting")
            say(f"phase {describe_phase(self.run, phase)}")
            self.engine.module.set_phase_(phase.model)
            with self.open_data() as loader:
                if self.progress.phase_step == 0:
                    self.judge.new_phase()
                    if self._held_out_changed():
                        self.evaluate()
                self.clock.turn_to("training")
                stop.begin()
                while not phase_is_done(self.run, self.progress):
                    before, step = self.progress, self.progress.step + 1
                    self.watch.mark(f"in step {step}")
                    data = self._next(loader)
                    agreed = self._agree(data, stop)
                    lr = lr_at(phase, phase_tokens=before.phase_tokens, step_tokens=data.tokens)
                    result = _left_out(agreed.counts) if self.judge.is_left_out(step) else self.engine.step(
                        data.micro_batches, counts=agreed.counts, lr=lr, max_lr=phase.max_lr or phase.lr.peak,
                        weight_decay=self.run.weight_decay_of(phase))
                    # a step that predicts nothing is neither fine nor bad: the ledger's count of masked tokens tells it
                    predicts = any(agreed.counts.values())
                    fault = self.judge.judge(step, loss=result.loss, applied=result.applied) if predicts else FINE
                    self.progress = _after(before, data, agreed, fault)
                    with self.guarded():
                        self._record(data, result, lr, agreed, fault)
                        self._record_epochs(loader, data)
                    if self.judge.must_go_back:
                        self.clock.turn_to("starting")
                        self.go_back(result)
                        break
                    if _crossed(before, self.progress, self.run.evaluation and self.run.evaluation.every_tokens):
                        self.evaluate()
                    ended = phase_is_done(self.run, self.progress)
                    if agreed.stop and not ended:
                        if self.lock:
                            self.lock.say_ending()
                        self.save(wait=True)
                        return self._stopped(stop)
                    save_is_due |= (_crossed(before, self.progress, self.run.checkpoints.every_tokens)
                                    or self.progress.step in self.taken_after.values())      # steps done again: to go back to
                    if save_is_due and not ended and not self.judge.in_a_row:
                        self.save()
                        save_is_due = False
            if not phase_is_done(self.run, self.progress):
                continue                 # went back: the data go on elsewhere
            self.evaluate()
            self.progress = enter_next_phase(self.progress)
            self.save(milestone=phase.name)
            save_is_due = False
            if agreed.stop and current_phase(self.run, self.progress) is not None:
                return self._stopped(stop)
        return self._finished()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Keeps a mistake that this rank alone can meet until all ranks meet: nobody leaves others waiting."""
        try:
            yield
        except (UserError, OSError) as error:
            self.error = self.error or as_user_error(error)

    def open_data(self) -> Feed:
        """The phase's held-out batches and its steps, on all ranks or on none."""
        feed, p = None, self.progress
        with self.guarded():
            phase, parts = self.run.phases[p.phase], (self.run, self.facts, self.world, self.device)
            self.held_out = build.make_held_out(*parts, phase)
            feed = Feed(open_loader=lambda at, left_out: build.make_loader(*parts, phase, at, left_out=left_out),
                        names=[source_name(s) for s in self.run.sources_of(phase)], quarantine=self.quarantine,
                        position=DataPosition(lanes=p.lanes, phase_tokens=p.phase_tokens), step=p.step + 1,
                        stops=self.run.loader.on_bad_shard == "stop", lose=self._lose)
        agree_on_errors(self.error, self.world)
        return feed

    def _lose(self, lost: LostShard) -> None:
        """On every rank, before the first step without the shard."""
        warn_once(f"{lost.file} of source {lost.source} is left out from step {lost.from_step} on, {lost.documents:,} documents of "
                  f"{short_count(lost.tokens)} tokens an epoch: {lost.reason}")
        if self.tracker:
            with self.guarded():
                self.quarantine.write()
                values = dataclasses.asdict(lost)
                self.tracker.event("quarantine", step=values.pop("from_step"), **values)

    def evaluate(self) -> None:
        """Held-out loss and accuracy, said and recorded; nothing without an evaluation section, or twice at one step of a phase."""
        if not self.held_out or self.last_held_out.get("step") == self.progress.step and self.progress.phase_step:
            return
        self.watch.mark(f"evaluating after step {self.progress.step}")
        with self.clock.doing("evaluating"):
            numbers = held_out_numbers(self.held_out, self.engine.evaluate)
        whole = numbers["held_out_accuracy"]
        silent = [s.name for s in self.held_out if math.isnan(numbers.get(f"held_out_accuracy_{s.name}", whole))]
        if silent:
            warn_once(f"the held-out rows of {', '.join(silent)} have no masked token, and so no loss. Raise evaluation.rows or "
                      "evaluation.mask_share")
        finite = {k: _finite(v) for k, v in numbers.items()}
        self.last_held_out = {"step": self.progress.step, **finite}
        beside = f" (unigram entropy {self.entropy:.2f})" if self.entropy is not None else ""
        per_source = "".join(f"  {name} {numbers[f'held_out_loss_{name}']:.3f} {numbers[f'held_out_accuracy_{name}']:.1%}"
                             for name in [s.name for s in self.held_out] if len(self.held_out) > 1)
        p = self.progress
        asks = f" as phase {self.run.phases[p.phase].name} asks" if p.step and not p.phase_step else ""
        say(f"step {self.progress.step:>6}  held-out loss{asks} {numbers['held_out_loss']:.3f}{beside} accuracy "
            f"{numbers['held_out_accuracy']:.1%}{per_source}")
        if self.tracker:
            phase = self.run.phases[self.progress.phase].name
            with self.guarded():
                self.tracker.metrics(self.progress.step, phase=phase, tokens=self.progress.tokens, **finite)

    def _held_out_changed(self) -> bool:
        """At the start of a phase: whether the held-out loss is another one than at the end of the phase before."""
        now, before = self.run.phases[self.progress.phase], self.run.phases[max(0, self.progress.phase - 1)]
        decided_by = [(p.max_tokens_per_document, p.model) for p in (now, before)]
        return self.progress.step == 0 or decided_by[0] != decided_by[1]

    def save(self, milestone: str | None = None, *, wait: bool = False) -> None:
        """A checkpoint, with the loss of the fixed batch that a load must give again; a milestone is committed on return."""
        with self.clock.doing("saving"):
            self._save(milestone, wait=wait)

    def _save(self, milestone: str | None, *, wait: bool) -> None:
        began = time.monotonic()
        self.watch.mark(f"saving after step {self.progress.step}")
        if not wait:
            self.judge.went_back = False
        if self.saver.busy:
            say(f"step {self.progress.step:>6}  waits for the checkpoint before, which is still being written")
            self._saved(self.saver.wait())
        with self.guarded():
            if self.ledger:
                self.ledger.sync()
        agree_on_errors(self.error, self.world)
        loss = fingerprint(self.run, self.engine, self.device)
        if not math.isfinite(loss):      # the same on all ranks
            where = f"the weights after step {self.progress.step} give a loss of {loss} on the fixed batch"
            if wait or milestone:
                raise UserError(f"{where}: they are not saved, the checkpoints before them stay. {self._lower_rate()}.")
            say(f"step {self.progress.step:>6}  not saved: {where}")
            return
        saved = self.saver.start(
            self.progress, run_yaml=to_yaml(self.run), milestone=milestone,
            extra={"fingerprint_loss": loss,
                   "fingerprint_precision": self.run.engine.precision,
                   "card_sha256": self.facts.card_sha256, "last_held_out": self.last_held_out,
                   "init_sha256": self.init_sha256, "quarantine": self.quarantine.to_plain(), "parent": self.parent,
                   "bad_steps": self.judge.to_plain()})
        if wait or milestone or not self.run.checkpoints.background:
            saved = saved or self.saver.wait()
        self.stall_seconds = time.monotonic() - began
        self._saved(saved)

    def _saved(self, saved: Saved | None) -> None:
        """Says what was committed, if something was."""
        if saved is None:
            return
        p = saved.progress
        self.deadline.saved(saved.seconds)
        end = f", the end of {saved.milestone}" if saved.milestone else ""
        say(f"step {self.progress.step:>6}  saved {saved.path.name} (step {p.step}{end}): {short_bytes(saved.bytes)} in "
            f"{short_seconds(saved.seconds)}, training waited {short_seconds(self.stall_seconds)}")
        if self.tracker:
            with self.guarded():
                self.tracker.event("checkpoint", step=p.step, tokens=p.tokens, name=saved.path.name, bytes=saved.bytes,
                                   seconds=round(saved.seconds, 3), stall_seconds=round(self.stall_seconds, 3))

    def close(self) -> None:
        """Files closed; safe after any error, also on a full disk, which was said already."""
        self.saver.close()
        for writer in (self.ledger, self.tracker):
            if writer:
                with contextlib.suppress(OSError):
                    writer.close()

    def _next(self, loader: Feed) -> StepData | None:
        with self.clock.doing("waiting"), self.guarded():
            return loader.next_step()
        return None

    def _agree(self, data: StepData | None, stop: StopFlag) -> StepAgreement:
        """What all ranks know of a step before it, by one all-reduce. Raises what a rank has met."""
        terms = self.engine.objective.terms
        counts = [data.counts[term] if data else 0 for term in terms]
        mine = [data.row_hash, self._flops(data)] if data else [0, 0]
        time_is_near = self.world.first and self.deadline.is_near()
        flags = [stop.asked, self.error is not None, self.saver.ready, time_is_near]
        shared = sum_over_ranks(torch.tensor([*counts, *mine, *flags], dtype=torch.int64, device=self.device)).tolist()
        batch_hash, flops, stops, errors, saves_ready, time_is_up = shared[len(terms):]
        if errors:
            agree_on_errors(self.error, self.world)
        if saves_ready >= self.world.size:
            self._saved(self.saver.advance())
        self.time_is_up = time_is_up > 0
        return StepAgreement(counts=dict(zip(terms, shared)), batch_hash=batch_hash, flops=flops,
                             stop=stops > 0 or self.time_is_up)

    def _flops(self, data: StepData) -> int:
        """Model FLOP of this rank's documents as long as they are; padding is no work."""
        return int(sum(self.run.model.train_flops(lengths=document_lengths(b), targets=b.counts) for b in data.micro_batches))

    def _record(self, data: StepData, result: StepResult, lr: float, agreed: StepAgreement, fault: str) -> None:
        p, phase = self.progress, self.run.phases[self.progress.phase]
        predicts = any(agreed.counts.values())
        if predicts and not self.judge.is_left_out(p.step):      # else nothing was computed: no measure of speed
            self.speed.step(data.tokens, agreed.flops)
        if not predicts:
            self._say_nothing_masked(data)
        held = memory_bytes(self.device)
        used = {} if self.speed.mfu is None else {"mfu": round(self.speed.mfu, 4)}
        if self.ledger:
            self.ledger.write(p, phase=phase.name, rows=data.rows, tokens=data.tokens, masked_tokens=agreed.masked_tokens,
                              batch_hash=agreed.batch_hash, fault=fault, other_targets=agreed.other_targets)
        if fault and self.tracker:
            self.tracker.event("bad_step", step=p.step, fault=fault, in_a_row=self.judge.in_a_row, loss=_finite(result.loss),
                               grad_norm=_finite(result.grad_norm))
        if fault:
            again = ", says the ledger" if self.judge.is_recorded(p.step) else ""
            say(f"step {p.step:>6}  {phase.name}  bad: {_FAULT_TEXTS[fault]}{again}  loss {result.loss:.3f}  gradient norm "
                f"{result.grad_norm:.3g}  {self.judge.in_a_row} in a row")
        if self.tracker:
            self.tracker.metrics(p.step, phase=phase.name, tokens=p.tokens, loss=_finite(result.loss), **_by_term(result), lr=lr,
                                 rows=data.rows,
                                 step_tokens=data.tokens, fill=round(data.fill, 4), grad_norm=_finite(result.grad_norm),
                                 tokens_per_second=round(self.speed.tokens_per_second, 1),
                                 tflops_per_second=round(self.speed.tflops_per_second, 6), memory_bytes=held, **used)
        left = max(0, sum(f.tokens for f in self.run.phases[p.phase:]) - p.phase_tokens)
        self.board.show(
            f"step {p.step:>6}  {phase.name}  {short_count(p.tokens):>7} tokens  loss {result.loss:.3f}  lr {lr:.2e}  "
            f"batch {short_count(data.tokens)}  {short_count(self.speed.tokens_per_second)} tok/s  "
            + (f"mfu {used['mfu']:.0%}  " if used else f"{self.speed.tflops_per_second:.4g} TFLOP/s  ") +
            f"waiting {self.speed.waiting_share:.0%}  {short_bytes(held)}  left {short_seconds(self.speed.seconds_for(left))}",
            step=p.step, share=p.tokens / (p.tokens + left), now=p.phase_step == 1)

    def _say_nothing_masked(self, data: StepData) -> None:
        warn_once(f"step {self.progress.step} has no masked token in its {data.tokens:,} tokens: it moves nothing, and the run "
                  f"goes on. {EVENTS} has every such step; a larger batch_tokens or mask_share makes them rarer")
        if self.tracker:
            self.tracker.event("nothing_asked", step=self.progress.step, tokens=data.tokens)

    def _record_epochs(self, loader: Feed, data: StepData) -> None:
        if self.tracker and [w for w, _ in data.start.lanes] != [w for w, _ in data.end.lanes]:
            before = loader.epochs_at(data.start)
            for source, epochs in loader.epochs_at(data.end).items():
                if int(epochs) > int(before[source]):
                    say(f"step {self.progress.step:>6}  epoch {int(epochs) + 1} of {source} begins")
                    self.tracker.event("epoch", step=self.progress.step, source=source, epoch=int(epochs) + 1)

    def go_back(self, result: StepResult) -> None:
        """The weights of the last good checkpoint, and the data from the next window on. The clock of tokens goes on: what was
        trained between is in the ledger, and so is this. Raises UserError, the same on all ranks, the second time in a row."""
        p, step = self.progress, self.progress.step
        self.watch.mark(f"going back after step {step}")
        self._saved(self.saver.wait())
        again, taken = self.judge.went_back, self.taken_after.get(step)
        found = None if again else newest_checkpoint(self.folder / CHECKPOINTS, fits=self._is_good)
        if found is None and taken is not None:
            raise UserError(f"{self.folder / LEDGER} goes back from step {step} to the weights of step {taken}, whose checkpoint "
                            f"is gone or damaged. Put it back, or remove those after step {taken}, so that it is made again.")
        if found is None:
            why = "the run went back once since its last checkpoint" if again else "there is no good checkpoint to go back to"
            raise UserError(
                f"{self.judge.in_a_row} bad steps in a row, and {why}: the loss of step {step} is {result.loss:.4g}, its gradient "
                f"norm {result.grad_norm:.4g}. {self._lower_rate()}, or look at the data of these steps in {self.folder / LEDGER}.")
        weights, _ = load_verified(found, self.run, self.engine, self.device)
        self.engine.module.set_phase_(self.run.phases[p.phase].model)
        lanes = tuple((window + (row > 0), 0) for window, row in p.lanes)
        self.progress = dataclasses.replace(p, lanes=lanes, ledger_hash=chain_back(
            p.ledger_hash, step=step, weights_of_step=weights.step, lanes=lanes))
        self.judge.gone_back()
        say(f"step {step:>6}  back to the weights of step {weights.step} ({found.name}); the data go on at the next window")
        with self.guarded():
            if self.ledger:
                self.ledger.write_back(self.progress, weights_of_step=weights.step)
            if self.tracker:
                self.tracker.event("back", step=step, weights_of_step=weights.step, name=found.name)

    def _lower_rate(self) -> str:
        phase = self.progress.phase
        return (f"Start anew with a lower rate: out=ANOTHER_FOLDER phases.{phase}.lr.peak="
                f"{self.run.phases[phase].lr.peak / 2:g}")

    def _is_good(self, folder: Path) -> bool:
        """Whether the run could go back to a checkpoint: it was made after a fine step; of steps done again, it is the one that
        was taken then."""
        try:
            progress, extra = read_progress(folder)
        except CheckpointError:
            return False
        taken = next((taken for back, taken in sorted(self.taken_after.items()) if back >= self.progress.step), None)
        return extra.get("bad_steps", {}).get("in_a_row", 0) == 0 if taken is None else progress.step == taken

    def _stopped(self, stop: StopFlag) -> Outcome:
        if self.time_is_up and not stop.asked:
            number, name, cause = 0, f"its time limit ({self.deadline.of})", {"limit": self.deadline.of}
        else:
            number = stop.signal or signal.SIGTERM
            name = stop.cause or signal.Signals(number).name
            cause = {"signal": int(number)}
        say(f"stopped by {name} after step {self.progress.step}; {how_to_go_on(self.folder, self.world)}")
        if self.tracker:
            self.tracker.event("stopped", step=self.progress.step, **cause)
        return Outcome(done=False, progress=self.progress, signal=int(number))

    def _finished(self) -> Outcome:
        p = self.progress
        if self.world.first:
            with self.guarded():
                self.ledger.sync()
                self.tracker.event("done", step=p.step, tokens=p.tokens)
                write_json(self.folder / DONE, {
                    "step": p.step, "tokens": p.tokens, "ledger_hash": p.ledger_hash, "unigram_entropy": self.entropy,
                    **{k: v for k, v in self.last_held_out.items() if k != "step"}})
        agree_on_errors(self.error, self.world)
        say(f"done: {p.step} steps, {short_count(p.tokens)} tokens, ledger {p.ledger_hash}")
        for line in what_comes_next(self.run, self.folder):
            say(line)
        return Outcome(done=True, progress=p)


def _after(before: Progress, data: StepData, agreed: StepAgreement, fault: str) -> Progress:
    """The progress after a step, with the next link of the ledger's chain."""
    tokens = before.tokens + data.tokens
    return dataclasses.replace(
        before, step=before.step + 1, tokens=tokens, phase_step=before.phase_step + 1,
        phase_tokens=before.phase_tokens + data.tokens, masked_tokens=before.masked_tokens + agreed.masked_tokens,
        lanes=data.end.lanes,
        ledger_hash=chain(before.ledger_hash, step=before.step + 1, tokens=tokens, masked_tokens=agreed.masked_tokens,
                          batch_hash=agreed.batch_hash, fault=fault, other_targets=agreed.other_targets))


def _left_out(counts: Mapping[str, int]) -> StepResult:
    """A step that moved nothing the first time, too."""
    return StepResult(loss=math.nan, grad_norm=math.inf, applied=False, means=dict.fromkeys(counts, math.nan))


def _by_term(result: StepResult) -> dict[str, float | None]:
    """The mean of each of several loss terms."""
    if len(result.means) == 1:
        return {}
    return {f"loss_{name}": _finite(mean) for name, mean in result.means.items()}


def _from_first_rank(recorded: list[tuple[int, str, int]], device: torch.device) -> list[tuple[int, str, int]]:
    """The ledger's steps that will be done again, on all ranks."""
    words = [FINE, NOT_FINITE, SPIKE]
    table = torch.zeros(int(sum_over_ranks(torch.tensor([len(recorded)], device=device))), 3, dtype=torch.int64, device=device)
    for row, (step, fault, weights_of_step) in enumerate(recorded):
        table[row] = torch.tensor([step, words.index(fault), weights_of_step])
    return [(step, words[fault], weights_of_step) for step, fault, weights_of_step in sum_over_ranks(table).tolist()]


def _crossed(before: Progress, after: Progress, every_tokens: int | None) -> bool:
    return bool(every_tokens) and before.tokens // every_tokens != after.tokens // every_tokens


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
