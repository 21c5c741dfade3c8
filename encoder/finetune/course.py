"""A fine-tuning: from a task file to its end, epochs over labelled examples, by the clock of examples.

Position of the data: (epoch, index), the next example's place in the epoch's order; Progress.lanes holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from encoder.base.agreement import all_ranks_agree
from encoder.base.batch import TokenBatch
from encoder.base.command import as_typed
from encoder.base.dist import World, watched
from encoder.base.errors import ConfigError
from encoder.base.log import note, outlive_readers, say
from encoder.base.model import TrainedModel
from encoder.base.stopping import StopFlag
from encoder.base.units import Progress, counted, short_count
from encoder.data.examples import (
    ExampleDealing,
    Examples,
    ExampleSteps,
    NumberedBatch,
    in_order,
)
from encoder.data.loader import DataPosition, StepData
from encoder.engine.engine import Engine
from encoder.engine.precision import precision_on
from encoder.finetune.best import BestKeeper, best_checkpoint, judge_of
from encoder.finetune.checks import (
    check_finished,
    check_first_start,
    check_same_examples,
    check_same_rows,
    check_same_settings,
    check_same_start,
    check_task,
)
from encoder.finetune.config import FineTuneConfig
from encoder.finetune.kinds.contract import AskedSet, Decided
from encoder.finetune.metrics import Scores
from encoder.finetune.predict import KeptWeights, predicted, write_predictions, write_result
from encoder.finetune.prepare import LastRows, Prepared, Start, prepare, read_start
from encoder.finetune.rates import layer_factors
from encoder.models.hf.catalog import export_blocker
from encoder.models.with_task import AnyTaskModel, build_task_model, first_weights
from encoder.objectives.text_tasks import TERM, TextObjective
from encoder.optim.groups import Factors
from encoder.optim.shares import rate_of_step
from encoder.runs.about import machine_facts
from encoder.runs.folder import RUN_FILE
from encoder.runs.initial import weights_sha256
from encoder.runs.same import has_begun
from encoder.train import build
from encoder.train.course import Evaluation, UpdateSettings, crossed
from encoder.train.loop import Outcome, done_already, train_course
from encoder.train.meters import Clock, document_lengths
from encoder.train.recorder import Recorder
from encoder.train.session import Session
from encoder.train.start import load_verified


def finetune(
    task: FineTuneConfig,
    world: World,
    *,
    stop: StopFlag | None = None,
    began: float | None = None,
    last: LastRows | None = None,
) -> Outcome:
    """Trains a task to its end, or until a signal or its time limit stops it; goes on from the newest checkpoint in `task.out`.

    Raises UserError.

    task: what is trained
    world: of this rank
    stop: a flag that listens already; None: one that listens from here to the end
    began: time of day (seconds, Unix) from which on all was for this run; None: its process began for it
    last: rows that another run of this process has encoded
    """
    if stop is None:
        with StopFlag() as stop:
            return finetune(task, world, stop=stop, began=began, last=last)
    outlive_readers()
    clock = Clock(began=began or psutil.Process().create_time())
    with watched(world):
        return _finetune(task, world, stop, clock, last)


def _finetune(
    task: FineTuneConfig, world: World, stop: StopFlag, clock: Clock, last: LastRows | None
) -> Outcome:
    """As finetune, whose parameters these are."""
    folder = Path(task.out)
    # what needs no data comes first: a mistake is told in seconds
    if done := done_already(folder, world, check=lambda: check_finished(task)):
        return done
    check_task(task)

    start = read_start(task)
    prepared = prepare(task, start, last=last)
    task = prepared.task
    if has_begun(folder):
        check_same_settings(task, folder / RUN_FILE, of=folder)

    device = build.choose_device(task, world)
    precise = dataclasses.replace(
        task.engine, precision=precision_on(task.engine.precision, device)
    )
    task = dataclasses.replace(task, engine=precise)
    course = FineTuning(
        dataclasses.replace(prepared, task=task), world=world, device=device, start=start
    )
    return train_course(course, world, device, clock=clock, stop=stop)


@dataclass(frozen=True)
class Epochs:
    """The one phase of a fine-tuning (encoder.train.course.Phase)."""

    name: str
    model: dict[str, float]


class FineTuning:
    """The course of a run over labelled examples (encoder.train.course.Course)."""

    verb = "finetune"

    def __init__(
        self, prepared: Prepared, *, world: World, device: torch.device, start: Start
    ) -> None:
        """prepared: the task, settled
        world, device: of this rank
        start: its weights are taken into the engine, and let go
        """
        self.run = prepared.task
        self.prepared = prepared
        self._world, self._device, self._start = world, device, start
        self._metrics = self.run.task.metric_names()
        _refuse_equal_names(self.run.data.dev_names, [*self._metrics, "loss"])
        judge = judge_of(self.run)
        self._keeper = BestKeeper(judge) if judge else None
        self._dealing = ExampleDealing(
            world=world, micro_batch_tokens=self.run.loader.micro_batch_tokens
        )
        self._phase = Epochs(
            name="epochs",
            model={name: getattr(self.run.model, name) for name in self.run.model.PHASE_SETTINGS},
        )
        self._schedule = self.run.lr.over(self._examples)
        self._start_sha256: str | None = None
        self._drawn: tuple[str, ...] = ()
        # this rank's batches of each data set, once they are asked for
        self._batches: dict[str, list[NumberedBatch]] = {}

    @property
    def _examples(self) -> int:
        """Of all epochs."""
        return self.run.epochs * len(self.prepared.train)

    @property
    def tokenizer_json(self) -> Path:
        """That of the model."""
        return self.prepared.encoder.path

    def prepare(self, *, fresh: bool) -> None:
        """The rows were read before, on every rank: they are the same ones."""
        check_same_rows(self.prepared)

    def make_model(self) -> AnyTaskModel:
        """With the weights of start_from, which the engine takes afterwards; for ZeRO stage 3 without any."""
        with torch.device("meta" if self.run.engine.zero_stage == 3 else "cpu"):
            return build_task_model(
                self.run.model,
                self.prepared.head,
                attention=self.run.attention,
                seed=self.run.seed,
            )

    def factors(self, model: TrainedModel) -> dict[str, Factors]:
        """By layer, as layer_decay and gradient_layer_decay say."""
        return layer_factors(
            model,
            layers=self.run.model.num_hidden_layers,
            decay=self.run.layer_decay,
            gradient_decay=self.run.gradient_layer_decay,
        )

    def make_objective(self) -> TextObjective:
        """Of the task."""
        return self.prepared.objective

    def check_same(self, checkpoint: Path) -> None:
        """By settings, and by the encoded rows."""
        check_same_settings(self.run, checkpoint / RUN_FILE, of=checkpoint)
        if self._world.first:
            check_same_start(self.run, checkpoint)
        check_same_examples(
            self.prepared.train.sha256, checkpoint, rows_of=self.prepared.rows_of["train"]
        )

    def set_first_weights(self, engine: Engine) -> Progress:
        """Those of start_from; a head that it has none for is drawn."""
        with all_ranks_agree(self._world):
            if self._world.first:
                self._start_sha256 = weights_sha256(self._start.model.weights)
                check_first_start(self.run, self._start_sha256)
        weights = self.first_weights()
        engine.set_masters(lambda name, _shape: weights[name])
        self._start.model.weights.clear()
        return Progress()

    def first_weights(self) -> dict[str, Tensor]:
        """By our names; what start_from has none for is drawn, and origin_lines says so from then on."""
        with torch.device("meta"):
            model = build_task_model(self.run.model, self.prepared.head, seed=self.run.seed)
        weights, self._drawn = first_weights(
            self._start.weights_for(self.run.task), model, of_task=self._start.head is not None
        )
        return weights

    def take_up(self, saved: dict[str, Any]) -> None:
        """Where the first weights came from, and the best evaluation so far."""
        self._start_sha256 = self._start_sha256 or saved.get("init_sha256")
        if self._keeper:
            self._keeper.take_up(saved)

    def to_plain(self) -> dict[str, Any]:
        """What a resume is held against."""
        return {
            "examples_sha256": self.prepared.train.sha256,
            "init_sha256": self._start_sha256,
            "rows_of": self.prepared.rows_of,
            **(self._keeper.to_plain() if self._keeper else {}),
        }

    def model_at(self, progress: Progress) -> dict[str, float]:
        """The model's own thetas."""
        return self._phase.model

    def fingerprint_batch(self, objective: Any) -> TokenBatch:
        """A fixed text of random tokens."""
        return build.fingerprint_batch(
            self.run.model,
            objective=objective,
            seed=self.run.seed,
            address="fingerprint",
            documents=objective.documents,
        )

    @property
    def amount(self) -> str:
        """Epochs and examples."""
        train = self.prepared.train
        return (
            f"{counted(self.run.epochs, 'epoch')} of {len(train):,} examples,"
            f" {short_count(len(train.ids_A))} tokens each time"
        )

    def warnings(self) -> list[str]:
        """Of rows that did not fit as they are."""
        lines = [note for asked in self.prepared.sets for note in asked.notes()]
        if not self.prepared.dev:
            lines.append(
                "no dev set: what the model learns is not measured. Add data.dev,"
                " or data.dev_share: 0.1"
            )
        lines += [
            f"no dev set chooses {name}: test sets are measured at {value:g}. Name one as task.{name}"
            for name, value in self._undecided().items()
        ]
        return lines

    def origin_lines(self) -> list[str]:
        """Of the weights, and of the head."""
        head = self.prepared.head
        lines = [
            f"head of {head.family}: {head.place_text}, {counted(head.outputs, 'output')},"
            f" dropout {head.dropout:g}"
        ]
        if self.run.layer_decay != 1.0:
            layers, decay = self.run.model.num_hidden_layers, self.run.layer_decay
            lines.append(
                f"rates: layer l of {layers} at {decay:g}^({layers} - l) of the peak, embeddings at"
                f" {decay:g}^{layers} = {decay**layers:.3g}, the head at 1"
            )
        if self._keeper:
            lines.append(
                f"keeps the weights of the best {self._keeper.judge.text}, of equals the earlier"
            )
        if self.run.gradient_layer_decay != 1.0:
            layers, decay = self.run.model.num_hidden_layers, self.run.gradient_layer_decay
            lines.append(
                f"gradients: after clipping those of layer l of {layers} times"
                f" {decay:g}^({layers} - l), of all others as they are"
            )
        if self.run.data.hub is not None:
            lines.append(f"rows of {', '.join(dict.fromkeys(self.prepared.rows_of.values()))}")
        if not self._start.resumes:
            drawn = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in self._drawn))
            lines.append(
                f"weights from {self.run.start_from}: {self._start.model.origin}"
                f"; drawn from the seed: {drawn or 'nothing'}"
            )
        return lines

    def announce(self) -> None:
        """The steps to come, and how they are packed."""
        train = self.prepared.train
        steps = math.ceil(len(train) / self.run.batch_examples) * self.run.epochs
        mean = len(train.ids_A) / len(train)
        batch = min(self.run.batch_examples, len(train))
        say(
            f"{counted(steps, 'step')} of {batch:,} examples, packed without padding:"
            f" {mean:.1f} tokens each, at most {int(train.lengths_N.max()):,}"
        )

    @property
    def export_text(self) -> str | None:
        """Why the model stays ours."""
        return export_blocker(self.run.model)

    def origin(self) -> dict[str, Any]:
        """Where the weights came from."""
        return {
            "start_from": self.run.start_from,
            "init_sha256": self._start_sha256,
            "rows_of": self.prepared.rows_of,
        }

    def about(self, *, parameters: int) -> dict[str, Any]:
        """Model size, data, machine and versions."""
        sources = [
            {"name": e.name, "documents": len(e), "tokens": len(e.ids_A)}
            for e in (self.prepared.train,)
        ]
        trained = len(self.prepared.train.ids_A) * self.run.epochs
        return {
            "parameters": parameters,
            "sources": [{**source, "trained": trained} for source in sources],
            **machine_facts(self._world, self._device),
        }

    def phase_at(self, progress: Progress) -> Epochs | None:
        """There is one phase."""
        return self._phase if progress.phase == 0 else None

    def last_phase(self, progress: Progress) -> Epochs:
        """There is one phase."""
        return self._phase

    def is_done(self, progress: Progress) -> bool:
        """After the last epoch."""
        return self._seen(progress) >= self._examples

    def describe(self, progress: Progress) -> str:
        """The rate's course."""
        return f"{self._phase.name}: {self.amount}, rate {self.run.lr.peak:g} at its peak"

    def tokens_left(self, progress: Progress) -> int:
        """Every epoch has the same tokens."""
        return max(0, len(self.prepared.train.ids_A) * self.run.epochs - progress.tokens)

    def past_bad_steps(self, progress: Progress) -> tuple[tuple[int, int], ...]:
        """The next example: those of the bad steps lie behind."""
        return progress.lanes

    def open_data(self, session: Session, recorder: Recorder) -> ExampleSteps:
        """The epochs from where the run stands."""
        return ExampleSteps(
            self.prepared.train,
            term=TERM,
            seed=self.run.seed,
            epochs=self.run.epochs,
            batch_examples=self.run.batch_examples,
            dealing=self._dealing,
            start=DataPosition(
                lanes=session.progress.lanes, phase_tokens=session.progress.phase_tokens
            ),
        )

    def update(self, before: Progress, data: StepData) -> UpdateSettings:
        """By the schedule at the middle example of the step."""
        return UpdateSettings(
            lr=rate_of_step(
                self._schedule,
                seen=self._seen(before),
                rows=data.rows,
                examples=self._examples,
            ),
            max_lr=self.run.lr.peak,
            weight_decay=self.run.weight_decay,
        )

    def flops(self, batch: TokenBatch) -> float:
        """Of the body; the head is small."""
        return self.run.model.train_flops(lengths=document_lengths(batch), targets={})

    def evaluation_is_due(self, before: Progress, after: Progress) -> bool:
        """By the clock of examples."""
        return self._is_due(before, after, self.run.evaluate.every_epochs)

    def evaluation_begins(self, progress: Progress) -> bool:
        """A new head knows nothing."""
        return False

    def evaluate(self, engine: Engine, progress: Progress) -> Evaluation | None:
        """Loss and metrics of each dev set."""
        if not self.prepared.dev:
            return None
        found = {
            asked.examples.name: asked.scores(
                self._predicted(engine, asked.examples), self._metrics
            )
            for asked in self.prepared.dev
        }
        numbers: dict[str, float] = {}
        for name, measured in found.items():
            numbers |= {f"{name}_loss": measured.loss}
            numbers |= {f"{name}_{metric}": value for metric, value in measured.metrics.items()}
        constant = [name for name, measured in found.items() if measured.constant]
        return Evaluation(
            numbers=numbers,
            text="  ".join(scores_text(name, measured) for name, measured in found.items()),
            warnings=tuple(
                f"all predictions of {name} are the same: what has no value then counts as 0"
                for name in constant
            ),
        )

    def keeps(self, evaluation: Evaluation, progress: Progress) -> bool:
        """The best so far, where the task asks for it."""
        return self._keeper is not None and self._keeper.takes(evaluation.numbers, progress)

    def save_is_due(self, before: Progress, after: Progress) -> bool:
        """By the clock of examples."""
        return self._is_due(before, after, self.run.checkpoints.every_epochs)

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """Predictions of all dev and test sets, in the order of their rows, and result.json."""
        folder = Path(self.run.out)
        results: dict[str, Scores] = {}
        decided: Decided | None = self._undecided() or None
        kept = self._take_kept(engine, progress)
        for asked in self.prepared.dev:
            logits_PK = self._predicted(engine, asked.examples)
            self._tell(asked, logits_PK, results, decided=None)
            # what the first dev set chooses holds for the test sets
            decided = decided or asked.decided(logits_PK)
        for asked in self.prepared.test:
            self._tell(asked, self._predicted(engine, asked.examples), results, decided=decided)
        with all_ranks_agree(self._world):
            if self._world.first:
                write_result(
                    folder,
                    self.run,
                    self.prepared.train,
                    results,
                    kept=kept,
                    decided=decided or {},
                    rows_of=self.prepared.rows_of,
                )
        self._say_end(results)
        return {"results": {name: measured.plain() for name, measured in results.items()}}

    def _undecided(self) -> Decided:
        """What test sets take as given, for want of a dev set; they never choose it themselves."""
        if self.prepared.dev or not self.prepared.test:
            return {}
        return self.prepared.test[0].undecided()

    def _tell(
        self,
        asked: AskedSet,
        logits_PK: np.ndarray,
        results: dict[str, Scores],
        *,
        decided: Decided | None,
    ) -> None:
        """Measures a data set into `results` and writes its predictions.

        asked, logits_PK: the data set, and the answers at its places
        results: by the name of a data set
        decided: on a dev set; None: on this one
        """
        name = asked.examples.name
        results[name] = asked.scores(logits_PK, self._metrics, decided)
        with all_ranks_agree(self._world):
            if self._world.first:
                write_predictions(Path(self.run.out), name, asked.lines(logits_PK, decided))

    def _take_kept(self, engine: Engine, progress: Progress) -> KeptWeights:
        """The weights that the run ends with, put into the engine where they are not those of its last step."""
        if self._keeper is None:
            return KeptWeights(text="last step", progress=progress)
        best, text = self._keeper.best, self._keeper.text
        say(f"keeps the {text}" if best else text)
        if best is None or best.step == progress.step:
            return KeptWeights(text=text, progress=progress)
        path = best_checkpoint(Path(self.run.out), best)
        taken, _ = load_verified(path, self, engine, self._device)
        return KeptWeights(text=text, progress=taken)

    def _say_end(self, results: dict[str, Scores]) -> None:
        """The test sets' numbers; and, at the end of all lines, what makes them worth nothing."""
        for name in self.run.data.test:
            say(f"test  {scores_text(name, results[name])}")
        constant = [name for name, measured in results.items() if measured.constant]
        if constant:
            # said of an evaluation long ago, perhaps: once more where a person reads
            note(
                f"warning: the model gives every row of {', '.join(constant)} the same answer. Try a"
                f" lower rate, lr.peak={self.run.lr.peak / 2:g}, or another seed"
            )

    def what_comes_next(self) -> list[str]:
        """Its page, its export."""
        out = Path(self.run.out)
        beside = out.with_name(f"{out.name}-hf")
        return [
            f"next: {as_typed('report', out)}   curves and results in one page",
            f"next: {as_typed('export', out, beside)}   a Hugging Face folder, proven",
        ]

    def lower_rate_text(self, progress: Progress) -> str:
        """The rate, halved."""
        return f"Start anew with a lower rate: out=ANOTHER_FOLDER lr.peak={self.run.lr.peak / 2:g}"

    def _seen(self, progress: Progress) -> int:
        """Examples gone through."""
        if progress.phase > 0:
            return self._examples
        ((epoch, index),) = progress.lanes or ((0, 0),)
        return epoch * len(self.prepared.train) + index

    def _is_due(self, before: Progress, after: Progress, every_epochs: float) -> bool:
        every = max(1, round(every_epochs * len(self.prepared.train)))
        return crossed(self._seen(before), self._seen(after), every)

    def _predicted(self, engine: Engine, examples: Examples) -> np.ndarray:
        if examples.name not in self._batches:
            self._batches[examples.name] = in_order(examples, term=TERM, dealing=self._dealing)
        return predicted(
            engine,
            self._batches[examples.name],
            examples=examples,
            outputs=self.prepared.head.outputs,
            objective=self.prepared.objective,
        )


def _refuse_equal_names(sets: Sequence[str], metrics: Sequence[str]) -> None:
    """A dev set's number is called NAME_METRIC: sets dev and dev_macro would both have a dev_macro_f1. Raises ConfigError."""
    names = [f"{name}_{metric}" for name in sets for metric in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two sets of data.dev would both have a number called {twice}; needed: names that do"
            " not meet. Rename one."
        )


def scores_text(name: str, measured: Scores) -> str:
    """`dev loss 0.412 accuracy 0.853 f1 0.851`."""
    numbers = " ".join(f"{metric} {value:.4f}" for metric, value in measured.metrics.items())
    return f"{name} loss {measured.loss:.4f} {numbers}"
