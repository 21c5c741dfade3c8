"""What a fine-tuning would be, from its task file, its model and its rows; nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from encoder.base.rng import generator
from encoder.base.units import counted, short_count
from encoder.base.world import World
from encoder.engine.checkpoint.read import newest_checkpoint
from encoder.finetune.checks import (
    check_finished,
    check_first_start,
    check_same_settings,
    check_task,
)
from encoder.finetune.config import FineTuneConfig
from encoder.finetune.course import FineTuning
from encoder.finetune.kinds.contract import AskedSet
from encoder.finetune.prepare import Prepared, Start, prepare, read_start
from encoder.runs.folder import CHECKPOINTS, RUN_FILE
from encoder.runs.initial import weights_sha256
from encoder.runs.same import has_begun
from encoder.train.loop import done_already


def plan_lines(task: FineTuneConfig) -> list[str]:
    """Its sets, its steps, what packing saves, its rates, and what did not fit. Raises UserError as the run would.

    None of a finished run, which is said as the run would.
    """
    if done_already(Path(task.out), World(), check=lambda: check_finished(task)):
        return []
    check_task(task)
    start = read_start(task)
    prepared = prepare(task, start)
    task = prepared.task
    course = FineTuning(prepared, world=World(), device=torch.device("cpu"), start=start)
    _check_goes_on(course, start)
    begun = f"nothing was written; the run folder would be {task.out}"
    if start.resumes:
        begun = f"nothing was written; {task.out} has begun, and would go on"
    else:
        course.first_weights()
    kind, head = task.task, prepared.head
    names = "" if kind.labels is None else f": {', '.join(kind.labels[:12])}"
    return [
        f"{task.name}: {kind.KIND}, {counted(head.outputs, 'output')}{names}",
        f"model: {start.model.config.shape_text}",
        *course.origin_lines(),
        *(_set_line(asked, counts=kind.COUNTED) for asked in prepared.sets),
        *_step_lines(prepared),
        f"rate {task.lr.peak:g} at its peak, weight decay {task.weight_decay:g}"
        f" ({task.optimizer.rule})",
        f"metrics: {', '.join(kind.metric_names())}",
        *(f"warning: {line}" for line in course.warnings()),
        begun,
    ]


def _check_goes_on(course: FineTuning, start: Start) -> None:
    """Where a run has begun, it may go on with these settings, rows and weights. Raises UserError as the run would."""
    folder = Path(course.run.out)
    if not has_begun(folder):
        return
    check_same_settings(course.run, folder / RUN_FILE, of=folder)
    newest = newest_checkpoint(folder / CHECKPOINTS)
    if newest is not None:
        course.check_same(newest)
    elif not start.resumes:
        check_first_start(course.run, weights_sha256(start.model.weights))


def _set_line(asked: AskedSet, *, counts: str) -> str:
    examples = asked.examples
    lengths = examples.document_lengths_D
    asked_text = "" if counts == "examples" else f"; {examples.asked:,} {counts}"
    documents = ""
    if len(lengths) != len(examples):
        documents = f" in {len(lengths):,} documents"
    return (
        f"{examples.name}: {counted(len(examples), 'example')}, {short_count(len(examples.ids_A))}"
        f" tokens{documents}, {np.median(lengths):.0f} at the median, {lengths.max():,} at most"
        f"{asked_text}"
    )


def _step_lines(prepared: Prepared) -> Iterator[str]:
    task, train = prepared.task, prepared.train
    batch = min(task.batch_examples, len(train))
    steps = math.ceil(len(train) / task.batch_examples)
    yield (
        f"{counted(steps * task.epochs, 'step')} of {counted(batch, 'example')}:"
        f" {counted(task.epochs, 'epoch')} of {steps:,}"
    )
    order = generator(task.seed, "examples", 0).permutation(len(train))
    lengths = train.document_lengths_D
    batches = np.array_split(order, range(batch, len(order), batch))
    parts = [lengths[train.documents_of(numbers)] for numbers in batches]
    by_batch = sum(int(part.max()) * len(part) for part in parts)
    whole = int(lengths.sum())
    yield (
        f"packed without padding; padded to the longest of a batch it would be"
        f" {by_batch / whole:.2f} times as many tokens, padded to data.max_tokens"
        f" {task.data.max_tokens * len(lengths) / whole:.2f} times"
    )
