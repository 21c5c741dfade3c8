"""Our settings and config.json's: one table of correspondence, read in both directions.

What stands in no table below is worked out: window_radius_tokens is half of local_attention (transformers sees
|i - j| <= local_attention // 2), and the two thetas and the layers' kinds are written and read in the words of transformers 4
(global_rope_theta, local_rope_theta, global_attn_every_n_layers) and of transformers 5 (rope_parameters, layer_types).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from encoder.base.errors import ConfigError, ModelError
from encoder.base.schema import from_mapping
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.hf.bridge import Bridge, blocker_text, refuse_strange, without_words
from encoder.models.modernbert import ModernBertConfig

FAMILY = "ModernBERT"  # for people
# ours -> theirs
HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "norm_bias": "norm_bias",
    "norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "head_bias": "classifier_bias",
    "decoder_bias": "decoder_bias",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "initializer_cutoff_factor": "initializer_cutoff_factor",
}
# our mlp -> hidden_activation; transformers' layer is always gated
ACTIVATIONS = {
    "geglu": "gelu",
    "swiglu": "silu",
}
# what theirs always is
OURS_ONLY = {
    "norm": "layernorm",
    "norm_place": "pre",
    "positions": "rope",
    "type_vocab_size": 0,
    "embedding_projection": False,
}
# what ours always is
THEIRS_ONLY = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "classifier_activation": "gelu",
    "rope_scaling": None,
    "quantization_config": None,
}
# words of other models, and of attributes that transformers would set over its own: what each may say, if it is there
FOREIGN = {
    "is_causal": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
}
# in training only; an import takes ModernBERT's own 0.1
NOT_IN_HF_CONFIG = "attention_output_dropout"
THETA = {
    "global_rope_theta": ("full_attention", 160_000.0),
    "local_rope_theta": ("sliding_attention", 10_000.0),
}


def _blocker(config: ModernBertConfig) -> str | None:
    """Why a model of this shape cannot become a Hugging Face folder, or None if it can."""
    return blocker_text(_strange(config), family=FAMILY)


def _strange(config: ModernBertConfig) -> list[str]:
    return without_words(config, only=OURS_ONLY, activations=ACTIVATIONS)


def _edges(config: ModernBertConfig) -> tuple[int, ...]:
    """Lengths around a whole window of 2 r + 1 tokens: there the middle token sees all others in a local layer. One token
    more, and none does."""
    window = 2 * config.window_radius_tokens + 1
    return window - 2, window - 1, window, window + 1


def hf_config(config: ModernBertConfig, specials: SpecialIds) -> dict[str, Any]:
    """config.json. Raises ExportError for a setting that Hugging Face's ModernBERT has no word for."""
    refuse_strange(_strange(config), family=FAMILY)
    return {
        **_class_words(config),
        "model_type": "modernbert",
        "dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in HF_KEYS.items()},
        "hidden_activation": ACTIVATIONS[config.mlp],
        "local_attention": 2 * config.window_radius_tokens,
        **_both_forms(config),
        **{name: only for name, only in THEIRS_ONLY.items() if only is not None},
        "classifier_pooling": "mean",
        "classifier_dropout": 0.0,
        # transformers 4 would compile on a GPU, and fails at it now and then
        "reference_compile": (False),
        "pad_token_id": specials.pad_id,
        "cls_token_id": specials.cls_id,
        "sep_token_id": specials.sep_id,
        "bos_token_id": specials.cls_id,
        "eos_token_id": specials.sep_id,
    }


def _class_words(config: ModernBertConfig) -> dict[str, Any]:
    """The class with the model's head: a discriminator is one that tells tokens apart by one logit."""
    if config.predicts_tokens:
        return {"architectures": ["ModernBertForMaskedLM"]}
    return {
        "architectures": ["ModernBertForTokenClassification"],
        "id2label": {"0": "replaced"},
        "label2id": {"replaced": 0},
    }


def _auto_class(values: dict[str, Any]) -> str:
    if values.get("architectures") == ["ModernBertForTokenClassification"]:
        return "AutoModelForTokenClassification"
    return "AutoModelForMaskedLM"


def _logits(model: Any, x_MC: Tensor) -> Tensor:
    """[M, V], or [M, 1] of a discriminator."""
    decoder = getattr(model, "classifier", None) or model.decoder
    return decoder(model.head(x_MC))


def config_from_hf(
    values: dict[str, Any], *, where: str, names: Sequence[str] = ()
) -> ModernBertConfig:
    """The inverse: config.json of ModernBertForMaskedLM, written by any transformers; what is not said has its default.

    `where` opens the errors. Raises ModelError for another architecture and for what our model cannot be.
    """
    kind, architectures = (
        values.get("model_type"),
        values.get("architectures") or ["ModernBertForMaskedLM"],
    )
    # architectures may be missing; named, it is this one alone
    if kind != "modernbert" or architectures != ["ModernBertForMaskedLM"]:
        of = kind
        if values.get("architectures"):
            of = architectures
        if isinstance(of, list):
            of = ", ".join(map(str, of))
        raise ModelError(
            f"{where} is of a {of}; needed: ModernBertForMaskedLM alone (model_type modernbert,"
            ' architectures ["ModernBertForMaskedLM"]). Give such a folder.'
        )
    for name, only in {**THEIRS_ONLY, **FOREIGN}.items():
        found = values.get(name, only)
        # null says nothing for a word of other models
        if found != only and not (found is None and name in FOREIGN):
            raise ModelError(
                f"{where}: {name} is {found!r}; needed: {only!r}, our model has nothing else. Where"
                " the weights do not depend on it, change config.json."
            )
    activation = values.get("hidden_activation", "gelu")
    mlp = next((ours for ours, theirs in ACTIVATIONS.items() if theirs == activation), None)
    if mlp is None:
        raise ModelError(
            f"{where}: hidden_activation is {activation!r}; needed:"
            f" {' or '.join(ACTIVATIONS.values())}. Give a model with one of these."
        )
    # null is not the default: leaving a word out means that
    empty = next(
        (theirs for theirs in HF_KEYS.values() if theirs in values and values[theirs] is None), None
    )
    if empty:
        raise ModelError(
            f"{where}: {empty} is null; needed: a value. Put the one that the model was trained"
            f" with, or leave {empty} out for the default of transformers."
        )
    found = {ours: values[theirs] for ours, theirs in HF_KEYS.items() if theirs in values}
    _check_heads(found, values, where)
    try:
        config = from_mapping(
            ModernBertConfig,
            {
                **found,
                "mlp": mlp,
                "window_radius_tokens": _window_radius(values, where),
                **_thetas(values, where),
            },
        )
        # needs the number of layers, which the settings class has checked first
        every_n = _global_every_n(values, config.num_hidden_layers, where)
        return dataclasses.replace(config, global_attn_every_n_layers=every_n)
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def completed(values: dict[str, Any], config: ModernBertConfig) -> dict[str, Any]:
    """config.json with the words that it lacks of transformers 4 or of 5, as `config` has them: either reads it then."""
    return {
        **values,
        **{word: said for word, said in _both_forms(config).items() if values.get(word) is None},
    }


def smaller(
    values: dict[str, Any], config: ModernBertConfig
) -> tuple[dict[str, Any], ModernBertConfig]:
    """The same kind of model with few features, layers and tokens: every other word as it was, in both languages.

    Kept are the head width, the first global layers with the local ones between them, window, thetas, biases and the gate.
    """
    heads = min(config.num_attention_heads, 2)
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_size": heads * config.head_width,
        "vocab_size": min(config.vocab_size, 256),
        "intermediate_size": min(config.intermediate_size, 96),
        # up to the second global layer and the local one behind it
        "num_hidden_layers": min(config.num_hidden_layers, config.global_attn_every_n_layers + 2),
    }
    # special ids beyond the small vocabulary become its last one
    last = sizes["vocab_size"] - 1
    ids = {
        word: min(i, last)
        for word, i in values.items()
        if word.endswith("_token_id") and isinstance(i, int)
    }
    if isinstance(values.get("layer_types"), list):
        ids["layer_types"] = values["layer_types"][: sizes["num_hidden_layers"]]
    # tables that are named beside the stream are as wide
    ours = dict(sizes)
    if hasattr(config, "embedding_size"):
        ours["embedding_size"] = sizes["hidden_size"]
    return {
        **values,
        **ids,
        **{HF_KEYS[name]: size for name, size in sizes.items()},
    }, dataclasses.replace(config, **ours)


def _both_forms(config: ModernBertConfig) -> dict[str, Any]:
    return {
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        "layer_types": [
            _layer_type(i, config.global_attn_every_n_layers)
            for i in range(config.num_hidden_layers)
        ],
        **{name: getattr(config, name) for name in THETA},
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": getattr(config, name)}
            for name, (kind, _) in THETA.items()
        },
    }


def _check_heads(found: dict[str, Any], values: dict[str, Any], where: str) -> None:
    """A head is hidden_size / heads wide, whole and even; what is no number is left to the settings class."""
    width, heads = (
        found.get(name, getattr(ModernBertConfig, name))
        for name in ("hidden_size", "num_attention_heads")
    )
    if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
        return
    if width % (2 * heads):
        raise ModelError(
            f"{where}: hidden_size {width} over {heads} heads gives a head width of"
            f" {width / heads:g}; needed: an even whole number. Put the hidden_size and"
            " num_attention_heads that the model was trained with."
        )
    if values.get("head_dim") not in (None, width // heads):
        raise ModelError(
            f"{where}: head_dim is {values['head_dim']!r}; needed: hidden_size /"
            f" num_attention_heads, {width // heads}, or no head_dim. Give a model whose heads are"
            " so wide."
        )


def _layer_type(layer: int, every_n: int) -> str:
    return "sliding_attention" if layer % every_n else "full_attention"


def _window_radius(values: dict[str, Any], where: str) -> int:
    window = values.get("local_attention", 128)
    if not isinstance(window, int) or isinstance(window, bool) or window < 2 or window % 2:
        raise ModelError(
            f"{where}: local_attention is {window!r}; needed: an even number of at least 2, half of"
            " it to each side. Put the number that the model was trained with (ModernBERT: 128)."
        )
    if values.get("sliding_window", window // 2) != window // 2:
        raise ModelError(
            f"{where}: sliding_window is {values['sliding_window']!r}, which transformers 5 takes"
            f" for half of local_attention {window}. Keep the one that the model was trained with."
        )
    return window // 2


def _thetas(values: dict[str, Any], where: str) -> dict[str, float]:
    """Both thetas, from the words of transformers 4, of 5, or of both where they agree."""
    thetas: dict[str, float] = {}
    # transformers 5: {full_attention: {rope_type, rope_theta}, sliding_attention: ...}
    ropes = values.get("rope_parameters")
    if ropes is None:
        ropes = {}
    kinds = [kind for kind, _ in THETA.values()]
    if (
        not isinstance(ropes, dict)
        or ropes.keys() - set(kinds)
        or not all(isinstance(r, dict | None) for r in ropes.values())
    ):
        raise ModelError(
            f"{where}: rope_parameters is {ropes!r}; needed: a mapping of {' and '.join(kinds)},"
            " each to its rope_type and rope_theta. Write it so, with the thetas that the model"
            " was trained with."
        )
    # the global one first: the local one may be taken from it
    for name, (kind, default) in THETA.items():
        rope = ropes.get(kind) or {}
        beyond = [
            f"{k} {v!r}"
            for k, v in rope.items()
            if (k, v) != ("rope_type", "default") and k != "rope_theta"
        ]
        if beyond:
            raise ModelError(
                f"{where}: rope_parameters of {kind} hold {', '.join(beyond)}; needed: rope_type"
                " default and a rope_theta, our model has nothing else."
            )
        old, new = values.get(name), rope.get("rope_theta")
        # transformers 4: an empty local theta is the global one
        if name in values and old is None:
            old = thetas.get("global_rope_theta")
        if old is not None and new is not None and old != new:
            raise ModelError(
                f"{where}: {name} is {old}, but rope_parameters say {new} for {kind}. "
                "Keep the one that the model was trained with."
            )

        theta = new if new is not None else old if old is not None else default
        if (
            not isinstance(theta, (int, float))
            or isinstance(theta, bool)
            or not 0 < theta < math.inf
        ):
            raise ModelError(
                f"{where}: {name} is {theta!r}; needed: above 0, and finite. A conversion of"
                f" ModernBERT's first phase leaves -1, which means the global theta: set {name} to"
                " 10000."
            )
        thetas[name] = float(theta)
    if values.get("rope_theta", thetas["global_rope_theta"]) != thetas["global_rope_theta"]:
        raise ModelError(
            f"{where}: rope_theta is {values['rope_theta']!r}, but global_rope_theta is"
            f" {thetas['global_rope_theta']:g}. Keep global_rope_theta alone, with what the model"
            " was trained with."
        )
    return thetas


def _global_every_n(values: dict[str, Any], layers: int, where: str) -> int:
    """From global_attn_every_n_layers or layer_types; from both where they agree."""
    every_n, kinds = values.get("global_attn_every_n_layers"), values.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ModelError(
            f"{where}: layer_types is {kinds!r}; needed: a list with the kind of each layer."
        )
    # the first global layer after layer 0; none: layer 0 alone is global
    if every_n is None and kinds is not None:
        every_n = next(
            (i for i, kind in enumerate(kinds) if i and kind == "full_attention"), layers
        )
    elif "global_attn_every_n_layers" not in values:
        # transformers' default
        every_n = 3
    if not isinstance(every_n, int) or isinstance(every_n, bool) or every_n < 1:
        raise ModelError(
            f"{where}: global_attn_every_n_layers is {every_n!r}; needed: a whole number of at"
            " least 1 (ModernBERT: 3)."
        )
    if kinds is not None and kinds != [_layer_type(i, every_n) for i in range(layers)]:
        raise ModelError(
            f"{where}: layer_types is not full_attention at layers 0, {every_n}, {2 * every_n}, ..."
            f" of {layers} and sliding_attention between them; needed: this pattern, our model has"
            " no other."
        )
    return every_n


MODERNBERT = Bridge(
    model_type="modernbert",
    title="ModernBERT",
    config_class="ModernBertConfig",
    without_word=NOT_IN_HF_CONFIG,
    blocker=_blocker,
    to_settings=hf_config,
    from_settings=config_from_hf,
    completed=completed,
    smaller=smaller,
    edges=_edges,
    hidden_states=lambda model, ids_BL, real_BL: (
        model.model(input_ids=ids_BL, attention_mask=real_BL).last_hidden_state
    ),
    logits=_logits,
    auto_class=_auto_class,
)
