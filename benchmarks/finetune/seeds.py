"""A whole fine-tuning here and by transformers, seed by seed: accuracy after each epoch, and CPU seconds.

    python benchmarks/finetune/seeds.py TASK.yaml [key=value ...] [--seeds 1,2,3] [--runs runs] [--json FILE]

Ours is `tessera finetune`, from its start to its last answer. transformers' side has the same rows in the same order, encoded
before its clock runs, batches as long as their longest text, torch's fused AdamW, the same rates, precision and clipping; its
head and its dropout are drawn by its own generator. What is finished is not done again.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.finetune.packed import Theirs, padded
from encoder.base.command import CommandLine, run_command
from encoder.data.examples import Examples
from encoder.finetune.config import read_task
from encoder.finetune.prepare import prepare, read_start
from encoder.runs.about import versions

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
ASKED_AT_ONCE = 64  # texts


def main() -> int:
    """Both sides of every seed; the table, and the JSON."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("task", help="of kind classify; a Hugging Face folder in start_from")
    asked.add_argument("settings", nargs="*", metavar="key=value")
    asked.add_argument("--seeds", default="1,2,3")
    asked.add_argument("--runs", type=Path, default=Path("runs"), help="where ours go")
    asked.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = asked.parse_args()

    def body() -> None:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        compare(args.task, args.settings, seeds=seeds, runs=args.runs, out=args.json)

    return run_command(body)


def compare(
    path: str, settings: Sequence[str], *, seeds: Sequence[int], runs: Path, out: Path
) -> None:
    """Writes what was seen after each side of each seed.

    path: of the task file
    settings: key=value, of both sides
    seeds: of the order, the head and dropout
    runs: folder for ours
    out: the JSON; what it has is kept
    """
    found: dict[str, Any] = {"sides": {}}
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
    for seed in seeds:
        for side, run in (("packed", ours), ("padded", theirs)):
            known = found["sides"].setdefault(side, {})
            if str(seed) in known:
                continue
            known[str(seed)] = run(path, [*settings, f"seed={seed}"], runs / f"seed{seed}")
            found |= {"task": path, "versions": versions(), "threads": torch.get_num_threads()}
            found["summary"] = {name: _summary(of) for name, of in found["sides"].items()}
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(side, seed, json.dumps(known[str(seed)]), flush=True)


def ours(path: str, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """The command, and what its metrics say."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, LAUNCH / "finetune.py", path, *settings, f"out={folder}"]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    epochs = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers = json.loads(line)
        asked = {k: round(v, 4) for k, v in numbers.items() if k.endswith("_accuracy")}
        if asked:
            epochs.append(asked)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"epochs": epochs, "cpu_seconds": round(seconds, 1)}


def theirs(path: str, settings: Sequence[str], _folder: Path) -> dict[str, Any]:
    """transformers' model in a plain loop."""
    task = read_task(path, [*settings])
    prepared = prepare(task, read_start(task))
    side = Theirs(task, prepared)
    examples = len(prepared.train)
    per_epoch = -(-examples // task.batch_examples)
    steps = per_epoch * task.epochs
    schedule = task.lr.over(task.epochs * examples)
    epochs = []
    began = time.process_time()
    for step in range(steps):
        last_of_epoch = (step + 1) % per_epoch == 0
        size = task.batch_examples
        if last_of_epoch:
            size = examples - (per_epoch - 1) * task.batch_examples

        # the rate in the middle of the step, as ours
        rate = schedule.at(side.at + (size + 1) // 2, phase_tokens=task.epochs * examples)
        for group in side.optimizer.param_groups:
            group["lr"] = rate
        side.step(size)
        if last_of_epoch:
            found = {}
            for asked in prepared.dev:
                name = f"{asked.examples.name}_accuracy"
                found[name] = round(_accuracy(side, asked.examples), 4)
            epochs.append(found)
    return {"epochs": epochs, "cpu_seconds": round(time.process_time() - began, 1)}


def _accuracy(side: Theirs, examples: Examples) -> float:
    side.model.eval()
    right = 0
    numbers = np.arange(len(examples))
    for start in range(0, len(numbers), ASKED_AT_ONCE):
        batch = padded(
            examples,
            numbers[start : start + ASKED_AT_ONCE],
            pad_id=side.model.config.pad_token_id,
        )
        labels = batch.pop("labels")
        with torch.no_grad(), side.mode():
            right += int((side.model(**batch).logits.argmax(-1) == labels).sum())
    side.model.train()
    return right / len(numbers)


def _summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, after the last epoch, and the mean of the CPU seconds."""
    last = [of["epochs"][-1] for of in seeds.values()]
    found: dict[str, Any] = {
        "seeds": len(seeds),
        "cpu_seconds": round(statistics.mean(of["cpu_seconds"] for of in seeds.values()), 1),
    }
    for name in last[0]:
        values = [of[name] for of in last]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": round(statistics.mean(values), 4), "std": round(spread, 4)}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
