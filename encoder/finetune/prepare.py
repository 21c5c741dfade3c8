"""Before a fine-tuning starts: its model, its rows, and the head that follows from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from encoder.base.errors import ConfigError, ModelError
from encoder.base.tokenizer_json import special_ids_of
from encoder.data.examples import Examples
from encoder.data.hub_rows import read_split
from encoder.data.labelled import Rows, held_out_rows, read_rows
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import committed_folders
from encoder.finetune.config import HELD_OUT, FineTuneConfig, LabelledDataConfig, read_task
from encoder.finetune.encoding import TextEncoder, check_length, read_encoder
from encoder.finetune.head import head_shape
from encoder.finetune.kinds.contract import AskedSet, TaskConfig
from encoder.finetune.stored import is_task, read_trained
from encoder.models.contract import ModelConfig
from encoder.models.hf.other_heads import TaskHead
from encoder.models.hf.task import TrainedTask
from encoder.models.stored import StoredModel, used_network
from encoder.models.with_task import HeadShape
from encoder.objectives.text_tasks import TextObjective
from encoder.runs.folder import CHECKPOINTS, RUN_FILE
from encoder.runs.weights import read_head, read_model


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a fine-tuning begins with, or began with."""

    # its weights are empty where the run goes on from a checkpoint; with a head they have that, too
    model: StoredModel
    tokenizer_json: Path
    resumes: bool
    head: TaskHead | None = None  # of an earlier task

    def weights_for(self, task: TaskConfig) -> dict[str, Tensor]:
        """By our names; the classifier is kept for a task of the same kind with the same labels, and drawn for another."""
        if self.head is None or self._is_of(task):
            return self.model.weights
        return {n: w for n, w in self.model.weights.items() if not n.startswith("classifier.")}

    def in_its_order(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The labels as the earlier task has them, where they are the same ones: its classifier then fits."""
        known = self.head.labels if self.head else None
        if known is not None and len(known) == len(labels) and {*known} == {*labels}:
            return known
        return labels

    def _is_of(self, task: TaskConfig) -> bool:
        return (
            self.head is not None
            and self.head.kind == task.HEAD
            and self.head.problem == task.PROBLEM
            and self.head.labels == task.labels
        )


def read_start(task: FineTuneConfig) -> Start:
    """The model of start_from; once there is a checkpoint, what the run folder has of it. Raises UserError."""
    folder = Path(task.out)
    if committed_folders(folder / CHECKPOINTS) and (folder / RUN_FILE).is_file():
        begun = read_task(folder / RUN_FILE)
        model = StoredModel(
            config=begun.model, weights={}, tokenizer_json=folder / TOKENIZER, origin=""
        )
        # its labels keep the order that it began with
        head = TaskHead(
            kind=begun.task.HEAD, labels=begun.task.labels, weights={}, problem=begun.task.PROBLEM
        )
        return Start(model=model, tokenizer_json=folder / TOKENIZER, resumes=True, head=head)
    return start_of(Path(task.start_from))


def start_of(path: Path) -> Start:
    """What a fine-tuning from a run, a checkpoint or a folder begins with. Raises UserError."""
    if is_task(path):
        return _of_fine_tuning(read_trained(path))
    model = used_network(read_model(path))
    if model.tokenizer_json is None:
        raise ModelError(
            f"start_from {path} has no {TOKENIZER}; needed: the one that the model was"
            " trained with. Put it there."
        )
    _, specials = special_ids_of(model.tokenizer_json, error=ModelError)
    head = read_head(path, specials)
    if head is None:
        return Start(model=model, tokenizer_json=model.tokenizer_json, resumes=False)
    # what was drawn in place of the head over masked tokens goes
    own = {name: w for name, w in model.weights.items() if name not in model.drawn}
    return Start(
        model=dataclasses.replace(model, weights=own | head.weights),
        tokenizer_json=model.tokenizer_json,
        resumes=False,
        head=head,
    )


def _of_fine_tuning(trained: TrainedTask) -> Start:
    return Start(
        model=StoredModel(
            config=trained.config,
            weights=trained.weights,
            tokenizer_json=trained.tokenizer_json,
            origin=trained.origin,
        ),
        tokenizer_json=trained.tokenizer_json,
        resumes=False,
        head=TaskHead(
            kind=trained.head.kind,
            labels=trained.labels,
            weights={},
            problem=trained.problem,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task with all that its rows and its model say."""

    task: FineTuneConfig  # body and labels filled in
    head: HeadShape
    encoder: TextEncoder
    train_set: AskedSet
    dev: list[AskedSet] = field(default_factory=list)
    test: list[AskedSet] = field(default_factory=list)
    # data set -> file, or dataset with commit and split, that its rows were read of
    rows_of: dict[str, str] = field(default_factory=dict)

    @property
    def sets(self) -> list[AskedSet]:
        """All of them, the training rows first."""
        return [self.train_set, *self.dev, *self.test]

    @property
    def train(self) -> Examples:
        """What is trained on."""
        return self.train_set.examples

    @property
    def objective(self) -> TextObjective:
        """Of the task."""
        return self.task.task.objective


@dataclass(frozen=True, kw_only=True)
class EncodedSets:
    """All rows of a task, encoded."""

    kind: TaskConfig  # whose labels are known
    train: AskedSet
    dev: list[AskedSet]
    test: list[AskedSet]
    rows_of: dict[str, str]  # as of Prepared


class LastRows:
    """The rows that a process encoded last: its next run often has the same ones, as the points of a sweep do."""

    def __init__(self) -> None:
        self._of: Hashable = None
        self._sets: EncodedSets | None = None

    def sets(self, task: FineTuneConfig, encoder: TextEncoder, start: Start) -> EncodedSets:
        """Those of a task, encoded anew where files, tokenizer or what is asked are others. Raises UserError."""
        of = (*_identity(task, encoder), start.head and start.head.labels)
        if self._sets is None or of != self._of:
            self._sets = None
            self._sets = _encode_all(task, encoder, start)
            self._of = of
        return self._sets


def prepare(task: FineTuneConfig, start: Start, *, last: LastRows | None = None) -> Prepared:
    """Reads and encodes all rows, and shapes the head. Raises UserError with file and row.

    task: as it was read
    start: its model
    last: rows that another run of this process has encoded
    """
    body, encoder = _body_and_encoder(task, start)
    sets = (last or LastRows()).sets(task, encoder, start)
    return _prepared(task, body, encoder, sets)


def prepare_training(task: FineTuneConfig, start: Start) -> Prepared:
    """As prepare, of the training rows alone. Raises UserError with file and row."""
    body, encoder = _body_and_encoder(task, start)
    rows = _encode_training(task, encoder, start)
    sets = EncodedSets(kind=rows.kind, train=rows.train, dev=[], test=[], rows_of=rows.rows_of)
    return _prepared(task, body, encoder, sets)


def _prepared(
    task: FineTuneConfig, body: ModelConfig, encoder: TextEncoder, sets: EncodedSets
) -> Prepared:
    """The task with what is known of it.

    task: as it was read
    body, encoder: of `_body_and_encoder`
    sets: its rows, encoded
    """
    task = dataclasses.replace(task, task=sets.kind, body=body)
    return Prepared(
        task=task,
        head=head_shape(task, encoder.specials),
        encoder=encoder,
        train_set=sets.train,
        dev=sets.dev,
        test=sets.test,
        rows_of=sets.rows_of,
    )


def _body_and_encoder(task: FineTuneConfig, start: Start) -> tuple[ModelConfig, TextEncoder]:
    """The model with the task's dropout, and what makes tokens of its rows. Raises UserError."""
    kind = task.task
    body = dataclasses.replace(start.model.config, **_known(task, start.model))
    if task.body is not None and task.body != body:
        raise ConfigError(
            f"body is another model than that of start_from {task.start_from}. Leave body out."
        )
    _check_rates(task, body)
    longest = body.max_position_embeddings
    check_length(task.data.max_tokens, longest=longest, pairs=kind.pairs)
    kind.check_length(task.data.max_tokens)
    encoder = read_encoder(
        start.tokenizer_json,
        vocab_size=body.vocab_size,
        max_tokens=task.data.max_tokens,
        segments=getattr(body, "type_vocab_size", 0) > 1,
        pairs=kind.pairs,
    )
    return body, encoder


@dataclass(frozen=True, kw_only=True)
class _EncodedTraining:
    """The training rows of a task, encoded."""

    kind: TaskConfig  # whose labels are known
    train: AskedSet
    held_out: Rows | None  # of data.dev_share
    rows_of: dict[str, str]  # as of Prepared


def _encode_training(task: FineTuneConfig, encoder: TextEncoder, start: Start) -> _EncodedTraining:
    """Rows of data.train. Raises UserError with file and row."""
    kind, data = task.task, task.data
    train_rows = _rows(data, data.train, kind)
    rows_of = {"train": str(train_rows.path)}
    held_out: Rows | None = None
    if data.dev_share is not None:
        train_rows, held_out = held_out_rows(
            train_rows, share=data.dev_share, by=kind.kept_together
        )
    if kind.labels is None and (named := kind.labels_in(train_rows)):
        kind = dataclasses.replace(kind, labels=start.in_its_order(named))
    train = kind.encode(train_rows, encoder, name="train")
    kind.check_training(train.examples, train_rows)
    return _EncodedTraining(kind=kind, train=train, held_out=held_out, rows_of=rows_of)


def _encode_all(task: FineTuneConfig, encoder: TextEncoder, start: Start) -> EncodedSets:
    """Rows of all files and splits. Raises UserError with file and row."""
    training, data = _encode_training(task, encoder, start), task.data
    kind, rows_of = training.kind, dict(training.rows_of)
    sets: dict[str, list[AskedSet]] = {}
    for side, named_sets in (("dev", data.dev), ("test", data.test)):
        sets[side] = []
        for name, where in named_sets.items():
            rows = _rows(data, where, kind)
            rows_of[name] = str(rows.path)
            sets[side].append(kind.encode(rows, encoder, name=name))
    if (held_out := training.held_out) is not None:
        rows_of[HELD_OUT] = str(held_out.path)
        sets["dev"].append(kind.encode(held_out, encoder, name=HELD_OUT))
    return EncodedSets(
        kind=kind, train=training.train, dev=sets["dev"], test=sets["test"], rows_of=rows_of
    )


def _identity(task: FineTuneConfig, encoder: TextEncoder) -> tuple[Hashable, ...]:
    """By what the encoded rows of two tasks are known to be the same."""
    paths = [*task.data.files, encoder.path]
    stats = [path.stat() for path in paths if path.exists()]
    files = tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)
    return (repr(task.task), repr(task.data), encoder.segments, str(encoder.path), files)


def _known(task: FineTuneConfig, model: StoredModel) -> dict[str, float]:
    """The task's dropout of the body, as far as the model has such places. Raises ConfigError."""
    fields = {f.name for f in dataclasses.fields(model.config)}
    for name in task.dropout.of_body:
        if name not in fields:
            raise ConfigError(
                f"dropout.{name.removesuffix('_dropout')}: this model has no {name}. Leave it out."
            )
    return task.dropout.of_body


def _check_rates(task: FineTuneConfig, body: ModelConfig) -> None:
    """Raises ConfigError for rates by layer of a model whose layers have no weights of their own."""
    if not body.growth().shared_blocks:
        return
    for key in ("layer_decay", "gradient_layer_decay"):
        if getattr(task, key) != 1.0:
            raise ConfigError(
                f"{key} {getattr(task, key):g}: the layers of this model share their weights, so"
                f" none has a rate of its own. Leave {key} out."
            )


def _rows(data: LabelledDataConfig, name: str, kind: TaskConfig) -> Rows:
    """Of a file, or of a split of data.hub. Raises DataError."""
    if data.hub is not None and data.is_split(name):
        return read_split(data.hub, name, kind.columns)
    return read_rows(Path(name), kind.columns)
