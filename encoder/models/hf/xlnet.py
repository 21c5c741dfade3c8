"""XLNet of transformers (XLNetLMHeadModel): settings and weights of ours to theirs and back.

Ours keeps matrices of two axes, transformers those of attention as [C, H, D]; values are only laid anew. Beside hidden states
the proof asks both streams under a permutation, with a memory and with segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.base.batch import Targets, packed_documents
from encoder.base.errors import ConfigError, ModelError
from encoder.base.rng import generator
from encoder.base.schema import from_mapping
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.hf.bridge import (
    Bridge,
    Settings,
    Shapes,
    Weights,
    architecture_of,
    check_only,
    check_shapes,
    without_data,
)
from encoder.models.hf.use import FILLS_MASKS, Named, Use
from encoder.models.xlnet import DROPOUTS, XlnetConfig
from encoder.nn.two_streams import ReadingOrder

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
THEIR_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "mlp_output_dropout": "dropout",
}
# of its config class, where they are not ours
DEFAULTS = {"d_model": 1024, "n_layer": 24, "n_head": 16, "d_inner": 4096}
# what ours always is, where config.json says it
ONLY: dict[str, Any] = {
    "untie_r": True,
    "attn_type": "bi",
    "bi_data": False,
    "same_length": False,
    "clamp_len": -1,
    "tie_word_embeddings": True,
    "quantization_config": None,
    "pruned_heads": {},
}
ARCHITECTURES = ("XLNetLMHeadModel", "XLNetModel")
OF_A_TASK = "XLNetForMaskedLM"  # what a class for a task stands for (other_heads.py)
BODY = "transformer"
TOKENS = "model.embeddings.tok_embeddings.weight"
QUERY = "first_query.weight"
MASK_EMB = f"{BODY}.mask_emb"
# without .weight and .bias where theirs is a module of its own
WHOLE = {
    TOKENS: f"{BODY}.word_embedding.weight",
    QUERY: MASK_EMB,
    "decoder.bias": "lm_loss.bias",
}
PARTS = {
    "attn.Wq.weight": ("rel_attn.q",),
    "attn.Wkv.weight": ("rel_attn.k", "rel_attn.v"),
    "attn.Wr.weight": ("rel_attn.r",),
    "attn.Wo.weight": ("rel_attn.o",),
    "attn.r_w.weight": ("rel_attn.r_w_bias",),
    "attn.r_r.weight": ("rel_attn.r_r_bias",),
    "attn.r_s.weight": ("rel_attn.r_s_bias",),
    "attn.segments.weight": ("rel_attn.seg_embed",),
    **{
        f"{ours}.{kind}": (f"{theirs}.{kind}",)
        for ours, theirs in (
            ("attn_norm", "rel_attn.layer_norm"),
            ("mlp.Wi", "ff.layer_1"),
            ("mlp.Wo", "ff.layer_2"),
            ("mlp_norm", "ff.layer_norm"),
        )
        for kind in ("weight", "bias")
    },
}
TRANSPOSED = ("q", "k", "v", "r")  # [C, H, D] there, [H D, C] here


def to_settings(config: XlnetConfig, specials: SpecialIds) -> Settings:
    """config.json."""
    said = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "xlnet",
        "dtype": "float32",
        **said,
        "d_head": config.hidden_size // config.num_attention_heads,
        "ff_activation": ACTIVATIONS[config.mlp],
        **{name: value for name, value in ONLY.items() if name not in _SELDOM},
        # a text is read whole, as the released models say
        "mem_len": None,
        "reuse_len": None,
        "pad_token_id": specials.pad_id,
        "bos_token_id": specials.cls_id,
        "eos_token_id": specials.sep_id,
    }


_SELDOM = ("quantization_config", "pruned_heads")


def from_settings(
    values: Mapping[str, Any], *, where: str, names: Sequence[str] = ()
) -> XlnetConfig:
    """The inverse; what config.json does not say has the default of its class.

    values: config.json
    where: opens the errors
    names: of the tensors

    Raises ModelError for another architecture, and for what our model cannot be.
    """
    architecture_of(values, ARCHITECTURES, where=where, unnamed=(OF_A_TASK,))
    check_only(values, ONLY, where=where)
    activation = values.get("ff_activation", "gelu")
    if not isinstance(activation, str) or activation not in THEIR_ACTIVATIONS:
        raise ModelError(
            f"{where}: ff_activation is {activation!r}; needed: {' or '.join(THEIR_ACTIVATIONS)}."
            " Give a model with one of these."
        )
    said = {**DEFAULTS, **values}
    found = {ours: said[theirs] for ours, theirs in KEYS.items() if theirs in said}
    empty = next((name for name, value in found.items() if value is None), None)
    if empty:
        raise ModelError(
            f"{where}: {KEYS[empty]} is null; needed: a value. Put the one that the model was"
            f" trained with, or leave {KEYS[empty]} out."
        )
    # theirs has one rate for all places
    dropout = found.get("mlp_output_dropout", XlnetConfig.mlp_output_dropout)
    try:
        config = from_mapping(
            XlnetConfig,
            {
                **found,
                **dict.fromkeys(DROPOUTS, dropout),
                "mlp": THEIR_ACTIVATIONS[activation],
                "query_stream": True,
            },
        )
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error
    head_width = config.hidden_size // config.num_attention_heads
    if values.get("d_head", head_width) != head_width:
        raise ModelError(
            f"{where}: d_head is {values['d_head']!r}; needed: d_model over n_head, {head_width}."
            " Put that, or leave d_head out."
        )
    return config


def smaller(values: Settings, config: XlnetConfig) -> tuple[Settings, XlnetConfig]:
    """The same kind of model with few features and layers: every other word as it was."""
    heads = min(config.num_attention_heads, 2)
    width = config.hidden_size // config.num_attention_heads
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        # sinusoids come in pairs
        "hidden_size": 2 * width if heads == 2 else width + width % 2,
        "vocab_size": min(config.vocab_size, 256),
        "intermediate_size": min(config.intermediate_size, 96),
        "num_hidden_layers": min(config.num_hidden_layers, 3),
    }
    last = sizes["vocab_size"] - 1
    ids = {
        word: min(i, last)
        for word, i in values.items()
        if word.endswith("_token_id") and isinstance(i, int)
    }
    said = {KEYS[name]: size for name, size in sizes.items()}
    said["d_head"] = sizes["hidden_size"] // heads
    return {**values, **ids, **said}, dataclasses.replace(config, **sizes)


def their_names(name: str) -> tuple[str, ...]:
    """Of one of our parameters: one name, or two of which it is the rows."""
    if name in WHOLE:
        return (WHOLE[name],)
    # model.layers.3.attn.Wkv.weight -> layer 3, part attn.Wkv.weight
    _, _, layer, part = name.split(".", 3)
    return tuple(f"{BODY}.layer.{layer}.{theirs}" for theirs in PARTS[part])


def weights_to(weights: Mapping[str, Tensor], config: XlnetConfig) -> Weights:
    """Our weights by their names; values are cut and laid, never computed with."""
    heads = config.num_attention_heads
    found: Weights = {}
    for name, w in weights.items():
        names = their_names(name)
        for theirs, part in zip(names, w.chunk(len(names)), strict=True):
            found[theirs] = _to_theirs(theirs, part, heads=heads).contiguous()
    # a model without a query stream has a first state of zeros there, which nobody asks
    if TOKENS in weights and QUERY not in weights:
        found[MASK_EMB] = torch.zeros(1, 1, config.hidden_size, dtype=weights[TOKENS].dtype)
    return found


def _to_theirs(name: str, w: Tensor, *, heads: int) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == "mask_emb":
        return w[None]
    if kind in TRANSPOSED:
        return w.T.unflatten(-1, (heads, -1))
    if kind in ("o", "seg_embed"):
        return w.unflatten(-1, (heads, -1))
    return w


def _to_ours(name: str, w: Tensor) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == "mask_emb":
        return w[0]
    if kind in TRANSPOSED:
        return w.flatten(1).T
    if kind in ("o", "seg_embed"):
        return w.flatten(1)
    return w


def weights_from(
    raw: Mapping[str, Tensor], config: XlnetConfig, *, of: str, ours: Shapes
) -> tuple[Weights, tuple[str, ...]]:
    """Their weights by our names, and the names of theirs that have no place in the model.

    raw: as a file has them, with or without the body's name before them
    config: the model
    of: opens the errors
    ours: names and shapes of the model's parameters

    Raises ModelError where the decoder is no copy of the embedding, and where a shape is not that of the config.
    """
    bare = not any(name.startswith(f"{BODY}.") for name in raw)
    parts = ("word_embedding.", "mask_emb", "layer.")
    theirs = {
        f"{BODY}.{name}" if bare and name.startswith(parts) else name: w for name, w in raw.items()
    }
    copy = theirs.pop("lm_loss.weight", None)
    if copy is not None and not torch.equal(copy, theirs.get(WHOLE[TOKENS], copy)):
        raise ModelError(
            f"{of}: lm_loss.weight is not {WHOLE[TOKENS]}; needed: a decoder that is the embedding."
            " Our XLNet has no other."
        )
    check_shapes(theirs, weights_to(without_data(ours), config), of=of)
    found: Weights = {}
    for name in ours:
        names = their_names(name)
        if all(n in theirs for n in names):
            laid = [_to_ours(n, theirs.pop(n)) for n in names]
            found[name] = torch.cat(laid).contiguous()
    # what has no place keeps its name, by which it is refused
    found.update(theirs)
    return found, ()


def head_names(names: Sequence[str]) -> tuple[str, ...]:
    """Those of our parameters that a body alone does not have."""
    return tuple(name for name in names if name.startswith("decoder."))


# both streams --------------------------------------------------------------------------------------------------------

ASKED_TOKENS = 24  # of a text in two segments, of 14 and 10
FIRST_TOKENS = 14
REMEMBERED = 9


def two_streams_differ(ours: Any, theirs: Any) -> float:
    """The largest difference of a logit of the query stream in fp64: a permutation, segments, and a memory.

    ours: an Xlnet of ours; one without a query stream is not asked
    theirs: XLNetLMHeadModel with the same weights
    """
    if not ours.config.query_stream:
        return 0.0
    draw = generator(0, "two streams")
    ids_T = torch.from_numpy(draw.integers(0, ours.config.vocab_size, ASKED_TOKENS))
    segment_T = torch.from_numpy(draw.integers(0, 3, ASKED_TOKENS))
    stretch_T = (torch.arange(ASKED_TOKENS) >= FIRST_TOKENS).to(torch.int64)

    # three targets of each segment, and what is no target seen by all
    index_M = torch.tensor([1, 6, 11, 15, 18, 23])
    rank_T = torch.full((ASKED_TOKENS,), -1)
    rank_T[index_M] = torch.from_numpy(draw.permutation(len(index_M)))
    order = ReadingOrder(
        place_T=torch.arange(ASKED_TOKENS),
        stream_T=torch.arange(ASKED_TOKENS),
        stretch_T=stretch_T,
        segment_T=segment_T,
        key_rank_T=rank_T,
        query_rank_T=rank_T.clamp(min=0),
        memory_tokens=REMEMBERED,
    )
    targets = Targets(index_M=index_M, value_M=ids_T[index_M], count=len(index_M))
    with torch.inference_mode():
        x_MC = ours.predicted_states(packed_documents([ids_T]), targets, order)
        expected_MV = ours.decode(x_MC)
        found = []
        mems = None
        with _fp64_sinusoids(theirs):
            for number in (0, 1):
                own = stretch_T == number
                asked = index_M[own[index_M]] - int(torch.nonzero(own)[0])
                answer = theirs(
                    input_ids=ids_T[own][None],
                    token_type_ids=segment_T[own][None],
                    perm_mask=_blocked(rank_T[own]),
                    target_mapping=_one_hot(asked, tokens=int(own.sum())),
                    mems=mems,
                    use_mems=True,
                )
                found.append(answer.logits[0])
                mems = [m[-REMEMBERED:] for m in answer.mems]
    return float((torch.cat(found) - expected_MV).abs().max())


def _blocked(rank_T: Tensor) -> Tensor:
    """perm_mask [1, T, T]: 1 where a row does not see a key."""
    return (rank_T[None, :] >= rank_T.clamp(min=0)[:, None]).double()[None]


def _one_hot(index_M: Tensor, *, tokens: int) -> Tensor:
    """target_mapping [1, M, T]."""
    return torch.from_numpy(np.eye(tokens))[index_M][None]


@contextmanager
def _fp64_sinusoids(theirs: Any) -> Iterator[None]:
    """transformers multiplies fp32 sinusoids with its weights of two streams, which fp64 ones refuse."""
    body = theirs.transformer
    made = body.relative_positional_encoding
    body.relative_positional_encoding = lambda *given, **named: made(*given, **named).double()
    try:
        yield
    finally:
        del body.relative_positional_encoding


def _hidden_states(model: Any, ids_BL: Tensor, real_BL: Tensor) -> Tensor:
    return model.transformer(input_ids=ids_BL, attention_mask=real_BL)[0]


# what its card says -------------------------------------------------------------------------------------------------


def _asked_snippet(named: Named) -> str:
    """The query stream at a mask, which no token sees."""
    return f"""import torch
from transformers import {named.auto_class}, AutoTokenizer

{named.model_line}
tokenizer = AutoTokenizer.from_pretrained(model)
tokens = tokenizer({named.question}, return_tensors="pt")
masked = tokens["input_ids"][0] == tokenizer.mask_token_id
unseen = masked.float().repeat(1, len(masked), 1)        # by any token
asked = torch.eye(len(masked))[masked][None]
answer = {named.auto_class}.from_pretrained(model)(**tokens, perm_mask=unseen, target_mapping=asked)
print(tokenizer.convert_ids_to_tokens(answer.logits[0, 0].topk(5).indices))
"""


def _content_snippet(named: Named) -> str:
    return f"""from transformers import {named.auto_class}, AutoTokenizer

{named.model_line}
tokenizer = AutoTokenizer.from_pretrained(model)
tokens = tokenizer({named.question}, return_tensors="pt")
masked = tokens["input_ids"][0] == tokenizer.mask_token_id
answer = {named.auto_class}.from_pretrained(model)(**tokens)
print(tokenizer.convert_ids_to_tokens(answer.logits[0, masked][0].topk(5).indices))
"""


# transformers has no XLNet for its pipeline fill-mask
PERMUTED = Use(
    kind="encoder",
    says=(
        "pretrained by permutation language modelling with Tessera. Its query stream predicts tokens"
        " that nobody sees, and it gives vectors of tokens and texts; for a task, fine-tune it. Pad"
        " texts on the left."
    ),
    pipeline_tag="feature-extraction",
    task_tag="permutation-language-modelling",
    snippet=_asked_snippet,
)
MASKED = dataclasses.replace(
    FILLS_MASKS,
    says=f"{FILLS_MASKS.says} Pad texts on the left.",
    pipeline_tag="feature-extraction",
    snippet=_content_snippet,
)

XLNET = Bridge(
    model_type="xlnet",
    title="XLNet",
    config_class="XLNetConfig",
    without_word=None,
    blocker=lambda config: None,
    to_settings=to_settings,
    from_settings=from_settings,
    completed=lambda values, config: {**values, "architectures": [ARCHITECTURES[0]]},
    smaller=smaller,
    # no window: two lengths stand for all
    edges=lambda config: (2, 40),
    hidden_states=_hidden_states,
    logits=lambda model, x_MC: model.lm_loss(x_MC),
    auto_class=lambda values: "AutoModelForCausalLM",
    weights_to=weights_to,
    weights_from=weights_from,
    head_names=head_names,
    tied=("lm_loss.weight",),
    attention="eager",
    use=lambda config: PERMUTED if config.query_stream else MASKED,
    also_differs=two_streams_differ,
)
