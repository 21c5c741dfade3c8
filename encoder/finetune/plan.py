"""What a fine-tuning would be, from its task file, its model and its rows; nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from encoder.base.rng import generator
from encoder.base.units import counted, short_count
from encoder.finetune.checks import check_task
from encoder.finetune.config import FineTuneConfig
from encoder.finetune.kinds.contract import AskedSet
from encoder.finetune.prepare import Prepared, prepare, read_start


def plan_lines(task: FineTuneConfig) -> list[str]:
    """Its sets, its steps, what packing saves, its rates, and what did not fit. Raises UserError as the run would."""
    check_task(task)
    prepared = prepare(task, read_start(task))
    task = prepared.task
    kind, head = task.task, prepared.head
    names = "" if kind.labels is None else f": {', '.join(kind.labels[:12])}"
    sets = [prepared.train_set, *prepared.dev, *prepared.test]
    return [
        f"{task.name}: {kind.KIND}, {counted(head.outputs, 'output')}{names}",
        f"head of {head.family}: {head.place_text}, dropout {head.dropout:g}",
        *(_set_line(asked, counts=kind.COUNTED) for asked in sets),
        *_step_lines(prepared),
        f"rate {task.lr.peak:g} at its peak, weight decay {task.weight_decay:g}"
        f" ({task.optimizer.rule})",
        f"metrics: {', '.join(kind.metric_names())}",
        *(f"warning: {note}" for asked in sets for note in asked.notes()),
    ]


def _set_line(asked: AskedSet, *, counts: str) -> str:
    examples = asked.examples
    lengths = examples.lengths_N
    asked_text = "" if counts == "examples" else f"; {examples.asked:,} {counts}"
    return (
        f"{examples.name}: {counted(len(examples), 'example')}, {short_count(len(examples.ids_A))}"
        f" tokens, {np.median(lengths):.0f} at the median, {lengths.max():,} at most{asked_text}"
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
    lengths = train.lengths_N[order]
    parts = np.array_split(lengths, range(batch, len(lengths), batch))
    by_batch = sum(int(part.max()) * len(part) for part in parts)
    whole = int(lengths.sum())
    yield (
        f"packed without padding; padded to the longest of a batch it would be"
        f" {by_batch / whole:.2f} times as many tokens, padded to data.max_tokens"
        f" {task.data.max_tokens * len(lengths) / whole:.2f} times"
    )
