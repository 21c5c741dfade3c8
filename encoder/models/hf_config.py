"""Our settings and config.json's: one table of correspondence, read in both directions.

What stands in no table below is worked out: window_radius_tokens is half of local_attention (transformers sees
|i - j| <= local_attention // 2), and the two thetas and the layers' kinds are written and read in the words of transformers 4
(global_rope_theta, local_rope_theta, global_attn_every_n_layers) and of transformers 5 (rope_parameters, layer_types).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from encoder.base.errors import ConfigError, ExportError, ModelError
from encoder.base.schema import from_mapping
from encoder.models.modernbert import ModernBertConfig

# ours -> theirs
WORDS = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
         "num_hidden_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
         "norm_bias": "norm_bias", "norm_eps": "norm_eps", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias",
         "head_bias": "classifier_bias", "decoder_bias": "decoder_bias", "tie_word_embeddings": "tie_word_embeddings",
         "max_position_embeddings": "max_position_embeddings", "initializer_range": "initializer_range",
         "initializer_cutoff_factor": "initializer_cutoff_factor"}
ACTIVATIONS = {"geglu": "gelu", "swiglu": "silu"}          # our mlp -> hidden_activation; transformers' layer is always gated
OURS_ONLY = {"norm": "layernorm", "norm_place": "pre", "positions": "rope", "type_vocab_size": 0}   # what theirs always is
THEIRS_ONLY = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0, "classifier_activation": "gelu",
               "rope_scaling": None, "quantization_config": None}                                   # what ours always is
NO_WORD = "attention_output_dropout"                       # in training only; an import takes ModernBERT's own 0.1
THETA = {"global_rope_theta": ("full_attention", 160_000.0), "local_rope_theta": ("sliding_attention", 10_000.0)}


class SpecialIds(Protocol):
    """The tokens that structure a document."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    unk_id: int


def hf_config(config: ModernBertConfig, specials: SpecialIds) -> dict[str, Any]:
    """config.json. Raises ExportError for a setting that Hugging Face's ModernBERT has no word for."""
    strange = [f"{name} {getattr(config, name)} (needed: {only})" for name, only in OURS_ONLY.items()
               if getattr(config, name) != only]
    if config.mlp not in ACTIVATIONS:
        strange.append(f"mlp {config.mlp} (needed: {' or '.join(ACTIVATIONS)})")
    if config.head_width * config.num_attention_heads != config.hidden_size:
        strange.append(f"attention_head_width {config.attention_head_width} (needed: hidden_size / num_attention_heads, "
                       f"{config.hidden_size / config.num_attention_heads:g})")
    if strange:
        raise ExportError(f"Hugging Face's ModernBERT has no word for {', '.join(strange)}. "
                          "Train with the needed setting, or keep the model as a weights folder.")
    return {
        "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in WORDS.items()},
        "hidden_activation": ACTIVATIONS[config.mlp],
        "local_attention": 2 * config.window_radius_tokens,
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        "layer_types": [_layer_type(i, config.global_attn_every_n_layers) for i in range(config.num_hidden_layers)],
        **{name: getattr(config, name) for name in THETA},
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": getattr(config, name)}
                            for name, (kind, _) in THETA.items()},
        **{name: only for name, only in THEIRS_ONLY.items() if only is not None},
        "classifier_pooling": "mean", "classifier_dropout": 0.0,
        "reference_compile": False,                 # transformers 4 would compile on a GPU, and fails at it now and then
        "pad_token_id": specials.pad_id, "cls_token_id": specials.cls_id, "sep_token_id": specials.sep_id,
        "bos_token_id": specials.cls_id, "eos_token_id": specials.sep_id,
    }


def config_from_hf(values: dict[str, Any], *, where: str) -> ModernBertConfig:
    """The inverse: config.json of ModernBertForMaskedLM, written by any transformers; what is not said has its default.

    `where` opens the errors. Raises ModelError for another architecture and for what our model cannot be.
    """
    kind, (architecture,) = values.get("model_type"), values.get("architectures") or ["ModernBertForMaskedLM"]
    if kind != "modernbert" or architecture != "ModernBertForMaskedLM":
        raise ModelError(f"{where} is of a {architecture if values.get('architectures') else kind}; needed: "
                         "ModernBertForMaskedLM (model_type modernbert). Give such a folder.")
    for name, only in THEIRS_ONLY.items():
        if values.get(name, only) != only:
            raise ModelError(f"{where}: {name} is {values[name]!r}; needed: {only!r}, our model has nothing else. Where the "
                             "weights do not depend on it, change config.json.")
    activation = values.get("hidden_activation", "gelu")
    mlp = {theirs: ours for ours, theirs in ACTIVATIONS.items()}.get(activation)
    if mlp is None:
        raise ModelError(f"{where}: hidden_activation is {activation!r}; needed: {' or '.join(ACTIVATIONS.values())}. "
                         "Give a model with one of these.")
    found = {ours: values[theirs] for ours, theirs in WORDS.items() if values.get(theirs) is not None}
    try:
        config = from_mapping(ModernBertConfig, {
            **found, "mlp": mlp, "window_radius_tokens": _window_radius(values, where), **_thetas(values, where)})
        every_n = _global_every_n(values, config.num_hidden_layers, where)
        return dataclasses.replace(config, global_attn_every_n_layers=every_n)
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def _layer_type(layer: int, every_n: int) -> str:
    return "sliding_attention" if layer % every_n else "full_attention"


def _window_radius(values: dict[str, Any], where: str) -> int:
    window = values.get("local_attention", 128)
    if not isinstance(window, int) or window < 2 or window % 2:
        raise ModelError(f"{where}: local_attention is {window!r}; needed: an even number of at least 2, half of it to each "
                         "side. Put the number that the model was trained with (ModernBERT: 128).")
    return window // 2


def _thetas(values: dict[str, Any], where: str) -> dict[str, float]:
    """Both thetas, from the words of transformers 4, of 5, or of both where they agree."""
    thetas: dict[str, float] = {}
    for name, (kind, default) in THETA.items():
        rope = (values.get("rope_parameters") or {}).get(kind) or {}
        beyond = [f"{k} {v!r}" for k, v in rope.items() if (k, v) != ("rope_type", "default") and k != "rope_theta"]
        if beyond:
            raise ModelError(f"{where}: rope_parameters of {kind} hold {', '.join(beyond)}; needed: rope_type default and "
                             "a rope_theta, our model has nothing else.")
        old, new = values.get(name), rope.get("rope_theta")
        if name in values and old is None:
            old = thetas.get("global_rope_theta")          # transformers 4: an empty local theta is the global one
        if old is not None and new is not None and old != new:
            raise ModelError(f"{where}: {name} is {old}, but rope_parameters say {new} for {kind}. "
                             "Keep the one that the model was trained with.")
        theta = new if new is not None else old if old is not None else default
        if not isinstance(theta, (int, float)) or not theta > 0:
            raise ModelError(f"{where}: {name} is {theta!r}; needed: above 0. A conversion of ModernBERT's first phase leaves "
                             f"-1, which means the global theta: set {name} to 10000.")
        thetas[name] = float(theta)
    return thetas


def _global_every_n(values: dict[str, Any], layers: int, where: str) -> int:
    """From global_attn_every_n_layers or layer_types; from both where they agree."""
    every_n, kinds = values.get("global_attn_every_n_layers"), values.get("layer_types")
    if every_n is None and kinds is not None:
        every_n = next((i for i, kind in enumerate(kinds) if i and kind == "full_attention"), layers)
    every_n = 3 if every_n is None else every_n
    if not isinstance(every_n, int) or every_n < 1:
        raise ModelError(f"{where}: global_attn_every_n_layers is {every_n!r}; needed: a whole number of at least 1 "
                         "(ModernBERT: 3).")
    if kinds is not None and kinds != [_layer_type(i, every_n) for i in range(layers)]:
        raise ModelError(f"{where}: layer_types is not full_attention at layers 0, {every_n}, {2 * every_n}, ... of {layers} and "
                         "sliding_attention between them; needed: this pattern, our model has no other.")
    return every_n
