"""The encoders that came before ModernBERT, on packed tokens: BERT, RoBERTa and DistilBERT are one class with other defaults.

Its settings also give models beside them: MiniRoBERTa (norms before the sums, none around), crammed BERT (sinusoids, no
head), MosaicBERT without ALiBi (a gated layer). Parameters have our own names, as ModernBERT's; encoder/models/hf/bert.py
has the names of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from encoder.base.errors import ConfigError
from encoder.models.contract import GrowthRules
from encoder.models.encoder import AXES, GROWS, EncoderSettings, PackedEncoder, check_settings
from encoder.nn.block import NormPlace
from encoder.nn.init import Initialization
from encoder.nn.mlp import Mlp, is_gated
from encoder.nn.norm import Norm

OldPositions = Literal["learned", "sinusoidal"]
Head = Literal["dense", "none"]


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderSettings):
    """The shape of a BERT; the defaults are BERT-base's (Devlin et al. 2018)."""

    PHASE_SETTINGS: ClassVar[tuple[str, ...]] = ()  # positions are weights: a phase changes none
    # every layer sees the whole document
    global_attn_every_n_layers: ClassVar[int] = 1
    window_radius_tokens: ClassVar[int] = 64

    vocab_size: int = 30522  # rows of the embedding; default: the shards' vocabulary in whole 64s
    hidden_size: int = 768  # width of the residual stream
    intermediate_size: int = 3072  # of a gated layer: one half
    num_hidden_layers: int = 12  # blocks of attention and MLP
    num_attention_heads: int = 12  # of every layer
    # features of a head; default: hidden_size / num_attention_heads
    attention_head_width: int | None = None
    # gelu: by erf, as transformers computes BERT; gelu_tanh: as its own code does, in the head too
    mlp: Mlp = "gelu"
    norm: Norm = "layernorm"  # kind of every norm
    norm_place: NormPlace = "post"  # after each sum; pre: before attention and MLP
    embedding_norm: bool = True  # a norm of the embedding
    final_norm: bool = True  # with norm_place pre: a norm after the last layer
    norm_bias: bool = True  # of every norm
    norm_eps: float = 1e-12  # added to the variance
    attention_bias: bool = True  # of Wqkv and Wo
    mlp_bias: bool = True  # of Wi and Wo
    head: Head = "dense"  # dense, GELU and norm before the decoder; none: the last state itself
    head_bias: bool = True  # of the prediction head's dense layer
    # pooler and two logits of a text's first token; default: true where the objective has pairs
    sentence_head: bool = False
    decoder_bias: bool = True  # of the logits
    tie_word_embeddings: bool = True  # the decoder's weight is the embedding
    positions: OldPositions = "learned"  # a table; or fixed sinusoids with one learned scale
    max_position_embeddings: int = 512  # the longest document
    position_offset: int = 0  # rows of the table before a document's first; RoBERTa: pad id + 1
    type_vocab_size: int = 2  # rows of the segment table; 0: no segments
    embedding_dropout: float = 0.1  # after the embedding's norm
    attention_output_dropout: float = 0.1  # after attention's Wo
    mlp_output_dropout: float = 0.1  # after the MLP's Wo
    mlp_inner_dropout: float = 0.0  # between the MLP's matrices, after GELU
    # of the published recipe: not applied, no kernel for packed documents has a place for it; an export's config.json says it
    attention_probability_dropout: float = 0.1
    # bert: truncated normals, one sigma; normal: not cut; megatron: narrower into the stream
    initialization: Initialization = "bert"
    # sigma of the first weights; default with megatron: sqrt(2 / (5 hidden_size))
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0  # they are cut at so many sigma

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0.0 <= self.attention_probability_dropout < 1.0:
            raise ConfigError(
                f"attention_probability_dropout is {self.attention_probability_dropout}; needed: 0"
                " to below 1."
            )
        if self.mlp_inner_dropout and is_gated(self.mlp):
            raise ConfigError(
                f"mlp_inner_dropout {self.mlp_inner_dropout} with mlp {self.mlp}: a gated layer has"
                " no such place. Use 0, or mlp: gelu."
            )
        if self.position_offset < 0:
            raise ConfigError(f"position_offset is {self.position_offset}; needed: 0 or more.")
        if self.position_offset and self.positions != "learned":
            raise ConfigError(
                f"position_offset {self.position_offset} with positions {self.positions}: there is"
                " no table. Use 0."
            )

    @property
    def phase_texts(self) -> dict[str, str]:
        """What a phase may change, for people: nothing."""
        return {}

    @property
    def facts(self) -> dict[str, str]:
        """The shape, for people: name and value, as a model card shows them."""
        segments = f", {self.type_vocab_size} segments" if self.type_vocab_size > 1 else ""
        return {
            "layers": f"{self.num_hidden_layers}, norms {self.norm_place}",
            "width, heads": f"{self.hidden_size}, {self.num_attention_heads}",
            "positions": f"{self.positions}, {self.max_position_embeddings:,}{segments}",
            "vocabulary": f"{self.vocab_size:,}",
        }

    def growth(self) -> GrowthRules:
        """How a larger model takes over this one's weights."""
        ends_in_norm = self.norm_place == "pre" and self.final_norm
        final_norm = None
        if ends_in_norm:
            final_norm = "model.final_norm."
        free: tuple[str, ...] = _FREE
        if self.positions == "sinusoidal":  # no table is as long as the positions
            free = (*_FREE, "max_position_embeddings")
        return GrowthRules(
            axes=AXES,
            grows=GROWS,
            free=free,
            heads=("sentence_head",),
            layer_kinds=("global",) * self.num_hidden_layers,
            uncut={"num_attention_heads": self.head_width},
            derived={"attention_head_width": self.head_width},
            final_norm=final_norm,
        )

    def without_effect(self, given: Callable[[str], bool], *, longest_tokens: int) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each.

        given: whether the run file has a setting of this name
        longest_tokens: of a document, in any phase
        """
        if self.attention_probability_dropout:
            yield (
                f"model.attention_probability_dropout {self.attention_probability_dropout:g} is not"
                " applied: kernels for packed documents have no place for it. An export's"
                " config.json says it, for fine-tuning."
            )
        if self.norm_place == "post" and given("final_norm"):
            yield "model.final_norm has no effect: with norm_place post each layer ends in a norm."
        if self.head == "none" and given("head_bias"):
            yield "model.head_bias has no effect: with head none there is no dense layer."
        if self.initialization == "normal" and given("initializer_cutoff_factor"):
            yield "model.initializer_cutoff_factor has no effect: initialization normal cuts none."


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """The shape of a RoBERTa; the defaults are RoBERTa-base's (Liu et al. 2019)."""

    vocab_size: int = 50265  # rows of the embedding; default: the shards' vocabulary in whole 64s
    norm_eps: float = 1e-5  # added to the variance
    position_offset: int = 2  # rows of the table before a document's first: its pad id is 1
    # transformers has one row, added to every token, where fairseq has none
    type_vocab_size: int = 1
    initialization: Initialization = "normal"  # not cut


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """The shape of a DistilBERT; the defaults are the published ones (Sanh et al. 2019)."""

    num_hidden_layers: int = 6  # blocks of attention and MLP
    type_vocab_size: int = 0  # no segments
    attention_output_dropout: float = 0.0  # its code has no such place
    initialization: Initialization = "normal"  # as transformers draws; published: its teacher's


# what a model may be given anew with the same weights; all other settings must be the source's
_FREE = (
    "embedding_dropout",
    "attention_output_dropout",
    "mlp_output_dropout",
    "mlp_inner_dropout",
    "attention_probability_dropout",
    "norm_eps",
    "initialization",
    "initializer_range",
    "initializer_cutoff_factor",
)


class BertForPretraining(PackedEncoder):
    """Packed tokens -> hidden states; a masked-language head and, where settings have it, a sentence head."""
