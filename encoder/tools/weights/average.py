"""The mean of checkpoints' weights, as a weights folder: what ModernBERT-base is, of four of its decay; of one, its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from encoder.base.errors import CheckpointError, ModelError
from encoder.base.files import meant_beside
from encoder.engine.checkpoint.folder import COMMITTED, damage
from encoder.engine.checkpoint.read import newest_checkpoint
from encoder.engine.checkpoint.tensors import StretchReader
from encoder.models.catalog import build_model
from encoder.models.growth import differing
from encoder.models.stored import StoredModel, write_stored
from encoder.runs.folder import CHECKPOINTS, RUN_FILE
from encoder.runs.weights import checkpoint_facts


def average_checkpoints(checkpoints: Sequence[Path], out: Path) -> StoredModel:
    """Writes the mean of checkpoints of one model, each of the same weight, whole or not at all. Raises UserError.

    checkpoints: folders of RUN/checkpoints; a run folder stands for its newest. One alone is written as it is.
    Takes the memory of one model in fp32 and of its largest tensor in fp64, however many checkpoints there are.
    """
    checkpoints = [_newest_of(path) for path in checkpoints]
    facts = [_checked(path) for path in checkpoints]
    different = len({os.path.realpath(path) for path in checkpoints})
    if different < len(checkpoints):
        raise ModelError(
            f"a mean of {len(checkpoints)} checkpoints, {different} different; needed: each once."
        )
    first = facts[0]
    for path, other in zip(checkpoints[1:], facts[1:], strict=True):
        if settings := differing(first.config, other.config):
            name, there, here = settings[0]
            raise ModelError(
                f"{path} has {name} {here}, {checkpoints[0]} has {there}; needed: checkpoints of"
                " one model, under the same RoPE thetas. Leave one of them out."
            )
        if _bytes_of(first.tokenizer_json) != _bytes_of(other.tokenizer_json):
            raise ModelError(
                f"{path} has another tokenizer.json than {checkpoints[0]}; needed: checkpoints of"
                " one vocabulary. Leave one of them out."
            )
    model = dataclasses.replace(
        first,
        weights=mean_weights(checkpoints, first),
        max_tokens=max((f.max_tokens for f in facts if f.max_tokens is not None), default=None),
        origin=(
            f"mean of {len(facts)} checkpoints: {'; '.join(f.origin for f in facts)}"
            if len(facts) > 1
            else first.origin
        ),
    )
    write_stored(model, out)
    return model


def mean_weights(checkpoints: Sequence[Path], facts: StoredModel) -> dict[str, Tensor]:
    """The mean of the master weights by name, summed in fp64, in fp32. Raises CheckpointError."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(facts.config, seed=0).named_parameters()}
    weights: dict[str, Tensor] = {}
    try:
        with contextlib.ExitStack() as held:
            readers = [held.enter_context(StretchReader(path)) for path in checkpoints]
            for name, shape in shapes.items():
                # one tensor at a time, put together from the stretches in the ranks' files
                total = torch.zeros(math.prod(shape), dtype=torch.float64)
                one = torch.empty_like(total)
                for reader in readers:
                    reader.copy_into(one, name=name, start=0, kind="master")
                    total += one
                weights[name] = (total / len(readers)).float().view(shape)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"a checkpoint cannot be read: {error}. Use another one.") from error
    return weights


def _newest_of(path: Path) -> Path:
    """The newest checkpoint of a run folder; any other path as it is. Raises CheckpointError."""
    if not (path / RUN_FILE).is_file() or (path / COMMITTED).exists():
        return path
    newest = newest_checkpoint(path / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(f"{path} holds no checkpoint yet; needed: a run that has saved one.")
    return newest


def _checked(checkpoint: Path) -> StoredModel:
    if not (checkpoint / COMMITTED).is_file():
        found = "is no committed checkpoint" if checkpoint.is_dir() else "does not exist"
        meant = meant_beside(checkpoint, folders=True)
        raise CheckpointError(
            f"{checkpoint} {found}; needed: folders of RUN/checkpoints, or a run folder.{meant}"
        )
    if problem := damage(checkpoint):
        raise CheckpointError(f"{problem} Use another checkpoint.")
    return checkpoint_facts(checkpoint)


def _bytes_of(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None
