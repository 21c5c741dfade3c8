"""ModernBERT (Warner et al. 2024) with a masked-language head, on packed tokens, under Hugging Face's parameter names.

The defaults are ModernBERT's. Other encoders of the family are other settings of the same class: a BERT is norm_place
post, mlp gelu, positions learned, biases everywhere and only global layers (tests/unit/models/test_model_family.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.base.errors import ConfigError
from encoder.models.contract import Axis, GrowthRules, ParameterCounts
from encoder.models.flops import parameter_counts, train_flops
from encoder.nn.attend import AttentionRequest, Backend, check_backend_name, choose_backend
from encoder.nn.attention import Attention
from encoder.nn.block import Block, NormPlace
from encoder.nn.dropout import AddressedDropout
from encoder.nn.embedding import TokenEmbedding
from encoder.nn.fp8 import to_fp8_
from encoder.nn.heads import Decoder, PredictionHead, TokenDecoder
from encoder.nn.init import draw_, initial_values
from encoder.nn.mlp import FeedForward, Mlp
from encoder.nn.norm import Norm, make_norm
from encoder.nn.recompute import recomputed
from encoder.nn.rope import Positions, rope_table

# no model is larger, and a config made elsewhere must not keep a plan or an import busy for hours
MOST = {
    "vocab_size": 2**31,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**14,
    "max_position_embeddings": 2**31,
    "type_vocab_size": 2**20,
}


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """The shape of a model; the defaults are ModernBERT-base before its context extension."""

    # what a phase may change, with the same weights
    PHASE_SETTINGS: ClassVar[tuple[str, ...]] = ("global_rope_theta", "local_rope_theta")

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
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "global_attn_every_n_layers",
            "window_radius_tokens",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; needed: at least 1.")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} is {getattr(self, name):,}; needed: at most {most:,}.")
        for name in (
            "global_rope_theta",
            "local_rope_theta",
            "norm_eps",
            "initializer_range",
            "initializer_cutoff_factor",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; needed: more than 0, and finite."
                )
        if self.type_vocab_size < 0:
            raise ConfigError(
                f"type_vocab_size is {self.type_vocab_size}; needed: 0 (no segments) or more."
            )
        if not 0.0 <= self.attention_output_dropout < 1.0:
            raise ConfigError(
                f"attention_output_dropout is {self.attention_output_dropout}; needed: 0 to"
                " below 1."
            )
        if self.norm == "rmsnorm" and self.norm_bias:
            raise ConfigError(
                "norm_bias true with norm rmsnorm: an RMSNorm has no bias. Use norm_bias: false."
            )
        if self.positions == "learned" and (self.global_rope_theta, self.local_rope_theta) != (
            1e4,
            1e4,
        ):
            raise ConfigError(
                "a RoPE theta has no effect on positions learned. Leave global_rope_theta and"
                " local_rope_theta out, or use positions: rope."
            )
        self._check_head_width()

    def _check_head_width(self) -> None:
        even = 2 if self.positions == "rope" else 1  # rotary positions turn pairs
        if self.attention_head_width is not None:
            if self.attention_head_width < 1 or self.attention_head_width % even:
                raise ConfigError(
                    f"attention_head_width is {self.attention_head_width}; needed: at least 1, and"
                    " even where positions are rope, which turns pairs."
                )
        elif self.hidden_size % (even * self.num_attention_heads):
            width = even * self.num_attention_heads
            down = max(width, self.hidden_size // width * width)
            raise ConfigError(
                f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads gives a head"
                f" width of {self.hidden_size / self.num_attention_heads:g}; needed: a whole"
                " number, even where positions are rope, which turns pairs. Nearest hidden_size:"
                f" {down} or {down + width}; or set attention_head_width."
            )

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.attention_head_width or self.hidden_size // self.num_attention_heads

    @property
    def activation_width(self) -> int:
        """Numbers per token that a layer writes in the forward pass: what its time in memory is estimated by."""
        return 14 * self.hidden_size + 4 * self.intermediate_size

    @property
    def shape_text(self) -> str:
        """Layers, width and vocabulary, in one line."""
        layers = f"{self.num_hidden_layers} layer{'' if self.num_hidden_layers == 1 else 's'}"
        return (
            f"{layers} of {self.hidden_size}, {self.num_attention_heads} heads, vocabulary"
            f" {self.vocab_size:,}"
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
                f"{self.num_hidden_layers}, every {self.global_attn_every_n_layers}. global, the"
                f" others see {window} tokens"
            ),
            "width, heads": f"{self.hidden_size}, {self.num_attention_heads}",
            "vocabulary": f"{self.vocab_size:,}",
            **self.phase_texts,
        }

    def parameter_counts(self) -> ParameterCounts:
        """Trained numbers by place, from the shape alone."""
        return parameter_counts(self)

    def train_flops(
        self, *, lengths: Sequence[int] | np.ndarray, targets: Mapping[str, float]
    ) -> float:
        """Model FLOP of documents forward and backward.

        lengths: of the documents, in tokens
        targets: of each loss term; those of masked tokens reach head and decoder
        """
        return train_flops(self, lengths=lengths, decoded=targets.get("mlm", 0.0))

    def growth(self) -> GrowthRules:
        """How a larger model takes over this one's weights."""
        # rope learns no table
        free = (*_FREE, "max_position_embeddings") if self.positions == "rope" else _FREE
        kinds = tuple(
            "local" if self.is_local(layer) else "global" for layer in range(self.num_hidden_layers)
        )
        return GrowthRules(axes=_AXES, grows=_GROWS, free=free, layer_kinds=kinds)

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

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only its window."""
        return layer % self.global_attn_every_n_layers != 0


_V = Axis(name="vocab_size", length=lambda c: c.vocab_size)
_P = Axis(name="max_position_embeddings", length=lambda c: c.max_position_embeddings)
_S = Axis(name="type_vocab_size", length=lambda c: c.type_vocab_size)
_C = Axis(name="hidden_size", length=lambda c: c.hidden_size)
_HD = Axis(name="num_attention_heads", length=lambda c: c.num_attention_heads * c.head_width)
_QKV = Axis(name="num_attention_heads", length=_HD.length, blocks=lambda c: 3)
_F = Axis(name="intermediate_size", length=lambda c: c.intermediate_size)
_GATED = Axis(
    name="intermediate_size", length=_F.length, blocks=lambda c: 1 if c.mlp == "gelu" else 2
)

# the end of a parameter's name -> its axes; of a bias, the first one
_AXES: dict[str, tuple[Axis, ...]] = {
    "tok_embeddings": (_V, _C),
    "position_embeddings": (_P, _C),
    "token_type_embeddings": (_S, _C),
    "norm": (_C,),  # embeddings.norm, attn_norm, mlp_norm, final_norm, head.norm
    "attn.Wqkv": (_QKV, _C),
    "attn.Wo": (_C, _HD),
    "mlp.Wi": (_GATED, _C),
    "mlp.Wo": (_C, _F),
    "head.dense": (_C, _C),
    "decoder": (_V, _C),  # its weight only where it is not the embedding
}
# the sizes that may be larger in the new model
_GROWS = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
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


class ModernBertForMaskedLM(nn.Module):
    """Packed tokens -> hidden states, and the head and decoder that an objective asks for.

    `attention` is a word of encoder.nn.attend ("auto": the fastest that can run on the batch's device).
    """

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto", seed: int = 0) -> None:
        super().__init__()
        check_backend_name(attention)
        self.config = config
        self.attention = attention
        self.model = _Encoder(config)
        self.head = PredictionHead(
            width=config.hidden_size, bias=config.head_bias, norm=_norm(config)
        )
        self.decoder = Decoder(
            vocab_size=config.vocab_size,
            width=config.hidden_size,
            bias=config.decoder_bias,
            tied=config.tie_word_embeddings,
        )
        self.phase_settings: dict[str, float] = {}
        self.set_phase_({name: getattr(config, name) for name in config.PHASE_SETTINGS})
        self._draw = dict(
            seed=seed,
            initializer_range=config.initializer_range,
            cutoff_factor=config.initializer_cutoff_factor,
            layers=config.num_hidden_layers,
        )
        draw_(self)

    def forward(self, batch: TokenBatch) -> Tensor:
        """x_TC; under an engine this is replaced by the objective's loss."""
        return self.hidden_states(batch)

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """x_TC after the last norm."""
        backend = choose_backend(self.attention, self._situation(batch.ids_T.device)).backend
        return self.model(
            batch,
            backend=backend,
            global_theta=self.phase_settings["global_rope_theta"],
            local_theta=self.phase_settings["local_rope_theta"],
        )

    def logits(self, batch: TokenBatch) -> Tensor:
        """[T, V] at all positions: for proofs and for asking questions, not for training."""
        return self.decode(self.hidden_states(batch))

    def decode(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] -> logits [M, V]."""
        return F.linear(*self.token_decoder(x_MC))

    def token_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """Hidden states [M, C] -> the head's output, and the decoder's weight and bias: logits not yet computed."""
        return TokenDecoder(self.head(x_MC), self._decoder_weight, self.decoder.bias)

    def initial_values(self, name: str, shape: Sequence[int]) -> Tensor:
        """What a parameter starts with, whole: for an engine that builds the model in parts (ZeRO stage 3)."""
        return initial_values(name, shape, **self._draw)

    def hidden_matrices(self) -> dict[str, int]:
        """The matrices of the layers, by parameter: how many stand in it, one above another (query, key and value in Wqkv,
        both halves in a gated Wi)."""
        several = {"Wqkv": 3, "Wi": 1 if self.config.mlp == "gelu" else 2}
        return {
            f"model.layers.{name}": several.get(name.split(".")[-2], 1)
            for name, p in self.model.layers.named_parameters()
            if name.endswith(".weight") and p.ndim == 2
        }

    def set_phase_(self, settings: Mapping[str, float]) -> None:
        """Sets what a phase may change: the base of the rotary angles of global and local layers, from now on."""
        self.phase_settings = {name: float(value) for name, value in settings.items()}

    def compile_blocks_(self, *, backend: str = "inductor") -> None:
        """From now on the layers run compiled (regional: two small graphs shared by all layers, for each shape)."""
        for block in self.model.layers:
            block.compile_(backend=backend)

    def recompute_blocks_(self) -> None:
        """From now on a layer keeps its input alone for the backward, which computes the rest again."""
        self.model.recomputes = True

    def fp8_blocks_(self) -> None:
        """From now on the layers' linear maps compute in 8 bits (encoder.nn.fp8). Raises ConfigError for odd shapes."""
        to_fp8_(self.model.layers)

    def parameter_count(self) -> int:
        """Trained numbers; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def attention_reason(self, device: torch.device | None = None) -> str:
        """Which backend runs in training, why, and why others cannot: a line for the run's header."""
        return choose_backend(
            self.attention, self._situation(device or self._decoder_weight.device)
        ).reason

    def _situation(self, device: torch.device) -> AttentionRequest:
        mixed = torch.is_autocast_enabled(device.type)
        return AttentionRequest(
            device=device,
            head_width=self.config.head_width,
            training=torch.is_grad_enabled(),
            dtype=torch.get_autocast_dtype(device.type) if mixed else self._decoder_weight.dtype,
        )

    @property
    def _decoder_weight(self) -> Tensor:
        return (
            self.model.embeddings.tok_embeddings.weight
            if self.decoder.weight is None
            else self.decoder.weight
        )


class _Encoder(nn.Module):
    """Embedding, layers and, with norms before the sums, a final norm: the part that Hugging Face calls `model`."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TokenEmbedding(
            vocab_size=config.vocab_size,
            width=config.hidden_size,
            norm=_norm(config),
            segments=config.type_vocab_size,
            positions=config.max_position_embeddings if config.positions == "learned" else 0,
        )
        self.layers = nn.ModuleList(
            _block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.final_norm = _norm(config) if config.norm_place == "pre" else nn.Identity()
        self.recomputes = False

    def forward(
        self, batch: TokenBatch, *, backend: Backend, global_theta: float, local_theta: float
    ) -> Tensor:
        """[T] ids -> [T, C]. What depends on the documents alone is made here, once, and shared by all layers."""
        plan = backend.plan(
            batch.cu_seqlens_S1,
            max_seqlen=batch.max_seqlen,
            tokens=len(batch.ids_T),
            window_radius_tokens=self.config.window_radius_tokens,
        )
        turning = self.config.positions == "rope"
        ropes = {
            theta: (
                rope_table(batch.positions_T, theta=theta, head_width=self.config.head_width)
                if turning
                else None
            )
            for theta in {global_theta, local_theta}
        }
        x_TC = self.embeddings(batch.ids_T, batch.positions_T, batch.segments_T)
        run = recomputed if self.recomputes and torch.is_grad_enabled() else nn.Module.__call__
        for block in self.layers:
            x_TC = run(
                block,
                x_TC,
                plan=plan,
                rope=ropes[local_theta if block.local else global_theta],
                dropout_key_T=batch.token_key_T,
            )
        return self.final_norm(x_TC)


def _block(config: ModernBertConfig, layer: int) -> Block:
    # the embedding's norm stands right before the first layer: a second one would only multiply two weights
    doubled = layer == 0 and config.norm_place == "pre"
    return Block(
        norm_place=config.norm_place,
        local=config.is_local(layer),
        attn_norm=nn.Identity() if doubled else _norm(config),
        attn=Attention(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            head_width=config.head_width,
            bias=config.attention_bias,
        ),
        attn_dropout=AddressedDropout(
            width=config.hidden_size, layer=layer, p=config.attention_output_dropout
        ),
        mlp_norm=_norm(config),
        mlp=FeedForward(
            kind=config.mlp,
            width=config.hidden_size,
            intermediate=config.intermediate_size,
            bias=config.mlp_bias,
        ),
    )


def _norm(config: ModernBertConfig) -> nn.Module:
    return make_norm(config.norm, config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
