"""A model at rest: its config, its fp32 weights, its tokenizer and where it came from, in one *weights folder*.

OUT/
    model.yaml           the config under the key `model`, as a run file has it
    model.safetensors    fp32, by our names, which are Hugging Face's
    tokenizer.json       where the model has one
    origin.json          where it came from; also the mark of a folder that we may replace
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from encoder.base.errors import ConfigError, ModelError, UserError, first_names
from encoder.base.files import atomic_folder, native_path, write_atomic, write_json
from encoder.base.schema import chosen_by, read_settings, to_yaml
from encoder.base.untrusted import open_regular, read_json
from encoder.models.catalog import FAMILIES, SYSTEMS, build_model, networks_of, system_of
from encoder.models.contract import ModelConfig

MODEL, WEIGHTS, TOKENIZER, ORIGIN = (
    "model.yaml",
    "model.safetensors",
    "tokenizer.json",
    "origin.json",
)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a run folder, a checkpoint, a weights folder and a Hugging Face folder have in common."""

    config: ModelConfig
    weights: dict[str, Tensor]  # fp32 on the CPU, as state_dict() names them
    tokenizer_json: Path | None  # a file, read when the model is written elsewhere
    origin: str  # one line for people
    # parameters that the source lacked: heads of a body without
    drawn: tuple[str, ...] = ()
    # the longest document trained on; None: max_position_embeddings
    max_tokens: int | None = None


def write_stored(model: StoredModel, out: Path) -> None:
    """Write the weights folder `out`, whole or not at all. Raises UserError; ModelError where weights and config differ."""
    check_weights(model.weights, model.config, of=model.origin)
    # whole or not at all; origin.json is the mark that lets us write over it
    with atomic_folder(out, mark=ORIGIN, ours=(MODEL, WEIGHTS, TOKENIZER)) as part:
        write_atomic(part / MODEL, to_yaml(_ModelFile(model=model.config)))
        write_safetensors(model.weights, part / WEIGHTS)
        if model.tokenizer_json is not None:
            shutil.copyfile(model.tokenizer_json, part / TOKENIZER)
        write_json(part / ORIGIN, {"origin": model.origin, "max_tokens": model.max_tokens})


def read_stored(folder: Path) -> StoredModel:
    """Read a weights folder. Raises ModelError for one that is incomplete, damaged, or whose weights do not fit."""
    missing = [name for name in (MODEL, WEIGHTS, ORIGIN) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} has no {missing[0]}; needed: a weights folder with {MODEL}, {WEIGHTS} and"
            f" {ORIGIN}, as tessera import and tessera grow write it."
        )
    try:
        config = read_stored_config(folder)
        origin = read_json(folder / ORIGIN, root=dict, error=ConfigError)
        origin, max_tokens = origin["origin"], origin["max_tokens"]
        # `type is int`: true is an int to isinstance
        if not isinstance(origin, str) or not (
            max_tokens is None or type(max_tokens) is int and 0 < max_tokens < 2**40
        ):
            raise ValueError(f"{ORIGIN} holds no origin, or no max_tokens")
    except ConfigError as error:
        raise ModelError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} cannot be read: {str(error).rstrip('.')}. Write the folder again."
        ) from error
    weights = fp32(read_safetensors(folder / WEIGHTS))
    check_weights(weights, config, of=str(folder))
    tokenizer_json = folder / TOKENIZER
    return StoredModel(
        config=config,
        weights=weights,
        origin=origin,
        max_tokens=max_tokens,
        tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
    )


def network_of(model: StoredModel, name: str) -> StoredModel:
    """One network of a model of several, such as a discriminator; any other model as it is.

    model: at rest, or its facts without weights
    name: of the network
    """
    family = FAMILIES[system_of(model.config)]
    if family.network_weights is None:
        return model
    weights = {}
    # facts alone have none
    if model.weights:
        weights = family.network_weights(model.weights, model.config, name)
    return dataclasses.replace(
        model,
        config=getattr(model.config, name),
        weights=weights,
        origin=f"{model.origin}, {name}",
    )


def used_network(model: StoredModel) -> StoredModel:
    """Of a model of several networks the one that is used after training; any other model as it is."""
    name = next(iter(networks_of(model.config)), None)
    return network_of(model, name) if name else model


def read_stored_config(folder: Path) -> ModelConfig:
    """The shape of a weights folder's model. Raises ConfigError."""
    return read_settings(_ModelFile, folder / MODEL).model


def check_weights(
    weights: dict[str, Tensor], config: ModelConfig, *, of: str, may_lack: Sequence[str] = ()
) -> None:
    """Names and shapes are those of the config's model. Raises ModelError with the first three that are not.

    weights: by our names
    config: of the model
    of: opens the errors
    may_lack: parameters that will be drawn
    """
    wanted = parameter_shapes(config)
    lacking = sorted(wanted.keys() - weights.keys() - {*may_lack})
    unknown = sorted(weights.keys() - wanted.keys())
    unfit = [
        f"{n} {list(weights[n].shape)} for {list(s)}"
        for n, s in wanted.items()
        if n in weights and weights[n].shape != s
    ]
    no_floats = [f"{n} {w.dtype}" for n, w in weights.items() if not w.is_floating_point()]
    for words, names in (
        ("lack", lacking),
        ("hold unknown", unknown),
        ("have another shape in", unfit),
        ("are no floats in", no_floats),
    ):
        if names:
            raise ModelError(
                f"{of}: the weights {words} {first_names(names)}. "
                "Give the config that the weights were trained with, or complete weights."
            )


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Of the config's model, as state_dict() names them: no weight is drawn."""
    with torch.device("meta"):
        return {name: p.shape for name, p in build_model(config, seed=0).state_dict().items()}


def parameter_names(config: ModelConfig) -> list[str]:
    """The same without the shapes."""
    return list(parameter_shapes(config))


def drawn_weights(config: ModelConfig, names: Sequence[str], *, seed: int = 0) -> dict[str, Tensor]:
    """Initial weights of some parameters of the config's model, which is not built for it: for heads that weights lack."""
    with torch.device("meta"):
        # values follow from seed, name and shape: any parameter can be drawn alone
        model = build_model(config, seed=seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return {name: model.initial_values(name, shapes[name]) for name in names}


def stems(names: Sequence[str]) -> list[str]:
    """Names of parameters without .weight and .bias, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def fp32(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous fp32 copies on the CPU; a tensor that is so already is not copied."""
    return {name: w.detach().to("cpu", torch.float32).contiguous() for name, w in weights.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, in the file's own dtypes. Raises ModelError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    open_regular(path, error=ModelError).close()  # a fifo would be waited for
    try:
        with native_path(path) as name:
            return load_file(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}. Copy or write the file again."
        ) from error


def write_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    """fp32, one file; equal weights give equal bytes. Raises UserError where there is no room."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(fp32(weights), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(
            f"{path.parent} cannot be written: {error}. Make room, or name another folder."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _ModelFile:
    """model.yaml."""

    model: Annotated[ModelConfig, chosen_by("system", SYSTEMS)]
