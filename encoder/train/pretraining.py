"""Pretraining: from a run file to its end, phase after phase over shards, by the clock of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from encoder.base.agreement import all_ranks_agree
from encoder.base.batch import TokenBatch
from encoder.base.dist import World, watched
from encoder.base.log import outlive_readers, say, warn_once
from encoder.base.model import TrainedModel
from encoder.base.objective import Objective, TrainedObjective
from encoder.base.stopping import StopFlag
from encoder.base.units import Progress, counted, short_count
from encoder.data.loader import DataPosition, StepData
from encoder.data.shards import Source
from encoder.engine.checkpoint.folder import committed_folders
from encoder.engine.engine import Engine
from encoder.engine.precision import computes_bf16, precision_on
from encoder.models.contract import ModelConfig
from encoder.models.hf.catalog import export_blocker
from encoder.optim.groups import Factors
from encoder.runs.about import FIRST_VECTORS, about_run, newest_about, starts_of
from encoder.runs.branch import Parent, find_parent
from encoder.runs.checks import check_settings, hints_of
from encoder.runs.config import PhaseConfig, RunConfig, describe_phase, with_engine
from encoder.runs.defaults import settled, slow_precision_text, warnings_of
from encoder.runs.epochs import count_repeats, many_epochs_text, repeats_text
from encoder.runs.facts import DataFacts, check_data, fetch_cards, named_sources, source_name
from encoder.runs.folder import CHECKPOINTS, RUN_FILE
from encoder.runs.initial import InitialWeights, read_initial
from encoder.runs.objective_models import AskedModel, read_objective_models
from encoder.runs.phases import current_phase, lr_at, phase_is_done, phase_of_weights
from encoder.runs.same import (
    check_finished,
    check_same_content,
    check_same_run,
    check_same_settings,
)
from encoder.train import build
from encoder.train.course import Evaluation, UpdateSettings, crossed
from encoder.train.evaluate import HeldOut, held_out_numbers, held_out_text, silent_sources
from encoder.train.first_vectors import FirstVectors, set_first_vectors
from encoder.train.hints import what_comes_next
from encoder.train.loop import Outcome, done_already, train_course
from encoder.train.meters import Clock, document_lengths
from encoder.train.probes import (
    Probes,
    other_texts,
    probe_numbers,
    probes_text,
    read_probes,
    sha256_of_each,
)
from encoder.train.quarantine import LostShard, Quarantine, QuarantiningLoader
from encoder.train.recorder import Recorder
from encoder.train.session import Session
from encoder.train.start import load_verified

PROBES_SHA256 = "probes_sha256"  # in events, under about


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
    folder = Path(run.out)
    clock = Clock(began=psutil.Process().create_time())
    # what needs no data and no other rank comes first: a mistake is told in seconds
    run.tracking.check_packages()
    check_same_run(run, folder)
    if done := done_already(
        folder, world, check=lambda: check_finished(run, folder, first=world.first)
    ):
        return done

    # all of the run file and of the shards' cards, before any rank waits for another
    fetch_cards(run, world)
    run = settled(run)
    facts = check_data(run)
    known = check_settings(run)
    run = named_sources(run)
    probes = read_probes(run, facts)

    # a run that has a checkpoint goes on from that, and init_from may be gone
    fresh = not committed_folders(folder / CHECKPOINTS)
    initial = None
    if fresh:
        build.check_held_out_names(run, facts)
        if run.init_from:
            initial = read_initial(run, facts, hashed=world.first)
    # models that the objective asks, such as a teacher, are needed at every start
    asked = read_objective_models(run, facts, hashed=world.first)

    device = build.choose_device(run, world)
    run = with_engine(run, precision=precision_on(run.engine.precision, device))
    course = Pretraining(
        run,
        facts,
        world=world,
        device=device,
        initial=initial,
        asked=asked,
        probes=Probes(texts=probes, stop=stop),
        mistakes=known,
    )
    return train_course(course, world, device, clock=clock, stop=stop)


class SavedPhases:
    """A run of phases, as its checkpoints are held against it (encoder.train.course.SavedWeights)."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def model_at(self, progress: Progress) -> dict[str, float]:
        """The thetas that the loss of the fixed batch was recorded with."""
        return self.run.phases[phase_of_weights(progress)].model

    def fingerprint_batch(self, objective: TrainedObjective) -> TokenBatch:
        """A fixed batch of random tokens, all of them predicted."""
        return build.fingerprint_batch(
            self.run.model, objective=objective, seed=self.run.seed, address="fingerprint"
        )


class Pretraining(SavedPhases):
    """The course of a run over shards (encoder.train.course.Course)."""

    verb = "pretrain"

    def __init__(
        self,
        run: RunConfig,
        facts: DataFacts,
        *,
        world: World,
        device: torch.device,
        initial: InitialWeights | None = None,
        asked: Mapping[str, AskedModel] | None = None,
        probes: Probes | None = None,
        mistakes: Sequence[str] = (),
    ) -> None:
        """run, facts: settled, and what the cards of its sources say
        world, device: of this rank
        initial: what init_from names; its weights are taken into the engine unless a checkpoint is there, and let go
        asked: the models that the objective asks; their weights go to the device, and are let go
        probes: of its embeddings, with every evaluation
        mistakes: of the settings of a run that has begun, to be said
        """
        super().__init__(run)
        self.facts = facts
        self._world, self._device = world, device
        self._initial, self._asked, self._mistakes = initial, asked or {}, mistakes
        self._probes = probes or Probes()
        # of the start before, on rank zero
        self._probes_sha256: Any = None
        # the shapes of the models that the objective asks
        self._asked_configs: dict[str, ModelConfig] = {
            name: model.config for name, model in self._asked.items()
        }
        # unigram entropy of the held-out text, on rank zero
        self._entropy: float | None = None
        # of a run whose tables begin with counted neighbours
        self._first_vectors: FirstVectors | None = None
        self._parent: Parent | None = None
        self._parent_record: dict[str, Any] | None = None
        # of the weights of init_from, also when resumed; on rank zero
        self._init_sha256 = initial.sha256 if initial else None
        self._objective_sha256 = {name: m.sha256 for name, m in self._asked.items() if m.sha256}
        self.quarantine: Quarantine  # from take_up on
        self._held_out: list[HeldOut] = []  # of the phase

    @property
    def tokenizer_json(self) -> Path:
        """That of the shards."""
        return self.facts.tokenizer_json

    def prepare(self, *, fresh: bool) -> None:
        """Looks at the shards' files, and for the parent of a branch."""
        run, first = self.run, self._world.first
        # rank zero alone looks at files; sizes do not count where damaged shards are left out
        with all_ranks_agree(self._world):
            sources: list[Source] = []
            for phase in run.phases:
                sources += build.open_mixture(run.sources_of(phase))
            if first:
                for source in sources:
                    source.check_files(sizes=run.loader.on_bad_shard == "stop")
                self._entropy = build.held_out_entropy(run, self.facts)
            if first and self._probes.texts:
                about = newest_about(starts_of(Path(run.out)))
                self._probes_sha256 = about.get(PROBES_SHA256)

        # a parent is looked for once: a run that has a checkpoint goes on from that
        if run.branch_from and fresh:
            self._parent = find_parent(run, self._world, facts=self.facts)

    def make_model(self) -> TrainedModel:
        """With the weights of the seed."""
        return build.make_model(self.run)

    def factors(self, model: TrainedModel) -> dict[str, Factors]:
        """All parameters are updated alike."""
        return {}

    def make_objective(self) -> Objective:
        """That of the first phase: phases change how rows are masked, not the loss."""
        models = build.make_objective_models(self.run, self._asked, self._device)
        return build.make_objective(self.run, self.facts, self.run.phases[0], models=models)

    def check_same(self, checkpoint: Path) -> None:
        """By settings and by content."""
        check_same_settings(self.run, checkpoint / RUN_FILE, of=str(checkpoint))
        check_same_content(
            self.run, self.facts, checkpoint, asked=self._asked, first=self._world.first
        )

    def set_first_weights(self, engine: Engine) -> Progress:
        """Those of the parent of a branch, of init_from, or else of the seed and, where asked for, of counted neighbours."""
        run, parent = self.run, self._parent
        if parent:
            load_verified(parent.checkpoint, SavedPhases(parent.run), engine, self._device)
            # weights and optimizer state are the parent's, and its ledger's chain goes on;
            # step and tokens begin at zero
            self._parent_record = parent.record
            return Progress(ledger_hash=parent.progress.ledger_hash)
        if run.init_from or run.branch_from:
            initial = self._initial
            assert initial, f"{run.out} had a checkpoint a moment ago"
            engine.set_masters(lambda name, _shape: initial.weights[name])
            initial.weights.clear()  # 1.6 GB of the large model, on every rank
        if run.init_embeddings:
            self._first_vectors = set_first_vectors(run, self.facts, engine, self._world)
        return Progress()

    def take_up(self, saved: dict[str, Any]) -> None:
        """Of the checkpoint: where the first weights came from, and the shards that were lost."""
        self._init_sha256 = self._init_sha256 or saved.get("init_sha256")
        self._parent_record = saved.get("parent", self._parent_record)
        self.quarantine = Quarantine(Path(self.run.out), saved.get("quarantine", []))

    def to_plain(self) -> dict[str, Any]:
        """What a resume is held against, or goes on with."""
        return {
            "card_sha256": self.facts.card_sha256,
            "init_sha256": self._init_sha256,
            "objective_sha256": self._objective_sha256,
            "quarantine": self.quarantine.to_plain(),
            "parent": self._parent_record,
        }

    @property
    def amount(self) -> str:
        """Tokens of all phases."""
        tokens = sum(phase.tokens for phase in self.run.phases)
        return f"{short_count(tokens)} tokens in {counted(len(self.run.phases), 'phase')}"

    def warnings(self) -> list[str]:
        """Of settings, and of what cannot be exported."""
        run, device = self.run, self._device
        lines = [*self._mistakes, *warnings_of(run)]
        if self._world.first:
            lines += hints_of(run, ranks=self._world.size)
            lines += other_texts(self._probes.texts, self._probes_sha256)
        if (
            device.type == "cuda"
            and computes_bf16(device)
            and (slow := slow_precision_text(run, on_cuda=True))
        ):
            lines.append(slow)
        return lines

    def origin_lines(self) -> list[str]:
        """Of the weights, and of the models that the objective asks."""
        lines: list[str] = []
        if self._initial:
            lines += self._initial.lines
        elif self._parent:
            lines.append(f"branched off {self._parent.text}")
        elif self._first_vectors:
            lines.append(self._first_vectors.text)
        for model in self._asked.values():
            lines += model.lines
        return lines

    def announce(self) -> None:
        """How often it goes through its sources."""
        repeats = count_repeats(self.run)
        say(f"epochs: {repeats_text(repeats)}")
        if many := many_epochs_text(repeats):
            warn_once(many)

    @property
    def export_text(self) -> str | None:
        """Why the model stays ours; None: it can become a Hugging Face folder."""
        return export_blocker(self.run.model)

    def origin(self) -> dict[str, Any]:
        """Where the weights came from, for the report and the card of an export."""
        origin: dict[str, Any] = {}
        if self.run.init_from:
            origin |= {"init_from": self.run.init_from, "init_sha256": self._init_sha256}
        if self._objective_sha256:
            origin["objective_sha256"] = self._objective_sha256
        if self._parent_record:
            origin["parent"] = self._parent_record
        return origin

    def about(self, *, parameters: int) -> dict[str, Any]:
        """Model size, data, machine and versions."""
        about = about_run(self.run, self._world, self._device, parameters=parameters)
        if self._probes.texts:
            about[PROBES_SHA256] = sha256_of_each(self._probes.texts)
        if self._first_vectors:
            about[FIRST_VECTORS] = dataclasses.asdict(self._first_vectors)
        return about

    def phase_at(self, progress: Progress) -> PhaseConfig | None:
        """Of the run file."""
        return current_phase(self.run, progress)

    def last_phase(self, progress: Progress) -> PhaseConfig:
        """The last one once all are done."""
        return self.run.phases[min(progress.phase, len(self.run.phases) - 1)]

    def is_done(self, progress: Progress) -> bool:
        """By its tokens."""
        return phase_is_done(self.run, progress)

    def describe(self, progress: Progress) -> str:
        """Name, amount, length, and what it may change of the model."""
        return describe_phase(self.run, self.last_phase(progress))

    def tokens_left(self, progress: Progress) -> int:
        """Of this phase and those to come; a phase's last step may pass its end."""
        tokens = sum(p.tokens for p in self.run.phases[progress.phase :])
        return max(0, tokens - progress.phase_tokens)

    def past_bad_steps(self, progress: Progress) -> tuple[tuple[int, int], ...]:
        """Each lane goes on at its next window; one at a window's start (row 0) stays there."""
        return tuple((window + (row > 0), 0) for window, row in progress.lanes)

    def open_data(self, session: Session, recorder: Recorder) -> QuarantiningLoader:
        """The phase's held-out batches and its steps."""
        phase = self.last_phase(session.progress)
        run, progress = self.run, session.progress
        parts = (run, self.facts, self._world, self._device)

        def on_shard_lost(lost: LostShard) -> None:
            # on every rank, before the first step without the shard
            if self._world.first:
                with session.errors.deferred():
                    self.quarantine.write()
            recorder.shard_lost(lost)

        self._held_out = build.make_held_out(*parts, phase)
        return QuarantiningLoader(
            open_loader=lambda at, left_out: build.make_loader(
                *parts, phase, at, left_out=left_out
            ),
            names=[source_name(s) for s in run.sources_of(phase)],
            quarantine=self.quarantine,
            position=DataPosition(lanes=progress.lanes, phase_tokens=progress.phase_tokens),
            step=progress.step + 1,
            stops=run.loader.on_bad_shard == "stop",
            on_shard_lost=on_shard_lost,
        )

    def update(self, before: Progress, data: StepData) -> UpdateSettings:
        """By the phase's schedule at the middle of the step."""
        phase = self.last_phase(before)
        return UpdateSettings(
            lr=lr_at(phase, phase_tokens=before.phase_tokens, step_tokens=data.tokens),
            max_lr=phase.max_lr or phase.lr.peak,
            weight_decay=self.run.weight_decay_of(phase),
        )

    def flops(self, batch: TokenBatch) -> float:
        """As the objective counts them."""
        return self.run.objective.train_flops(
            self.run.model,
            self._asked_configs,
            lengths=document_lengths(batch),
            targets=batch.counts,
        )

    def evaluation_is_due(self, before: Progress, after: Progress) -> bool:
        """By the clock of tokens."""
        evaluation = self.run.evaluation
        return evaluation is not None and crossed(
            before.tokens, after.tokens, evaluation.every_tokens
        )

    def evaluation_begins(self, progress: Progress) -> bool:
        """Whether the held-out loss is another one than at the end of the phase before."""
        if progress.step == 0:
            return True

        # the mixture of training does not decide it, its length and the phase's thetas do
        phases = self.run.phases
        now = phases[progress.phase]
        before = phases[max(0, progress.phase - 1)]
        is_other_length = now.max_tokens_per_document != before.max_tokens_per_document
        return is_other_length or now.model != before.model

    def evaluate(self, engine: Engine, progress: Progress) -> Evaluation | None:
        """Held-out loss and accuracy; None without an evaluation section."""
        if not self._held_out:
            return None
        numbers = held_out_numbers(self._held_out, engine.evaluate)
        sources = [source.name for source in self._held_out]
        # after enter_next_phase: the phase before ended at this step, and has its own line
        begins = progress.step and not progress.phase_step
        silent = silent_sources(numbers, sources)
        warning = (
            f"the held-out rows of {', '.join(silent)} have no masked token, and so no loss."
            " Raise evaluation.rows or evaluation.mask_share"
        )
        text = held_out_text(
            numbers,
            sources,
            terms=engine.objective.terms,
            entropy=self._entropy,
            phase=self.last_phase(progress).name if begins else None,
        )
        probed = probe_numbers(
            self._probes.texts, engine, world=self._world, run=self.run, stop=self._probes.stop
        )
        return Evaluation(
            numbers=numbers | probed,
            text=text + probes_text(self._probes.texts, probed),
            warnings=(warning,) if silent else (),
        )

    def keeps(self, evaluation: Evaluation, progress: Progress) -> bool:
        """A run ends with its last weights."""
        return False

    def save_is_due(self, before: Progress, after: Progress) -> bool:
        """By the clock of tokens."""
        return crossed(before.tokens, after.tokens, self.run.checkpoints.every_tokens)

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """Nothing more is written; the record says what the held-out loss is to be compared with."""
        return {"unigram_entropy": self._entropy}

    def what_comes_next(self) -> list[str]:
        """Its page, its export."""
        return what_comes_next(self.run, Path(self.run.out))

    def lower_rate_text(self, progress: Progress) -> str:
        """The rate of the phase that moved the weights last, halved."""
        number = phase_of_weights(progress)
        peak = self.run.phases[number].lr.peak
        return (
            f"Start anew with a lower rate: out=ANOTHER_FOLDER phases.{number}.lr.peak={peak / 2:g}"
        )
