"""Before a fine-tuning starts: its model, its rows, and the head that follows from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from encoder.base.errors import ConfigError, ModelError
from encoder.base.tokenizer_json import special_ids_of
from encoder.data.examples import Examples
from encoder.data.labelled import Rows, held_out_rows, read_rows
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import committed_folders
from encoder.finetune.config import HELD_OUT, FineTuneConfig, read_task
from encoder.finetune.encoding import TextEncoder, check_length, read_encoder
from encoder.finetune.head import head_shape
from encoder.finetune.kinds.contract import AskedSet, TaskConfig
from encoder.finetune.stored import is_task, read_trained
from encoder.models.hf.other_heads import TaskHead
from encoder.models.hf.task import TrainedTask
from encoder.models.stored import StoredModel
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
        return Start(model=model, tokenizer_json=folder / TOKENIZER, resumes=True)
    path = Path(task.start_from)
    if is_task(path):
        return _of_fine_tuning(read_trained(path))
    model = read_model(path)
    if model.tokenizer_json is None:
        raise ModelError(
            f"start_from {task.start_from} has no {TOKENIZER}; needed: the one that the model was"
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
        head=TaskHead(kind=trained.head.kind, labels=trained.labels, weights={}),
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


def prepare(task: FineTuneConfig, start: Start) -> Prepared:
    """Reads and encodes all rows, and shapes the head. Raises UserError with file and row."""
    kind = task.task
    body = dataclasses.replace(start.model.config, **_known(task, start.model))
    if task.body is not None and task.body != body:
        raise ConfigError(
            f"body is another model than that of start_from {task.start_from}. Leave body out."
        )
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

    train_rows = _rows(task, task.data.train)
    held_out: Rows | None = None
    if task.data.dev_share is not None:
        train_rows, held_out = held_out_rows(train_rows, share=task.data.dev_share)
    if kind.labels is None and (named := kind.labels_in(train_rows)):
        kind = dataclasses.replace(kind, labels=start.in_its_order(named))
    task = dataclasses.replace(task, task=kind, body=body)
    train = kind.encode(train_rows, encoder, name="train")
    kind.check_training(train.examples, train_rows)
    dev = _sets_of(task, task.data.dev, encoder)
    if held_out is not None:
        dev.append(kind.encode(held_out, encoder, name=HELD_OUT))

    return Prepared(
        task=task,
        head=head_shape(task, encoder.specials),
        encoder=encoder,
        train_set=train,
        dev=dev,
        test=_sets_of(task, task.data.test, encoder),
    )


def _known(task: FineTuneConfig, model: StoredModel) -> dict[str, float]:
    """The task's dropout of the body, as far as the model has such places. Raises ConfigError."""
    fields = {f.name for f in dataclasses.fields(model.config)}
    for name in task.dropout.of_body:
        if name not in fields:
            raise ConfigError(
                f"dropout.{name.removesuffix('_dropout')}: this model has no {name}. Leave it out."
            )
    return task.dropout.of_body


def _rows(task: FineTuneConfig, path: str) -> Rows:
    return read_rows(Path(path), task.task.columns)


def _sets_of(
    task: FineTuneConfig, files: Mapping[str, str], encoder: TextEncoder
) -> list[AskedSet]:
    return [task.task.encode(_rows(task, path), encoder, name=name) for name, path in files.items()]
