"""How large an encoder is and what a step costs, by counting; checked against the built model and torch's counter in tests.

Model FLOP are what the mathematics needs: two for every multiply-add of the matrix products and of attention, nothing
for norms, softmax, dropout or the optimizer. They are what MFU divides by the device's peak. Kernels do more, and that
lowers MFU: flash attention multiplies queries and keys again in backward (5 products instead of 4), blocked attention
computes whole blocks across the edge of a window or a document, padding runs through every matrix product, and
positions that only fill the capacity of the question run through head and decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from encoder.models.contract import ParameterCounts
from encoder.nn.mlp import Mlp, is_gated


class EncoderShape(Protocol):
    """The settings of an encoder of packed tokens that decide its size and its work."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width inside the feed-forward layer."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""

    @property
    def num_attention_heads(self) -> int:
        """Heads of a layer."""

    @property
    def mlp(self) -> Mlp:
        """The feed-forward layer: geglu, swiglu or gelu."""

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias."""

    @property
    def attention_bias(self) -> bool:
        """Whether Wqkv and Wo have a bias."""

    @property
    def mlp_bias(self) -> bool:
        """Whether Wi and Wo have a bias."""

    @property
    def head_bias(self) -> bool:
        """Whether the head's matrix has a bias."""

    @property
    def decoder_bias(self) -> bool:
        """Whether the decoder has a bias."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the decoder is the embedding."""

    @property
    def positions(self) -> str:
        """Where positions come in: rope or learned."""

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest document."""

    @property
    def type_vocab_size(self) -> int:
        """Segments that have an embedding."""

    @property
    def window_radius_tokens(self) -> int:
        """Of local layers: |i - j| at most this."""

    @property
    def norm_place(self) -> str:
        """Where norms stand: pre or post."""

    @property
    def embedding_norm(self) -> bool:
        """Whether the embedding has a norm."""

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows the last layer."""

    @property
    def head(self) -> str:
        """What the prediction head is."""

    @property
    def sentence_head(self) -> bool:
        """Whether sentence pairs have a head."""

    @property
    def position_offset(self) -> int:
        """Rows of the position table before that of the first token."""

    @property
    def embedding_width(self) -> int:
        """Features of a token in the tables, and of what is decoded."""

    @property
    def embedding_projection(self) -> bool:
        """Whether a dense layer brings the embedding to the stream's width."""

    @property
    def block_calls(self) -> tuple[int, ...]:
        """Of each block that runs, one after another, its number: shared ones come several times."""

    @property
    def head_width(self) -> int:
        """Features of one attention head."""

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only its window."""


def parameter_counts(config: EncoderShape) -> ParameterCounts:
    """Counts from the shape alone."""
    c = config
    width = config.hidden_size
    tokens = config.embedding_width
    # a block that several layers run through counts once
    blocks = len({*c.block_calls})
    # width of all heads together, which attention_head_width may make another than C
    inner = c.num_attention_heads * c.head_width
    norm = width * (1 + c.norm_bias)
    token_norm = tokens * (1 + c.norm_bias)
    positions = c.max_position_embeddings + c.position_offset
    # dense C x E with its bias, and a norm
    head = (c.head == "dense") * (width * tokens + c.head_bias * tokens + token_norm)
    # pooler C x C + C, and two labels, 2 C + 2
    sentence = c.sentence_head * (width * width + width + 2 * width + 2)
    return ParameterCounts(
        # scaled sinusoids learn one number
        embedding=tokens
        * (c.vocab_size + c.type_vocab_size + (c.positions == "learned") * positions)
        + (c.positions == "sinusoidal")
        + c.embedding_projection * (tokens * width + width),
        matrices=blocks * _matrix_numbers(c),
        biases=blocks
        * (
            c.attention_bias * (3 * inner + width)
            + c.mlp_bias * (_mlp_inputs(c) * c.intermediate_size + width)
        ),
        norms=norm
        * (2 * blocks - first_norm_is_doubled(c) + (c.norm_place == "pre" and c.final_norm))
        + c.embedding_norm * token_norm,
        head=head + sentence,
        decoder=c.decoder_bias * c.vocab_size + (not c.tie_word_embeddings) * c.vocab_size * tokens,
    )


def first_norm_is_doubled(config: EncoderShape) -> bool:
    """Whether the embedding's norm stands right before the first layer: a second one would only multiply two weights."""
    return config.norm_place == "pre" and config.embedding_norm and not config.embedding_projection


def attended_pairs(lengths: Sequence[int] | np.ndarray, radius: int | None) -> int:
    """(query, key) pairs inside documents of these lengths: all of them, or those with |i - j| <= radius.

    A document of n tokens has n^2; in a window of w = min(radius, n - 1) tokens to each side n (2w + 1), less the
    w (w + 1) / 2 keys that are missing at each end.
    """
    n = np.asarray(lengths, dtype=np.int64)
    w = n - 1
    if radius is not None:
        w = np.minimum(radius, n - 1)
    return int((n * (2 * w + 1) - w * (w + 1)).sum())


def train_flops(
    config: EncoderShape,
    *,
    lengths: Sequence[int] | np.ndarray,
    decoded: float,
    sentences: float = 0.0,
) -> float:
    """Model FLOP of documents of these lengths forward and backward: 3 x forward (Kaplan et al. 2020, section 2.1).

    Every layer at every token, also where the last one is computed for the positions that are decoded alone (encoder.nn.block).

    lengths: of the documents, in tokens
    decoded: positions that reach head and decoder
    sentences: texts that reach the pooler and the sentence head
    """
    # global layers score all pairs of a document, local ones those of the window
    calls = config.block_calls
    local = sum(config.is_local(block) for block in calls)
    pairs = (len(calls) - local) * attended_pairs(lengths, None) + local * attended_pairs(
        lengths, config.window_radius_tokens
    )

    # 2 FLOP for each number of the matrices and each token, as often as a block is called
    numbers = len(calls) * _matrix_numbers(config)
    if config.embedding_projection:
        numbers += config.embedding_width * config.hidden_size
    layers = 2.0 * numbers * int(np.sum(lengths, dtype=np.int64))

    # of the positions that are asked: the dense layer C x E, and the decoder E x V
    width = config.hidden_size
    decoder = (config.head == "dense") * width + config.vocab_size
    head = 2.0 * config.embedding_width * decoder * decoded
    head += 2.0 * width * (width + 2) * sentences
    # a pair costs query times key and weight times value: 2 products of 2 x head width in every head
    return 3.0 * (layers + head + 4.0 * config.num_attention_heads * config.head_width * pairs)


def _matrix_numbers(config: EncoderShape) -> int:
    """Of one layer: Wqkv, Wo, Wi, Wo."""
    attention = 4 * config.num_attention_heads * config.head_width
    return config.hidden_size * (attention + (_mlp_inputs(config) + 1) * config.intermediate_size)


def _mlp_inputs(config: EncoderShape) -> int:
    """Halves of Wi's output."""
    return 1 + is_gated(config.mlp)
