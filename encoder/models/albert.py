"""ALBERT (Lan et al. 2019): a BERT whose layers share their weights, and whose embedding is narrower than the stream.

    12 layers, 1 group of 1 block       block 0 0 0 0 0 0 0 0 0 0 0 0        layer l of L calls group floor(l G / L)
    6 layers, 2 groups of 2 blocks      block 01 01 01 23 23 23             a layer is all blocks of its group, in turn

A block stands once in `layers`, so its weights have one name, one gradient and one place in a checkpoint. A step costs what
that of a BERT of as many layers costs. Names of transformers are in encoder/models/hf/albert.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.models.bert import BertConfig
from encoder.models.contract import GrowthRules
from encoder.models.encoder import MOST
from encoder.nn.mlp import Mlp


@dataclass(frozen=True, kw_only=True)
class AlbertConfig(BertConfig):
    """The shape of an ALBERT; the defaults are those of ALBERT-base, its second version (google-research/albert)."""

    vocab_size: int = 30000  # rows of the embedding; default: the shards' vocabulary in whole 64s
    embedding_size: int = 128  # width of the embedding; a dense layer brings it to hidden_size
    num_hidden_groups: int = 1  # sets of weights that the layers share, in equal runs of layers
    # blocks of attention and MLP of a group; a layer is all of them, in turn
    inner_group_num: int = 1
    # gelu_tanh: as its code computes both versions; gelu: by erf, as transformers reads the first one
    mlp: Mlp = "gelu_tanh"
    embedding_dropout: float = 0.0  # after the embedding's norm; first version, but xxlarge: 0.1
    attention_output_dropout: float = 0.0  # after attention's Wo; first version, but xxlarge: 0.1
    mlp_output_dropout: float = 0.0  # after the MLP's Wo; first version, but xxlarge: 0.1
    # not applied, no kernel for packed documents has a place for it; first version, but xxlarge: 0.1
    attention_probability_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embedding_size", "inner_group_num"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; needed: at least 1.")
        if self.embedding_size > MOST["hidden_size"]:
            raise ConfigError(
                f"embedding_size is {self.embedding_size:,}; needed: at most"
                f" {MOST['hidden_size']:,}."
            )
        if not 1 <= self.num_hidden_groups <= self.num_hidden_layers:
            raise ConfigError(
                f"num_hidden_groups is {self.num_hidden_groups}; needed: 1 to num_hidden_layers"
                f" ({self.num_hidden_layers}), for each layer calls one."
            )
        calls = self.num_hidden_layers * self.inner_group_num
        if calls > MOST["num_hidden_layers"]:
            raise ConfigError(
                f"num_hidden_layers {self.num_hidden_layers} times inner_group_num"
                f" {self.inner_group_num} is {calls:,} blocks; needed: at most"
                f" {MOST['num_hidden_layers']:,}."
            )
        if self.head == "none" and self.embedding_size != self.hidden_size:
            raise ConfigError(
                f"head none with embedding_size {self.embedding_size} and hidden_size"
                f" {self.hidden_size}: the decoder is as wide as the embedding. Use head: dense."
            )

    @property
    def embedding_width(self) -> int:
        """Features of a token in the tables, and of what is decoded."""
        return self.embedding_size

    @property
    def embedding_projection(self) -> bool:
        """As transformers has it also where both widths are equal; its own code then has none."""
        return True

    @property
    def block_calls(self) -> tuple[int, ...]:
        """Of each block that runs, one after another, its number in `layers`."""
        # a quotient of floats, as transformers rounds it: 18 layers over 14 groups are not floor(l G / L)
        layers_of_group = self.num_hidden_layers / self.num_hidden_groups
        inner = self.inner_group_num
        return tuple(
            int(layer / layers_of_group) * inner + block
            for layer in range(self.num_hidden_layers)
            for block in range(inner)
        )

    @property
    def activation_width(self) -> int:
        """Numbers per token that a layer writes in the forward pass: those of its blocks."""
        return self.inner_group_num * super().activation_width

    @property
    def facts(self) -> dict[str, str]:
        """The shape, for people: name and value, as a model card shows them."""
        blocks = self.num_hidden_groups * self.inner_group_num
        return {
            **super().facts,
            "layers": (
                f"{self.num_hidden_layers}, norms {self.norm_place}, sharing"
                f" {counted(blocks, 'block')}"
            ),
            "width, heads": (
                f"{self.hidden_size}, {self.num_attention_heads}, embedding {self.embedding_size}"
            ),
        }

    def growth(self) -> GrowthRules:
        """How a larger model takes over this one's weights: in width. Its depth is a number."""
        rules = super().growth()
        return dataclasses.replace(
            rules,
            grows=(*rules.grows, "embedding_size"),
            shared_blocks=self.num_hidden_groups * self.inner_group_num,
            fewest_layers=self.num_hidden_groups,
            most_layers=MOST["num_hidden_layers"] // self.inner_group_num,
        )
