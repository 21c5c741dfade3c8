"""Any model that we can name by a path: a run folder, a checkpoint, a weights folder or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from encoder.base.errors import CheckpointError, ModelError
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint import newest_checkpoint, read_progress, read_weights
from encoder.engine.checkpoint_folder import COMMITTED, damage
from encoder.models.hf_import import CONFIG, read_hf
from encoder.models.stored import MODEL, StoredModel, fp32, read_stored
from encoder.train.config import read_run
from encoder.train.phases import phase_of_weights
from encoder.train.tracking import CHECKPOINTS, RUN_FILE

_KINDS = "a run folder, a checkpoint, a weights folder or a Hugging Face folder"


def read_model(path: Path) -> StoredModel:
    """The model at `path`, its thetas those of the phase that trained it last. Raises CheckpointError, ConfigError, ModelError."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"{path} {found}; needed: {_KINDS}.")
    if (path / COMMITTED).exists():
        if problem := damage(path):
            raise CheckpointError(f"{problem} Use another checkpoint.")
        return _read_checkpoint(path)
    if (path / CHECKPOINTS).is_dir() or (path / RUN_FILE).is_file():
        newest = newest_checkpoint(path / CHECKPOINTS)
        if newest is None:
            raise CheckpointError(f"{path} holds no checkpoint yet; needed: a run that has saved one.")
        return _read_checkpoint(newest)
    if (path / MODEL).is_file():
        return read_stored(path)
    if (path / CONFIG).is_file():
        return read_hf(path)
    names = sorted(p.name for p in path.iterdir())
    found = f"holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "is empty"
    raise ModelError(f"{path} {found}; needed: {_KINDS}.")


def checkpoint_facts(checkpoint: Path) -> StoredModel:
    """All of a checkpoint's model but its weights. Raises CheckpointError, ConfigError."""
    run = read_run(checkpoint / RUN_FILE)
    index = phase_of_weights(read_progress(checkpoint)[0])
    phase = run.phases[index]
    tokenizer_json = checkpoint.parent.parent / TOKENIZER
    return StoredModel(
        config=dataclasses.replace(run.model, global_rope_theta=phase.global_rope_theta,
                                   local_rope_theta=phase.local_rope_theta),
        weights={}, tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
        origin=f"run {run.name}, checkpoint {checkpoint.name}",
        max_tokens=max(p.max_tokens_per_document for p in run.phases[: index + 1]))


def _read_checkpoint(checkpoint: Path) -> StoredModel:
    return dataclasses.replace(checkpoint_facts(checkpoint), weights=fp32(read_weights(checkpoint)))
