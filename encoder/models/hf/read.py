"""From Hugging Face: a folder of a class that has a bridge, written by any transformers, as a stored model.

Weights are read from model.safetensors, from its shards (model.safetensors.index.json) or from pytorch_model.bin, in
whatever float they are, and become fp32. A body without heads has them drawn, as has a model with a task (other_heads.py).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.base.errors import ExportError, ModelError
from encoder.base.tokenizer_json import SpecialIds
from encoder.base.untrusted import inside, open_regular, plain_name, read_json
from encoder.models.contract import ModelConfig
from encoder.models.hf.bridge import Bridge
from encoder.models.hf.catalog import TITLES, bridge_of_settings
from encoder.models.hf.other_heads import (
    TaskHead,
    as_pretrained,
    kind_of,
    labels_of,
    problem_of,
    set_apart,
    task_head,
)
from encoder.models.hf.parity import (
    TOLERANCE_DRAWN,
    Proof,
    drawn_difference,
    logits_fn,
    logits_fn_fp64,
    our_model,
    prove,
    transformers_model,
)
from encoder.models.stored import (
    TOKENIZER,
    WEIGHTS,
    StoredModel,
    check_weights,
    drawn_weights,
    fp32,
    parameter_shapes,
    read_safetensors,
    stems,
)
from encoder.models.with_task import head_family

CONFIG = "config.json"
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
EMBEDDING, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"


def read_hf(folder: Path) -> StoredModel:
    """The model of a Hugging Face folder, its config.json checked to mean the same to transformers, on drawn weights in fp64.

    Raises ModelError for another architecture, a config that cannot be ours, missing or unfit weights. ModernBERT's
    dropout after attention has no word in config.json: the model has its own 0.1. `origin` says so, and which heads were
    drawn or left out.
    """
    config = read_hf_config(folder)
    said = _read_json(folder / CONFIG)
    values = as_pretrained(said)
    bridge = bridge_of_settings(values, where=str(folder / CONFIG))
    shapes = parameter_shapes(config)
    names = list(shapes)
    raw, apart = set_apart(_read_weights(folder), said)
    # our names, the copy of the embedding dropped; then all names must fit, before missing heads are drawn
    weights, left_out = bridge.weights_from(raw, config, of=str(folder), ours=shapes)
    weights = untie(weights, tied=config.tie_word_embeddings, of=str(folder))
    may_lack = bridge.head_names(names)
    if values is not said:
        may_lack = tuple(name for name in names if not name.startswith("model."))
    drawn = [name for name in may_lack if name not in weights]
    # first: a config that says more than the file holds makes nothing
    check_weights(weights, config, of=str(folder), may_lack=drawn)
    weights |= drawn_weights(config, drawn)
    _check_meaning(values, config, folder / CONFIG)
    tokenizer_json = folder / TOKENIZER
    return StoredModel(
        config=config,
        weights=fp32(weights),
        tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
        origin=_origin(folder, config, bridge, drawn=drawn, left_out=[*left_out, *apart]),
        drawn=tuple(drawn),
        max_tokens=_max_tokens(folder, config),
    )


def _origin(
    folder: Path,
    config: ModelConfig,
    bridge: Bridge,
    *,
    drawn: Sequence[str],
    left_out: Sequence[str],
) -> str:
    """One line for people.

    folder, config, bridge: of the model.
    drawn: parameters that the folder lacks.
    left_out: of its tensors, those that the model has no place for.
    """
    said = []
    if bridge.without_word:
        value = getattr(config, bridge.without_word)
        said.append(f"{bridge.without_word} is {value}, our default: its config.json has none")
    if drawn:
        said.append(f"drawn, for it has none: {', '.join(stems(drawn))}")
    if left_out:
        said.append(f"left out: {', '.join(stems(left_out))}")
    notes = ""
    if said:
        notes = f" ({'; '.join(said)})"
    return f"Hugging Face folder {folder.name}{notes}"


def read_task_head(folder: Path, specials: SpecialIds) -> TaskHead | None:
    """The head of a folder of a class for a task; None of another class. Raises ModelError.

    folder: with config.json
    specials: of its tokenizer, which say whose head it is
    """
    said = _read_json(folder / CONFIG)
    kind = kind_of(said)
    if kind is None:
        return None
    family = head_family(read_hf_config(folder), specials)
    weights = fp32(task_head(_read_weights(folder), kind=kind, family=family))
    return TaskHead(
        kind=kind,
        labels=labels_of(said),
        weights=weights,
        problem=problem_of(said, weights),
    )


def read_hf_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json tells. Raises ModelError."""
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} has no {CONFIG}; needed: a Hugging Face folder of"
            f" {', '.join(TITLES[:-1])} or {TITLES[-1]}."
        )
    settings = as_pretrained(_read_json(folder / CONFIG))
    bridge = bridge_of_settings(settings, where=str(folder / CONFIG))
    return bridge.from_settings(settings, where=str(folder / CONFIG), names=_tensor_names(folder))


def prove_import(model: StoredModel, folder: Path) -> Proof:
    """Our logits are those of transformers on the folder's weights, at all lengths and paddings. Raises ExportError.

    To a transformers whose words config.json lacks they are given (Bridge.completed).
    """
    said = _read_json(folder / CONFIG)
    settings = as_pretrained(said)
    bridge = bridge_of_settings(settings)
    _, apart = set_apart(dict.fromkeys(_tensor_names(folder), torch.empty(0)), said)

    # transformers is given the same drawn heads, so that they are compared as well
    drawn = {name: model.weights[name] for name in model.drawn}
    theirs = transformers_model(
        folder,
        bridge,
        bridge.completed(settings, model.config),
        bridge.weights_to(drawn, model.config),
        beside=[*apart],
    )
    return prove(
        our_model(model.weights, model.config),
        logits_fn(theirs, bridge),
        asked="transformers",
        ask_fp64=lambda: logits_fn_fp64(theirs, bridge),
        max_tokens=model.max_tokens or model.config.max_position_embeddings,
        padding=bridge.padding(settings),
    )


def _check_meaning(values: dict[str, Any], config: ModelConfig, path: Path) -> None:
    bridge = bridge_of_settings(values)
    try:
        drawn = drawn_difference(bridge.completed(values, config), config)
    except ExportError as error:
        raise ModelError(f"{path}: {error}") from error
    if not drawn <= TOLERANCE_DRAWN:
        raise ModelError(
            f"{path} means another model to transformers than to us: on drawn weights the logits"
            f" differ by {drawn:.2e} in fp64; needed: at most {TOLERANCE_DRAWN:.0e}. Take out the"
            f" words that {bridge.title}'s own config.json does not have."
        )


def untie(weights: dict[str, Tensor], *, tied: bool, of: str) -> dict[str, Tensor]:
    """Without the copy of the embedding that some writers store as the decoder's weight. Raises ModelError where it is none."""
    if not tied or DECODER not in weights:
        return weights
    if EMBEDDING in weights and not torch.equal(weights[DECODER], weights[EMBEDDING]):
        raise ModelError(
            f"{of}: tie_word_embeddings is true, but {DECODER} is not {EMBEDDING}. Set"
            " tie_word_embeddings to false to keep both."
        )
    return {name: w for name, w in weights.items() if name != DECODER}


def load_tensors(path: Path, *, allowed: Sequence[Any] = ()) -> Any:
    """What torch.save wrote, read as tensors and plain values alone. Raises ModelError for anything else.

    allowed: further types that the file's format has, as torch.serialization.safe_globals takes them.
    """
    open_regular(path, error=ModelError).close()  # a fifo would be waited for
    try:
        # weights_only: no code of the file runs; mmap: no second copy, for torch's zip format alone
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # torch, its unpickler and zipfile each raise their own kinds
        if kind := re.search(r"GLOBAL (\S+)", str(error)):
            raise ModelError(
                f"{path} holds {kind[1]} beside tensors, and reading that would run code named in"
                " the file. Where you trust it, load it in the program that wrote it and"
                " torch.save the state dict alone."
            ) from error
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} cannot be read: {why}. Copy the file again.") from error


def named_tensors(found: Any, *, where: str) -> dict[str, Tensor]:
    """`found`, where it is a mapping of names to dense tensors. Raises ModelError."""
    if not isinstance(found, dict):
        raise ModelError(
            f"{where} holds a {type(found).__name__}; needed: a mapping of names to tensors. Save"
            " the model's state_dict()."
        )
    for name, tensor in found.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not dense:
            kind = type(tensor).__name__
            if isinstance(tensor, Tensor) and not dense:
                kind = f"{tensor.layout} tensor"
            raise ModelError(
                f"{where} holds a {kind} under {name!r}; needed: dense tensors under names. Save"
                " the model's state_dict()."
            )
        # also one that repeats few values over a shape of terabytes
        if (
            tensor.is_meta
            or tensor.is_quantized
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise ModelError(
                f"{where} holds {name!r} without all of its values ({list(tensor.shape)}); needed:"
                " whole tensors. Load the model's weights before you save its state_dict()."
            )
    return found


def _tensor_names(folder: Path) -> list[str]:
    """Names of the tensors, without reading them; none where that cannot be, or where something is amiss: who reads says so."""
    from safetensors import SafetensorError, safe_open

    if (folder / WEIGHTS).is_file():
        try:
            open_regular(folder / WEIGHTS, error=ModelError).close()
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                return list(file.keys())
        except (ModelError, SafetensorError, OSError):
            return []
    if (folder / INDEX).is_file():
        files = _read_json(folder / INDEX).get("weight_map")
        return list(files) if isinstance(files, dict) else []
    return []


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / PICKLED).is_file():
        return named_tensors(load_tensors(folder / PICKLED), where=str(folder / PICKLED))
    raise ModelError(
        f"{folder} has a {CONFIG} but no {WEIGHTS}, no {INDEX} and no {PICKLED}. Copy the folder"
        " again, or save it with save_pretrained."
    )


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Each tensor from the file that the index names for it; another file may hold an older one of that name."""
    files = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise ModelError(
            f"{folder / INDEX} has no weight_map; needed: the names of the weights with their"
            " files."
        )
    # before anything is read: an index may name files outside of the folder
    for file in files.values():
        plain_name(file, where=folder / INDEX, error=ModelError, folders=False)
    weights: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        held = read_safetensors(
            inside(folder, file, where=folder / INDEX, error=ModelError, folders=False)
        )
        weights.update((name, w) for name, w in held.items() if files.get(name) == file)
    lost = sorted(files.keys() - weights.keys())
    if lost:
        raise ModelError(
            f"{folder}: {INDEX} lists {lost[0]} in {files[lost[0]]}, which lacks it. Copy the"
            " folder again."
        )
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    """A mapping; NaN and Infinity are taken, which transformers writes."""
    try:
        return read_json(path, root=dict, error=ModelError, non_finite=True)
    except ModelError as error:
        raise ModelError(f"{error} Copy the file again.") from error


def _max_tokens(folder: Path, config: ModelConfig) -> int | None:
    """model_max_length of the tokenizer, where it says one that the model can do."""
    path = folder / "tokenizer_config.json"
    found = None
    if path.is_file():
        found = _read_json(path).get("model_max_length")
    if not isinstance(found, int) or isinstance(found, bool):
        return None

    # tokenizers say 10^30 where there is no limit
    if 1 <= found <= config.max_position_embeddings:
        return found
    return None
