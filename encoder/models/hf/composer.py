"""From ModernBERT's own training code: a Composer checkpoint or a bare state dict.

The names of FlexBERT, its model, are ours but for their prefixes:

    model.bert.embeddings.*         ->  model.embeddings.*         no matrix is turned or reordered
    model.bert.encoder.layers.{i}.* ->  model.layers.{i}.*
    model.bert.final_norm.*         ->  model.final_norm.*
    model.head.* model.decoder.*    ->  head.* decoder.*

A checkpoint of Composer's trainer also holds the model's whole configuration and its tokenizer:

    state/model                                                     the tensors
    state/integrations/huggingface/
        model/config/content                  FlexBERT's configuration (flexbert_config.py)
        tokenizer/tokenizer.json/content
    state/timestamp, rng, ...                 timedelta, numpy's generator: allowed, not looked at
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from encoder.base.errors import ConfigError, ModelError
from encoder.models.hf.flexbert import (
    HEAD_WIDTH,
    FlexBertWords,
    Shape,
    config_from_flexbert,
    turns_neighbours,
)
from encoder.models.hf.read import DECODER, EMBEDDING, load_tensors, named_tensors, untie
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, check_weights, fp32
from encoder.nn.rope import half_split_rows

HUGGING_FACE = ("integrations", "huggingface")


def read_composer(
    path: Path,
    *,
    global_rope_theta: float | None = None,
    local_rope_theta: float | None = None,
    heads: int | None = None,
    tokenizer_to: Path | None = None,
) -> StoredModel:
    """Reads the model of a .pt file, its settings from its own configuration where it has one.

    global_rope_theta: needed where the file does not say it; where it does, only the same.
    local_rope_theta: the same; default as the file says, else 10,000.
    heads: the same; default as the file says, else as many as are 64 wide.
    tokenizer_to: where the file's own tokenizer.json is written, if it has one.

    What the file does not say is listed as assumed in the model's origin. Raises ModelError
    where a theta or the heads are needed, where a setting cannot be ours, and where the file
    holds anything but FlexBERT's weights.
    """
    for name, theta in (("global", global_rope_theta), ("local", local_rope_theta)):
        if theta is not None and not 0 < theta < math.inf:
            raise ModelError(
                f"--{name}-rope-theta is {theta:g}; needed: above 0, and finite (ModernBERT: 10000 "
                "or 160000)."
            )
    found = load_tensors(path, allowed=composer_types())
    # None: the file has no configuration, as a bare state dict
    content = _within(found, "state", *HUGGING_FACE, "model", "config", "content", where=path)
    weights, tables = _our_names(_state_dict(found, path), path)
    shape = _shape_of(weights, path)
    turned = False
    try:
        if content is None:
            config, assumed = _config_of(
                weights, shape, path, global_rope_theta, local_rope_theta, heads
            )
        else:
            words = FlexBertWords(values=content, where=str(path))
            config = config_from_flexbert(
                words,
                shape=shape,
                heads=heads,
                global_rope_theta=global_rope_theta,
                local_rope_theta=local_rope_theta,
            )
            turned = turns_neighbours(words, config)
            assumed = words.assumed
    except ConfigError as error:
        raise ModelError(
            f"{path}: {str(error).replace('set attention_head_width', 'give --heads')}"
        ) from error

    _check_angles(tables, config, path)
    weights = untie(weights, tied=config.tie_word_embeddings, of=str(path))
    check_weights(weights, config, of=str(path))
    # rotary pairs of neighbours: rows are put in another order, the values stay
    if turned:
        weights = _half_split(weights, config)
    source = "its own configuration" if content is not None else "its tensors and as told"
    told = {name: "none" if value in ({}, "") else value for name, value in assumed.items()}
    list_of = ", ".join(f"{name} {value}" for name, value in told.items())
    return StoredModel(
        config=config,
        weights=fp32(weights),
        tokenizer_json=_own_tokenizer(found, path, tokenizer_to),
        origin=(
            f"FlexBERT file {path.name} ({_described(config)}, by {source}; not said by the "
            f"file and assumed: {list_of or 'nothing'})"
        ),
    )


def _half_split(weights: dict[str, Tensor], config: ModernBertConfig) -> dict[str, Tensor]:
    """Queries and keys of pairs (2j, 2j + 1) as our rotation has them; values stay."""
    found = dict(weights)
    for name, rows in weights.items():
        # rows are q, k, v, each of all heads
        if ".attn.Wqkv." in name and len(rows) == 3 * config.hidden_size:
            query, key, value = rows.chunk(3)
            turned = [
                half_split_rows(part, heads=config.num_attention_heads) for part in (query, key)
            ]
            found[name] = torch.cat([*turned, value])
    return found


def composer_types() -> list[Any]:
    """Names the types beside tensors in a checkpoint of Composer's trainer.

    None of them runs code of the file's choice: arrays of numbers (numpy's generator), a
    timedelta, the version of torch, which is a string.
    """
    # numpy 1 and 2 name the module of this function differently
    rebuild = np.empty(0).__reduce__()[0]
    numbers = [type(np.dtype(word)) for word in ("u1", "u4", "u8", "i4", "i8", "f4", "f8")]
    return [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *numbers,
        datetime.timedelta,
        TorchVersion,
    ]


def _within(found: Any, *keys: str, where: Path) -> dict[str, Any] | None:
    """The mapping at a path of keys, or None where a key is missing. Raises ModelError."""
    at = found
    for i, key in enumerate(keys):
        if not isinstance(at, dict):
            raise ModelError(
                f"{where} holds a {type(at).__name__} at {'/'.join(keys[:i])}; needed: a mapping, "
                "as Composer writes it."
            )
        if at.get(key) is None:
            return None
        at = at[key]
    if not isinstance(at, dict) or not all(isinstance(key, str) for key in at):
        raise ModelError(
            f"{where} holds a {type(at).__name__} at {'/'.join(keys)}; needed: a mapping of names "
            "to values."
        )
    return at


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    # state/model of a trainer's checkpoint, model alone, or the state dict itself
    for key in ("state", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = {}
    if isinstance(found, dict):
        tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ModelError(
            f"{path} holds no tensors by name; needed: a Composer checkpoint, or the state dict of "
            "its model."
        )
    return named_tensors(tensors, where=str(path))


def _own_tokenizer(found: Any, path: Path, to: Path | None) -> Path | None:
    if to is None:
        return None
    content = _within(
        found, "state", *HUGGING_FACE, "tokenizer", "tokenizer.json", "content", where=path
    )
    if content is None:
        return None
    try:
        to.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} holds a tokenizer.json that is none ({error}). Give yours: --tokenizer FILE."
        ) from error
    return to


def _our_names(found: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights by our names, and the tables of rotary angles, which are made from theta."""
    weights: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for name, tensor in found.items():
        name = name.removeprefix("model.")
        # inv_freq is a buffer that theta makes again: not a weight, but a witness of theta
        kind = tables if name.endswith(".inv_freq") else weights
        kind[name.replace("bert.encoder.", "model.", 1).replace("bert.", "model.", 1)] = tensor
    if EMBEDDING not in weights:
        raise ModelError(
            f"{path} holds {', '.join(sorted(found)[:3])}, ...; needed: FlexBERT's names, such as "
            "bert.embeddings.tok_embeddings.weight. A Hugging Face model is imported from its "
            "folder."
        )
    return weights, tables


def _shape_of(weights: dict[str, Tensor], path: Path) -> Shape:
    way_out = weights.get("model.layers.0.mlp.Wo.weight")
    if way_out is None:
        raise ModelError(
            f"{path} has no layers (bert.encoder.layers.0.mlp.Wo.weight is missing). Give whole "
            "weights."
        )
    for name, matrix in (
        (EMBEDDING, weights[EMBEDDING]),
        ("model.layers.0.mlp.Wo.weight", way_out),
    ):
        if matrix.dim() != 2:
            raise ModelError(
                f"{path}: {name} is {list(matrix.shape)}; needed: a matrix. Give whole weights, "
                "not those of a rank."
            )
    layers = [n.split(".")[2] for n in weights if n.startswith("model.layers.")]
    strange = next((layer for layer in layers if not (layer.isdecimal() and len(layer) <= 6)), None)
    if strange is not None:
        raise ModelError(
            f"{path} has a layer {strange!r}; needed: bert.encoder.layers.0, 1, ... Give the "
            "weights as "
            "ModernBERT's code saves them."
        )
    # layers 0 to `last` must all be there
    last = max(map(int, layers))
    if last >= len(set(layers)):
        raise ModelError(
            f"{path} has a layer {last} but only {len(set(layers))} layers. Give whole weights."
        )
    vocab_size, width = weights[EMBEDDING].shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": way_out.shape[1],
        "num_hidden_layers": 1 + last,
    }


def _config_of(
    weights: dict[str, Tensor],
    shape: Shape,
    path: Path,
    global_theta: float | None,
    local_theta: float | None,
    heads: int | None,
) -> tuple[ModernBertConfig, dict[str, Any]]:
    """Settings of a bare state dict, and those of them that nobody said: ModernBERT's defaults."""
    if global_theta is None:
        raise ModelError(
            f"{path} does not say its RoPE thetas, and a wrong one gives a wrong model without a "
            "word. Needed: "
            "--global-rope-theta 10000 for a checkpoint of the first phase, 160000 after context "
            "extension."
        )

    width = shape["hidden_size"]
    if heads is None and width % HEAD_WIDTH:
        raise ModelError(
            f"{path}: {width} features are no whole number of heads of {HEAD_WIDTH}, as published "
            "ones are, and the "
            "file does not say its heads. Give --heads."
        )
    if heads is not None and heads < 1:
        raise ModelError(f"--heads is {heads}; needed: at least 1.")

    told: dict[str, Any] = {"num_attention_heads": heads, "local_rope_theta": local_theta}
    default: dict[str, Any] = {
        "num_attention_heads": width // HEAD_WIDTH,
        "local_rope_theta": ModernBertConfig.local_rope_theta,
    }
    unsaid = (
        "norm",
        "mlp",
        "norm_eps",
        "global_attn_every_n_layers",
        "window_radius_tokens",
        "max_position_embeddings",
        "attention_output_dropout",
    )
    # told to the reader as such: a wrong one would show nowhere else
    assumed = {
        **{name: value for name, value in default.items() if told[name] is None},
        **{name: getattr(ModernBertConfig, name) for name in unsaid},
    }
    config = ModernBertConfig(
        **shape,
        **{**default, **{name: value for name, value in told.items() if value is not None}},
        # some writers store the copy as well
        tie_word_embeddings=DECODER not in weights or weights[DECODER].equal(weights[EMBEDDING]),
        norm_bias="model.embeddings.norm.bias" in weights,
        attention_bias="model.layers.0.attn.Wqkv.bias" in weights,
        mlp_bias="model.layers.0.mlp.Wi.bias" in weights,
        head_bias="head.dense.bias" in weights,
        decoder_bias="decoder.bias" in weights,
        global_rope_theta=global_theta,
    )
    return config, assumed


def _check_angles(tables: dict[str, Tensor], config: ModernBertConfig, path: Path) -> None:
    """Tables of rotary angles say the thetas, too. Raises ModelError where they disagree."""
    for name, table in tables.items():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if layer is None:
            continue
        theta = config.local_rope_theta if config.is_local(layer) else config.global_rope_theta
        width = config.head_width

        # theta^(-2j / D) for j = 0 .. D/2 - 1; a table saved in bf16 is off by up to 0.4 %
        expected = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        if table.shape != expected.shape or not torch.allclose(table.double(), expected, rtol=1e-2):
            raise ModelError(
                f"{path}: {name} is no table of RoPE theta {theta:g} for heads of {width}. Give "
                "the theta and the heads "
                "that the model was trained with."
            )


def _described(config: ModernBertConfig) -> str:
    how = "learned positions"
    if config.positions == "rope":
        how = f"RoPE theta {config.global_rope_theta:g} and {config.local_rope_theta:g}"
    return f"{config.num_attention_heads} heads, {how}, {config.norm}, {config.mlp}"
