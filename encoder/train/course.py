"""What a run does with its data: the loop walks a course, and does not know whether its steps are masked text or labelled rows.

Pretraining    phases over shards, by the clock of tokens          (encoder/train/pretraining.py)
FineTuning     epochs over labelled examples, by that of examples  (encoder/finetune/course.py)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from encoder.base.batch import TokenBatch
from encoder.base.model import TrainedModel
from encoder.base.objective import TrainedObjective
from encoder.base.schema import Settings
from encoder.base.units import Progress
from encoder.data.loader import DataPosition, StepData
from encoder.engine.engine import Engine, EngineConfig
from encoder.optim.groups import Factors
from encoder.optim.whole_tensors import MomentsConfig
from encoder.runs.config import TrackingConfig
from encoder.runs.faults import FaultConfig

if TYPE_CHECKING:
    from encoder.train.recorder import Recorder
    from encoder.train.session import Session


class KeptCheckpoints(Protocol):
    """How checkpoints are written, whatever says when."""

    @property
    def keep_last(self) -> int:
        """Whole ones; older ones are removed."""

    @property
    def background(self) -> bool:
        """Written while training goes on."""


class ModelShape(Protocol):
    """Of a model's settings, what decides where it can run."""

    @property
    def head_width(self) -> int | None:
        """Features of one attention head."""

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest document."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""


class RunSettings(Settings, Protocol):
    """The settings that every run has, whatever it trains on."""

    @property
    def name(self) -> str:
        """In reports."""

    @property
    def out(self) -> str:
        """The run folder."""

    @property
    def seed(self) -> int:
        """Of weights and order."""

    @property
    def model(self) -> ModelShape:
        """The shape."""

    @property
    def engine(self) -> EngineConfig:
        """Precision, ZeRO stage, clipping."""

    @property
    def optimizer(self) -> MomentsConfig:
        """The update."""

    @property
    def checkpoints(self) -> KeptCheckpoints:
        """How they are kept."""

    @property
    def faults(self) -> FaultConfig:
        """What ends a run, and what it does about bad steps."""

    @property
    def tracking(self) -> TrackingConfig:
        """Where numbers go."""

    @property
    def attention(self) -> str:
        """The kernels."""

    @property
    def compile(self) -> Literal["auto", "blocks", "off"]:
        """Whether layers are compiled."""

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """Where it runs."""


class Phase(Protocol):
    """One stretch of a run."""

    @property
    def name(self) -> str:
        """In reports and checkpoints."""

    @property
    def model(self) -> dict[str, float]:
        """What the model runs with in it."""


class Steps(AbstractContextManager["Steps"], Protocol):
    """The steps of a phase, from a position on."""

    def next_step(self) -> StepData:
        """The next step; called on every rank."""

    def epochs_at(self, position: DataPosition) -> dict[str, float]:
        """How often each source was gone through."""


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """What a step's update is made with."""

    lr: float
    max_lr: float  # at which a step loses the whole weight_decay
    weight_decay: float | None = None  # None: the optimizer's


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers of an evaluation, and how they are told."""

    numbers: dict[str, float]  # a nan where there was nothing to count
    text: str  # one line
    warnings: tuple[str, ...] = ()


class SavedWeights(Protocol):
    """By what a checkpoint's weights are known to have come back as they went."""

    def model_at(self, progress: Progress) -> dict[str, float]:
        """What the model ran with when it was saved (Phase.model)."""

    def fingerprint_batch(self, objective: TrainedObjective) -> TokenBatch:
        """A fixed batch, whose loss is saved with the weights."""


class Course(SavedWeights, Protocol):
    """What a run trains on, how far it goes, and what it says of itself. All ranks call the same methods in the same order."""

    @property
    def run(self) -> RunSettings:
        """Its settings, as they are written to the run folder."""

    @property
    def verb(self) -> str:
        """The command that starts such a run."""

    @property
    def tokenizer_json(self) -> Path:
        """The tokenizer of its texts, kept in the run folder."""

    # before the first step, in this order

    def prepare(self, *, fresh: bool) -> None:
        """Looks at the data. `fresh`: no checkpoint is there. Raises UserError on all ranks."""

    def make_model(self) -> TrainedModel:
        """With its initial weights; for ZeRO stage 3 on the meta device."""

    def factors(self, model: TrainedModel) -> dict[str, Factors]:
        """Of rate and gradient by parameter; 1 for all others."""

    def make_objective(self) -> TrainedObjective:
        """Whose loss the engine computes."""

    def check_same(self, checkpoint: Path) -> None:
        """The checkpoint is of this run and its data. Raises UserError."""

    def set_first_weights(self, engine: Engine) -> Progress:
        """Without a checkpoint: the weights that the run starts from, and where it then stands."""

    def take_up(self, saved: dict[str, Any]) -> None:
        """What `to_plain` gave to the checkpoint that the run goes on from; nothing without one."""

    def to_plain(self) -> dict[str, Any]:
        """What a checkpoint holds of the course: by what a resume is held against it."""

    @property
    def amount(self) -> str:
        """How much it trains on, for the run's header: 20B tokens in 2 phases."""

    def warnings(self) -> list[str]:
        """Sentences for the start."""

    def origin_lines(self) -> list[str]:
        """Where the weights came from, for people."""

    def announce(self) -> None:
        """Says what is to come, before the first phase."""

    @property
    def export_text(self) -> str | None:
        """Why the model stays ours; None: it can become a Hugging Face folder."""

    def origin(self) -> dict[str, Any]:
        """Where the weights came from, for the event of the start."""

    def about(self, *, parameters: int) -> dict[str, Any]:
        """What the run is, for the event of the start."""

    # where it stands

    def phase_at(self, progress: Progress) -> Phase | None:
        """The phase that the run is in, or None when all are done."""

    def last_phase(self, progress: Progress) -> Phase:
        """The phase that the run is in; the last one once all are done."""

    def is_done(self, progress: Progress) -> bool:
        """Whether the phase is at its end."""

    def describe(self, progress: Progress) -> str:
        """The phase that the run is in, in one line for people."""

    def tokens_left(self, progress: Progress) -> int:
        """Of all phases; a guess where their number is not known."""

    def past_bad_steps(self, progress: Progress) -> tuple[tuple[int, int], ...]:
        """Where the data go on once the weights went back: Progress.lanes."""

    # a phase

    def open_data(self, session: Session, recorder: Recorder) -> Steps:
        """The steps of the phase from where the run stands, and what is evaluated."""

    def update(self, before: Progress, data: StepData) -> UpdateSettings:
        """Of a step."""

    def flops(self, batch: TokenBatch) -> float:
        """Model FLOP of a micro-batch, forward and backward; padding is no work."""

    def evaluation_is_due(self, before: Progress, after: Progress) -> bool:
        """Whether a step is followed by an evaluation."""

    def evaluation_begins(self, progress: Progress) -> bool:
        """Whether a phase begins with one."""

    def evaluate(self, engine: Engine, progress: Progress) -> Evaluation | None:
        """Of the data that `open_data` opened; None: there is none."""

    def keeps(self, evaluation: Evaluation, progress: Progress) -> bool:
        """Whether the weights of an evaluation are wanted at the end, and so saved at once."""

    def save_is_due(self, before: Progress, after: Progress) -> bool:
        """Whether a step is followed by a checkpoint."""

    # its end

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """What is written once all phases are done, before the run's own record; and what that says beside."""

    def what_comes_next(self) -> list[str]:
        """Lines for the end of the run."""

    def lower_rate_text(self, progress: Progress) -> str:
        """What to do where training diverges."""


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies between; several at once count as one."""
    return before // every != after // every
