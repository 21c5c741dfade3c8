"""A fine-tuning's checkpoint as a model: what an export writes, and what another fine-tuning starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoder.base.done import is_done, read_done
from encoder.base.errors import CheckpointError, LedgerError, UserError
from encoder.base.schema import from_mapping, read_mapping
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.units import counted
from encoder.base.untrusted import read_json
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import COMMITTED, damage
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress, read_weights
from encoder.finetune.best import Best, best_checkpoint
from encoder.finetune.config import FineTuneConfig, task_of
from encoder.finetune.head import head_shape
from encoder.finetune.metrics import CHOSEN
from encoder.finetune.predict import RESULT
from encoder.models.hf.task import TrainedTask
from encoder.models.stored import fp32
from encoder.runs.folder import CHECKPOINTS, RUN_FILE


def is_task(source: Path) -> bool:
    """Whether this is the folder or a checkpoint of a fine-tuning."""
    path = source / RUN_FILE
    try:
        return path.is_file() and "task" in read_mapping(path)
    except UserError:
        return False


def read_trained(source: Path) -> TrainedTask:
    """The newest checkpoint of a run folder, or the one named. Raises CheckpointError, ConfigError."""
    checkpoint = source if (source / COMMITTED).exists() else _kept_checkpoint(source)
    if problem := damage(checkpoint):
        raise CheckpointError(f"{problem} Use another checkpoint.")
    task = task_of(read_mapping(checkpoint / RUN_FILE), where=str(checkpoint / RUN_FILE))
    folder = checkpoint.parent.parent
    tokenizer_json = folder / TOKENIZER
    _, specials = special_ids_of(tokenizer_json)
    progress, saved = read_progress(checkpoint)
    rows = hub_rows_of(task, saved)
    return TrainedTask(
        name=task.name,
        config=task.model,
        head=head_shape(task, specials),
        weights=fp32(read_weights(checkpoint)),
        tokenizer_json=tokenizer_json,
        specials=specials,
        max_tokens=task.data.max_tokens,
        labels=task.task.labels,
        problem=task.task.PROBLEM,
        origin=f"run {task.name}, checkpoint {checkpoint.name}",
        facts={
            "trained": f"{progress.step:,} steps, {progress.masked_tokens:,} {task.task.COUNTED}",
            **_kept_fact(folder, progress.ledger_hash),
            **_facts(task),
            **({"rows": rows} if rows else {}),
            "ledger": f"{progress.ledger_hash} after step {progress.step:,}",
        },
        dataset=task.data.hub.dataset if task.data.hub and rows else None,
        results=_results(folder, progress.ledger_hash),
        carried=task.task.carried(_decided(task, folder, progress.ledger_hash)),
    )


def hub_rows_of(task: FineTuneConfig, saved: Mapping[str, Any]) -> str | None:
    """The training rows as dataset, commit and split of the hub; None: they were files, which a card does not name.

    task: as the checkpoint has it
    saved: what the checkpoint has beside its progress
    """
    if task.data.hub is None:
        return None
    told = str((saved.get("rows_of") or {}).get("train", ""))
    return told if told.startswith(f"{task.data.hub.dataset}@") else None


def _facts(task: FineTuneConfig) -> dict[str, str]:
    return {
        "epochs": str(task.epochs),
        "examples a step": str(task.batch_examples),
        "peak rate": f"{task.lr.peak:g}",
        "weight decay": f"{task.weight_decay:g}",
        "seed": str(task.seed),
    }


def _kept_checkpoint(run: Path) -> Path:
    """Of a run folder: where its best weights are, with keep: best; else the newest. Raises CheckpointError."""
    newest = newest_checkpoint(run / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(f"{run} holds no checkpoint yet; needed: a run that has saved one.")
    best = read_progress(newest)[1].get("best")
    if best is None:
        return newest
    return best_checkpoint(run, from_mapping(Best, best, where=str(newest)))


def unfinished_text(source: Path) -> str | None:
    """What to say of a run folder whose fine-tuning has not ended: how far it is. None for any other source."""
    if not (source / CHECKPOINTS).is_dir() or is_done(source)[0]:
        return None
    newest = newest_checkpoint(source / CHECKPOINTS)
    if newest is None:
        return None
    task = task_of(read_mapping(newest / RUN_FILE), where=str(newest / RUN_FILE))
    progress, saved = read_progress(newest)
    ((epoch, _),) = progress.lanes or ((task.epochs if progress.phase else 0, 0),)
    exported = "that step"
    if saved.get("best") is not None:
        best = from_mapping(Best, saved["best"], where=str(newest))
        exported = f"step {best.step:,}, the best so far"
    return (
        f"{source} is not trained to its end: step {progress.step:,}, {epoch} of"
        f" {counted(task.epochs, 'epoch')} are whole. This exports {exported}."
    )


def _result_of(folder: Path, ledger_hash: str) -> dict[str, Any]:
    """The finished run's result.json where it is about the weights of this ledger's end; else nothing."""
    path = folder / RESULT
    try:
        done = read_done(folder, with_checkpoint=False)
    except LedgerError:
        return {}
    if done is None or not path.is_file():
        return {}
    found = read_json(path, error=CheckpointError, root=dict)
    # earlier versions always ended with the last weights
    if found.get("weights_ledger_hash", done["ledger_hash"]) != ledger_hash:
        return {}
    return found


def _decided(task: FineTuneConfig, folder: Path, ledger_hash: str) -> dict[str, float]:
    """What the first dev set chose for others, where these weights are those of the run's end."""
    found = _result_of(folder, ledger_hash)
    decided = found.get("decided")
    if not isinstance(decided, dict):
        # of earlier versions: it stands among the metrics
        metrics = found.get("metrics")
        first = next(iter(task.data.dev_names), None)
        measured = metrics.get(first) if isinstance(metrics, dict) else None
        decided = measured if isinstance(measured, dict) else {}
    return {
        name: float(value)
        for name, value in decided.items()
        if name in CHOSEN and isinstance(value, (int, float))
    }


def _kept_fact(folder: Path, ledger_hash: str) -> dict[str, str]:
    """Which of a run's weights these are, where its result says so."""
    text = _result_of(folder, ledger_hash).get("weights_of")
    return {"weights": text} if isinstance(text, str) else {}


def _results(folder: Path, ledger_hash: str) -> dict[str, Any]:
    """What the run measured at its end, where these weights are those of its end."""
    found = _result_of(folder, ledger_hash).get("metrics")
    return found if isinstance(found, dict) else {}
