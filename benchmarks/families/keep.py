"""Keeps what a small run measured as one JSON file, beside the command that made it.

python benchmarks/families/keep.py runs/ropert_small --cpu-seconds 312 --out benchmarks/results/families -- COMMAND ...

In the folder where the run was made: its shards are asked for their unigram entropy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from encoder.base.command import CommandLine
from encoder.base.done import read_done
from encoder.base.world import World
from encoder.runs.config import RunConfig, read_run
from encoder.runs.facts import check_data
from encoder.tools.report.goodput import wall_ms
from encoder.train.build import held_out_entropy, make_held_out

STEPS_A_POINT = 10  # of the training loss, which is averaged over them


def main() -> None:
    """One run folder to OUT/NAME.json."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("run", type=Path, help="a run's folder")
    asked.add_argument(
        "--cpu-seconds", type=float, required=True, help="user and system, as time(1) has them"
    )
    asked.add_argument("--out", type=Path, required=True, help="the folder of the JSON files")
    asked.add_argument("command", nargs="+", help="behind --: the command that made the run")
    args = asked.parse_args()

    measured = result(args.run)
    kept = {
        "name": args.run.name,
        "command": " ".join(args.command),
        "cpu_minutes": round(args.cpu_seconds / 60, 1),
        **measured,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.run.name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def result(run: Path) -> dict[str, Any]:
    """Curves and facts of a run's folder; of one that was stopped, those so far."""
    lines = _lines(run / "metrics.jsonl")
    start = next(e for e in _lines(run / "events.jsonl") if e["event"] == "start")
    return {
        "finished": read_done(run) is not None,
        "parameters": start["about"]["parameters"],
        "tokens": lines[-1]["tokens"],
        "precision": start["precision"],
        "wall_minutes": round(wall_ms(run)["wall time"] / 60_000, 1),
        "versions": start["about"]["versions"],
        **_yardsticks(read_run(run / "run.yaml")),
        "held_out": [_held_out(line) for line in lines if "held_out_loss" in line],
        "train": _train(lines),
    }


def _yardsticks(run: RunConfig) -> dict[str, float]:
    """What the held-out numbers are to be compared with: unigram entropy; of pairs, how right it is to say 1 always."""
    facts = check_data(run)
    found = {"unigram_entropy": round(held_out_entropy(run, facts) or math.nan, 4)}
    sets = make_held_out(run, facts, World(rank=0, size=1), torch.device("cpu"), run.phases[-1])
    batches = [batch for source in sets for batch in source.batches]
    pairs = next((name for name in ("nsp", "sop") if name in batches[0].targets), None)
    if pairs:
        labels = torch.cat([batch.targets[pairs].value_M for batch in batches])
        found["always_1"] = round(float((labels == 1).double().mean()), 4)
        found["pairs"] = len(labels)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _held_out(line: dict[str, Any]) -> dict[str, float]:
    """An evaluation: tokens seen, and each loss and accuracy in four digits."""
    numbers = {key: round(value, 4) for key, value in line.items() if key.startswith("held_out_")}
    return {"tokens": line["tokens"], **numbers}


def _train(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The training losses, as means over some steps."""
    steps = [line for line in lines if "loss" in line]
    points = []
    for first in range(0, len(steps), STEPS_A_POINT):
        some = steps[first : first + STEPS_A_POINT]
        names = [name for name in some[0] if name.startswith("loss")]
        means = {name: round(sum(s[name] for s in some) / len(some), 4) for name in names}
        points.append({"tokens": some[-1]["tokens"], **means})
    return points


if __name__ == "__main__":
    main()
