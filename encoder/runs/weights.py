"""Any model that we can name: a run folder, a checkpoint, a weights folder, a Hugging Face folder, or a name on its hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from encoder.base.command import as_typed
from encoder.base.errors import CheckpointError, ModelError
from encoder.base.files import meant_beside
from encoder.base.hub import HubName, fetch_model, parse_hub_name
from encoder.base.schema import from_mapping, read_mapping
from encoder.base.tokenizer_json import SpecialIds
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import COMMITTED, committed_folders, damage
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress, read_weights
from encoder.models.contract import ModelConfig
from encoder.models.hf.other_heads import TaskHead
from encoder.models.hf.read import CONFIG, read_hf, read_hf_config, read_task_head
from encoder.models.stored import MODEL, StoredModel, fp32, read_stored, read_stored_config
from encoder.runs.config import RunConfig, todays_form
from encoder.runs.folder import CHECKPOINTS, RUN_FILE
from encoder.runs.phases import phase_of_weights

_KINDS = (
    "a run folder, a checkpoint, a weights folder, a Hugging Face folder, or ORG/NAME on the"
    " Hugging Face hub"
)


def read_model(path: Path) -> StoredModel:
    """The model at `path`, its thetas those of the phase that trained it last. Raises CheckpointError, ConfigError, ModelError."""
    if name := parse_hub_name(path):
        return _read_hub(name)
    _check_is_folder(path)
    if (path / COMMITTED).exists():
        if problem := damage(path):
            raise CheckpointError(f"{problem} Use another checkpoint.")
        return _read_checkpoint(path)
    if (path / CHECKPOINTS).is_dir() or (path / RUN_FILE).is_file():
        newest = newest_checkpoint(path / CHECKPOINTS)
        if newest is None:
            raise CheckpointError(
                f"{path} holds no checkpoint yet; needed: a run that has saved one."
            )
        return _read_checkpoint(newest)
    if (path / MODEL).is_file():
        return read_stored(path)
    if (path / CONFIG).is_file():
        return read_hf(path)
    names = sorted(p.name for p in path.iterdir())
    if len(names) <= 3:
        shown = names
    else:
        shown = [*names[:3], "..."]
    found = "is empty"
    if names:
        found = f"holds {', '.join(shown)}"
    raise ModelError(f"{path} {found}; needed: {_KINDS}.")


def read_head(path: Path, specials: SpecialIds) -> TaskHead | None:
    """The head of a Hugging Face folder of a class for a task; None of any other model. Raises ModelError.

    path: that read_model has read
    specials: of its tokenizer
    """
    folder = path
    if name := parse_hub_name(path):
        folder = fetch_model(name, error=ModelError).folder
    is_ours = (folder / MODEL).is_file() or _newest_folder(folder)
    if is_ours or not (folder / CONFIG).is_file():
        return None
    return read_task_head(folder, specials)


def model_facts(path: Path) -> ModelConfig:
    """The shape of the model at `path` without its weights, thetas as read_model has them. Raises UserError for what is none."""
    if name := parse_hub_name(path):
        return read_hf_config(fetch_model(name, weights=False, error=ModelError).folder)
    _check_is_folder(path)
    if checkpoint := _newest_folder(path):
        return checkpoint_facts(checkpoint).config
    if (path / MODEL).is_file():
        return read_stored_config(path)
    return read_hf_config(path)


def saved_run(path: Path) -> RunConfig:
    """The run of a run folder or of one of its checkpoints. Raises CheckpointError, ConfigError."""
    checkpoint = _newest_folder(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; needed: a run folder or one of its checkpoints."
        )
    return read_saved_run(checkpoint / RUN_FILE)


def read_saved_run(path: Path) -> RunConfig:
    """A run file that a run wrote: it says everything, and nothing is worked out again. Raises ConfigError."""
    mapping = read_mapping(path)
    if "task" in mapping:
        raise ModelError(
            f"{path} is of a fine-tuning, whose model has another head. Export it with"
            f" {as_typed('export', path.parent, 'OUT')}, or name its folder in start_from of a task"
            " file."
        )
    return from_mapping(RunConfig, todays_form(mapping), where=str(path))


def _check_is_folder(path: Path) -> None:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"{path} {found}; needed: {_KINDS}.{meant_beside(path, folders=True)}")


def _newest_folder(path: Path) -> Path | None:
    """The checkpoint at `path`, or the newest of the run folder at `path`; its files are not looked at."""
    if (path / COMMITTED).is_file():
        return path
    folders = committed_folders(path / CHECKPOINTS)
    return folders[-1] if folders else None


def _read_hub(name: HubName) -> StoredModel:
    fetched = fetch_model(name, error=ModelError)
    model = read_hf(fetched.folder)
    origin = model.origin.replace(
        f"folder {fetched.folder.name}", f"hub {name.id} at commit {fetched.commit}", 1
    )
    return dataclasses.replace(model, origin=origin)


def checkpoint_facts(checkpoint: Path) -> StoredModel:
    """All of a checkpoint's model but its weights. Raises CheckpointError, ConfigError."""
    run = read_saved_run(checkpoint / RUN_FILE)
    index = phase_of_weights(read_progress(checkpoint)[0])
    phase = run.phases[index]
    # the run's; one that was moved away from its run may have a copy beside it
    beside = (checkpoint.parent.parent / TOKENIZER, checkpoint / TOKENIZER)
    tokenizer_json = next((path for path in beside if path.is_file()), None)
    return StoredModel(
        config=run.model_of(phase),
        weights={},
        tokenizer_json=tokenizer_json,
        origin=f"run {run.name}, checkpoint {checkpoint.name}",
        max_tokens=max(p.max_tokens_per_document for p in run.phases[: index + 1]),
    )


def _read_checkpoint(checkpoint: Path) -> StoredModel:
    return dataclasses.replace(checkpoint_facts(checkpoint), weights=fp32(read_weights(checkpoint)))
