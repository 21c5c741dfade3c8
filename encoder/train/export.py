"""From a run folder or one of its checkpoints to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from encoder.base.errors import CheckpointError, ExportError
from encoder.data.shard_format import TOKENIZER, special_ids_of
from encoder.engine.checkpoint import newest_checkpoint, read_progress, read_weights
from encoder.engine.checkpoint_folder import COMMITTED, damage
from encoder.models.hf import ExportProof, export_hf
from encoder.train.config import read_run
from encoder.train.phases import phase_of_weights
from encoder.train.tracking import CHECKPOINTS, RUN_FILE


def export_run(folder: Path, out: Path) -> ExportProof:
    """Exports a run folder's newest checkpoint, or a checkpoint folder. Raises CheckpointError, ExportError, ShardError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; needed: a run folder or a checkpoint folder.")
    checkpoint = folder if (folder / COMMITTED).exists() else newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; needed: a run that has saved one.")
    if checkpoint == folder and (problem := damage(folder)):
        raise CheckpointError(f"{problem} Export another checkpoint.")
    run = read_run(checkpoint / RUN_FILE)
    index = phase_of_weights(read_progress(checkpoint)[0])
    phase = run.phases[index]
    tokenizer_json = (folder.parent.parent if checkpoint == folder else folder) / TOKENIZER
    if not tokenizer_json.is_file():
        raise ExportError(f"{tokenizer_json} is missing. Put the run's tokenizer.json back: it stands beside the shards, too.")
    _, specials = special_ids_of(tokenizer_json)
    config = dataclasses.replace(run.model, global_rope_theta=phase.global_rope_theta,
                                 local_rope_theta=phase.local_rope_theta)
    longest = max(p.max_tokens_per_document for p in run.phases[: index + 1])
    return export_hf(weights=read_weights(checkpoint), config=config, tokenizer_json=tokenizer_json,
                     specials=specials, out=out, max_tokens=longest)
