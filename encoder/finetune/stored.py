"""A fine-tuning's checkpoint as a model: what an export writes, and what another fine-tuning starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoder.base.done import read_done
from encoder.base.errors import CheckpointError, LedgerError, UserError
from encoder.base.schema import read_mapping
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.untrusted import read_json
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import COMMITTED, damage
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress, read_weights
from encoder.finetune.config import FineTuneConfig, task_of
from encoder.finetune.head import head_shape
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
    checkpoint = (
        source if (source / COMMITTED).exists() else newest_checkpoint(source / CHECKPOINTS)
    )
    if checkpoint is None:
        raise CheckpointError(
            f"{source} holds no checkpoint yet; needed: a run that has saved one."
        )
    if problem := damage(checkpoint):
        raise CheckpointError(f"{problem} Use another checkpoint.")
    task = task_of(read_mapping(checkpoint / RUN_FILE), where=str(checkpoint / RUN_FILE))
    folder = checkpoint.parent.parent
    tokenizer_json = folder / TOKENIZER
    _, specials = special_ids_of(tokenizer_json)
    progress, _ = read_progress(checkpoint)
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
            **_facts(task),
            "ledger": f"{progress.ledger_hash} after step {progress.step:,}",
        },
        results=_results(folder, progress.ledger_hash),
    )


def _facts(task: FineTuneConfig) -> dict[str, str]:
    return {
        "epochs": str(task.epochs),
        "examples a step": str(task.batch_examples),
        "peak rate": f"{task.lr.peak:g}",
        "weight decay": f"{task.weight_decay:g}",
        "seed": str(task.seed),
    }


def _results(folder: Path, ledger_hash: str) -> dict[str, Any]:
    """What the run measured at its end, where these weights are those of its end."""
    path = folder / RESULT
    try:
        done = read_done(folder, with_checkpoint=False)
    except LedgerError:
        return {}
    if done is None or done["ledger_hash"] != ledger_hash or not path.is_file():
        return {}
    found = read_json(path, error=CheckpointError, root=dict).get("metrics")
    return found if isinstance(found, dict) else {}
