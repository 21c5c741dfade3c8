"""A weights folder that is made of one stored model: what growing and shrinking have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from encoder.base.errors import ModelError
from encoder.models.contract import ModelConfig
from encoder.models.stored import StoredModel, write_stored
from encoder.runs.weights import read_model


def read_source(source: Path, *, out: Path) -> StoredModel:
    """Any stored model, seen not to be what is to be written. Raises UserError."""
    if os.path.realpath(out) == os.path.realpath(source):
        raise ModelError(f"{out} is the source itself. Name another folder to write.")
    return read_model(source)


def write_derived(
    old: StoredModel,
    out: Path,
    *,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    origin: str,
) -> StoredModel:
    """The new model, written whole or not at all. Raises UserError.

    old: the source, whose tokenizer and longest document it keeps
    out: the folder to write
    config, weights: of the new model
    origin: where it comes from, for people
    """
    # None stays None: the length is that of the new model's positions
    longest = old.max_tokens and min(old.max_tokens, config.max_position_embeddings)
    model = StoredModel(
        config=config,
        weights=dict(weights),
        tokenizer_json=old.tokenizer_json,
        max_tokens=longest,
        origin=origin,
    )
    write_stored(model, out)
    return model
