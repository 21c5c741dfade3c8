"""From any model that we can name by a path to a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

from encoder.base.command import as_typed
from encoder.base.done import is_done
from encoder.base.errors import ExportError
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.units import short_count
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.models.hf.catalog import export_blocker
from encoder.models.hf.parity import Proof
from encoder.models.hf.write import export_hf
from encoder.models.stored import MODEL
from encoder.runs.folder import CHECKPOINTS
from encoder.runs.weights import read_model, saved_run
from encoder.tools.weights.card import training_of


def export_run(source: Path, out: Path, *, onnx: bool = False) -> dict[str, Proof]:
    """Exports a run folder's newest checkpoint, a checkpoint, or a weights folder; returns the proofs. Raises UserError."""
    model = read_model(source)
    if stays := export_blocker(model.config):
        kept = (
            "it is one already"
            if (source / MODEL).is_file()
            else as_typed("average", source, "--out", "OUT")
        )
        raise ExportError(
            f"{source} goes {stays}. Train with the needed setting, or keep the model as a weights"
            f" folder: {kept}"
        )
    if model.tokenizer_json is None:
        raise ExportError(
            f"{source} has no tokenizer.json; needed: the one that the model was trained with. Put"
            " it there: of a run it stands beside the shards, too."
        )
    _, specials = special_ids_of(model.tokenizer_json)
    training = training_of(source, model, name=Path(os.path.abspath(out)).name)
    return export_hf(model, model.tokenizer_json, specials, out, onnx=onnx, training=training)


def unfinished_text(source: Path) -> str | None:
    """What to say of a run folder whose run has not ended: how far its newest checkpoint is. None for any other source."""
    if not (source / CHECKPOINTS).is_dir() or is_done(source)[0]:
        return None
    newest = newest_checkpoint(source / CHECKPOINTS)
    if newest is None:
        return None
    progress, _ = read_progress(newest)
    planned = sum(phase.tokens for phase in saved_run(newest).phases)
    return (
        f"{source} is not trained to its end: step {progress.step:,},"
        f" {short_count(progress.tokens)} of {short_count(planned)} tokens. This exports that step."
    )
