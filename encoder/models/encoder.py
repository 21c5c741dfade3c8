"""An encoder of packed tokens, assembled from the pieces of encoder.nn by its settings: what the model files share.

A model file (modernbert.py, bert.py) has the settings of a family with their defaults; the module that they build is here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.objective import Stretch
from encoder.base.units import counted
from encoder.models.contract import Axis, ModelConfig, ParameterCounts
from encoder.models.flops import (
    EncoderShape,
    first_norm_is_doubled,
    parameter_counts,
    train_flops,
)
from encoder.nn.attend import AttentionRequest, Backend, check_backend_name, choose_backend
from encoder.nn.attention import Attention
from encoder.nn.block import Block, NormPlace
from encoder.nn.dropout import AddressedDropout, key_of_call
from encoder.nn.embedding import TokenEmbedding
from encoder.nn.fp8 import to_fp8_
from encoder.nn.half import product_dtype
from encoder.nn.heads import Decoder, Pooler, PredictionHead, TokenDecoder
from encoder.nn.init import Initialization, draw_, drawn_later, initial_values
from encoder.nn.mlp import FeedForward, is_gated
from encoder.nn.norm import Norm, make_norm
from encoder.nn.recompute import recomputed
from encoder.nn.rope import rope_table

# no model is larger, and a config made elsewhere must not keep a plan or an import busy for hours
MOST = {
    "vocab_size": 2**31,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**14,
    "max_position_embeddings": 2**31,
    "type_vocab_size": 2**20,
    "position_offset": 2**31,
}
LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "global_attn_every_n_layers",
    "window_radius_tokens",
    "max_position_embeddings",
)
SENTENCE_LABELS = 2  # 0: B follows A; 1: it does not


class PackedSettings(EncoderShape, ModelConfig, Protocol):
    """What the module asks of its settings beside their shape."""

    @property
    def head_width(self) -> int:
        """Features of one attention head."""

    @property
    def norm(self) -> Norm:
        """layernorm or rmsnorm."""

    @property
    def norm_place(self) -> NormPlace:
        """Before a layer's halves, or after their sums."""

    @property
    def norm_eps(self) -> float:
        """Added to the variance."""

    @property
    def attention_head_width(self) -> int | None:
        """Features of one head; None: hidden_size over the heads."""

    @property
    def global_attn_every_n_layers(self) -> int:
        """Of which the first layer is global."""

    @property
    def embedding_dropout(self) -> float:
        """After the embedding's norm."""

    @property
    def attention_output_dropout(self) -> float:
        """After attention's Wo."""

    @property
    def mlp_output_dropout(self) -> float:
        """After the MLP's Wo."""

    @property
    def mlp_inner_dropout(self) -> float:
        """Between the MLP's matrices."""

    @property
    def initialization(self) -> Initialization:
        """The rule of the initial weights."""

    @property
    def initializer_range(self) -> float:
        """Their sigma."""

    @property
    def initializer_cutoff_factor(self) -> float:
        """They are cut at so many sigma."""


class EncoderSettings:
    """What follows from the settings of any such encoder; the fields are those of the class that inherits it."""

    # objectives that train all of it; None: all that it has the heads for
    TRAINED_BY: ClassVar[tuple[str, ...] | None] = None
    # whether its states become logits over the vocabulary
    predicts_tokens: ClassVar[bool] = True

    @property
    def head_width(self: PackedSettings) -> int:
        """Features of one head."""
        return self.attention_head_width or self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self: PackedSettings) -> int:
        """Features of a token in the tables, and of what is decoded: the stream's."""
        return self.hidden_size

    @property
    def embedding_projection(self) -> bool:
        """Whether a dense layer brings the embedding to the stream's width."""
        return False

    @property
    def block_calls(self: PackedSettings) -> tuple[int, ...]:
        """Of each block that runs, one after another, its number in `layers`: every layer is one of its own."""
        return tuple(range(self.num_hidden_layers))

    @property
    def activation_width(self: PackedSettings) -> int:
        """Numbers per token that a layer writes in the forward pass: what its time in memory is estimated by."""
        return 14 * self.hidden_size + 4 * self.intermediate_size

    def attention_bytes(self, stretch: Stretch, *, tokens: int, width: int, device: str) -> int:
        """None: kernels for packed documents keep no scores."""
        return 0

    @property
    def shape_text(self: PackedSettings) -> str:
        """Layers, width and vocabulary, in one line."""
        return (
            f"{counted(self.num_hidden_layers, 'layer')} of {self.hidden_size},"
            f" {counted(self.num_attention_heads, 'head')}, vocabulary {self.vocab_size:,}"
        )

    def parameter_counts(self: PackedSettings) -> ParameterCounts:
        """Trained numbers by place, from the shape alone."""
        return parameter_counts(self)

    def train_flops(
        self: PackedSettings, *, lengths: Sequence[int] | np.ndarray, targets: Mapping[str, float]
    ) -> float:
        """Model FLOP of documents forward and backward.

        lengths: of the documents, in tokens
        targets: of each loss term; those of masked tokens reach head and decoder, the others the sentence head
        """
        sentences = sum(count for term, count in targets.items() if term != "mlm")
        return train_flops(
            self,
            lengths=lengths,
            decoded=targets.get("mlm", 0.0),
            sentences=sentences if self.sentence_head else 0.0,
        )

    def is_local(self: PackedSettings, layer: int) -> bool:
        """Whether a layer sees only its window."""
        return layer % self.global_attn_every_n_layers != 0


def check_settings(config: PackedSettings) -> None:
    """Sizes, shares and head width are possible. Raises ConfigError."""
    for name in LEAST_ONE:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; needed: at least 1.")
    for name, most in MOST.items():
        if getattr(config, name) > most:
            raise ConfigError(f"{name} is {getattr(config, name):,}; needed: at most {most:,}.")
    for name in (
        *config.PHASE_SETTINGS,
        "norm_eps",
        "initializer_range",
        "initializer_cutoff_factor",
    ):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(
                f"{name} is {getattr(config, name)}; needed: more than 0, and finite."
            )
    if config.type_vocab_size < 0:
        raise ConfigError(
            f"type_vocab_size is {config.type_vocab_size}; needed: 0 (no segments) or more."
        )
    for name in (
        "embedding_dropout",
        "attention_output_dropout",
        "mlp_output_dropout",
        "mlp_inner_dropout",
    ):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(f"{name} is {getattr(config, name)}; needed: 0 to below 1.")
    if config.norm == "rmsnorm" and config.norm_bias:
        raise ConfigError(
            "norm_bias true with norm rmsnorm: an RMSNorm has no bias. Use norm_bias: false."
        )
    _check_head_width(config)


def _check_head_width(config: PackedSettings) -> None:
    # rotary positions turn pairs
    even = 1 + (config.positions == "rope")
    if config.attention_head_width is not None:
        if config.attention_head_width < 1 or config.attention_head_width % even:
            raise ConfigError(
                f"attention_head_width is {config.attention_head_width}; needed: at least 1, and"
                " even where positions are rope, which turns pairs."
            )
    elif config.hidden_size % (even * config.num_attention_heads):
        width = even * config.num_attention_heads
        # the nearest multiples of heads times 2 (or 1), at least one
        down = max(width, config.hidden_size // width * width)
        raise ConfigError(
            f"hidden_size {config.hidden_size} over {config.num_attention_heads} heads gives a head"
            f" width of {config.hidden_size / config.num_attention_heads:g}; needed: a whole"
            " number, even where positions are rope, which turns pairs. Nearest hidden_size:"
            f" {down} or {down + width}; or set attention_head_width."
        )


_V = Axis(name="vocab_size", length=lambda c: c.vocab_size)
_P = Axis(
    name="max_position_embeddings", length=lambda c: c.max_position_embeddings + c.position_offset
)
_S = Axis(name="type_vocab_size", length=lambda c: c.type_vocab_size)
C = Axis(name="hidden_size", length=lambda c: c.hidden_size)
_E = Axis(name="embedding_size", length=lambda c: c.embedding_width)
_HD = Axis(name="num_attention_heads", length=lambda c: c.num_attention_heads * c.head_width)
_QKV = Axis(name="num_attention_heads", length=_HD.length, blocks=lambda c: 3)
_F = Axis(name="intermediate_size", length=lambda c: c.intermediate_size)
_GATED = Axis(name="intermediate_size", length=_F.length, blocks=lambda c: 1 + is_gated(c.mlp))
ONE = Axis(name="one", length=lambda c: 1)
_LABELS = Axis(name="labels", length=lambda c: SENTENCE_LABELS)

# the end of a parameter's name -> its axes; of a bias, the first one
AXES: dict[str, tuple[Axis, ...]] = {
    "tok_embeddings": (_V, _E),
    "position_embeddings": (_P, _E),
    "token_type_embeddings": (_S, _E),
    "sinusoids": (ONE,),
    "embeddings.norm": (_E,),
    "embedding_projection": (C, _E),
    "head.norm": (_E,),
    "norm": (C,),  # attn_norm, mlp_norm, final_norm
    "attn.Wqkv": (_QKV, C),
    "attn.Wo": (C, _HD),
    "mlp.Wi": (_GATED, C),
    "mlp.Wo": (C, _F),
    "head.dense": (_E, C),
    "pooler.dense": (C, C),
    "nsp": (_LABELS, C),
    "decoder": (_V, _E),  # its weight only where it is not the embedding
}
# the sizes that may be larger in the new model
GROWS = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")


# (ids, positions, segments, dropout keys) of tokens -> their vectors [T, E]
Embed = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


class PackedBody(nn.Module):
    """Packed tokens -> hidden states: what a model has before any head. Who inherits it adds its heads and draws.

    `attention` is a word of encoder.nn.attend ("auto": the fastest that can run on the batch's device). A body that does not
    embed has no tables: it is given another's.
    """

    def __init__(
        self,
        config: PackedSettings,
        *,
        attention: str = "auto",
        seed: int = 0,
        embeds: bool = True,
    ) -> None:
        """config: the shape
        attention: the kernels
        seed: of the initial weights
        embeds: whether it has tables of its own
        """
        super().__init__()
        check_backend_name(attention)
        self.config = config
        self.attention = attention
        with drawn_later():
            self.model = _Encoder(config, embeds=embeds)
        self.phase_settings: dict[str, float] = {}
        self.set_phase_({name: getattr(config, name) for name in config.PHASE_SETTINGS})
        self.seed = seed

    def forward(self, batch: TokenBatch) -> Tensor:
        """x_TC; under an engine this is replaced by the objective's loss."""
        return self.hidden_states(batch)

    def hidden_states(
        self, batch: TokenBatch, *, embed: Embed | None = None, at_M: Tensor | None = None
    ) -> Tensor:
        """x_TC after the last norm, or x_MC of tokens at_M alone; `embed`: in place of its own embedding."""
        backend = choose_backend(
            self.attention, self._attention_request(batch.ids_T.device)
        ).backend
        return self.model(
            batch, backend=backend, thetas=self.phase_settings, embed=embed, at_M=at_M
        )

    def initial_values(self, name: str, shape: Sequence[int]) -> Tensor:
        """What a parameter starts with, whole: for an engine that builds the model in parts (ZeRO stage 3)."""
        if name.endswith("sinusoids.scale"):
            # as long as a drawn vector of deviation 1 / sqrt(C)
            return torch.full(tuple(shape), self.config.embedding_width**-0.5, device="cpu")
        values = initial_values(
            name,
            shape,
            seed=self.seed,
            initializer_range=self.config.initializer_range,
            cutoff_factor=self.config.initializer_cutoff_factor,
            layers=self.config.num_hidden_layers,
            rule=self.config.initialization,
        )
        if name.endswith("position_embeddings.weight"):
            values[: self.config.position_offset] = 0.0  # rows that no token meets
        return values

    def hidden_matrices(self) -> dict[str, int]:
        """The matrices of the layers, by parameter: how many stand in it, one above another (query, key and value in Wqkv,
        both halves in a gated Wi)."""
        # Muon orthogonalizes each matrix by itself, so it must know where one ends
        several = {"Wqkv": 3, "Wi": 1 + is_gated(self.config.mlp)}
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
            assert isinstance(block, Block)
            block.compile_(backend=backend)

    def recompute_blocks_(self) -> None:
        """From now on a layer keeps its input alone for the backward, which computes the rest again."""
        self.model.recomputes = True

    def fp8_blocks_(self) -> None:
        """From now on the blocks' linear layers compute in FP8 (encoder.nn.fp8). Raises ConfigError for odd shapes."""
        to_fp8_(self.model.layers)
        for block in self.model.layers:
            assert isinstance(block, Block)
            block.may_leave_out = False

    def parameter_count(self) -> int:
        """Trained numbers; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def attention_reason(self, device: torch.device | None = None) -> str:
        """Which backend runs in training, why, and why others cannot: a line for the run's header."""
        return choose_backend(
            self.attention, self._attention_request(device or self._first_weight.device)
        ).reason

    def _attention_request(self, device: torch.device) -> AttentionRequest:
        # under autocast the kernels meet its dtype, whatever the weights are
        return AttentionRequest(
            device=device,
            head_width=self.config.head_width,
            training=torch.is_grad_enabled(),
            dtype=product_dtype(device, self._first_weight.dtype),
        )

    @property
    def _first_weight(self) -> Tensor:
        """One that every body has; its values are not looked at."""
        return next(self.parameters())


class PackedEncoder(PackedBody):
    """The body, with the heads and the decoder that pretraining asks for."""

    def __init__(self, config: PackedSettings, *, attention: str = "auto", seed: int = 0) -> None:
        super().__init__(config, attention=attention, seed=seed)
        self.head = prediction_head(config)
        self.decoder = Decoder(
            vocab_size=config.vocab_size,
            width=config.embedding_width,
            bias=config.decoder_bias,
            tied=config.tie_word_embeddings,
        )
        if config.sentence_head:
            self.pooler = Pooler(width=config.hidden_size)
            self.nsp = nn.Linear(config.hidden_size, SENTENCE_LABELS)
        draw_(self)

    def logits(self, batch: TokenBatch) -> Tensor:
        """[T, V] at all positions: for proofs and for asking questions, not for training."""
        return self.decode(self.hidden_states(batch))

    def masked_states(self, batch: TokenBatch, index_M: Tensor) -> Tensor:
        """x_MC, from which the decoder tells what stood at masked tokens index_M."""
        return self.hidden_states(batch, at_M=index_M)

    def decode(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] -> logits [M, V]."""
        return F.linear(*self.token_decoder(x_MC))

    def token_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """Hidden states [M, C] -> the head's output, and the decoder's weight and bias: logits not yet computed."""
        return TokenDecoder(self.head(x_MC), self._decoder_weight, self.decoder.bias)

    def sentence_decoder(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] of texts' first tokens -> logits [M, 2] of the labels 0, B follows A, and 1."""
        assert self.config.sentence_head, "a model without sentence_head was asked about sentences"
        return self.nsp(self.pooler(x_MC))

    @property
    def _decoder_weight(self) -> Tensor:
        if self.decoder.weight is None:
            assert self.model.embeddings is not None, "who decodes by its embedding has one"
            return self.model.embeddings.tok_embeddings.weight
        return self.decoder.weight


class _Encoder(nn.Module):
    """Embedding, layers and, with norms before the sums, a final norm: the part that Hugging Face calls `model`."""

    def __init__(self, config: PackedSettings, *, embeds: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _embedding(config) if embeds else None
        self.embedding_projection: nn.Linear | None = None
        if config.embedding_projection:
            self.embedding_projection = nn.Linear(config.embedding_width, config.hidden_size)
        # a block that several layers run through stands here once: its weights have one name
        self.layers = nn.ModuleList(
            _block(config, number) for number in range(max(config.block_calls) + 1)
        )
        self.calls = _counted_calls(config.block_calls)
        # post: every layer ends in a norm already
        ends = config.norm_place == "pre" and config.final_norm
        self.final_norm: nn.Module = nn.Identity()
        if ends:
            self.final_norm = _norm(config)
        self.recomputes = False

    def forward(
        self,
        batch: TokenBatch,
        *,
        backend: Backend,
        thetas: Mapping[str, float],
        embed: Embed | None = None,
        at_M: Tensor | None = None,
    ) -> Tensor:
        """[T] ids -> [T, C], or [M, C]. What depends on the documents alone is made here, once, and shared by all layers.

        batch: the tokens
        backend: of attention
        thetas: of the rotary angles, by setting
        embed: in place of the embedding of its own
        at_M: tokens whose states are asked; None: all
        """
        plan = backend.plan(
            batch.cu_seqlens_S1,
            max_seqlen=batch.max_seqlen,
            tokens=len(batch.ids_T),
            window_radius_tokens=self.config.window_radius_tokens,
        )

        # a table for each theta, of the positions within documents; one where both are equal
        ropes: dict[float | None, Tensor | None] = {None: None}
        global_theta = local_theta = None
        if self.config.positions == "rope":
            global_theta, local_theta = thetas["global_rope_theta"], thetas["local_rope_theta"]
            ropes = {
                theta: rope_table(batch.positions_T, theta=theta, head_width=self.config.head_width)
                for theta in {global_theta, local_theta}
            }

        embed = embed or self.embeddings
        assert embed is not None, "a body without an embedding is given one"
        x_TC = embed(batch.ids_T, batch.positions_T, batch.segments_T, batch.token_key_T)
        if self.embedding_projection is not None:
            x_TC = self.embedding_projection(x_TC)
        # without gradients there is no backward to compute anything again for
        run = nn.Module.__call__
        if self.recomputes and torch.is_grad_enabled():
            run = recomputed
        for layer, (number, call) in enumerate(self.calls, start=1):
            block = self.layers[number]
            x_TC = run(
                block,
                x_TC,
                plan=plan,
                rope=ropes[local_theta if block.local else global_theta],
                dropout_key_T=key_of_call(batch.token_key_T, call),
                # no layer behind the last one attends to the others
                at_M=at_M if layer == len(self.calls) else None,
            )
        return self.final_norm(x_TC)


def _counted_calls(blocks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Of each call the block, and how often it was called before."""
    before: Counter[int] = Counter()
    calls = []
    for block in blocks:
        calls.append((block, before[block]))
        before[block] += 1
    return tuple(calls)


def _embedding(config: PackedSettings) -> TokenEmbedding:
    # positions begin behind the offset, so that many rows are never looked up
    rows = config.max_position_embeddings + config.position_offset
    dropout = AddressedDropout(
        width=config.embedding_width, layer=0, p=config.embedding_dropout, place="embedding"
    )
    return TokenEmbedding(
        vocab_size=config.vocab_size,
        width=config.embedding_width,
        norm=_norm(config, width=config.embedding_width)
        if config.embedding_norm
        else nn.Identity(),
        segments=config.type_vocab_size,
        positions=rows if config.positions == "learned" else 0,
        first_position=config.position_offset,
        sinusoids=config.positions == "sinusoidal",
        dropout=dropout if config.embedding_dropout else None,
    )


def _block(config: PackedSettings, layer: int) -> Block:
    doubled = layer == 0 and first_norm_is_doubled(config)
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
        mlp=_feed_forward(config, layer),
        mlp_dropout=AddressedDropout(
            width=config.hidden_size, layer=layer, p=config.mlp_output_dropout, place="mlp"
        ),
    )


def _feed_forward(config: PackedSettings, layer: int) -> FeedForward:
    inner_dropout = None
    if config.mlp_inner_dropout:
        inner_dropout = AddressedDropout(
            width=config.intermediate_size,
            layer=layer,
            p=config.mlp_inner_dropout,
            place="mlp_inner",
        )
    return FeedForward(
        kind=config.mlp,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        bias=config.mlp_bias,
        inner_dropout=inner_dropout,
    )


def prediction_head(config: PackedSettings) -> nn.Module:
    """Dense, activation and norm of a model that has them; nothing of one without."""
    if config.head == "none":
        return nn.Identity()
    return PredictionHead(
        width=config.hidden_size,
        out_width=config.embedding_width,
        bias=config.head_bias,
        norm=_norm(config, width=config.embedding_width),
        # gelu_tanh is that of BERT's own code, whose head computes it so, too
        activation="gelu_tanh" if config.mlp == "gelu_tanh" else "gelu",
    )


def _norm(config: PackedSettings, *, width: int | None = None) -> nn.Module:
    return make_norm(
        config.norm, width or config.hidden_size, eps=config.norm_eps, bias=config.norm_bias
    )
