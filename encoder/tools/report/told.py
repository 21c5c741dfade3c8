"""What a report says of a run, by its kind: a pretraining, or a fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.schema import read_mapping
from encoder.base.units import short_count
from encoder.finetune.config import FineTuneConfig, task_of
from encoder.finetune.metrics import LOWER_IS_BETTER
from encoder.finetune.stored import is_task
from encoder.optim.catalog import OPTIMIZERS
from encoder.runs.about import (
    machine_lines,
    model_line,
    newest_about,
    starts_of,
    weights_lines,
    what_was_trained,
)
from encoder.runs.config import RunConfig, schedule_word
from encoder.runs.folder import RUN_FILE
from encoder.runs.weights import read_saved_run
from encoder.tools.report.curves import Evaluated


@dataclass(frozen=True, kw_only=True)
class Told:
    """Of one run, what depends on its kind."""

    name: str
    trained: dict[str, str]  # what was trained: a line each
    results: dict[str, str]  # of its last evaluation
    evaluated: Evaluated
    vocab_size: int | None  # None: its loss is not over a vocabulary
    phase_head: Sequence[str] = ()
    phases: Sequence[Sequence[str]] = ()


def told_of(folder: Path, metrics: Sequence[dict[str, Any]], done: dict[str, Any]) -> Told:
    """Of a run folder. Raises UserError.

    folder: of the run
    metrics: its merged lines
    done: its record of the end; empty while there is none
    """
    if is_task(folder):
        path = folder / RUN_FILE
        return _of_task(task_of(read_mapping(path), where=str(path)), folder, metrics, done)
    return _of_pretraining(read_saved_run(folder / RUN_FILE), folder, metrics)


def _of_pretraining(run: RunConfig, folder: Path, metrics: Sequence[dict[str, Any]]) -> Told:
    # columns of what a phase may change: the same for all phases of a model
    own = [run.model_of(phase).phase_texts for phase in run.phases]
    asked = run.objective.target_text
    evaluated = Evaluated(
        loss_title=f"{asked.replace(' ', '-')} loss",
        loss_unit=f"nats a {asked}",
        score_unit=f"share of the {asked}s",
    )
    last = _last_with(evaluated.loss, metrics)
    return Told(
        name=run.name,
        trained=what_was_trained(run, folder),
        results={
            _shown(name): _number_text(name, value)
            for name, value in last.items()
            if name.startswith(("held_out_", "probe_"))
        },
        evaluated=evaluated,
        vocab_size=run.model.vocab_size,
        phase_head=("phase", "tokens", "length", *own[0], "schedule", "peak rate"),
        phases=[
            [
                phase.name,
                short_count(phase.tokens),
                f"{phase.max_tokens_per_document:,}",
                *texts.values(),
                schedule_word(phase),
                f"{phase.lr.peak:g}",
            ]
            for phase, texts in zip(run.phases, own)
        ],
    )


def _of_task(
    task: FineTuneConfig, folder: Path, metrics: Sequence[dict[str, Any]], done: dict[str, Any]
) -> Told:
    """The curve is that of the first set that is evaluated on the way.

    task, folder: of the run
    metrics, done: as told_of has them
    """
    name = next(iter(task.data.dev_names), "")
    last = _last_with(f"{name}_loss", metrics)
    # of this set alone: a set dev_b has names that begin alike
    scores = [key for metric in task.task.metric_names() if (key := f"{name}_{metric}") in last]
    score = scores[0] if scores else f"{name}_score"
    unit = "1 is the best"
    if score.removeprefix(f"{name}_") in LOWER_IS_BETTER:
        unit = "lower is better"
    results: dict[str, Any] = {key: last[key] for key in (f"{name}_loss", *scores) if key in last}
    # at the end all sets were asked
    for measured, numbers in done.get("results", {}).items():
        results |= {f"{measured}_{key}": value for key, value in numbers.items()}
    return Told(
        name=task.name,
        trained=_task_lines(task, folder),
        results={_shown(key): _number_text(key, value) for key, value in results.items()},
        evaluated=Evaluated(
            loss=f"{name}_loss",
            loss_title="loss of the task",
            loss_unit=f"mean over {task.task.COUNTED}",
            score=score,
            score_title=_shown(score),
            score_unit=unit,
            set_name=name or "no set",
        ),
        vocab_size=None,
    )


def _task_lines(task: FineTuneConfig, folder: Path) -> dict[str, str]:
    starts = starts_of(folder)
    about = newest_about(starts)
    optimizer = next((w for w, kind in OPTIMIZERS.items() if type(task.optimizer) is kind), "")
    lines = {
        "task": task.task.KIND,
        "model": model_line(about, task.model),
        "started from": task.start_from,
        "optimizer": f"{optimizer}, peak rate {task.lr.peak:g}, weight decay {task.weight_decay:g},"
        f" seed {task.seed}",
        "training": f"{task.epochs} epochs in steps of {task.batch_examples:,} examples",
    }
    for source in about.get("sources", []):
        lines[f"data {source.get('name')}"] = (
            f"{source.get('documents', 0):,} examples of {short_count(source.get('tokens', 0))}"
            " tokens"
        )
    machine = machine_lines(starts, precision=task.engine.precision)
    return lines | machine | weights_lines(starts)


def _last_with(name: str, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line that has a number of this name."""
    nothing: dict[str, Any] = {}
    return next((line for line in reversed(metrics) if name in line), nothing)


def _number_text(name: str, value: float | None) -> str:
    """A loss over tokens in nats, a share of what was asked in percent, any other number as it is."""
    if value is None:
        return "not finite"
    if name.startswith("held_out_loss"):
        return f"{value:.3f} nats"
    if "accuracy" in name or name.startswith("probe_"):
        return f"{value:.2%}"
    return f"{value:.4f}"


def _shown(name: str) -> str:
    """held_out_loss_web -> held-out loss web"""
    return name.replace("held_out", "held-out").replace("_", " ")
