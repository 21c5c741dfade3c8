"""From FlexBERT's configuration, as a Composer checkpoint holds it, to the settings of our model.

FlexBERT is the model of ModernBERT's own training code. Each of its keys has one of four fates:

    read         normalization, hidden_act, num_attention_heads, sliding_window, ...
    one value    embed_norm, head_pred_act, ...: another value is refused by name
    no effect    pad_logits, compile_model, ...: speed, loss, initial draws, leftovers of BERT
    unknown      refused by name, for it may mean another model

A key that is missing has the default of FlexBERT's class, and is listed as assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

from encoder.base.errors import ModelError
from encoder.models.modernbert import ModernBertConfig
from encoder.nn.block import NormPlace
from encoder.nn.mlp import Mlp
from encoder.nn.rope import Positions


class Shape(TypedDict):
    """The sizes that tensors say."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


HEAD_WIDTH = 64  # of every published ModernBERT
WAY_OUT = (
    "Import it without its configuration: torch.save its state['model'] alone, and give what the "
    "import then asks for, "
    "where the weights do not depend on this."
)

# what FlexBERT's class takes for a key that is missing
DEFAULTS: dict[str, Any] = {
    "attention_layer": "base",
    "bert_layer": "prenorm",
    "mlp_layer": "mlp",
    "embedding_layer": "absolute_pos",
    "encoder_layer": "base",
    "initial_attention_layer": None,
    "initial_bert_layer": None,
    "initial_mlp_layer": None,
    "num_initial_layers": 1,
    "normalization": "rmsnorm",
    "norm_kwargs": {},
    "hidden_act": "gelu",
    "head_pred_act": "silu",
    "embed_norm": True,
    "final_norm": False,
    "skip_first_prenorm": False,
    "head_pred_norm": True,
    "attn_qkv_bias": False,
    "attn_out_bias": False,
    "mlp_in_bias": False,
    "mlp_out_bias": False,
    "head_pred_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
    "attn_out_dropout_prob": 0.0,
    "embed_dropout_prob": 0.0,
    "mlp_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "sliding_window": -1,
    "global_attn_every_n_layers": -1,
    "rotary_emb_dim": None,
    "local_attn_rotary_emb_dim": None,
    "local_attn_rotary_emb_base": -1,
    "rotary_emb_scale_base": None,
    "rotary_emb_interleaved": False,
    "init_std": 0.02,
    "init_cutoff_factor": 2.0,
}
# our model has nothing else
ONLY = {
    "embed_norm": True,
    "head_pred_norm": True,
    "head_pred_act": "gelu",
    "embed_dropout_prob": 0.0,
    "mlp_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "encoder_layer": "base",
}
ONLY_WITH_ROPE = {"rotary_emb_scale_base": None}
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
READ = {*DEFAULTS, *SHAPE, "num_attention_heads", "rotary_emb_base", "max_position_embeddings"}
# speed, loss, initial draws, classification, leftovers of BERT: no logit depends on them
WITHOUT_EFFECT = {
    "padding",
    "unpad_embeddings",
    "pad_logits",
    "compile_model",
    "masked_prediction",
    "use_fa2",
    "use_sdpa_attn_mask",
    "deterministic_fa2",
    "allow_embedding_resizing",
    "loss_function",
    "loss_kwargs",
    "init_method",
    "init_small_embedding",
    "head_class_act",
    "head_class_bias",
    "head_class_dropout",
    "head_class_norm",
    "head_pred_dropout",
    "pooling_type",
    "alibi_starting_size",
    "gradient_checkpointing",
    "position_embedding_type",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "classifier_dropout",
    "use_cache",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
    "model_type",
    "attn_implementation",
    "name_or_path",
    "auto_map",
    "tokenizer_class",
    "problem_type",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "num_labels",
    "id2label",
    "label2id",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "torchscript",
    "use_bfloat16",
    "finetuning_task",
}
MLPS: dict[tuple[str, str], Mlp] = {
    ("glu", "gelu"): "geglu",
    ("glu", "silu"): "swiglu",
    ("glu", "swish"): "swiglu",
    ("mlp", "gelu"): "gelu",
}
POSITIONS: dict[tuple[str, str], Positions] = {
    ("rope", "sans_pos"): "rope",
    ("base", "absolute_pos"): "learned",
}
PLACES: dict[str, NormPlace] = {
    "prenorm": "pre",
    "compile_prenorm": "pre",
    "postnorm": "post",
}


@dataclass(kw_only=True)
class FlexBertWords:
    """A FlexBERT configuration as it is read, key by key."""

    values: dict[str, Any]
    where: str  # opens every error
    # what it does not say, and what was taken for it
    assumed: dict[str, Any] = field(default_factory=dict)

    def get(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """The value of a key, or its default, then listed as assumed. Raises ModelError."""
        if key not in self.values:
            self.assumed[key] = DEFAULTS[key]
            return DEFAULTS[key]
        value = self.values[key]
        # true and false are ints to Python, and no number here
        is_flag = isinstance(value, bool)
        fits = isinstance(value, kind) and (not is_flag or kind in (bool, object))
        if not fits or isinstance(value, float) and not math.isfinite(value):
            raise self.refusal(key, value, needed=_kind_word(kind))
        return value

    def refusal(self, key: str, value: Any, *, needed: str) -> ModelError:
        """A setting that our model cannot be."""
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        unsaid = "" if key in self.values else " (it is not said: FlexBERT's default)"
        return ModelError(
            f"{self.where}: its configuration has {key} {shown}{unsaid}; needed: {needed}, our "
            "model has nothing "
            f"else. {WAY_OUT}"
        )


def config_from_flexbert(
    words: FlexBertWords,
    *,
    shape: Shape,
    global_rope_theta: float | None,
    local_rope_theta: float | None,
    heads: int | None,
) -> ModernBertConfig:
    """The settings of our model.

    words: the configuration; what it lacks is noted there.
    shape: vocab_size, hidden_size, intermediate_size and num_hidden_layers of the tensors.
    global_rope_theta, local_rope_theta: as a person told them; the first is needed where the
        configuration is silent.
    heads: the same.

    Raises ModelError for a setting that our model cannot be, or that contradicts the tensors
    or what was told; ConfigError.
    """
    _refuse_unknown(words)
    # the tensors tell the sizes; a configuration of other sizes belongs to another file
    for key, found in shape.items():
        said = words.values.get(key, found)
        if said != found:
            raise ModelError(
                f"{words.where}: its configuration says {key} {said!r}, its tensors {found}. "
                "Give the checkpoint "
                "that the configuration belongs to."
            )

    attention, layer, mlp = (_layer_word(words, kind) for kind in ("attention", "bert", "mlp"))
    for key, only in ONLY.items():
        if _without_padding(words.get(key)) != only:
            raise words.refusal(key, words.get(key), needed=repr(only))

    # pre-norm: a final norm, and no first one, since the embedding has its own; post-norm: no final
    if layer not in PLACES:
        raise words.refusal("bert_layer", layer, needed="prenorm or postnorm")
    pre = PLACES[layer] == "pre"
    if words.get("final_norm", bool) != pre:
        raise words.refusal("final_norm", not pre, needed=f"{pre} with bert_layer {layer}")
    if pre and not words.get("skip_first_prenorm", bool):
        raise words.refusal("skip_first_prenorm", False, needed="True")

    activation = words.get("hidden_act", str)
    if (mlp, activation) not in MLPS:
        # the error names the word that is wrong by itself, or else the pair's second
        wrong: tuple[str, Any] = ("hidden_act", activation)
        if mlp not in ("glu", "mlp"):
            wrong = ("mlp_layer", mlp)
        raise words.refusal(
            *wrong, needed="mlp_layer glu with hidden_act gelu or silu, or mlp with gelu"
        )

    embedding = words.get("embedding_layer", str)
    positions = POSITIONS.get((attention, embedding))
    if positions is None:
        wrong = ("embedding_layer", embedding)
        if attention not in ("rope", "base"):
            wrong = ("attention_layer", attention)
        raise words.refusal(
            *wrong,
            needed="attention_layer rope with embedding_layer sans_pos, or base with absolute_pos",
        )

    every_n, radius = _windows(words)
    head_count = _heads(words, width=shape["hidden_size"], told=heads)
    thetas = _thetas(words, positions, every_n, told=(global_rope_theta, local_rope_theta))
    if positions == "rope":
        _check_rotary(words, head_width=shape["hidden_size"] // head_count)
    return ModernBertConfig(
        **shape,
        num_attention_heads=head_count,
        mlp=MLPS[mlp, activation],
        norm_place=PLACES[layer],
        positions=positions,
        **_norm(words),
        **thetas,
        attention_bias=_both(words, "attn_qkv_bias", "attn_out_bias"),
        mlp_bias=_both(words, "mlp_in_bias", "mlp_out_bias"),
        head_bias=words.get("head_pred_bias", bool),
        decoder_bias=words.get("decoder_bias", bool),
        tie_word_embeddings=words.get("tie_word_embeddings", bool),
        max_position_embeddings=_max_positions(words, positions),
        global_attn_every_n_layers=every_n,
        window_radius_tokens=radius,
        attention_output_dropout=float(words.get("attn_out_dropout_prob", (int, float))),
        initializer_range=float(words.get("init_std", (int, float))),
        # FlexBERT's None is 3
        initializer_cutoff_factor=float(
            words.get("init_cutoff_factor", (int, float, type(None))) or 3.0
        ),
    )


def _refuse_unknown(words: FlexBertWords) -> None:
    for key, value in words.values.items():
        if not isinstance(value, (str, int, float, list, tuple, dict, type(None))):
            raise ModelError(
                f"{words.where}: its configuration holds a {type(value).__name__} under {key!r}; "
                "needed: words and numbers, as Composer writes them."
            )
    # values that switch something off: a key that we do not know is harmless with one
    nothing: tuple[Any, ...] = (None, False, "", {}, [], -1, 0)
    known = READ | WITHOUT_EFFECT
    unknown = [
        key
        for key, value in words.values.items()
        if key not in known and not key.startswith("_") and value not in nothing
    ]
    if unknown:
        raise ModelError(
            f"{words.where}: its configuration has {unknown[0]} "
            f"{str(words.values[unknown[0]])[:80]!r}, which is no "
            f"setting of FlexBERT that we know; it may be another model. {WAY_OUT}"
        )


def _layer_word(words: FlexBertWords, kind: str) -> str:
    """rope, prenorm, glu, ...: without the padding in front, the same for all layers."""
    key = f"{kind}_layer"
    word = _without_padding(words.get(key, str))
    # the first layers may be of another kind in FlexBERT, in our model not
    first, how_many = (
        words.get(f"initial_{key}", (str, type(None))),
        words.get("num_initial_layers", int),
    )
    if first is not None and how_many > 0 and _without_padding(first) != word:
        raise words.refusal(f"initial_{key}", first, needed=f"{word}, as in the other layers")
    return word


def _without_padding(word: Any) -> Any:
    if isinstance(word, str):
        return word.removeprefix("unpadded_").removeprefix("padded_")
    return word


def _norm(words: FlexBertWords) -> dict[str, Any]:
    kind, details = words.get("normalization", str), words.get("norm_kwargs", dict)
    norm = kind.removeprefix("triton_")
    if norm not in ("layernorm", "rmsnorm"):
        raise words.refusal("normalization", kind, needed="layernorm or rmsnorm")
    if details.get("elementwise_affine", True) is not True:
        raise words.refusal("norm_kwargs", details, needed="elementwise_affine true")
    eps, bias = details.get("eps", 1e-5), details.get("bias", True)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not isinstance(bias, bool):
        raise words.refusal("norm_kwargs", details, needed="eps, a number, and bias, true or false")
    needed = {"eps": eps}
    if norm == "layernorm":
        needed["bias"] = bias
    for name, value in needed.items():
        # where norm_kwargs itself is missing, it is on the list already
        if name not in details and "norm_kwargs" in words.values:
            words.assumed[f"norm_kwargs.{name}"] = value
    return {"norm": norm, "norm_eps": float(eps), "norm_bias": bias and norm == "layernorm"}


def _both(words: FlexBertWords, one: str, other: str) -> bool:
    """Of two biases that our model has both or neither."""
    values = [words.get(key, bool) for key in (one, other)]
    if values[0] != values[1]:
        raise words.refusal(one, values[0], needed=f"{values[1]}, as {other}")
    return values[0]


def _windows(words: FlexBertWords) -> tuple[int, int]:
    """Every how many layers one is global, and the radius of the others' window."""
    window, every_n = words.get("sliding_window", int), words.get("global_attn_every_n_layers", int)
    # -1: every layer is global
    if window == -1:
        if every_n != -1:
            raise words.refusal(
                "global_attn_every_n_layers", every_n, needed="-1 where sliding_window is -1"
            )
        return 1, ModernBertConfig.window_radius_tokens
    if window < 2:
        raise words.refusal("sliding_window", window, needed="-1, or at least 2")
    if every_n < 1:
        raise words.refusal(
            "global_attn_every_n_layers",
            every_n,
            needed="at least 1 where there is a sliding_window",
        )
    # sliding_window counts both sides
    return every_n, window // 2


def _heads(words: FlexBertWords, *, width: int, told: int | None) -> int:
    said = words.values.get("num_attention_heads")
    if said is None and told is None:
        if width % HEAD_WIDTH:
            raise ModelError(
                f"{words.where} does not say its heads (num_attention_heads), and {width} features "
                "are no whole number "
                f"of heads of {HEAD_WIDTH}, as published ones are. Give --heads."
            )
        words.assumed["num_attention_heads"] = width // HEAD_WIDTH
        return width // HEAD_WIDTH
    if said is None:
        assert told is not None
        return told
    if isinstance(said, bool) or not isinstance(said, int) or said < 1 or width % said:
        raise words.refusal(
            "num_attention_heads", said, needed=f"a whole number that divides hidden_size {width}"
        )
    if told not in (None, said):
        raise ModelError(
            f"--heads is {told}, but the configuration in {words.where} says num_attention_heads "
            f"{said}. Leave "
            "--heads out."
        )
    return said


def _thetas(
    words: FlexBertWords, positions: str, every_n: int, *, told: tuple[float | None, float | None]
) -> dict[str, Any]:
    if positions == "learned":
        if told != (None, None):
            raise ModelError(
                f"a RoPE theta has no effect on the learned positions of {words.where}. Leave it "
                "out."
            )
        return {}

    said = words.values.get("rotary_emb_base")
    whole = _theta(words, "rotary_emb_base", said, told[0], option="--global-rope-theta")
    if whole is None:
        raise ModelError(
            f"{words.where} does not say its RoPE theta (rotary_emb_base), and a wrong one gives a "
            "wrong model without "
            "a word. Needed: --global-rope-theta 10000 for a checkpoint of the first phase, 160000 "
            "after context "
            "extension."
        )
    if every_n == 1:  # no layer is local
        if told[1] not in (None, whole):
            raise ModelError(
                f"--local-rope-theta has no effect: {words.where} has no local layers. Leave it "
                "out."
            )
        return {"global_rope_theta": whole, "local_rope_theta": whole}
    key = "local_attn_rotary_emb_base"
    local = words.values.get(key)
    local = whole if local == -1 else local  # -1: as in the global layers
    found = _theta(words, key, local, told[1], option="--local-rope-theta")
    if found is None:
        found = words.assumed[key] = whole
    return {"global_rope_theta": whole, "local_rope_theta": found}


def _theta(
    words: FlexBertWords, key: str, said: Any, told: float | None, *, option: str
) -> float | None:
    if said is None:
        return told
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not 0 < said < math.inf:
        raise words.refusal(key, said, needed="above 0, and finite")
    if told not in (None, said):
        raise ModelError(
            f"{option} is {told:g}, but the configuration in {words.where} says {said:g} ({key}). "
            f"Leave {option} out."
        )
    return float(said)


def turns_neighbours(words: FlexBertWords, config: ModernBertConfig) -> bool:
    """Whether its rotary positions turn features 2j and 2j + 1, where ours turn j and j + D/2."""
    return config.positions == "rope" and words.get("rotary_emb_interleaved", bool)


def _check_rotary(words: FlexBertWords, *, head_width: int) -> None:
    for key, only in ONLY_WITH_ROPE.items():
        if words.get(key) != only:
            raise words.refusal(key, words.get(key), needed=repr(only))
    for key in ("rotary_emb_dim", "local_attn_rotary_emb_dim"):
        if words.get(key) not in (None, head_width):
            raise words.refusal(key, words.get(key), needed=f"the whole head, {head_width}")


def _max_positions(words: FlexBertWords, positions: str) -> int:
    """Rows of the learned table; with RoPE no FlexBERT reads it, and BERT's 512 is left there."""
    said = words.values.get("max_position_embeddings")
    if positions == "learned" and said is not None:
        if isinstance(said, bool) or not isinstance(said, int) or said < 1:
            raise words.refusal("max_position_embeddings", said, needed="at least 1")
        return said
    # with rope no number of the file means the longest text
    longest = ModernBertConfig.max_position_embeddings
    words.assumed["max_position_embeddings"] = longest
    return longest


def _kind_word(kind: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        dict: "a mapping",
        type(None): "nothing",
    }
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys(words[k] for k in kinds if not (k is int and float in kinds)))
