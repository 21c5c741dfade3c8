"""From Hugging Face, its hub, or ModernBERT's own training code to a weights folder."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TypedDict

from encoder.base.errors import ModelError
from encoder.base.files import meant_beside
from encoder.base.hub import fetch_model, fetch_tokenizer, parse_hub_name
from encoder.models.hf.composer import read_composer
from encoder.models.hf.parity import Proof
from encoder.models.hf.read import prove_import, read_hf
from encoder.models.hf.tokenizer import check_tokenizer
from encoder.models.stored import StoredModel, write_stored
from encoder.runs.weights import read_model


class Told(TypedDict, total=False):
    """What a bare state dict does not say, as read_composer takes it."""

    global_rope_theta: float
    local_rope_theta: float
    heads: int


def import_model(
    source: Path, out: Path, *, tokenizer: Path | None = None, told: Told
) -> tuple[StoredModel, Proof | None]:
    """Writes the weights folder `out`, whole or not at all; a Hugging Face model is proven first.

    source: a Hugging Face folder, a name on its hub, or a .pt file in FlexBERT's names.
    tokenizer: tokenizer.json (or a name on the hub), where the source has none.
    told: global_rope_theta, local_rope_theta, heads, as read_composer takes them.

    Returns the model, and the proof of a Hugging Face model. Raises UserError.
    """
    name = parse_hub_name(source)
    if name is None and not source.exists():
        raise ModelError(
            f"{source} does not exist; needed: a Hugging Face folder, ORG/NAME on its hub, or a "
            f".pt file.{meant_beside(source, folders=True)}"
        )
    folder = source
    if name:
        folder = fetch_model(name, error=ModelError).folder
    with tempfile.TemporaryDirectory() as scratch:
        if not folder.is_dir():
            model = read_composer(source, **told, tokenizer_to=Path(scratch) / "tokenizer.json")
        elif told:
            option = f"--{next(iter(told)).replace('_', '-')}"
            raise ModelError(
                f"{option} has no effect on a folder, whose config.json says it. Leave it out."
            )
        else:
            # a name on the hub also tells the commit in its origin
            if name:
                model = read_model(source)
            else:
                model = read_hf(folder)

        if tokenizer is not None:
            if model.tokenizer_json is not None:
                raise ModelError(
                    f"--tokenizer is not needed: {source} has its own tokenizer.json. Leave it out."
                )
            on_hub = parse_hub_name(tokenizer)
            path = fetch_tokenizer(on_hub, error=ModelError) if on_hub else tokenizer
            model = dataclasses.replace(model, tokenizer_json=path)
        if model.tokenizer_json is not None:
            check_tokenizer(model.tokenizer_json, vocab_size=model.config.vocab_size)
        proof = prove_import(model, folder) if folder.is_dir() else None
        write_stored(model, out)
        return model, proof
