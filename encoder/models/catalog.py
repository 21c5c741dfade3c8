"""The models a run file can name, and presets of published shapes."""

from __future__ import annotations

from typing import Any

from encoder.models.albert import AlbertConfig
from encoder.models.bert import BertConfig, BertForPretraining, DistilBertConfig, RobertaConfig
from encoder.models.contract import Family, Model, ModelConfig
from encoder.models.electra import (
    ElectraConfig,
    ElectraDiscriminatorConfig,
    ElectraGeneratorConfig,
    ModernBertDiscriminatorConfig,
    ModernBertGeneratorConfig,
    ModernBertRtdConfig,
)
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.models.rtd import NETWORKS, Discriminator, ReplacedTokenModel, weights_of_network
from encoder.models.xlnet import Xlnet, XlnetConfig


def _two_networks(settings: type[ModelConfig]) -> Family:
    return Family(
        settings=settings,
        model=ReplacedTokenModel,
        networks=NETWORKS,
        network_weights=weights_of_network,
    )


# a new family is one line here (docs/adding_a_model.md)
FAMILIES: dict[str, Family] = {
    "modernbert": Family(settings=ModernBertConfig, model=ModernBertForMaskedLM),
    "bert": Family(settings=BertConfig, model=BertForPretraining),
    "roberta": Family(settings=RobertaConfig, model=BertForPretraining),
    "distilbert": Family(settings=DistilBertConfig, model=BertForPretraining),
    "albert": Family(settings=AlbertConfig, model=BertForPretraining),
    "xlnet": Family(settings=XlnetConfig, model=Xlnet),
    "electra": _two_networks(ElectraConfig),
    "electra_generator": Family(settings=ElectraGeneratorConfig, model=BertForPretraining),
    "electra_discriminator": Family(settings=ElectraDiscriminatorConfig, model=Discriminator),
    "modernbert_rtd": _two_networks(ModernBertRtdConfig),
    "modernbert_generator": Family(settings=ModernBertGeneratorConfig, model=ModernBertForMaskedLM),
    "modernbert_discriminator": Family(settings=ModernBertDiscriminatorConfig, model=Discriminator),
}
SYSTEMS: dict[str, type[ModelConfig]] = {name: family.settings for name, family in FAMILIES.items()}


def _shape(
    system: str, layers: int, hidden: int, heads: int, intermediate: int, **settings: Any
) -> dict[str, Any]:
    """A preset: system, layers, width, heads, MLP width, and what differs from the system's defaults."""
    return {
        "system": system,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **settings,
    }


# Ettin's (Weller et al. 2025): d 256 to 1,792; initial weights by Megatron's rule, sqrt(2 / (5 hidden))
_ETTIN = {
    "17m": (7, 256, 4, 384, 0.03953),
    "32m": (10, 384, 6, 576, 0.03227),
    "68m": (19, 512, 8, 768, 0.02795),
    "150m": (22, 768, 12, 1152, 0.02),
    "400m": (28, 1024, 16, 2624, 0.02),
    "1b": (28, 1792, 28, 3840, 0.02),
}
# mmBERT's (Marone et al. 2025): the vocabulary of Gemma 2, 256,000
_MMBERT = {"small": (22, 384, 6, 1152, 0.03227), "base": (22, 768, 12, 1152, 0.02)}
# the small BERTs (Turc et al. 2019; google-research/bert, README): heads of 64, F = 4H
_SMALL_BERTS = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512)}

# MiniRoBERTa as its code has it (AndreyKol1/RoBERTaPaperFromScratch): norms before the sums, none around the stack, no
# bias in attention, head and decoder. Its own initial weights, N(0, 1) tables, are left out: the first loss would be 69 nats.
_MINI_ROBERTA = dict(
    norm_place="pre",
    embedding_norm=False,
    final_norm=False,
    attention_bias=False,
    head_bias=False,
    decoder_bias=False,
    max_position_embeddings=128,
    position_offset=0,
    type_vocab_size=0,
    embedding_dropout=0.0,
    attention_output_dropout=0.0,
    mlp_output_dropout=0.0,
    mlp_inner_dropout=0.1,
)
# JonasGeiping/cramming, arch/crammed-bert.yaml (Geiping and Goldstein 2022)
_CRAMMED = dict(
    mlp="geglu",
    norm_place="pre",
    norm_eps=1e-12,
    attention_bias=False,
    mlp_bias=False,
    norm_bias=True,
    head="none",
    decoder_bias=False,
    positions="sinusoidal",
    max_position_embeddings=128,
    type_vocab_size=0,
    embedding_dropout=0.0,
    attention_output_dropout=0.0,
    mlp_output_dropout=0.0,
    attention_probability_dropout=0.0,
)

PRESETS: dict[str, dict[str, Any]] = {
    # ModernBERT's as published (Warner et al. 2024); the first three are Ettin's, under their older names
    **{
        f"modernbert_{size}": _shape(
            "modernbert", *_ETTIN[size][:4], initializer_range=_ETTIN[size][4]
        )
        for size in ("17m", "32m", "68m")
    },
    "modernbert_base": _shape("modernbert", 22, 768, 12, 1152, initializer_range=0.02),
    "modernbert_large": _shape("modernbert", 28, 1024, 16, 2624, initializer_range=0.02),
    **{
        f"ettin_{size}": _shape("modernbert", *shape, initializer_range=sigma)
        for size, (*shape, sigma) in _ETTIN.items()
    },
    **{
        f"mmbert_{size}": _shape("modernbert", *shape, initializer_range=sigma)
        for size, (*shape, sigma) in _MMBERT.items()
    },
    "bert_base": _shape("bert", 12, 768, 12, 3072),
    "bert_large": _shape("bert", 24, 1024, 16, 4096),
    **{
        f"bert_{size}": _shape("bert", layers, hidden, hidden // 64, 4 * hidden)
        for size, (layers, hidden) in _SMALL_BERTS.items()
    },
    "roberta_base": _shape("roberta", 12, 768, 12, 3072),
    "roberta_large": _shape("roberta", 24, 1024, 16, 4096),
    "distilroberta_base": _shape("roberta", 6, 768, 12, 3072),
    "distilbert_base": _shape("distilbert", 6, 768, 12, 3072),
    # E 128, one block for all layers (Lan et al. 2019, table 1); heads of google-research/albert
    "albert_base": _shape("albert", 12, 768, 12, 3072),
    "albert_large": _shape("albert", 24, 1024, 16, 4096),
    "albert_xlarge": _shape("albert", 24, 2048, 16, 8192),
    "albert_xxlarge": _shape("albert", 12, 4096, 64, 16384),
    "mini_roberta": _shape("roberta", 6, 256, 8, 1024, **_MINI_ROBERTA),
    # what its README says instead: a RoBERTa of these sizes
    "mini_roberta_readme": _shape("roberta", 6, 256, 8, 1024, max_position_embeddings=128),
    # RoPERT-small's sizes are not published. A guess: BERT-small's, and two thirds of its MLP in each half of SwiGLU
    "ropert_small": _shape(
        "modernbert",
        4,
        512,
        8,
        1365,
        mlp="swiglu",
        global_attn_every_n_layers=1,
        max_position_embeddings=128,
        norm_bias=True,
        norm_eps=1e-12,
        initializer_range=0.02,
    ),
    # google-research/electra, README and configure_pretraining.py; generators of 1/4, 1/3 and 1/4
    "electra_small": _shape(
        "electra", 12, 256, 4, 1024, embedding_size=128, generator_fraction=0.25
    ),
    "electra_base": _shape("electra", 12, 768, 12, 3072, generator_fraction=1 / 3),
    "electra_large": _shape("electra", 24, 1024, 16, 4096, generator_fraction=0.25),
    # DeBERTa-v3's way with its body exchanged: a generator as wide and half as deep
    "modernbert_rtd": _shape(
        "modernbert_rtd", 22, 768, 12, 1152, generator_layers=11, initializer_range=0.02
    ),
    "crammed_bert": _shape("bert", 16, 768, 12, 1536, **_CRAMMED),
    "xlnet_base": _shape("xlnet", 12, 768, 12, 3072),
    "xlnet_large": _shape("xlnet", 24, 1024, 16, 4096),
    # mosaicml/examples: its ALiBi is not here, learned positions stand in its place
    "mosaic_bert": _shape("bert", 12, 768, 12, 3072, mlp="geglu", max_position_embeddings=512),
}


def system_of(config: ModelConfig) -> str:
    """The name of a settings object's family."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.settings)


def build_model(config: ModelConfig, *, attention: str = "auto", seed: int) -> Model:
    """The model of a settings object, its weights drawn from the seed."""
    return FAMILIES[system_of(config)].model(config, attention=attention, seed=seed)


def networks_of(config: ModelConfig) -> dict[str, ModelConfig]:
    """Settings of each network of a model of several, the one that is used afterwards first; of any other nothing."""
    return {name: getattr(config, name) for name in FAMILIES[system_of(config)].networks}


def predicts_tokens(config: ModelConfig) -> bool:
    """Whether the model's states become logits over the vocabulary: not those of a discriminator."""
    return getattr(config, "predicts_tokens", True)
