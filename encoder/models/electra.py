"""ELECTRA (Clark et al. 2020) and, with the same objective, ModernBERT: a generator beside the encoder that is trained for use.

    electra                    both networks, BERTs           electra_generator, electra_discriminator      one of them, at rest
    modernbert_rtd             both networks, ModernBERTs     modernbert_generator, modernbert_discriminator

The networks and what they share are those of encoder/models/rtd.py; here are the settings and their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from encoder.models.bert import BertConfig
from encoder.models.modernbert import ModernBertConfig
from encoder.models.rtd import DiscriminatorSettings, OwnEmbeddingWidth, Sharing, TwoNetworks
from encoder.nn.init import Initialization


@dataclass(frozen=True, kw_only=True)
class ElectraGeneratorConfig(OwnEmbeddingWidth, BertConfig):
    """The shape of an ELECTRA's generator alone: a masked-language model; the defaults are those of base."""

    embedding_size: int = 768  # width of the tables; a dense layer brings them to hidden_size
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 1024  # width inside the feed-forward layer
    num_attention_heads: int = 4  # of every layer
    # as bert, but for the matrix behind the embedding: uniform, TensorFlow's default
    initialization: Initialization = "electra"


@dataclass(frozen=True, kw_only=True)
class ElectraDiscriminatorConfig(DiscriminatorSettings, OwnEmbeddingWidth, BertConfig):
    """The shape of an ELECTRA's discriminator alone, as an export or import has it; the defaults are those of base."""

    embedding_size: int = 768  # width of the tables; another than hidden_size: a dense layer behind
    # as bert, but for two matrices: uniform, TensorFlow's default
    initialization: Initialization = "electra"


@dataclass(frozen=True, kw_only=True)
class ElectraConfig(TwoNetworks, BertConfig):
    """Both networks of an ELECTRA, the objective is rtd; the defaults are those of base."""

    GENERATOR: ClassVar[type[ElectraGeneratorConfig]] = ElectraGeneratorConfig
    DISCRIMINATOR: ClassVar[type[ElectraDiscriminatorConfig]] = ElectraDiscriminatorConfig

    # heads, width and MLP of the generator, as a share of the discriminator's
    generator_fraction: float = 1 / 3
    # as bert, but for two matrices: uniform, TensorFlow's default
    initialization: Initialization = "electra"


@dataclass(frozen=True, kw_only=True)
class ModernBertGeneratorConfig(OwnEmbeddingWidth, ModernBertConfig):
    """The shape of a ModernBERT generator alone: a masked-language model."""

    embedding_size: int = 768  # width of the tables; another than hidden_size: a dense layer behind


@dataclass(frozen=True, kw_only=True)
class ModernBertDiscriminatorConfig(DiscriminatorSettings, OwnEmbeddingWidth, ModernBertConfig):
    """The shape of a ModernBERT discriminator alone; its head has ModernBERT's norm, so transformers has a class for it."""

    head_norm: ClassVar[bool] = True

    embedding_size: int = 768  # width of the tables; another than hidden_size: a dense layer behind


@dataclass(frozen=True, kw_only=True)
class ModernBertRtdConfig(TwoNetworks, ModernBertConfig):
    """Two ModernBERTs, the objective is rtd; the defaults are DeBERTa-v3's: a generator as wide, its tables not trained by both."""

    GENERATOR: ClassVar[type[ModernBertGeneratorConfig]] = ModernBertGeneratorConfig
    DISCRIMINATOR: ClassVar[type[ModernBertDiscriminatorConfig]] = ModernBertDiscriminatorConfig

    # heads, width and MLP of the generator, as a share of the discriminator's
    generator_fraction: float = 1.0
    # shared: one for both (ELECTRA); difference: what the discriminator adds to the generator's (DeBERTa-v3); separate
    embedding_sharing: Sharing = "difference"
