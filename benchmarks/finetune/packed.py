"""Steps of a fine-tuning, packed here and padded by transformers, side by side on the same rows: useful tokens and seconds.

    python benchmarks/finetune/packed.py TASK.yaml [key=value ...] [--steps 4] [--rounds 8] [--json FILE]

Both take the same examples in the same order, batch_examples a step, from the same weights, with the same update and precision.
transformers' batch is as long as its longest text (dynamic padding). Texts are encoded before the clock runs.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import cpu_ratio, in_turn, paired_ratio, ratio_text
from encoder.base.command import CommandLine, run_command
from encoder.base.dist import World, join, leave
from encoder.data.examples import ExampleDealing, Examples, ExampleSteps
from encoder.data.loader import DataPosition, StepData
from encoder.engine.engine import Engine, start_engine
from encoder.engine.precision import precision_on
from encoder.finetune.config import FineTuneConfig, read_task
from encoder.finetune.course import FineTuning
from encoder.finetune.prepare import Prepared, prepare, read_start
from encoder.objectives.text_tasks import TERM
from encoder.runs.about import versions

CPU = torch.device("cpu")


def main() -> int:
    """Both sides in turn; the table, and the JSON."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("task", help="of kind classify; a Hugging Face folder in start_from")
    asked.add_argument("settings", nargs="*", metavar="key=value")
    asked.add_argument("--steps", type=int, default=4, help="of a round (default 4)")
    asked.add_argument("--rounds", type=int, default=8, help="counted ones (default 8)")
    asked.add_argument("--json", type=Path, metavar="FILE")
    args = asked.parse_args()

    def body() -> None:
        found = compare(read_task(args.task, args.settings), steps=args.steps, rounds=args.rounds)
        print(json.dumps(found, indent=1))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    return run_command(body)


def compare(task: FineTuneConfig, *, steps: int, rounds: int) -> dict[str, Any]:
    """What was seen.

    task: of kind classify
    steps: of a round
    rounds: that are counted
    """
    world = World()
    joined = join(world, device=CPU)
    start = read_start(task)
    prepared = prepare(task, start)
    ours = Ours(FineTuning(prepared, world=world, device=CPU, start=start), prepared)
    theirs = Theirs(task, prepared)
    first = {"packed": ours.step(), "padded": theirs.step()}
    timed = in_turn(
        {"packed": ours.round_of(steps), "padded": theirs.round_of(steps)},
        rounds=rounds,
        device=CPU,
    )
    if joined:
        leave(peer_failed=False)
    ratio = paired_ratio(timed["packed"], timed["padded"])
    return {
        "task": task.name,
        "examples_a_step": task.batch_examples,
        "steps_a_round": steps,
        "rounds": rounds,
        "precision": theirs.precision,
        "first_loss": {name: round(loss, 4) for name, loss in first.items()},
        "useful_share": {"packed": 1.0, "padded": round(theirs.useful_share(), 4)},
        "padded_by_packed": ratio_text(ratio),
        "padded_by_packed_cpu": round(cpu_ratio(timed["packed"], timed["padded"]), 3),
        "seconds_a_step": {name: round(t.median / steps, 4) for name, t in timed.items()},
        "spread": {name: round(t.spread, 3) for name, t in timed.items()},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


class Ours:
    """An engine with the packed steps of a task."""

    def __init__(self, course: FineTuning, prepared: Prepared) -> None:
        model = course.make_model()
        task = course.run
        self.engine: Engine = start_engine(
            model,
            objective=course.make_objective(),
            config=task.engine,
            optimizer=task.optimizer,
            world=World(),
            device=CPU,
        )
        self.task = task
        weights = course.first_weights()
        self.engine.set_masters(lambda name, _shape: weights[name])
        self.steps = ExampleSteps(
            prepared.train,
            term=TERM,
            seed=task.seed,
            epochs=task.epochs,
            batch_examples=task.batch_examples,
            dealing=ExampleDealing(
                world=World(), micro_batch_tokens=task.loader.micro_batch_tokens
            ),
            start=DataPosition(lanes=(), phase_tokens=0),
        )

    def step(self) -> float:
        """One; its loss."""
        data: StepData = self.steps.next_step()
        return self.engine.step(
            data.micro_batches,
            counts=data.counts,
            lr=self.task.lr.peak,
            max_lr=self.task.lr.peak,
            weight_decay=self.task.weight_decay,
        ).loss

    def round_of(self, steps: int) -> Any:
        """So many."""
        return lambda: [self.step() for _ in range(steps)]


class Theirs:
    """transformers' class with dynamically padded batches, and torch's AdamW."""

    def __init__(self, task: FineTuneConfig, prepared: Prepared) -> None:
        import transformers

        torch.manual_seed(task.seed)
        self.task, self.examples = prepared.task, prepared.train
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            task.start_from, num_labels=prepared.head.outputs, local_files_only=True
        ).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": task.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=task.lr.peak,
            betas=task.optimizer.betas,
            eps=task.optimizer.eps,
            fused=True,
        )
        self.precision = precision_on(task.engine.precision, CPU)
        # the order of the packed side
        self.order = _order(self.examples, task)
        self.at = self.real = self.laid = 0

    def step(self, size: int | None = None) -> float:
        """One of so many examples, or of batch_examples; its loss."""
        numbers = self.order[self.at : self.at + (size or self.task.batch_examples)]
        self.at += len(numbers)
        batch = padded(self.examples, numbers, pad_id=self.model.config.pad_token_id)
        self.real += int(batch["attention_mask"].sum())
        self.laid += batch["attention_mask"].numel()
        with self.mode():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.task.engine.gradient_clipping or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def round_of(self, steps: int) -> Any:
        """So many."""
        return lambda: [self.step() for _ in range(steps)]

    def useful_share(self) -> float:
        """Of the tokens that were computed, those of texts."""
        return self.real / self.laid

    def mode(self) -> contextlib.AbstractContextManager[Any]:
        """What its forward runs in."""
        low = self.precision == "autocast"
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=low)


def _order(examples: Examples, task: FineTuneConfig) -> np.ndarray:
    steps = ExampleSteps(
        examples,
        term=TERM,
        seed=task.seed,
        epochs=task.epochs,
        batch_examples=task.batch_examples,
        dealing=ExampleDealing(world=World(), micro_batch_tokens=1),
        start=DataPosition(lanes=(), phase_tokens=0),
    )
    return np.concatenate([steps.order_of(epoch) for epoch in range(task.epochs)])


def padded(
    examples: Examples, numbers: Sequence[int] | np.ndarray, *, pad_id: int
) -> dict[str, torch.Tensor]:
    """A batch as transformers' collator makes it, as long as its longest text."""
    longest = int(examples.lengths_N[numbers].max())
    shape = (len(numbers), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.from_numpy(examples.value_P[numbers]),
    }
    if examples.segments_A is not None:
        batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    for row, number in enumerate(numbers):
        start, end = examples.starts_N1[number], examples.starts_N1[number + 1]
        batch["input_ids"][row, : end - start] = torch.from_numpy(
            examples.ids_A[start:end].astype(np.int64)
        )
        batch["attention_mask"][row, : end - start] = 1
        if examples.segments_A is not None:
            batch["token_type_ids"][row, : end - start] = torch.from_numpy(
                examples.segments_A[start:end].astype(np.int64)
            )
    return batch


if __name__ == "__main__":
    raise SystemExit(main())
