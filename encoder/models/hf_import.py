"""From Hugging Face: a folder of ModernBertForMaskedLM, written by any transformers, as a stored model.

Weights are read from model.safetensors, from its shards (model.safetensors.index.json) or from pytorch_model.bin, in
whatever float they are, and become fp32.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.base.errors import ModelError
from encoder.models.hf_config import NO_WORD, config_from_hf
from encoder.models.hf_proof import Proof, asking, our_model, prove, transformers_model
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import TOKENIZER, WEIGHTS, StoredModel, check_weights, fp32, read_safetensors

CONFIG = "config.json"
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
EMBEDDING, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"


def read_hf(folder: Path) -> StoredModel:
    """The model of a Hugging Face folder. Raises ModelError for another architecture, missing or unfit weights.

    Dropout after attention has no word in config.json: the model has ModernBERT's own 0.1.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}; needed: a Hugging Face folder of ModernBertForMaskedLM.")
    config = config_from_hf(_read_json(folder / CONFIG), where=str(folder / CONFIG))
    weights = untie(_read_weights(folder), tied=config.tie_word_embeddings, of=str(folder))
    check_weights(weights, config, of=str(folder))
    tokenizer_json = folder / TOKENIZER
    return StoredModel(
        config=config, weights=fp32(weights), tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
        origin=f"Hugging Face folder {folder.name} (no word for {NO_WORD}: {config.attention_output_dropout})",
        max_tokens=_max_tokens(folder, config))


def prove_import(model: StoredModel, folder: Path) -> Proof:
    """Our logits are those of transformers on the folder, to 1e-4 at all lengths and paddings. Raises ExportError."""
    return prove(our_model(model.weights, model.config), asking(transformers_model(folder)), asked="transformers",
                 max_tokens=model.max_tokens or model.config.max_position_embeddings)


def untie(weights: dict[str, Tensor], *, tied: bool, of: str) -> dict[str, Tensor]:
    """Without the copy of the embedding that some writers store as the decoder's weight. Raises ModelError where it is none."""
    if not tied or DECODER not in weights:
        return weights
    if EMBEDDING in weights and not torch.equal(weights[DECODER], weights[EMBEDDING]):
        raise ModelError(f"{of}: tie_word_embeddings is true, but {DECODER} is not {EMBEDDING}. Set tie_word_embeddings to "
                         "false to keep both.")
    return {name: w for name, w in weights.items() if name != DECODER}


def load_tensors(path: Path) -> dict[str, Any]:
    """What torch.save wrote, read as tensors and plain values alone. Raises ModelError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:          # torch, its unpickler and zipfile each raise their own kinds
        if kind := re.search(r"GLOBAL (\S+)", str(error)):
            raise ModelError(f"{path} holds {kind[1]} beside tensors, and reading that would run code named in the file. Where "
                             "you trust it, load it in the program that wrote it and torch.save the state dict alone.") from error
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} cannot be read: {why}. Copy the file again.") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        files = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise ModelError(f"{folder / INDEX} has no weight_map; needed: the names of the weights with their files.")
        weights: dict[str, Tensor] = {}
        for name in sorted(set(files.values())):
            weights.update(read_safetensors(folder / name))
        lost = sorted(files.keys() - weights.keys())
        if lost:
            raise ModelError(f"{folder}: {INDEX} tells of {lost[0]}, which is in no file. Copy the folder again.")
        return weights
    if (folder / PICKLED).is_file():
        return load_tensors(folder / PICKLED)
    raise ModelError(f"{folder} has a {CONFIG} but no {WEIGHTS}, no {INDEX} and no {PICKLED}. Copy the folder again, or save "
                     "it with save_pretrained.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the file again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no mapping of names to values. Copy the file again.")
    return values


def _max_tokens(folder: Path, config: ModernBertConfig) -> int | None:
    """model_max_length of the tokenizer, where it says one that the model can do."""
    path = folder / "tokenizer_config.json"
    found = _read_json(path).get("model_max_length") if path.is_file() else None
    return found if isinstance(found, int) and 1 <= found <= config.max_position_embeddings else None
