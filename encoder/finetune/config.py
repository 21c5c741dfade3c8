"""A task file: everything that decides a fine-tuning, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from encoder.base.errors import ConfigError, nearest
from encoder.base.file_kinds import refuse_other_kinds
from encoder.base.schema import (
    LocalText,
    PathText,
    chosen_by,
    differences,
    from_mapping,
    put_overrides,
    read_mapping,
    to_plain,
)
from encoder.data.hub_rows import HubConfig
from encoder.data.labelled import READERS
from encoder.engine.engine import EngineConfig
from encoder.finetune.kinds.catalog import TASKS
from encoder.finetune.kinds.contract import TaskConfig
from encoder.models.catalog import SYSTEMS
from encoder.models.contract import ModelConfig
from encoder.nn.attend import Word as AttentionWord
from encoder.optim.adamw import AdamWConfig
from encoder.optim.catalog import OPTIMIZERS
from encoder.optim.shares import SHARE_SCHEDULES, ShareSchedule
from encoder.optim.whole_tensors import MomentsConfig
from encoder.runs.config import TrackingConfig
from encoder.runs.faults import FaultConfig

HELD_OUT = "dev"  # the name of what data.dev_share holds out
MOST_EPOCHS = 1_000_000  # between two evaluations or checkpoints


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig:
    """Where the rows are."""

    # a file of rows: .jsonl, .csv, .tsv, .parquet or .arrow; with hub a split of it, or a file
    train: PathText
    # name -> file or split, evaluated during training
    dev: dict[str, Annotated[str, "path"]] = field(default_factory=dict)
    # name -> file or split, evaluated once, at the end
    test: dict[str, Annotated[str, "path"]] = field(default_factory=dict)
    hub: HubConfig | None = None  # whose splits train, dev and test name
    # of the training rows, held out as a data set called dev: by their texts, so that rows of one text stay together
    dev_share: float | None = None
    max_tokens: int = 512  # of an example; a longer one is cut at its end, and counted

    @property
    def dev_names(self) -> tuple[str, ...]:
        """Of the data sets that are evaluated during training."""
        held_out = () if self.dev_share is None else (HELD_OUT,)
        return (*self.dev, *held_out)

    @property
    def named(self) -> tuple[str, ...]:
        """All files and splits, each once."""
        return tuple(dict.fromkeys([self.train, *self.dev.values(), *self.test.values()]))

    @property
    def files(self) -> tuple[Path, ...]:
        """Of these the files: with hub those that end as a file of rows does."""
        return tuple(Path(name) for name in self.named if not self.is_split(name))

    def is_split(self, name: str) -> bool:
        """Whether rows come from a split of hub."""
        return self.hub is not None and Path(name).suffix.lower() not in READERS

    def __post_init__(self) -> None:
        if self.dev_share is not None and not 0.0 < self.dev_share < 1.0:
            raise ConfigError(f"dev_share {self.dev_share:g} must lie between 0 and 1.")
        if self.dev_share is not None and HELD_OUT in (*self.dev, *self.test):
            raise ConfigError(
                f"dev_share holds out a data set called {HELD_OUT}, and there is one of that name."
                " Rename that, or leave dev_share out."
            )
        both = [name for name in self.dev if name in self.test]
        if both:
            raise ConfigError(f"dev and test both have {both[0]}; each name may stand once.")
        wrong = [n for n in (*self.dev, *self.test) if not n.replace("_", "").isalnum()]
        if wrong:
            raise ConfigError(
                f"{wrong[0]!r} is no name of a data set; needed: letters, digits and _."
            )


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Dropout of a fine-tuning; what is left out is the model's own."""

    embedding: float | None = None  # after the embedding's norm (BERT and its kind)
    attention_output: float | None = None  # after attention's Wo
    mlp_output: float | None = None  # after the MLP's Wo (BERT and its kind)
    # before the classifier; default: as transformers has it, 0 for ModernBERT, 0.1, DistilBERT 0.2
    head: float | None = None

    @property
    def of_body(self) -> dict[str, float]:
        """Settings of the model that differ from its own."""
        given = {
            "embedding_dropout": self.embedding,
            "attention_output_dropout": self.attention_output,
            "mlp_output_dropout": self.mlp_output,
        }
        return {name: value for name, value in given.items() if value is not None}


def check_every_epochs(every_epochs: float) -> None:
    """How often something is done. Raises ConfigError."""
    if not 0 < every_epochs <= MOST_EPOCHS:
        raise ConfigError(
            f"every_epochs {every_epochs:g} must be above 0, at most {MOST_EPOCHS:,}."
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When the dev sets are asked, and which weights a run ends with."""

    every_epochs: float = 1.0  # and at the end
    # whose weights the result, the predictions and an export have: the last step's, or the best evaluation's
    keep: Literal["last", "best"] = "last"
    # what best is judged by; default: the first metric of the task
    metric: str | None = None
    # data set that best is judged on; default: the only one of data.dev
    of: str | None = None

    def __post_init__(self) -> None:
        check_every_epochs(self.every_epochs)
        given = [key for key in ("metric", "of") if getattr(self, key) is not None]
        if self.keep == "last" and given:
            raise ConfigError(
                f"{given[0]} has no effect with keep: last. Leave it out, or use keep: best."
            )


@dataclass(frozen=True, kw_only=True)
class TaskCheckpointConfig:
    """When to save; the end and interruptions are always saved."""

    every_epochs: float = 1.0  # how often a checkpoint is written
    keep_last: int = 1  # whole ones; older ones are removed
    background: bool = True  # written while training goes on

    def __post_init__(self) -> None:
        check_every_epochs(self.every_epochs)
        if self.keep_last < 1:
            raise ConfigError(f"keep_last {self.keep_last} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ExampleLoaderConfig:
    """How examples reach this machine; nothing here changes the steps."""

    micro_batch_tokens: int = 8192  # in one forward; what is left of the batch is accumulated

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1:
            raise ConfigError(f"micro_batch_tokens {self.micro_batch_tokens} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """The whole task file."""

    other_words: ClassVar[dict[str, str]] = {}

    name: str  # of the run, in reports and in runs/NAME
    # a run, a checkpoint, a weights folder or a Hugging Face folder
    start_from: PathText
    task: Annotated[TaskConfig, chosen_by("kind", TASKS)]
    data: LabelledDataConfig
    # or its peak alone: linear, with a tenth of warm-up
    lr: Annotated[ShareSchedule, chosen_by("schedule", SHARE_SCHEDULES, default="linear")]
    out: LocalText = ""  # the run folder; default: runs/NAME
    seed: int = 17  # of the head's first weights, the order of the examples and dropout
    epochs: int = 3  # how often the training rows are gone through
    batch_examples: int = 32  # of a step, over all ranks and micro-batches
    optimizer: Annotated[MomentsConfig, chosen_by("name", OPTIMIZERS, default="adamw")] = field(
        default_factory=AdamWConfig
    )
    # share of a matrix that a step at the peak rate takes, as Composer counts decay (ModernBERT's table); instead of weight_decay
    decay_at_peak: float | None = None
    # d of the rate d^(L - l) of layer l of L; embeddings d^L, the head 1; 1: one rate for all
    layer_decay: float = 1.0
    # d of XLNet's form instead: the clipped gradients of layer l times d^(L - l), which is another rule under Adam
    gradient_layer_decay: float = 1.0
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoints: TaskCheckpointConfig = field(default_factory=TaskCheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loader: ExampleLoaderConfig = field(default_factory=ExampleLoaderConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    attention: AttentionWord = "auto"  # the kernels; auto: the fastest that can run
    compile: Literal["auto", "blocks", "off"] = "off"  # micro-batches differ in length
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where torch sees it
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    # of start_from, with this file's dropout: written down by the run, to be left out by you
    body: Annotated[ModelConfig, chosen_by("system", SYSTEMS)] | None = None

    def __post_init__(self) -> None:
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.name}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} must be 0 to 2^63 - 1.")
        for key in ("epochs", "batch_examples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} {getattr(self, key)} must be at least 1.")
        if self.engine.graphs != "off":
            raise ConfigError(
                "engine.graphs micro_step: micro-batches of labelled examples differ in shape. Use"
                " graphs: off."
            )
        if self.compile == "blocks" and self.engine.zero_stage == 3:
            raise ConfigError(
                "compile blocks with zero_stage 3: DeepSpeed fetches a layer's weights by hooks"
                " that compiled code does not call. Use compile: off, or zero_stage 2."
            )
        for key in ("layer_decay", "gradient_layer_decay"):
            if not 0.0 < getattr(self, key) <= 1.0:
                raise ConfigError(f"{key} {getattr(self, key):g} must lie above 0, at most 1.")
        if self.decay_at_peak is not None and not 0.0 <= self.decay_at_peak < 1.0:
            raise ConfigError(f"decay_at_peak {self.decay_at_peak:g} must lie in [0, 1).")
        if self.evaluate.keep == "best":
            one_of_dev(self.evaluate.of, self.data.dev_names, key="evaluate.of")

    @property
    def model(self) -> ModelConfig:
        """The body's settings."""
        assert self.body is not None, "the body is known once start_from was read"
        return self.body

    @property
    def weight_decay(self) -> float:
        """The optimizer's setting for the decay that this file asks for."""
        if self.decay_at_peak is None:
            return self.optimizer.weight_decay
        # of some optimizers the setting itself is a share at the peak rate, of AdamW a share at rate 1
        relative = self.optimizer.decay_at_peak
        return self.decay_at_peak if relative else self.decay_at_peak / self.lr.peak


def one_of_dev(name: str | None, dev: Sequence[str], *, key: str) -> str:
    """The dev set of this name; without a name the only one. Raises ConfigError.

    name: as it was given
    dev: data.dev
    key: of the setting, for messages
    """
    if not dev:
        raise ConfigError(f"{key} needs a dev set, and data.dev has none. Add one.")
    if name is None and len(dev) > 1:
        raise ConfigError(f"{key} is missing: data.dev has {', '.join(dev)}. Name one of them.")
    name = name or next(iter(dev))
    if name not in dev:
        raise ConfigError(f"{key} is {name}, which is none of data.dev. {nearest(name, [*dev])}")
    return name


def read_task(path: Path | str, overrides: Sequence[str] = ()) -> FineTuneConfig:
    """A task file with `key=value` overrides. Raises ConfigError."""
    # the rate in its long form first: an override may name its peak
    mapping = _with_rate(read_mapping(Path(path)))
    refuse_other_kinds(mapping, "task", path=path)
    # lr=1e-5 is the peak alone here, too: the file's schedule stays
    if isinstance(mapping.get("lr"), dict):
        overrides = [re.sub(r"^lr=(?=\s*[^{\s])", "lr.peak=", override) for override in overrides]
    put_overrides(mapping, overrides)
    return task_of(mapping, where=str(path))


def task_of(mapping: dict[str, Any], *, where: str) -> FineTuneConfig:
    """A task file's mapping; `lr` may be the peak alone. Raises ConfigError."""
    mapping = _with_rate(mapping)
    optimizer = mapping.get("optimizer")
    if mapping.get("decay_at_peak") is not None and isinstance(optimizer, dict):
        # a run's own file has the optimizer's default as well, without effect
        if "weight_decay" in optimizer and mapping.get("body") is None:
            raise ConfigError(
                f"{where}: decay_at_peak and optimizer.weight_decay both say the decay. Leave one"
                " out: decay_at_peak is weight_decay times the peak rate."
            )
    return from_mapping(FineTuneConfig, mapping, where=where)


def _with_rate(mapping: dict[str, Any]) -> dict[str, Any]:
    rate = mapping.get("lr")
    if isinstance(rate, (int, float, str)) and not isinstance(rate, bool):
        return {**mapping, "lr": {"peak": rate}}
    return mapping


# what may change between two starts: where things lie, how a step is computed, what is told
_PLACES = (
    "name",
    "out",
    "start_from",
    "checkpoints",
    "evaluate",
    "loader",
    "faults",
    "attention",
    "compile",
    "device",
    "tracking",
)


def identity_of(plain: dict[str, Any]) -> dict[str, Any]:
    """Of a task's plain values those that decide the curve; of data and start it is the content that decides."""
    identity = {key: value for key, value in plain.items() if key not in _PLACES}
    # runs from before it was there go on
    if identity.get("gradient_layer_decay") == 1.0:
        del identity["gradient_layer_decay"]
    data = identity.get("data") or {}
    identity["data"] = {"max_tokens": data.get("max_tokens"), "dev_share": data.get("dev_share")}
    task = identity.get("task") or {}
    identity["task"] = {key: value for key, value in task.items() if key != "metrics"}
    engine = identity.get("engine") or {}
    identity["engine"] = {"gradient_clipping": engine.get("gradient_clipping")}
    # what best is judged by, and how often, decides the weights that a run ends with
    evaluate = plain.get("evaluate") or {}
    is_best = evaluate.get("keep") == "best"
    identity["evaluate"] = evaluate if is_best else {"keep": "last"}
    return identity


def changed_settings(before: dict[str, Any], task: FineTuneConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of what decides the curve and is another than in the run file `before`."""
    return differences(identity_of(before), identity_of(to_plain(task)))
