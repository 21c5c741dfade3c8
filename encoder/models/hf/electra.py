"""ELECTRA of transformers, one network a folder: settings and weights of ours to theirs and back, by the rules of bert.py.

    electra_discriminator      ElectraForPreTraining      head.dense    discriminator_predictions.dense
                                                          classifier    discriminator_predictions.dense_prediction
    electra_generator          ElectraForMaskedLM         head          generator_predictions.dense, .LayerNorm
    embedding_projection       electra.embeddings_project

An ElectraModel is read as a discriminator whose head is drawn: that is the network whose body is published. The activation of
the generator's head is GELU by erf in transformers, whatever hidden_act says; so is that of our generators that go there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from encoder.base.errors import ModelError
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.bert import BertConfig
from encoder.models.electra import ElectraDiscriminatorConfig, ElectraGeneratorConfig
from encoder.models.hf import bert
from encoder.models.hf.bert import BERT_KEYS, BERT_LAYOUT, Layout, bridge_by, padded_on_the_right
from encoder.models.hf.bridge import Bridge, Settings, Shapes, Weights

GENERATOR_CLASS, DISCRIMINATOR_CLASS = "ElectraForMaskedLM", "ElectraForPreTraining"
# of our parameters, those of heads
HEADS = ("head.", "decoder.", "classifier.")


def _small(config: Any) -> dict[str, int]:
    """Tables of another width than the stream's where they have one."""
    width = min(config.num_attention_heads, 2) * config.head_width
    if not config.embedding_projection:
        return {"embedding_size": width}
    return {"embedding_size": 16 if width != 16 else 24}


def _by_erf(config: Any) -> list[str]:
    return [] if config.mlp == "gelu" else [f"mlp {config.mlp} (needed: gelu)"]


DISCRIMINATOR_LAYOUT = dataclasses.replace(
    BERT_LAYOUT,
    model_type="electra",
    title="ELECTRA discriminator",
    family="ELECTRA",
    config_class="ElectraConfig",
    body="electra",
    embeddings={**BERT_LAYOUT.embeddings, "model.embedding_projection": "embeddings_project"},
    heads={
        "head.dense": "discriminator_predictions.dense",
        "classifier": "discriminator_predictions.dense_prediction",
    },
    tied={},
    left_out=("generator_predictions.", "generator_lm_head."),
    keys={**BERT_KEYS, "embedding_size": "embedding_size"},
    # ElectraConfig() is small
    defaults={
        "embedding_size": 128,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
    },
    settings=ElectraDiscriminatorConfig,
    architectures=(DISCRIMINATOR_CLASS, "ElectraModel"),
    small=_small,
)
GENERATOR_LAYOUT = dataclasses.replace(
    DISCRIMINATOR_LAYOUT,
    title="ELECTRA generator",
    heads={
        "head.dense": "generator_predictions.dense",
        "head.norm": "generator_predictions.LayerNorm",
    },
    decoder_bias="generator_lm_head.bias",
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    left_out=("discriminator_predictions.",),
    settings=ElectraGeneratorConfig,
    architectures=(GENERATOR_CLASS,),
    strange=_by_erf,
)


def _layout_of(config: BertConfig) -> Layout:
    return GENERATOR_LAYOUT if config.predicts_tokens else DISCRIMINATOR_LAYOUT


def _layout_said(values: Mapping[str, Any]) -> Layout:
    """By config.json: a generator says so, a body alone is a discriminator's."""
    return GENERATOR_LAYOUT if _is_generator(values) else DISCRIMINATOR_LAYOUT


def _is_generator(values: Mapping[str, Any]) -> bool:
    return values.get("architectures") == [GENERATOR_CLASS]


def _from_settings(
    values: Settings, *, where: str, names: Sequence[str] = ()
) -> ElectraDiscriminatorConfig | ElectraGeneratorConfig:
    config = bert.from_settings(_layout_said(values), values, where=where, names=names)
    if _is_generator(values) and config.mlp != "gelu":
        raise ModelError(
            f"{where}: hidden_act is {values.get('hidden_act')!r}; needed: gelu for a generator,"
            " whose head has it in transformers whatever is said. Give another model."
        )
    assert isinstance(config, (ElectraDiscriminatorConfig, ElectraGeneratorConfig))
    return config


def _to_settings(config: Any, specials: SpecialIds) -> Settings:
    return bert.to_settings(_layout_of(config), config, specials)


def _weights_from(
    raw: Mapping[str, Tensor], config: Any, *, of: str, ours: Shapes
) -> tuple[Weights, tuple[str, ...]]:
    return bert.weights_from(_layout_of(config), raw, config, of=of, ours=ours)


def _logits(model: Any, x_MC: Tensor) -> Tensor:
    """[M, V] of a generator, [M, 1] of a discriminator."""
    if hasattr(model, "generator_lm_head"):
        return model.generator_lm_head(model.generator_predictions(x_MC))
    return model.discriminator_predictions(x_MC)[:, None]


ELECTRA: Bridge = dataclasses.replace(
    bridge_by(DISCRIMINATOR_LAYOUT, _logits, padded_on_the_right),
    title="ELECTRA",
    blocker=lambda config: bert.blocker(_layout_of(config), config),
    to_settings=_to_settings,
    from_settings=_from_settings,
    completed=lambda values, config: bert.completed(_layout_of(config), values, config),
    smaller=lambda values, config: bert.smaller(_layout_of(config), values, config),
    auto_class=lambda values: (
        "AutoModelForMaskedLM" if _is_generator(values) else "AutoModelForPreTraining"
    ),
    weights_to=lambda weights, config: bert.weights_to(_layout_of(config), weights, config),
    weights_from=_weights_from,
    head_names=lambda names: tuple(name for name in names if name.startswith(HEADS)),
    leaves=(*DISCRIMINATOR_LAYOUT.left_out, *GENERATOR_LAYOUT.left_out),
    tied=tuple(GENERATOR_LAYOUT.tied),
    # transformers 4.57 has no other for ELECTRA
    attention="eager",
)
