"""From a run folder or one of its checkpoints to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from encoder.base.errors import CheckpointError, ExportError
from encoder.base.schema import from_mapping, parse_yaml
from encoder.engine.checkpoint import newest_checkpoint, read_weights
from encoder.engine.checkpoint_folder import COMMITTED, damage
from encoder.models.hf import ExportProof, export_hf
from encoder.train import build
from encoder.train.config import RunConfig
from encoder.train.start import CHECKPOINTS, RUN_FILE


def export_run(folder: Path, out: Path) -> ExportProof:
    """Exports a run folder's newest checkpoint, or a checkpoint folder. Raises CheckpointError, ExportError, ShardError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; needed: a run folder or a checkpoint folder.")
    checkpoint = folder if (folder / COMMITTED).exists() else newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; needed: a run that has saved one.")
    if checkpoint == folder and (problem := damage(folder)):
        raise CheckpointError(f"{problem} Export another checkpoint.")
    run = from_mapping(
        RunConfig,
        parse_yaml((checkpoint / RUN_FILE).read_text(encoding="utf-8"), where=str(checkpoint / RUN_FILE)),
        where=str(checkpoint / RUN_FILE),
    )
    progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["progress"]
    # a checkpoint at the end of a phase stands at the start of the next: its weights belong to the phase that ended
    index = progress["phase"] - (1 if progress["phase_step"] == 0 and progress["phase"] > 0 else 0)
    phase = run.phases[index]
    facts = build.check_data(run)
    if not facts.tokenizer_json.is_file():
        raise ExportError(f"{facts.tokenizer_json} is missing. Put the tokenizer back beside the shards.")
    config = dataclasses.replace(
        run.model, global_rope_theta=phase.global_rope_theta, local_rope_theta=phase.local_rope_theta
    )
    longest = max(p.max_tokens_per_document for p in run.phases[: index + 1])
    return export_hf(weights=read_weights(checkpoint), config=config, tokenizer_json=facts.tokenizer_json,
                     specials=facts.specials, out=out, max_tokens=longest)
