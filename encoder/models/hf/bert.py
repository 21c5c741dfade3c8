"""BERT, RoBERTa and DistilBERT of transformers: settings and weights of our class to theirs and back.

Which of the three a model becomes follows from what it has, not from what it is called:

    DistilBERT    no segments, no offset of positions, no sentence head, norm_eps 1e-12
    RoBERTa       positions begin at the row behind the pad id, segments of one row or more, no sentence head
    BERT          the rest: positions from the first row that a token meets, a row of zeros where there are no segments

Ours keeps query, key and value in one matrix, transformers three; nothing else is more than another name. BERT's and
DistilBERT's positions count from the left, padding included, so they are asked alone and padded on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.base.errors import ConfigError, ModelError
from encoder.base.schema import from_mapping
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.bert import BertConfig, DistilBertConfig, RobertaConfig
from encoder.models.hf.bridge import (
    Bridge,
    Padding,
    Settings,
    Shapes,
    architecture_of,
    blocker_text,
    check_only,
    check_shapes,
    refuse_strange,
    without_data,
    without_words,
)

# our mlp -> hidden_act; the other names of transformers mean one of these
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
THEIR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# what theirs always is
ALWAYS = {
    "norm": "layernorm",
    "norm_place": "post",
    "embedding_norm": True,
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "head": "dense",
    "head_bias": True,
    "decoder_bias": True,
    "tie_word_embeddings": True,
    "positions": "learned",
}
# what ours always is, where config.json says it
THEIRS_ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "tie_weights_": True,
    "quantization_config": None,
    "pruned_heads": {},
}
DISTILBERT_EPS = 1e-12  # in its code, no setting
TOKENS = "model.embeddings.tok_embeddings.weight"
POSITIONS = "model.embeddings.position_embeddings.weight"
SEGMENTS = "model.embeddings.token_type_embeddings.weight"
SENTENCE = ("pooler.dense", "nsp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of one class of transformers, without .weight and .bias."""

    model_type: str
    title: str
    config_class: str
    body: str  # before the names of the encoder's parameters
    embeddings: dict[str, str]
    # of a block, by the number of its group and its number there
    layer: str
    parts: dict[str, tuple[str, ...]]  # of a layer
    heads: dict[str, str]
    decoder_bias: str
    tied: dict[str, str]  # copies that a file may hold -> what they are copies of
    left_out: tuple[str, ...]  # parts of names: where the model has no sentence head
    keys: dict[str, str]  # our settings -> theirs
    defaults: dict[str, Any]  # of its config class, where they are not ours
    activation: str
    settings: type[BertConfig]
    architectures: tuple[str, ...]  # the first for masked tokens, the second with all heads
    family: str = "BERT"  # for people: RoBERTa and DistilBERT have the same words
    # sizes of a small model of the same kind, beside those of all
    small: Callable[[Any], dict[str, int]] = lambda config: {}
    blocks_of_group: Callable[[Any], int] = lambda config: 1
    # settings that the class cannot run, each with what is needed
    strange: Callable[[Any], list[str]] = lambda config: []

    @property
    def has_sentences(self) -> bool:
        """Whether a class of it has a sentence head."""
        return "nsp" in self.heads


NORMS = {"model.embeddings.norm": "embeddings.LayerNorm"}
TABLES = {
    "model.embeddings.tok_embeddings": "embeddings.word_embeddings",
    "model.embeddings.position_embeddings": "embeddings.position_embeddings",
}
_BERT_PARTS = {
    "attn.Wqkv": (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ),
    "attn.Wo": ("attention.output.dense",),
    "attn_norm": ("attention.output.LayerNorm",),
    "mlp.Wi": ("intermediate.dense",),
    "mlp.Wo": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "initializer_range": "initializer_range",
    "mlp_output_dropout": "hidden_dropout_prob",
    "attention_probability_dropout": "attention_probs_dropout_prob",
}
BERT_LAYOUT = Layout(
    model_type="bert",
    title="BERT",
    config_class="BertConfig",
    body="bert",
    embeddings={
        **TABLES,
        **NORMS,
        "model.embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    },
    layer="encoder.layer.{0}",
    parts=_BERT_PARTS,
    heads={
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "pooler.dense": "bert.pooler.dense",
        "nsp": "cls.seq_relationship",
    },
    decoder_bias="cls.predictions.bias",
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    left_out=("pooler.dense.", "seq_relationship."),
    keys=BERT_KEYS,
    defaults={},
    activation="hidden_act",
    settings=BertConfig,
    architectures=("BertForMaskedLM", "BertForPreTraining", "BertModel"),
)
ROBERTA_LAYOUT = dataclasses.replace(
    BERT_LAYOUT,
    model_type="roberta",
    title="RoBERTa",
    config_class="RobertaConfig",
    body="roberta",
    heads={"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm"},
    decoder_bias="lm_head.bias",
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    # RobertaConfig() is no RoBERTa: its table is two rows short
    defaults={
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 1,
    },
    settings=RobertaConfig,
    architectures=("RobertaForMaskedLM", "RobertaModel"),
)
DISTILBERT_LAYOUT = Layout(
    model_type="distilbert",
    title="DistilBERT",
    config_class="DistilBertConfig",
    body="distilbert",
    embeddings={**TABLES, **NORMS},
    layer="transformer.layer.{0}",
    parts={
        "attn.Wqkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attn.Wo": ("attention.out_lin",),
        "attn_norm": ("sa_layer_norm",),
        "mlp.Wi": ("ffn.lin1",),
        "mlp.Wo": ("ffn.lin2",),
        "mlp_norm": ("output_layer_norm",),
    },
    heads={"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm"},
    decoder_bias="vocab_projector.bias",
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    left_out=BERT_LAYOUT.left_out,
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_position_embeddings",
        "initializer_range": "initializer_range",
        "mlp_output_dropout": "dropout",
        "attention_probability_dropout": "attention_dropout",
    },
    defaults={},
    activation="activation",
    settings=DistilBertConfig,
    architectures=("DistilBertForMaskedLM", "DistilBertModel"),
)


def model_type_of(config: BertConfig, specials: SpecialIds | None) -> str:
    """The class that a model becomes; before its tokenizer is known BERT, which has the same words."""
    # a sentence head is BERT's alone; RoBERTa needs segments and its offset, DistilBERT neither
    if config.sentence_head or specials is None:
        return BERT_LAYOUT.model_type
    if config.type_vocab_size and config.position_offset == specials.pad_id + 1:
        return ROBERTA_LAYOUT.model_type
    plain = not config.type_vocab_size and not config.position_offset
    if plain and config.norm_eps == DISTILBERT_EPS:
        return DISTILBERT_LAYOUT.model_type
    return BERT_LAYOUT.model_type


def blocker(layout: Layout, config: BertConfig) -> str | None:
    """Why a model of this shape cannot become a Hugging Face folder, or None if it can."""
    return blocker_text(_strange(layout, config), family=layout.family)


def _strange(layout: Layout, config: BertConfig) -> list[str]:
    strange = without_words(config, only=ALWAYS, activations=ACTIVATIONS)
    return [*strange, *layout.strange(config)]


def to_settings(layout: Layout, config: BertConfig, specials: SpecialIds) -> Settings:
    """config.json. Raises ExportError for a setting that transformers has no word for."""
    refuse_strange(_strange(layout, config), family=layout.family)
    said = {theirs: getattr(config, ours) for ours, theirs in layout.keys.items()}
    # RoBERTa counts the table's rows, ours the longest document
    if layout is ROBERTA_LAYOUT:
        said["max_position_embeddings"] += config.position_offset
    # transformers' table has a row at least: it becomes one of zeros (weights_to)
    if "type_vocab_size" in said:
        said["type_vocab_size"] = max(1, config.type_vocab_size)
    return {
        "architectures": [_architecture(layout, config)],
        "model_type": layout.model_type,
        "dtype": "float32",
        **said,
        layout.activation: ACTIVATIONS[config.mlp],
        **_words_of(layout),
        "pad_token_id": specials.pad_id,
        "cls_token_id": specials.cls_id,
        "sep_token_id": specials.sep_id,
        "bos_token_id": specials.cls_id,
        "eos_token_id": specials.sep_id,
    }


def _words_of(layout: Layout) -> Settings:
    """What the class's config.json says beside."""
    if layout is DISTILBERT_LAYOUT:
        return {"sinusoidal_pos_embds": False, "tie_weights_": True, "tie_word_embeddings": True}
    return {"position_embedding_type": "absolute", "tie_word_embeddings": True}


def from_settings(
    layout: Layout, values: Mapping[str, Any], *, where: str, names: Sequence[str] = ()
) -> BertConfig:
    """The inverse, of a folder by any transformers; what config.json does not say has the default of its class.

    layout: of the class.
    values: config.json.
    where: opens the errors.
    names: of the tensors, where they are known: a pooler among them is kept.

    Raises ModelError for another architecture, and for what our model cannot be.
    """
    architecture = architecture_of(values, layout.architectures, where=where)
    check_only(values, THEIRS_ONLY, where=where)
    said = {**layout.defaults, **values}
    activation = said.get(layout.activation, "gelu")
    if not isinstance(activation, str) or activation not in THEIR_ACTIVATIONS:
        raise ModelError(
            f"{where}: {layout.activation} is {activation!r}; needed:"
            f" {' or '.join(THEIR_ACTIVATIONS)}. Give a model with one of these."
        )

    found = {ours: said[theirs] for ours, theirs in layout.keys.items() if theirs in said}
    empty = next((name for name, value in found.items() if value is None), None)
    if empty:
        raise ModelError(
            f"{where}: {layout.keys[empty]} is null; needed: a value. Put the one that the model"
            f" was trained with, or leave {layout.keys[empty]} out."
        )
    if layout is ROBERTA_LAYOUT:
        found |= _positions_of(said, where=where)
    # theirs has one rate for embedding, attention and MLP; DistilBERT has none after attention
    dropout = found.get("mlp_output_dropout", layout.settings.mlp_output_dropout)
    found["embedding_dropout"] = dropout
    if layout is not DISTILBERT_LAYOUT:
        found["attention_output_dropout"] = dropout
    # a folder of BertForMaskedLM may have a pooler: then the sentence head is the model's, too
    pooler = layout.heads.get("pooler.dense", "").removeprefix(f"{layout.body}.")
    has_pooler = any(name.endswith(f"{pooler}.weight") for name in names)
    has_all_heads = architecture in layout.architectures[1:2]
    sentences = layout.has_sentences and (has_all_heads or has_pooler)
    try:
        return from_mapping(
            layout.settings,
            {**found, "mlp": THEIR_ACTIVATIONS[activation], "sentence_head": sentences},
        )
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def _positions_of(said: Mapping[str, Any], *, where: str) -> dict[str, int]:
    """RoBERTa's positions begin behind its pad id; the table's rows before them hold no document."""
    rows = said["max_position_embeddings"]
    pad_id = said["pad_token_id"]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (rows, pad_id))
    if not whole or pad_id < 0 or rows <= pad_id + 1:
        raise ModelError(
            f"{where}: max_position_embeddings is {rows!r} and pad_token_id {pad_id!r}; needed:"
            " more rows than pad_token_id + 1, where positions begin (RoBERTa: 514 and 1). Put what"
            " the model was trained with."
        )
    return {"position_offset": pad_id + 1, "max_position_embeddings": rows - pad_id - 1}


def completed(layout: Layout, values: Settings, config: BertConfig) -> Settings:
    """config.json that names the class which has all of the model's heads."""
    return {**values, "architectures": [_architecture(layout, config)]}


def _architecture(layout: Layout, config: BertConfig) -> str:
    """The class with all of the model's heads: one for pretraining has one for sentences."""
    if config.sentence_head:
        return layout.architectures[1]
    return layout.architectures[0]


def smaller(layout: Layout, values: Settings, config: BertConfig) -> tuple[Settings, BertConfig]:
    """The same kind of model with few features and layers: every other word as it was."""
    heads = min(config.num_attention_heads, 2)
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_size": heads * config.head_width,
        # the pad id, position_offset - 1, stays an id of the vocabulary
        "vocab_size": min(config.vocab_size, max(256, config.position_offset + 1)),
        "intermediate_size": min(config.intermediate_size, 96),
        "num_hidden_layers": min(config.num_hidden_layers, 3),
        **layout.small(config),
    }
    # special ids beyond the small vocabulary become its last one
    last = sizes["vocab_size"] - 1
    ids = {
        word: min(i, last)
        for word, i in values.items()
        if word.endswith("_token_id") and isinstance(i, int)
    }
    said = {layout.keys[name]: size for name, size in sizes.items()}
    return {**values, **ids, **said}, dataclasses.replace(config, **sizes)


def their_names(layout: Layout, name: str, config: BertConfig) -> tuple[str, ...]:
    """Of one of our parameters: one name, or three of which it is the rows."""
    stem, _, kind = name.rpartition(".")
    if name == "decoder.bias":
        return (layout.decoder_bias,)
    if stem in layout.heads:
        return (f"{layout.heads[stem]}.{kind}",)
    if stem in layout.embeddings:
        return (f"{layout.body}.{layout.embeddings[stem]}.{kind}",)
    # model.layers.3.attn.Wqkv -> block 3, part attn.Wqkv
    _, _, number, part = stem.split(".", 3)
    block = layout.layer.format(*divmod(int(number), layout.blocks_of_group(config)))
    at = f"{layout.body}.{block}"
    return tuple(f"{at}.{theirs}.{kind}" for theirs in layout.parts[part])


def weights_to(
    layout: Layout, weights: Mapping[str, Tensor], config: BertConfig
) -> dict[str, Tensor]:
    """Our weights by their names; values are cut and laid, never computed with."""
    found: dict[str, Tensor] = {}
    for name, w in weights.items():
        # BERT and DistilBERT begin at row 0: rows before the offset were never looked up
        if name == POSITIONS and layout is not ROBERTA_LAYOUT:
            w = w[config.position_offset :]
        names = their_names(layout, name, config)
        # rows of Wqkv are q, k, v: three names get a third each
        found.update(zip(names, (p.contiguous() for p in w.chunk(len(names))), strict=True))
    if not config.type_vocab_size and layout is not DISTILBERT_LAYOUT and TOKENS in weights:
        name = f"{layout.body}.embeddings.token_type_embeddings.weight"
        found[name] = torch.zeros(1, config.embedding_width, dtype=weights[TOKENS].dtype)
    return found


def weights_from(
    layout: Layout, raw: Mapping[str, Tensor], config: BertConfig, *, of: str, ours: Shapes
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Their weights by our names, and the names of theirs that have no place in the model.

    layout: of the class.
    raw: as a file has them: with or without the body's name before them, gamma and beta for norms.
    config: the model.
    of: opens the errors.
    ours: names and shapes of the model's parameters; a head that is not there is left out here, for another to draw.

    Raises ModelError where the decoder is no copy of the embedding, and where a shape is not that of the config.
    """
    # ..._ids are buffers of older versions, such as position_ids
    theirs = {name: w for name, w in _todays_names(layout, raw) if not name.endswith("_ids")}
    for copy, original in layout.tied.items():
        w = theirs.pop(copy, None)
        # a copy without its original passes here: the check of names finds what is missing
        if w is not None and not torch.equal(w, theirs.get(original, w)):
            raise ModelError(
                f"{of}: {copy} is not {original}; needed: a decoder that is the embedding. Our"
                " BERT has no other."
            )
    check_shapes(theirs, weights_to(layout, without_data(ours), config), of=of)
    found: dict[str, Tensor] = {}
    # what is taken is popped, so that the rest is what has no place
    for name in ours:
        names = their_names(layout, name, config)
        if all(n in theirs for n in names):
            parts = [theirs.pop(n) for n in names]
            if len(parts) == 1:
                found[name] = parts[0]
            else:
                found[name] = torch.cat(parts)
    left_out = tuple(n for n in theirs if any(part in n for part in layout.left_out))
    # what has no place at all keeps its name, by which it is refused
    found.update({name: w for name, w in theirs.items() if name not in left_out})
    return found, left_out


def _todays_names(layout: Layout, raw: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # a body alone (BertModel) has names without the class's prefix
    bare = not any(name.startswith(f"{layout.body}.") for name in raw)
    parts = ("embeddings", f"{layout.layer.partition('.')[0]}.", "pooler.")
    for name, w in raw.items():
        # names that TensorFlow's checkpoints left behind
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        new = new.replace("LayerNorm.beta", "LayerNorm.bias")
        if bare and new.startswith(parts):
            new = f"{layout.body}.{new}"
        yield new, w


def head_names(names: Sequence[str]) -> tuple[str, ...]:
    """Those of our parameters that a body alone does not have."""
    heads = ("head.", "decoder.", *(f"{name}." for name in SENTENCE))
    return tuple(name for name in names if name.startswith(heads))


def _hidden_states(layout: Layout) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def ask(model: Any, ids_BL: Tensor, real_BL: Tensor) -> Tensor:
        body = getattr(model, layout.body)
        return body(input_ids=ids_BL, attention_mask=real_BL)[0]

    return ask


def _bert_logits(model: Any, x_MC: Tensor) -> Tensor:
    """[M, V], or [M, V + 2] with the sentence head's."""
    logits_MV = model.cls.predictions(x_MC)
    if not hasattr(model.cls, "seq_relationship"):
        return logits_MV
    pooled_MC = model.bert.pooler(x_MC[:, None])
    return torch.cat((logits_MV, model.cls.seq_relationship(pooled_MC)), dim=-1)


def _distilbert_logits(model: Any, x_MC: Tensor) -> Tensor:
    hidden_MC = model.activation(model.vocab_transform(x_MC))
    return model.vocab_projector(model.vocab_layer_norm(hidden_MC))


def padded_on_the_right(values: Settings) -> Padding:
    """A position for each place of the batch, padding or not."""
    return Padding(left=False, most_tokens=values.get("max_position_embeddings", 512))


def bridge_by(
    layout: Layout,
    logits: Callable[[Any, Tensor], Tensor],
    padding: Callable[[Settings], Padding],
) -> Bridge:
    return Bridge(
        model_type=layout.model_type,
        title=layout.title,
        config_class=layout.config_class,
        without_word=None,
        blocker=lambda config: blocker(layout, config),
        to_settings=lambda config, specials: to_settings(layout, config, specials),
        from_settings=lambda values, *, where, names=(): from_settings(
            layout, values, where=where, names=names
        ),
        completed=lambda values, config: completed(layout, values, config),
        smaller=lambda values, config: smaller(layout, values, config),
        # no window: two lengths stand for all
        edges=lambda config: (2, 40),
        hidden_states=_hidden_states(layout),
        logits=logits,
        auto_class=lambda values: (
            "AutoModelForPreTraining"
            if layout.has_sentences and values.get("architectures") == [layout.architectures[1]]
            else "AutoModelForMaskedLM"
        ),
        weights_to=lambda weights, config: weights_to(layout, weights, config),
        weights_from=lambda raw, config, *, of, ours: weights_from(
            layout, raw, config, of=of, ours=ours
        ),
        head_names=head_names,
        leaves=layout.left_out,
        tied=tuple(layout.tied),
        padding=padding,
    )


BERT = bridge_by(BERT_LAYOUT, _bert_logits, padded_on_the_right)
ROBERTA = bridge_by(
    ROBERTA_LAYOUT,
    lambda model, x_MC: model.lm_head(x_MC),
    lambda values: Padding(
        pad_id=values.get("pad_token_id", 1), most_tokens=values.get("max_position_embeddings", 512)
    ),
)
DISTILBERT = bridge_by(DISTILBERT_LAYOUT, _distilbert_logits, padded_on_the_right)
