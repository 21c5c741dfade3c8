"""From ModernBERT's own training code: a Composer checkpoint or a bare state dict (.pt) in FlexBERT's names.

    model.bert.embeddings.*         ->  model.embeddings.*         no matrix is turned or reordered
    model.bert.encoder.layers.{i}.* ->  model.layers.{i}.*
    model.bert.final_norm.*         ->  model.final_norm.*
    model.head.* model.decoder.*    ->  head.* decoder.*
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from encoder.base.errors import ConfigError, ModelError
from encoder.models.hf_import import DECODER, EMBEDDING, load_tensors, named_tensors, untie
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, check_weights, fp32

HEAD_WIDTH = 64         # of every published ModernBERT


def read_composer(path: Path, *, global_rope_theta: float | None, local_rope_theta: float = 10_000.0,
                  heads: int | None = None) -> StoredModel:
    """The model of a .pt file. Its shape follows from the tensors; thetas, heads, windows and the gate do not.

    heads: default, as many as are 64 wide. Windows, norm (LayerNorm), gate (GELU) and eps are ModernBERT's defaults.
    Raises ModelError where a theta is not said or no angle, where `heads` is needed, or where the file holds anything but
    FlexBERT's weights.
    """
    if global_rope_theta is None:
        raise ModelError(f"{path} does not say its RoPE thetas, and a wrong one gives a wrong model without a word. Needed: "
                         "--global-rope-theta 10000 for a checkpoint of the first phase, 160000 after context extension.")
    for name, theta in (("global", global_rope_theta), ("local", local_rope_theta)):
        if not 0 < theta < math.inf:
            raise ModelError(f"--{name}-rope-theta is {theta:g}; needed: above 0, and finite (ModernBERT: 10000 or 160000).")
    weights = _our_names(_state_dict(path), path)
    config = _config_of(weights, path, global_rope_theta, local_rope_theta, heads)
    weights = untie(weights, tied=config.tie_word_embeddings, of=str(path))
    check_weights(weights, config, of=str(path))
    return StoredModel(config=config, weights=fp32(weights), tokenizer_json=None,
                       origin=f"FlexBERT file {path.name} ({config.num_attention_heads} heads, RoPE theta "
                              f"{global_rope_theta:g} and {local_rope_theta:g} as told; not said by the file and assumed: norm "
                              f"{config.norm}, gate {config.mlp}, the rest as ModernBERT has it)")


def _state_dict(path: Path) -> dict[str, Tensor]:
    found = load_tensors(path)
    for key in ("state", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name; needed: a Composer checkpoint, or the state dict of its model.")
    return named_tensors(tensors, where=str(path))


def _our_names(found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in found.items():
        name = name.removeprefix("model.")
        if not name.endswith(".inv_freq"):          # a table of the rotary angles, made from theta
            weights[name.replace("bert.encoder.", "model.", 1).replace("bert.", "model.", 1)] = tensor
    if EMBEDDING not in weights:
        raise ModelError(f"{path} holds {', '.join(sorted(found)[:3])}, ...; needed: FlexBERT's names, such as "
                         "bert.embeddings.tok_embeddings.weight. A Hugging Face model is imported from its folder.")
    return weights


def _config_of(weights: dict[str, Tensor], path: Path, global_theta: float, local_theta: float,
               heads: int | None) -> ModernBertConfig:
    way_out = weights.get("model.layers.0.mlp.Wo.weight")
    if way_out is None:
        raise ModelError(f"{path} has no layers (bert.encoder.layers.0.mlp.Wo.weight is missing). Give whole weights.")
    for name, matrix in ((EMBEDDING, weights[EMBEDDING]), ("model.layers.0.mlp.Wo.weight", way_out)):
        if matrix.dim() != 2:
            raise ModelError(f"{path}: {name} is {list(matrix.shape)}; needed: a matrix. Give whole weights, not those of a rank.")
    layers = [n.split(".")[2] for n in weights if n.startswith("model.layers.")]
    strange = next((layer for layer in layers if not layer.isdecimal()), None)
    if strange is not None:
        raise ModelError(f"{path} has a layer {strange!r}; needed: bert.encoder.layers.0, 1, ... Give the weights as "
                         "ModernBERT's code saves them.")
    vocab_size, width = weights[EMBEDDING].shape
    if heads is None and width % HEAD_WIDTH:
        raise ModelError(f"{path}: {width} features are no whole number of heads of {HEAD_WIDTH}, as published ones are, and the "
                         "file does not say its heads. Give --heads.")
    if heads is not None and heads < 1:
        raise ModelError(f"--heads is {heads}; needed: at least 1.")
    tied = DECODER not in weights or weights[DECODER].equal(weights[EMBEDDING])
    try:
        return ModernBertConfig(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=way_out.shape[1],
            num_hidden_layers=1 + max(map(int, layers)),
            num_attention_heads=heads or width // HEAD_WIDTH, tie_word_embeddings=tied,
            norm_bias="model.embeddings.norm.bias" in weights, attention_bias="model.layers.0.attn.Wqkv.bias" in weights,
            mlp_bias="model.layers.0.mlp.Wi.bias" in weights, head_bias="head.dense.bias" in weights,
            decoder_bias="decoder.bias" in weights, global_rope_theta=global_theta, local_rope_theta=local_theta)
    except ConfigError as error:
        raise ModelError(f"{path}: {str(error).replace('set attention_head_width', 'give --heads')}") from error
