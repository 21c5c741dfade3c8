"""A run file: everything that decides a run, checked before anything starts.

`identity_of(run)` is the part that decides the curve (data, model, objective, phases, optimizer, seed).
The rest (ranks, micro-batches, ZeRO stage, workers, logging, how often to save) may change between two starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from encoder.base.errors import ConfigError, nearest
from encoder.base.objective import LEAST_PAIR_TOKENS
from encoder.base.schema import (
    LocalText,
    PathText,
    Tokens,
    chosen_by,
    differences,
    expand_paths,
    from_mapping,
    to_plain,
    value_at,
)
from encoder.base.units import short_count
from encoder.data.neighbours import MOST_WINDOW
from encoder.data.order import SHARDS_PER_GROUP
from encoder.data.remote import SCHEMES
from encoder.data.windows import Join, PieceOrder
from encoder.engine.engine import EngineConfig
from encoder.models.catalog import PRESETS, SYSTEMS, system_of
from encoder.models.contract import ModelConfig
from encoder.nn.attend import Word as AttentionWord
from encoder.nn.task_heads import Pooling
from encoder.objectives.catalog import OBJECTIVES
from encoder.objectives.contract import MaskShare, ObjectiveConfig
from encoder.optim.catalog import OPTIMIZERS
from encoder.optim.schedule import SCHEDULES, BatchWarmup, Schedule, next_rise, rows_at
from encoder.optim.shares import LinearShares
from encoder.optim.whole_tensors import MomentsConfig
from encoder.runs.faults import FaultConfig
from encoder.runs.other_words import OTHER_WORDS
from encoder.runs.short_forms import read_run_mapping
from encoder.runs.vocabulary import VocabularyConfig

MOST_WINDOW_DOCUMENTS = 2**24
MOST_WORKERS = 256
# tokens times window, of init_embeddings: a different pair takes about 200 bytes while it is factorized, so at most 10 GB
MOST_COUNTED_PAIRS = 50_000_000
MOST_SHUFFLED = 256  # an open shard takes a file handle, of 1,024 that a process usually has


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One shard folder of a mixture."""

    path: PathText  # a folder with card.json, made by data-prep; or a URL of one, with `cache`
    # a folder of this machine that its files are fetched to, for this source alone
    cache: LocalText | None = None
    cache_bytes: int | None = None  # most that its shards may take there; default: all of them stay
    weight: float = 1.0  # share of the tokens, relative to the other sources' weights
    name: str | None = None  # in reports and in the data order's address; default: from the card
    max_epochs: float | None = None  # refuse a phase that goes through it more often

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"weight {self.weight} must be above 0. Leave the source out instead."
            )
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(
                f"max_epochs {self.max_epochs} must be above 0. Leave the source out instead."
            )
        scheme = self.path.partition("://")[0]
        if scheme != self.path and scheme not in SCHEMES:
            raise ConfigError(
                f"path {self.path} begins with {scheme}://. {nearest(scheme, list(SCHEMES))}"
            )
        if scheme != self.path and self.cache is None:
            raise ConfigError(
                f"path {self.path} lies elsewhere. Add cache: FOLDER, a folder of this machine to"
                " fetch it to."
            )
        if self.cache is None and self.cache_bytes is not None:
            raise ConfigError(
                "cache_bytes has no effect without cache. Leave it out, or add cache: FOLDER."
            )
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise ConfigError(
                f"cache_bytes {self.cache_bytes} must be at least 1; leave it out to keep all"
                " shards."
            )
        if self.cache is not None and Path(self.cache) == Path(self.path):
            raise ConfigError(
                f"cache {self.cache} is the source itself. Leave it out, or name another folder."
            )

    @property
    def folder(self) -> Path:
        """Where card, lengths and tokenizer are on this machine, of a cached source once they were fetched."""
        return Path(self.cache or self.path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How documents become rows."""

    sources: tuple[
        SourceConfig, ...
    ]  # shard folders, weighted; or mixture: {file: PREP.yaml, name: NAME}
    row_tokens: int  # capacity of a row, the unit of packing and of batch size; default: divides every batch
    # packed together, fewer where a source has fewer; rows of 16,384 of real text: 4096 99.5 %, 8192 99.7 % full
    window_documents: int = 8192
    lanes: int = 1  # sequences of windows side by side, each over its own shards of every source
    shuffle_shards: int = SHARDS_PER_GROUP  # of a source, shuffled together; more where shards are local: a wider shuffle
    # documents: a long document's pieces fill whole rows; mixed: rows have pieces of many documents, for batches of few rows
    piece_order: PieceOrder = "documents"
    # documents follow each other in blocks of max_tokens_per_document, which end `anywhere` or behind `sentences` (RoBERTa)
    join: Join = "none"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty; needed: at least one {path: FOLDER}.")
        if self.row_tokens < 8 or self.window_documents < 1 or self.lanes < 1:
            raise ConfigError(
                f"row_tokens {self.row_tokens}, window_documents {self.window_documents} and lanes"
                f" {self.lanes} must be at least 8, 1 and 1."
            )
        if self.window_documents > MOST_WINDOW_DOCUMENTS:
            raise ConfigError(
                f"window_documents {self.window_documents:,} is more than"
                f" {MOST_WINDOW_DOCUMENTS:,}: a window is planned as a whole, in about 100 bytes of"
                " memory a document."
            )
        if not 1 <= self.shuffle_shards <= MOST_SHUFFLED:
            raise ConfigError(
                f"shuffle_shards {self.shuffle_shards} must be 1 to {MOST_SHUFFLED}: so many shards"
                " of every source are open at a time."
            )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How rows reach this machine; nothing here changes the batches, but for shards that are lost."""

    micro_batch_rows: int = 1  # rows in one forward
    workers: int = 1  # processes that assemble rows ahead of time; 0: in the training process
    prefetch_windows: int | None = None  # how far ahead shards are brought to caches; default: 128
    # quarantine: go on without a damaged shard's documents
    on_bad_shard: Literal["stop", "quarantine"] = "stop"

    def __post_init__(self) -> None:
        if self.prefetch_windows is not None and self.prefetch_windows < 1:
            raise ConfigError(f"prefetch_windows {self.prefetch_windows} must be at least 1.")
        if self.micro_batch_rows < 1 or not 0 <= self.workers <= MOST_WORKERS:
            raise ConfigError(
                f"micro_batch_rows {self.micro_batch_rows} and workers {self.workers} must be at"
                f" least 1, and 0 to {MOST_WORKERS}."
            )


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One stretch of a run. The data order, the schedules and the token clock start anew in each phase."""

    name: str  # in reports and checkpoints; default: main, or phase_1, phase_2, ...
    tokens: Tokens  # without padding; ends with the step that reaches it
    max_tokens_per_document: int  # longer ones are cut into near-equal pieces; default: 1024
    batch_tokens: Tokens  # capacity of a step over all ranks, in whole rows
    # or its peak alone: warm-up, flat, decay at the run's end
    lr: Annotated[Schedule, chosen_by("schedule", SCHEDULES)]
    model: dict[str, float] = field(
        default_factory=dict
    )  # what the phase changes of the model; default: nothing
    batch_warmup: BatchWarmup | None = None
    # another mixture for this phase; or mixture: {name: NAME}
    sources: tuple[SourceConfig, ...] | None = None
    mask_share: float | None = None  # masking rate; default: the objective's
    # reached at the phase's end, on a straight line over its tokens
    mask_share_end: float | None = None
    # share of the matrices lost in a step; default: the optimizer's
    weight_decay: float | None = None
    max_lr: float | None = None  # rate at which a step loses all of weight_decay; default: lr.peak

    def __post_init__(self) -> None:
        for share in (self.mask_share, self.mask_share_end):
            if share is not None and not 0 < share < 1:
                raise ConfigError(
                    f"phase {self.name}: mask_share {share} must lie between 0 and 1. ModernBERT"
                    " uses 0.3."
                )
        if self.tokens < 1:
            raise ConfigError(f"phase {self.name}: tokens is 0; needed: at least one step.")
        if (
            self.weight_decay is not None
            and not 0.0 <= self.weight_decay < 1.0
            or self.max_lr is not None
            and not self.max_lr > 0
        ):
            raise ConfigError(
                f"phase {self.name}: weight_decay {self.weight_decay} must lie in [0, 1), max_lr"
                f" {self.max_lr} above 0. Leave them out for the optimizer's decay at the phase's"
                " own peak."
            )
        if self.max_tokens_per_document < 3:
            raise ConfigError(
                f"phase {self.name}: max_tokens_per_document {self.max_tokens_per_document} leaves"
                " no room between [CLS] and [SEP]; needed: at least 3."
            )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Labelled texts that a run is asked about at every evaluation."""

    name: str  # in metrics: probe_NAME
    train: LocalText  # labelled texts to learn from: .jsonl, .csv, .tsv, .parquet, .arrow
    test: LocalText  # to be asked
    text: str = "text"  # the column of the text
    label: str = "label"  # of the label
    most_rows: int = 2000  # of each file, drawn where it has more
    max_tokens: int = 128  # of a text, [CLS] and [SEP] included; the rest is cut off

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(
                f"name {self.name!r}: metrics have it as probe_NAME. Use letters, digits and _."
            )
        if self.most_rows < 1 or self.max_tokens < 3:
            raise ConfigError("most_rows must be at least 1, max_tokens at least 3.")


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(ProbeConfig):
    """A linear probe: what frozen embeddings tell about the labels of texts."""


@dataclass(frozen=True, kw_only=True)
class FineTuneProbeConfig(ProbeConfig):
    """A short fine-tuning of a copy of the weights, as `tessera finetune` does it; the run itself stays as it is."""

    epochs: int = 1  # how often the training texts are gone through
    batch_examples: int = 32  # of a step, over all ranks and micro-batches
    lr: float = 5.0e-5  # the highest rate: linear, with a tenth of warm-up
    seed: int = 17  # of the head's first weights, the order of the texts and dropout
    pooling: Pooling = "cls"  # the first token, or the mean of all (ModernBERT alone)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("epochs", "batch_examples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} {getattr(self, key)} must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} must be 0 to 2^63 - 1.")
        # raises where the rate is none
        LinearShares(peak=self.lr)


PROBES: dict[str, type[ProbeConfig]] = {
    "linear": LinearProbeConfig,
    "finetune": FineTuneProbeConfig,
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out loss: fixed documents, fixed masks."""

    sources: tuple[
        SourceConfig, ...
    ]  # shard folders; or mixture: {name: NAME}, the held-out documents of its sources
    every_tokens: Tokens  # how often it is measured; default: a twentieth of the run, at most 5B
    rows: int = 8  # of data.row_tokens, per source
    mask_share: float = 0.15  # as published for ModernBERT (15 %, [CLS] and [SEP] never masked)
    # what the weights tell about labels, with every evaluation
    probes: tuple[Annotated[ProbeConfig, chosen_by("kind", PROBES, default="linear")], ...] = ()

    def __post_init__(self) -> None:
        names = [probe.name for probe in self.probes]
        if len({*names}) < len(names):
            raise ConfigError(f"probes have the names {', '.join(names)}; each may stand once.")
        if self.every_tokens < 1 or self.rows < 1 or not 0 < self.mask_share < 1:
            raise ConfigError(
                "every_tokens and rows must be at least 1, mask_share between 0 and 1."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save; ends of phases and interruptions are always saved."""

    # how often a checkpoint is written; default: a twentieth of the run, at most 5B
    every_tokens: Tokens
    keep_last: int = 2  # whole ones; older ones are removed, ends of phases are kept
    background: bool = True  # written while training goes on, from a copy in host memory

    def __post_init__(self) -> None:
        if self.every_tokens < 1 or self.keep_last < 1:
            raise ConfigError("every_tokens and keep_last must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where numbers go beside the run folder's own metrics.jsonl."""

    print_every_steps: int = 10  # a line in a log
    # set: also log there (offline unless WANDB_API_KEY or a login is at hand)
    wandb_project: str | None = None
    # also write RUN/tensorboard (needs the extra: pip install -e '.[tensorboard]')
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.print_every_steps < 1:
            raise ConfigError(f"print_every_steps {self.print_every_steps} must be at least 1.")

    def check_packages(self) -> None:
        """Where the run is to start. Raises ConfigError for a package that is not here."""
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracking.tensorboard needs the package tensorboard, which is not here. "
                "Install the extra (pip install -e '.[tensorboard]'), or leave the setting out."
            )


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A setting that the run file does not have, and why it is what it is."""

    key: str  # dotted
    value: Any
    why: str

    @property
    def text(self) -> str:
        """One line for people."""
        if type(self.value) is int:
            value = f"{self.value:,}"
        else:
            value = self.value
        return (
            f"{self.key} {value}: {self.why}"
            if not isinstance(value, (dict, list))
            else f"{self.key}: {self.why}"
        )


@dataclass(frozen=True, kw_only=True)
class InitEmbeddingsConfig:
    """The table of tokens begins with vectors of neighbours that were counted (encoder.nn.token_vectors), and attention
    with passing them on (encoder.nn.init.mimetic_values)."""

    # of the first phase's documents, read before the first step; all of them where the shards hold fewer
    tokens: Tokens = 5_000_000
    window: int = 2  # tokens on either side, at most 16; times tokens at most 50M
    # standard deviation of a row's elements over that of a drawn table; half of it is added, with alternating sign, to all rows
    times_drawn: float = 2.5
    # strength of the mimetic initialization (Trockman and Kolter 2023): Wo Wv is this times the identity. Above 0 the head's dense
    # matrix is S of encoder.nn.token_vectors, which turns a vector towards its neighbours'; 0: both are drawn
    mimetic: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MOST_WINDOW:
            raise ConfigError(f"window {self.window} must lie between 1 and {MOST_WINDOW}.")
        most = MOST_COUNTED_PAIRS // self.window
        if not 1 <= self.tokens <= most:
            raise ConfigError(
                f"tokens {self.tokens:,} must lie between 1 and {most:,} with a"
                f" window of {self.window}: the pairs stand in the memory of one rank."
            )
        if not 0 <= self.mimetic < math.inf:
            raise ConfigError(
                f"mimetic {self.mimetic} must be at least 0; 0 leaves attention as it is drawn."
            )
        if not 0 < self.times_drawn < math.inf:
            raise ConfigError(
                f"times_drawn {self.times_drawn} must be above 0; 1 gives"
                " the deviation of drawn rows."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole run file."""

    other_words: ClassVar[dict[str, str]] = OTHER_WORDS

    name: str  # of the run, in reports and in runs/NAME
    out: LocalText  # the run folder: ledger, metrics, checkpoints; default: runs/NAME
    seed: int  # of weights, order and masks; default: 17, a branch's another
    # {preset: NAME}, or a shape; default: that of init_from
    model: Annotated[ModelConfig, chosen_by("system", SYSTEMS)]
    data: DataConfig  # or a list of shard folders
    phases: tuple[PhaseConfig, ...]
    checkpoints: CheckpointConfig  # default: see below
    objective: Annotated[ObjectiveConfig, chosen_by("name", OBJECTIVES, default="mlm")] = field(
        default_factory=OBJECTIVES["mlm"]
    )
    optimizer: Annotated[MomentsConfig, chosen_by("name", OPTIMIZERS, default="stable_adamw")] = (
        field(default_factory=OPTIMIZERS["stable_adamw"])
    )
    init_from: PathText | None = None  # a stored model that the weights start from, not the seed
    # rows of the tokens from counts of their neighbours in the shards, for small runs; default: drawn from the seed
    init_embeddings: InitEmbeddingsConfig | None = None
    # where the shards' tokenizer was edited after init_from was trained; default: it was not
    vocabulary: VocabularyConfig | None = None
    # a run's checkpoint: weights and optimizer state start from it
    branch_from: LocalText | None = None
    evaluation: EvaluationConfig | None = None  # default: held_out beside each train; null for none
    engine: EngineConfig = field(default_factory=EngineConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    # the kernels; auto: the fastest that can run; flash4 is experimental: never run on a GPU
    attention: AttentionWord = "auto"
    # layers by torch.compile; auto: on CUDA, below zero_stage 3
    compile: Literal["auto", "blocks", "off"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where torch sees it
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    given: dict[str, Any] | None = field(
        init=False, default=None, compare=False, repr=False
    )  # the run file as it was read
    derived: tuple[Derived, ...] = field(
        init=False, default=(), compare=False, repr=False
    )  # what it left out

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} must be 0 to 2^63 - 1.")
        if self.init_from and self.branch_from:
            raise ConfigError(
                "init_from and branch_from both say where the weights start. Leave one out:"
                " branch_from takes the optimizer state, too."
            )
        if self.init_embeddings and (self.init_from or self.branch_from):
            raise ConfigError(
                "init_embeddings has no effect with init_from or branch_from, whose tables are"
                " trained. Leave one out."
            )
        if self.vocabulary and not self.init_from:
            raise ConfigError(
                "vocabulary has no effect without init_from: a new model has no tokens yet. Leave"
                " it out."
            )
        _check_place("init_from", self.init_from)
        for name in self.objective.STORED_MODELS:
            _check_place(f"objective.{name}", getattr(self.objective, name))
        if not self.phases:
            raise ConfigError("phases is empty; needed: at least one phase.")
        if self.compile == "blocks" and self.engine.zero_stage == 3:
            raise ConfigError(
                "compile blocks with zero_stage 3: DeepSpeed fetches a layer's weights by hooks"
                " that compiled code does not call. Use compile: off, or zero_stage 2."
            )
        self._fill_in_phase_models()
        self._check_caches()
        self._check_objective()
        names = [p.name for p in self.phases]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"phases have the names {', '.join(names)}; each name may stand once."
            )
        for phase in self.phases:
            if phase.max_tokens_per_document > self.data.row_tokens:
                raise ConfigError(
                    f"phase {phase.name}: documents of {phase.max_tokens_per_document:,} tokens do"
                    f" not fit rows of {self.data.row_tokens:,}. Raise data.row_tokens or lower"
                    " max_tokens_per_document."
                )
            if phase.max_tokens_per_document > self.model.max_position_embeddings:
                raise ConfigError(
                    f"phase {phase.name}: max_tokens_per_document {phase.max_tokens_per_document:,}"
                    " is above model.max_position_embeddings"
                    f" {self.model.max_position_embeddings:,}. Raise the latter."
                )
            if phase.max_lr is not None and not self.optimizer.decay_at_peak:
                raise ConfigError(
                    f"phase {phase.name}: max_lr {phase.max_lr:g} has no effect: the decay of this"
                    " optimizer is not relative to a peak rate. Leave it out."
                )
            try:
                phase.lr.at(0, phase_tokens=phase.tokens)
            except ConfigError as error:
                raise ConfigError(
                    f"phases.{self.phases.index(phase)}.lr of phase {phase.name}: {error}"
                ) from error
            try:
                self.rows_at(phase, 0)
            except ConfigError as error:
                each = (
                    f" A step takes a row of each of {self.data.lanes} data.lanes at a time."
                    if self.data.lanes > 1
                    else ""
                )
                raise ConfigError(f"{error}{each}") from error

    def _fill_in_phase_models(self) -> None:
        may_change = self.model.PHASE_SETTINGS
        # in the end every phase has all of these settings: nobody else looks at the model's
        own = {name: getattr(self.model, name) for name in may_change}
        whole = []
        for number, phase in enumerate(self.phases):
            for name in phase.model:
                if name not in may_change:
                    raise ConfigError(
                        f"phases.{number}.model.{name} is nothing that a phase may change of this"
                        f" model. {nearest(name, list(may_change))}"
                    )
            # for its checks alone
            try:
                dataclasses.replace(self.model, **phase.model)
            except ConfigError as error:
                raise ConfigError(
                    f"phases.{number}.model of phase {phase.name}: {error}"
                ) from error
            whole.append(dataclasses.replace(phase, model={**own, **phase.model}))
        # the class is frozen
        object.__setattr__(self, "phases", tuple(whole))

    def _check_trained(self) -> None:
        """The objective trains all networks of the model, and a model is not half of one."""
        own = getattr(self.model, "TRAINED_BY", None)
        word = next(word for word, kind in OBJECTIVES.items() if type(self.objective) is kind)
        if own is None or word in own:
            return
        system = system_of(self.model)
        if not own:
            raise ConfigError(
                f"model.system {system} is half of a model, which no objective trains alone. Use"
                f" model.system: {system.removesuffix('_discriminator')}, or leave model out and"
                " start from a model of masked tokens."
            )
        raise ConfigError(
            f"objective {word} does not train all of a model.system {system}; needed: objective:"
            f" {{name: {own[0]}}}."
        )

    def _check_objective(self) -> None:
        self._check_trained()
        settings = {field.name for field in dataclasses.fields(self.model)}
        for name, least in self.objective.model_needs.items():
            if name not in settings:
                able = (
                    system
                    for system, kind in SYSTEMS.items()
                    if name in {field.name for field in dataclasses.fields(kind)}
                )
                raise ConfigError(
                    f"this objective needs a model with {name}, which this one has not. Use another"
                    f" model.system, such as {next(able)}, or objective: {{name: mlm}}."
                )
            found = getattr(self.model, name)
            if found < least:
                needed = json.dumps(least)
                raise ConfigError(
                    f"model.{name} is {json.dumps(found)}; this objective needs {needed}. Set"
                    f" model.{name}: {needed}."
                )

        # a head that no loss reaches would be saved as it was drawn
        for name in self.model.growth().heads:
            if getattr(self.model, name) and not self.objective.model_needs.get(name):
                raise ConfigError(
                    f"model.{name} is true, and this objective has no loss for it: nothing would"
                    f" train it. Set model.{name}: false, or use an objective that needs it."
                )

        longest = max(phase.max_tokens_per_document for phase in self.phases)
        self.objective.check_documents(longest_tokens=longest)
        if self.objective.pairs and self.data.join != "none":
            raise ConfigError(
                f"data.join {self.data.join} and an objective of pairs: a pair is a document of its"
                " own. Leave data.join out, or use objective: {name: mlm}."
            )
        for phase in self.phases if self.objective.pairs else ():
            if phase.max_tokens_per_document < LEAST_PAIR_TOKENS:
                raise ConfigError(
                    f"phase {phase.name}: max_tokens_per_document {phase.max_tokens_per_document}"
                    f" has no room for two sentences; needed: at least {LEAST_PAIR_TOKENS}."
                )

    def _check_caches(self) -> None:
        cached: dict[str, SourceConfig] = {}
        for source in self.all_sources():
            if not source.cache:
                continue
            # one cache for one folder: files of two would have the same names
            other = cached.setdefault(source.cache, source)
            if (other.path.rstrip("/"), other.cache_bytes) != (
                source.path.rstrip("/"),
                source.cache_bytes,
            ):
                raise ConfigError(
                    f"cache {source.cache} stands at {other.path} and at {source.path}, or with two"
                    " cache_bytes. Give each source a cache of its own."
                )
        if self.loader.prefetch_windows is not None and not cached:
            raise ConfigError(
                "loader.prefetch_windows has no effect: no source has a cache. Leave it out."
            )

    @property
    def needs_sentences(self) -> bool:
        """Whether shards must say where their sentences end: for pairs, and for blocks of whole sentences."""
        return self.objective.pairs is not None or self.data.join == "sentences"

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Of all phases and of the evaluation; a source that several phases share stands several times."""
        found: list[SourceConfig] = []
        for phase in self.phases:
            found += self.sources_of(phase)
        if self.evaluation:
            found += self.evaluation.sources
        return tuple(found)

    def rows_at(self, phase: PhaseConfig, phase_tokens: int) -> int:
        """Rows of the next step when `phase_tokens` were seen in the phase."""
        lanes = self.data.lanes  # as many rows of each
        return lanes * rows_at(
            phase_tokens,
            batch_tokens=phase.batch_tokens,
            # a row of each lane together count as one
            row_tokens=lanes * self.data.row_tokens,
            warmup=phase.batch_warmup,
        )

    def next_rise(self, phase: PhaseConfig, phase_tokens: int) -> int | None:
        """The first tokens of the phase, beyond `phase_tokens`, at which a step has more rows, or None."""
        return next_rise(
            phase_tokens,
            batch_tokens=phase.batch_tokens,
            row_tokens=self.data.lanes * self.data.row_tokens,
            warmup=phase.batch_warmup,
        )

    def mask_share_of(self, phase: PhaseConfig) -> MaskShare:
        """The masking rate of a phase: the phase's own or the objective's, over the phase's tokens."""
        return MaskShare(
            start=phase.mask_share or self.objective.mask_share,
            end=phase.mask_share_end,
            over_tokens=phase.tokens,
        )

    def weight_decay_of(self, phase: PhaseConfig) -> float:
        """The share that a step of the phase takes from the matrices at the rate `phase.max_lr` (default: its peak)."""
        return self.optimizer.weight_decay if phase.weight_decay is None else phase.weight_decay

    def model_of(self, phase: PhaseConfig) -> ModelConfig:
        """The model's settings with what the phase changes."""
        return dataclasses.replace(self.model, **phase.model)

    def sources_of(self, phase: PhaseConfig) -> tuple[SourceConfig, ...]:
        """The mixture of a phase: its own, or the run's."""
        return phase.sources or self.data.sources


def _check_place(key: str, place: str | None) -> None:
    """A stored model is here, or on the hub. Raises ConfigError for another scheme."""
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", place or "")
    if scheme and scheme[1] != "hf":
        raise ConfigError(
            f"{key} {place} begins with {scheme[0]}; needed: a folder or file of"
            " this machine, or a name of the hub, such as hf://answerdotai/ModernBERT-base."
        )


IDENTITY = (
    "seed",
    "model",
    "init_from",
    "init_embeddings",
    "vocabulary",
    "branch_from",
    "data",
    "objective",
    "optimizer",
    "phases",
)


def read_run(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file with `key=value` overrides, what it leaves out worked out (encoder.runs.defaults). Raises ConfigError."""
    return run_of(read_run_mapping(Path(path), overrides), where=str(path))


def run_of(given: dict[str, Any], *, where: str) -> RunConfig:
    """The run of a long form. Raises ConfigError."""
    # here: a default may come from a stored run, which is read by this module
    from encoder.runs.defaults import with_defaults

    mapping, derived = with_defaults(
        expand_paths(RunConfig, with_preset(given, where=where), where=where)
    )
    run = from_mapping(RunConfig, mapping, where=where)
    object.__setattr__(run, "given", given)
    object.__setattr__(run, "derived", derived)
    return run


def with_engine(run: RunConfig, **changes: Any) -> RunConfig:
    """The run with other settings of its engine; it keeps what it knows of its file."""
    return with_settings(run, engine=dataclasses.replace(run.engine, **changes))


def with_settings(run: RunConfig, **changes: Any) -> RunConfig:
    """As dataclasses.replace; the run keeps what it knows of its file."""
    changed = dataclasses.replace(run, **changes)
    object.__setattr__(changed, "given", run.given)
    object.__setattr__(changed, "derived", run.derived)
    return changed


def identity_of(run: RunConfig | dict[str, Any]) -> dict[str, Any]:
    """The plain values that decide the curve; a checkpoint goes on only under equal ones.

    No path is among them, for it is content that decides: encoder.runs.same holds cards, initial weights, a branch's parent
    and the objective's stored models against what the checkpoint has of them.
    """
    if isinstance(run, dict):
        plain = _with_old_meanings(run)
    else:
        plain = to_plain(run)
    identity = _without_places({key: plain.get(key) for key in IDENTITY})
    for key in ("init_from", "branch_from"):
        identity[key] = _A_MODEL if plain.get(key) else None
    identity["objective"] = _without_models(identity["objective"])
    # of the engine only clipping decides the curve: stage and precision may change on the way
    identity["engine"] = {"gradient_clipping": (plain.get("engine") or {}).get("gradient_clipping")}
    return identity


_A_MODEL = "a stored model"  # whichever path names it


def _without_models(objective: Any) -> Any:
    """The settings of an objective without where its stored models lie."""
    word = value_at(objective, "name")
    models = getattr(OBJECTIVES.get(word), "STORED_MODELS", ()) if isinstance(word, str) else ()
    if models:
        return {**objective, **dict.fromkeys(models, _A_MODEL)}
    return objective


# of a phase, which are in its `model` now
FORMER_PHASE_KEYS = ("global_rope_theta", "local_rope_theta")
# settings that came later, and what a resolved run file without them means
OLD_MEANINGS = {"objective.random_tokens": "all", "data.shuffle_shards": SHARDS_PER_GROUP}


def old_meanings(plain: dict[str, Any]) -> dict[str, Any]:
    """Those of OLD_MEANINGS that a run with these settings can have: not every objective draws random tokens."""
    word = value_at(plain.get("objective"), "name")
    kind = OBJECTIVES.get(word) if isinstance(word, str) else None
    if kind is None:
        return OLD_MEANINGS
    known = {f"objective.{field.name}" for field in dataclasses.fields(kind)}
    return {
        dotted: meaning
        for dotted, meaning in OLD_MEANINGS.items()
        if dotted in known or not dotted.startswith("objective.")
    }


def todays_form(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved run file of any version, with the keys of today: RoPE thetas of a phase stood in the phase itself once."""
    phases = plain.get("phases")
    if not isinstance(phases, list):
        return plain
    return {**plain, "phases": [_todays_phase(p) if isinstance(p, dict) else p for p in phases]}


def _todays_phase(phase: dict[str, Any]) -> dict[str, Any]:
    moved = {key: value for key, value in phase.items() if key in FORMER_PHASE_KEYS}
    if not moved:
        return phase
    kept = {key: value for key, value in phase.items() if key not in moved}
    return {**kept, "model": {**moved, **(phase.get("model") or {})}}


def _with_old_meanings(plain: dict[str, Any]) -> dict[str, Any]:
    plain = dict(todays_form(plain))
    for dotted, meaning in old_meanings(plain).items():
        section, _, key = dotted.partition(".")
        if isinstance(plain.get(section), dict):
            # what the file says stands last, and wins
            plain[section] = {key: meaning, **plain[section]}
    return plain


def changed_settings(before: dict[str, Any], run: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of what decides the curve and is another than in the run file `before`.

    A source without a name has its card's: there the names on the cards are compared, and not the settings. A setting that
    came after `before` was written had the meaning of its default then, unless OLD_MEANINGS has another.
    """
    saved = identity_of(before)
    changed = differences(saved, identity_of(run))
    return [
        (key, old, new)
        for key, old, new in changed
        # a name against none: the cards decide, which are compared elsewhere
        if not (".sources." in f".{key}" and key.endswith(".name") and (old is None or new is None))
        and (_stands_in(saved, key) or new != _default_at(run, key))
    ]


def _stands_in(plain: Any, dotted: str) -> bool:
    """Whether plain values have something at a dotted key."""
    for part in dotted.split("."):
        if isinstance(plain, list):
            # an index of a list is a part of the key: phases.0.tokens
            plain = {str(number): item for number, item in enumerate(plain)}
        if not isinstance(plain, dict) or part not in plain:
            return False
        plain = plain[part]
    return True


def _default_at(run: RunConfig, dotted: str) -> Any:
    """The default of the setting at a dotted key as a plain value; MISSING where there is none."""
    *path, name = dotted.split(".")
    holder: Any = run
    for part in path:
        holder = holder[int(part)] if part.isdecimal() else getattr(holder, part, None)
    if not dataclasses.is_dataclass(holder):
        return dataclasses.MISSING
    fields = {field.name: field for field in dataclasses.fields(holder)}
    if name not in fields:
        return dataclasses.MISSING
    factory = fields[name].default_factory
    if factory is not dataclasses.MISSING:
        return to_plain(factory())
    default = fields[name].default
    if default is dataclasses.MISSING:
        return default
    return to_plain(default)


# of a source: where it is, and how much of it is too much
PLACES = (
    "path",
    "cache",
    "cache_bytes",
    "max_epochs",
)


def _without_places(plain: Any) -> Any:
    """The settings without where a source lies and where its files are kept: neither decides anything."""
    if isinstance(plain, dict):
        return {k: _without_places(v) for k, v in plain.items() if k not in PLACES}
    if isinstance(plain, list):
        return [_without_places(v) for v in plain]
    return plain


def with_preset(mapping: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`model: {preset: NAME, ...}` filled in with the published shape. Raises ConfigError."""
    model = mapping.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return mapping
    name = model["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{where}: model.preset is {name!r}. {nearest(str(name), list(PRESETS))}")
    return {
        **mapping,
        "model": {**PRESETS[name], **{k: v for k, v in model.items() if k != "preset"}},
    }


def schedule_word(phase: PhaseConfig) -> str:
    """The word by which the run file chose the phase's schedule."""
    return next(word for word, kind in SCHEDULES.items() if type(phase.lr) is kind)


def describe_phase(run: RunConfig, phase: PhaseConfig) -> str:
    """One line for people: name, amount, length, and what the phase may change of the model."""
    texts = [f"{label} {text}" for label, text in run.model_of(phase).phase_texts.items()]
    return ", ".join(
        [
            f"{phase.name}: {short_count(phase.tokens)} tokens",
            f"documents up to {phase.max_tokens_per_document:,}",
            *texts,
        ]
    )
