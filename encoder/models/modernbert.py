"""ModernBERT (Warner et al. 2024) with a masked-language head, on packed tokens, under Hugging Face's parameter names.

The defaults are ModernBERT's. Other encoders of the family are other settings of the same class: a BERT is norm_place
post, mlp gelu, positions learned, biases everywhere and only global layers (tests/unit/models/test_model_family.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from encoder.base.errors import ConfigError
from encoder.models.contract import GrowthRules
from encoder.models.encoder import AXES, GROWS, EncoderSettings, PackedEncoder, check_settings
from encoder.nn.block import NormPlace
from encoder.nn.init import Initialization
from encoder.nn.mlp import Mlp
from encoder.nn.norm import Norm
from encoder.nn.rope import Positions


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderSettings):
    """The shape of a model; the defaults are ModernBERT-base before its context extension."""

    # what a phase may change, with the same weights
    PHASE_SETTINGS: ClassVar[tuple[str, ...]] = ("global_rope_theta", "local_rope_theta")
    # what other families set (encoder/models/bert.py), and this one has in one way alone
    position_offset: ClassVar[int] = 0
    embedding_norm: ClassVar[bool] = True
    final_norm: ClassVar[bool] = True
    head: ClassVar[str] = "dense"
    sentence_head: ClassVar[bool] = False
    embedding_dropout: ClassVar[float] = 0.0
    mlp_output_dropout: ClassVar[float] = 0.0
    mlp_inner_dropout: ClassVar[float] = 0.0
    initialization: ClassVar[Initialization] = "megatron"

    vocab_size: int = 50368  # rows of the embedding; default: the shards' vocabulary in whole 64s
    hidden_size: int = 768  # width of the residual stream
    intermediate_size: int = 1152  # of a gated layer: one half
    num_hidden_layers: int = 22  # blocks of attention and MLP
    num_attention_heads: int = 12  # of every layer
    # features of a head; default: hidden_size / num_attention_heads
    attention_head_width: int | None = None
    mlp: Mlp = "geglu"  # GELU or SiLU with a gate, or plain GELU as BERT has it
    norm: Norm = "layernorm"  # kind of every norm
    # pre: layer 0 needs no first norm (the embedding has one), a final one ends
    norm_place: NormPlace = "pre"
    norm_bias: bool = False  # of every norm
    norm_eps: float = 1e-5  # added to the variance
    attention_bias: bool = False  # of Wqkv and Wo
    mlp_bias: bool = False  # of Wi and Wo
    head_bias: bool = False  # of the prediction head's dense layer
    decoder_bias: bool = True  # of the logits
    tie_word_embeddings: bool = True  # the decoder's weight is the embedding
    positions: Positions = "rope"  # rotary, or a learned table as BERT has it
    # rows of the learned table; with rope only what an export promises
    max_position_embeddings: int = 8192
    # rows of a segment table (BERT 2, RoBERTa 1); every token is of segment 0
    type_vocab_size: int = 0
    global_attn_every_n_layers: int = 3  # layers 0, n, 2n, ... see the whole document
    window_radius_tokens: int = 64  # the others see |i - j| <= 64: 129 keys
    global_rope_theta: float = 10000.0  # base of the rotary angles in global layers; default: that of init_from, else 10000
    local_rope_theta: float = 10000.0  # and in local layers; default: that of init_from, else 10000
    attention_output_dropout: float = 0.1  # after attention's Wo; the only dropout
    # sigma of the first weights; default: sqrt(2 / (5 hidden_size))
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0  # they are cut at so many sigma

    def __post_init__(self) -> None:
        check_settings(self)
        if self.positions == "learned" and (self.global_rope_theta, self.local_rope_theta) != (
            1e4,
            1e4,
        ):
            raise ConfigError(
                "a RoPE theta has no effect on positions learned. Leave global_rope_theta and"
                " local_rope_theta out, or use positions: rope."
            )

    @property
    def phase_texts(self) -> dict[str, str]:
        """What a phase may change, for people: a column of a table and its cell."""
        if self.positions == "learned":
            return {}
        return {
            "RoPE theta": f"{self.global_rope_theta:,.0f}",
            "of local layers": f"{self.local_rope_theta:,.0f}",
        }

    @property
    def facts(self) -> dict[str, str]:
        """The shape, for people: name and value, as a model card shows them."""
        window = 2 * self.window_radius_tokens + 1
        return {
            "layers": (
                f"{self.num_hidden_layers}, 1 of {self.global_attn_every_n_layers} global, the"
                f" others see {window} tokens"
            ),
            "width, heads": f"{self.hidden_size}, {self.num_attention_heads}",
            "vocabulary": f"{self.vocab_size:,}",
            **self.phase_texts,
        }

    def growth(self) -> GrowthRules:
        """How a larger model takes over this one's weights."""
        # rope learns no table
        free: tuple[str, ...] = _FREE
        if self.positions == "rope":
            free = (*_FREE, "max_position_embeddings")
        kinds = tuple(
            "local" if self.is_local(layer) else "global" for layer in range(self.num_hidden_layers)
        )
        final_norm = None
        if self.norm_place == "pre":
            final_norm = "model.final_norm."
        return GrowthRules(
            axes=AXES,
            grows=GROWS,
            free=free,
            layer_kinds=kinds,
            uncut={"num_attention_heads": self.head_width},
            derived={"attention_head_width": self.head_width},
            final_norm=final_norm,
        )

    def without_effect(self, given: Callable[[str], bool], *, longest_tokens: int) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each.

        given: whether the run file has a setting of this name
        longest_tokens: of a document, in any phase
        """
        if self.global_attn_every_n_layers == 1:
            for name in ("window_radius_tokens", "local_rope_theta"):
                if given(name):
                    yield (
                        f"model.{name} has no effect: with global_attn_every_n_layers 1 no layer is"
                        " local."
                    )
        elif self.num_hidden_layers > 1 and self.window_radius_tokens >= longest_tokens - 1:
            yield (
                f"model.window_radius_tokens {self.window_radius_tokens} reaches over every"
                f" document of at most {longest_tokens:,} tokens: no layer is local."
            )


# what a model may be given anew with the same weights; all other settings must be the source's
_FREE = (
    "global_attn_every_n_layers",
    "window_radius_tokens",
    "global_rope_theta",
    "local_rope_theta",
    "attention_output_dropout",
    "norm_eps",
    "initializer_range",
    "initializer_cutoff_factor",
)


class ModernBertForMaskedLM(PackedEncoder):
    """Packed tokens -> hidden states, and the head and decoder that masked language modelling asks for."""
