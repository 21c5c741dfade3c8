"""From any model that we can name by a path to a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

from encoder.base.command import as_typed
from encoder.base.done import is_done
from encoder.base.errors import ExportError
from encoder.base.log import note
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.units import short_count
from encoder.engine.checkpoint.read import read_progress
from encoder.finetune.stored import is_task, read_trained
from encoder.finetune.stored import unfinished_text as unfinished_task_text
from encoder.models.catalog import networks_of
from encoder.models.hf.catalog import export_blocker
from encoder.models.hf.parity import Proof
from encoder.models.hf.task import export_task
from encoder.models.hf.write import export_hf
from encoder.models.stored import MODEL, StoredModel, network_of, used_network
from encoder.runs.folder import CHECKPOINTS
from encoder.runs.weights import read_model, saved_run
from encoder.tools.weights.card import checkpoint_of, training_of


def export_run(
    source: Path, out: Path, *, onnx: bool = False, network: str | None = None
) -> dict[str, Proof]:
    """Exports a run folder's newest checkpoint, a checkpoint, or a weights folder; returns the proofs. Raises UserError.

    source: what is exported
    out: the folder to write
    onnx: also for onnxruntime
    network: of a model of several; None: the one that is used after training
    """
    if is_task(source):
        if network:
            raise _one_network(source, network)
        trained = read_trained(source)
        if unfinished := unfinished_task_text(source):
            note(unfinished)
        return export_task(trained, out, onnx=onnx)
    # found once: to choose a run's newest checkpoint is to hash all of its files
    checkpoint = checkpoint_of(source)
    model = _chosen(read_model(checkpoint or source), source, network)
    if checkpoint and (unfinished := unfinished_text(source, checkpoint)):
        note(unfinished)
    if stays := export_blocker(model.config):
        kept = as_typed("average", source, "--out", "OUT")
        if (source / MODEL).is_file():
            kept = "it is one already"
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
    training = training_of(checkpoint or source, model, name=Path(os.path.abspath(out)).name)
    return export_hf(model, model.tokenizer_json, specials, out, onnx=onnx, training=training)


def _chosen(model: StoredModel, source: Path, network: str | None) -> StoredModel:
    """The network that is asked for. Raises ExportError where there is none of this name."""
    names = [*networks_of(model.config)]
    if network is None:
        return used_network(model)
    if not names:
        raise _one_network(source, network)
    if network not in names:
        raise ExportError(
            f"--network {network}: {source} has no such network; needed: {' or '.join(names)}."
        )
    return network_of(model, network)


def _one_network(source: Path, network: str) -> ExportError:
    return ExportError(
        f"--network {network} has no effect: {source} has one network. Leave --network out."
    )


def unfinished_text(source: Path, checkpoint: Path) -> str | None:
    """What to say of a run folder whose run has not ended: how far the checkpoint is. None for any other source."""
    if not (source / CHECKPOINTS).is_dir() or is_done(source)[0]:
        return None
    progress, _ = read_progress(checkpoint)
    planned = sum(phase.tokens for phase in saved_run(checkpoint).phases)
    return (
        f"{source} is not trained to its end: step {progress.step:,},"
        f" {short_count(progress.tokens)} of {short_count(planned)} tokens. This exports that step."
    )
