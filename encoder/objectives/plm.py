"""Permutation language modelling (XLNet): targets are predicted one after another, in an order that chance gives.

    text                 a  b  c  d  e  f  <sep> <cls>       c and e are targets, e before c in the order
    e is predicted from  a  b     d     f                    (and from <sep> and <cls> where they come before it)
    c is predicted from  a  b     d  e  f

Tokens are laid as they are: nothing is masked, nor seen by the stream that predicts it. Who sees whom is two ranks a token,
drawn on the device from the batch's token keys, so that the same row has the same order anywhere. About one of K = 6 tokens is a
target (mask_share), in spans of one to five tokens that begin where a word does. Yang et al. 2019, 2.2 and 2.3; zihangdai/xlnet,
data_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.tokenizer_json import Frame
from encoder.nn.heads import TokenDecoder
from encoder.nn.loss import cross_entropy_sum
from encoder.nn.two_streams import ReadingOrder
from encoder.objectives.contract import (
    MaskedRow,
    MaskShare,
    ModelShape,
    ObjectiveFacts,
    PairRule,
    RowTargets,
    Stretch,
    frame_text,
)
from encoder.objectives.words import WordEdges

PLM = "plm"  # the loss term
FRAME_TOKENS = 2  # <sep> <cls>
CLS_SEGMENT = 2
HELD_OUT_SHARE = 0.166  # 85 of 512
# odd: two draws from one token key, and neither is that of a dropout
_ORDER = 0x2545F4914F6CDD1D
_DIRECTION = -0x61C8864680B583EB


@dataclass(frozen=True, kw_only=True)
class PlmConfig:
    """Which tokens are predicted, and in what order."""

    STORED_MODELS: ClassVar[tuple[str, ...]] = ()
    model_needs: ClassVar[Mapping[str, int]] = {"query_stream": True}
    frame: ClassVar[Frame | None] = "end"  # of the shards' documents
    target_text: ClassVar[str] = "predicted token"

    mask_share: float = 0.166  # of the text: 85 of 512, the paper's K = 6
    context_tokens: int = 6  # text that a span takes for each of its tokens, itself included
    longest_span: int = 5  # tokens; lengths n have p(n) ~ 1/n
    word_starts: bool = True  # a span begins where a word does
    block_tokens: int = 256  # permuted by themselves; a block sees all of those before it
    # both: half of the documents are read from their end (bi_data)
    directions: Literal["both", "forward"] = "both"
    # a longer document is read in segments of so many tokens, where they have a memory
    segment_tokens: int = 512
    # of a segment: the states of so many tokens before it, without gradient; 0: a document is one segment
    memory_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mask_share < 1:
            raise ConfigError(
                f"mask_share {self.mask_share} must lie between 0 and 1. XLNet uses 0.166."
            )
        for name in ("context_tokens", "longest_span", "block_tokens", "segment_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; needed: at least 1.")
        if self.memory_tokens < 0:
            raise ConfigError(
                f"memory_tokens is {self.memory_tokens}; needed: 0 (no memory) or more."
            )
        if self.memory_tokens and self.segment_tokens % self.block_tokens:
            down = max(1, self.segment_tokens // self.block_tokens) * self.block_tokens
            raise ConfigError(
                f"segment_tokens {self.segment_tokens:,} is not a whole number of blocks of"
                f" {self.block_tokens:,}. Nearest: {down:,}, {down + self.block_tokens:,}."
            )

    @property
    def task_text(self) -> str:
        """What is learned, for people."""
        return f"tokens in an order that chance gives, {self.mask_share:.0%} of the text"

    @property
    def pairs(self) -> PairRule | None:
        """Its documents are no pairs of sentences."""
        return None

    @property
    def needs_word_edges(self) -> bool:
        """Whether build() must know where words begin."""
        return self.word_starts

    @property
    def needs_unused_ids(self) -> bool:
        """No token is replaced by another one."""
        return False

    @property
    def asks_every_document(self) -> bool:
        """Whether no document is without a target: a text of three tokens is."""
        return False

    def check_documents(self, *, longest_tokens: int) -> None:
        """A memory has something to remember. Raises ConfigError.

        longest_tokens: of a document, in any phase
        """
        if self.memory_tokens >= longest_tokens:
            raise ConfigError(
                f"objective.memory_tokens {self.memory_tokens:,} is not below the longest document,"
                f" {longest_tokens:,} tokens: a memory lies inside a document. Lower it, or raise"
                " max_tokens_per_document."
            )
        if self.memory_tokens and longest_tokens <= self.segment_tokens:
            raise ConfigError(
                f"objective.memory_tokens {self.memory_tokens:,}: documents of at most"
                f" {longest_tokens:,} tokens are one segment of {self.segment_tokens:,}, which has"
                " nothing before it. Raise max_tokens_per_document, lower"
                " objective.segment_tokens, or leave memory_tokens out."
            )

    def held_out(self, *, mask_share: float) -> PlmConfig:
        """The objective of the held-out loss: K = 6, whatever the masking rate of other objectives is."""
        return replace(
            self, mask_share=HELD_OUT_SHARE, context_tokens=6, longest_span=5, word_starts=False
        )

    def without_effect(self, given: Callable[[str], bool]) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each; `given`: whether the run file has one."""
        if not self.memory_tokens and given("segment_tokens"):
            yield "objective.segment_tokens has no effect: without memory a document is one segment."

    def check_models(self, model: ModelShape, stored: Mapping[str, ModelShape]) -> None:
        """Every model fits."""

    def expected_targets(
        self, *, documents: float, tokens: float, mask_share: float
    ) -> dict[str, float]:
        """Targets of each loss term in so many documents of so many tokens together."""
        return {PLM: mask_share * max(0.0, tokens - FRAME_TOKENS * documents)}

    def longest_stretch(self, *, longest_tokens: int, mask_share: float) -> Stretch:
        """A segment and its memory, or a whole document where there is none; a query row at each target."""
        tokens = longest_tokens
        if self.memory_tokens:
            tokens = min(tokens, self.segment_tokens)
        return Stretch(
            tokens, memory_tokens=self.memory_tokens, query_rows=mask_share * float(tokens)
        )

    def train_flops(
        self,
        model: ModelShape,
        stored: Mapping[str, ModelShape],
        *,
        lengths: Sequence[int] | np.ndarray,
        targets: Mapping[str, float],
    ) -> float:
        """Model FLOP of documents forward and backward.

        model: the trained one
        stored: none
        lengths: of the documents, in tokens
        targets: of each loss term
        """
        if not self.memory_tokens:
            return model.train_flops(lengths=lengths, targets=targets)
        # whole segments and the rest; each but the first of a document sees a memory
        lengths_S = np.asarray(lengths, dtype=np.int64)
        whole_S, rest_S = np.divmod(lengths_S, self.segment_tokens)
        memory = min(self.memory_tokens, self.segment_tokens)
        seen_S = np.maximum(0, -(-lengths_S // self.segment_tokens) - 1) * memory
        pairs_S = whole_S * self.segment_tokens**2 + rest_S**2
        with_memory_S = np.maximum(0, lengths_S - self.segment_tokens) * self.memory_tokens
        # model_needs asks for a model of two streams
        return cast(TwoStreamShape, model).train_flops(
            lengths=lengths,
            targets=targets,
            pairs=float((pairs_S + with_memory_S).sum()),
            remembered=float(seen_S.sum()),
        )

    def build(self, facts: ObjectiveFacts) -> PermutationLanguageModel:
        """Raises ConfigError if a special id is outside the vocabulary, or documents have another frame."""
        ids = facts.specials
        if ids.frame != self.frame:
            raise ConfigError(frame_text("the shards' tokenizer"))
        return PermutationLanguageModel(
            self,
            vocab_size=facts.vocab_size,
            special_ids=ids.all_special,
            share=facts.share,
            words=facts.words,
        )


class TwoStreamShape(ModelShape, Protocol):
    """What the objective's settings ask of a model's."""

    def train_flops(
        self,
        *,
        lengths: Sequence[int] | np.ndarray,
        targets: Mapping[str, float],
        pairs: float | None = None,
        remembered: float = 0.0,
    ) -> float:
        """Model FLOP of documents forward and backward.

        lengths: of the documents, in tokens
        targets: by loss term
        pairs: of rows and keys
        remembered: tokens of memories
        """


class TwoStreamModel(Protocol):
    """What the loss asks of a model."""

    def predicted_states(self, batch: TokenBatch, targets: Targets, order: ReadingOrder) -> Tensor:
        """x_MC of the query stream.

        batch: the micro-batch
        targets: where the query stream stands
        order: who sees whom
        """

    def token_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """States of the query stream, and the decoder."""


class PermutationLanguageModel:
    """The objective of a phase. Its rows are the clean ones: only places and values of the targets are drawn there."""

    has_segments = False
    scored_terms: tuple[str, ...] = ()
    terms = (PLM,)
    pairs: PairRule | None = None

    def __init__(
        self,
        config: PlmConfig,
        *,
        vocab_size: int,
        special_ids: Sequence[int],
        share: MaskShare | None = None,
        words: WordEdges | None = None,
    ) -> None:
        """config: its settings
        vocab_size: the tokenizer's
        special_ids: of tokens that are never targets
        share: a phase's own, instead of the settings'
        words: where words begin, where the settings ask for it
        """
        assert words is not None or not config.word_starts, "word starts need the word edges"
        if max(special_ids, default=0) >= vocab_size:
            raise ConfigError(
                f"special id {max(special_ids)} is outside the vocabulary of {vocab_size:,}. Use"
                " the tokenizer's own vocab_size, or larger."
            )
        self.config = config
        self.share = share or MaskShare(start=config.mask_share)
        self._words = words if config.word_starts else None
        self._may_be_V = np.ones(vocab_size, dtype=bool)
        self._may_be_V[list(special_ids)] = False
        weights = 1.0 / np.arange(1, config.longest_span + 1)
        self._cumulative = (np.cumsum(weights) / weights.sum()).tolist()

    def mask(
        self,
        ids: np.ndarray,
        generator: np.random.Generator,
        *,
        lengths: Sequence[int] = (),
        phase_tokens: int = 0,
    ) -> MaskedRow:
        """One row, as it is, with its targets.

        ids: int64 [T], not changed
        generator: keyed by the row's address
        lengths: of the row's documents, each with <sep> <cls> at its end
        phase_tokens: tokens of the phase before this row
        """
        share = self.share.at(phase_tokens)
        may_be_T = self._may_be_V[ids]
        starts_T = np.ones(len(ids), dtype=bool)
        if self._words is not None:
            starts_T[1:] = np.diff(self._words.words(ids)) > 0

        found: list[int] = []
        first = 0
        for length in lengths or (len(ids),):
            text = max(0, length - FRAME_TOKENS)
            for begin, end, number in blocks_of_text(
                text, block_tokens=self.config.block_tokens, share=share
            ):
                own = slice(first + begin, first + end)
                places = span_places(
                    starts_T[own].tolist(),
                    may_be_T[own].tolist(),
                    number,
                    generator.random,
                    cumulative=self._cumulative,
                    context_tokens=self.config.context_tokens,
                )
                found += [first + begin + place for place in places]
            first += length
        index = np.array(found, dtype=np.int64)
        return MaskedRow(ids=ids.copy(), targets={PLM: RowTargets(index, ids[index])})

    def capacity(self, term: str, tokens: int) -> int:
        """The most that there can be: share n + 1/2 of a text of n tokens, which is at least 1/2, and two tokens more."""
        share = self.share.highest
        return min(tokens, math.ceil(tokens * max(share, 2 * share / (1 + 4 * share))))

    def loss(self, model: TwoStreamModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """Sums of -log p(target), each from the tokens before it in the order, in fp32 (fp64 for fp64 weights)."""
        targets = batch.targets[PLM]
        x_MC = model.predicted_states(batch, targets, self.order(batch))
        return {PLM: cross_entropy_sum(*model.token_decoder(x_MC), targets.value_M)}

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Every second token of a document."""
        index_M = torch.arange(1, len(ids_T), 2)
        targets = Targets(index_M=index_M, value_M=ids_T[index_M], count=len(index_M))
        return {PLM: targets}

    def order(self, batch: TokenBatch) -> ReadingOrder:
        """How the documents of a micro-batch are read: a function of its token keys, documents and targets."""
        config = self.config
        laid = _lay(batch, both=config.directions == "both")
        targets = batch.targets[PLM]
        is_target_T = torch.zeros_like(batch.ids_T).index_add(
            0, targets.index_M, (targets.value_M >= 0).to(torch.int64)
        )

        # blocks are counted in the order of reading: backwards the last one comes first
        block_T = laid.number_of(config.block_tokens)
        group_T = laid.document_T * (len(batch.ids_T) + 1) + block_T
        rank_T = rank_in_group(batch.token_key_T * _ORDER, group_T)
        key_rank_T, query_rank_T = two_ranks(
            rank_T,
            block_T,
            is_target_T=is_target_T > 0,
            is_functional_T=laid.is_frame_T,
            # the last block of a document may hold its frame beside a whole block of text
            block_tokens=config.block_tokens + FRAME_TOKENS,
        )
        stretch_T = torch.zeros_like(block_T)
        if config.memory_tokens:
            stretch_T = laid.number_of(config.segment_tokens)
        return ReadingOrder(
            place_T=laid.place_T,
            stream_T=laid.stream_T,
            stretch_T=stretch_T,
            segment_T=laid.is_cls_T.to(torch.int64) * CLS_SEGMENT,
            key_rank_T=key_rank_T,
            query_rank_T=query_rank_T,
            memory_tokens=config.memory_tokens,
        )


# where targets are ---------------------------------------------------------------------------------------------------


def blocks_of_text(
    tokens: int, *, block_tokens: int, share: float
) -> Iterator[tuple[int, int, int]]:
    """(begin, end, targets) of each block of a text; the targets of all blocks are round(share tokens)."""
    for begin in range(0, tokens, block_tokens):
        end = min(begin + block_tokens, tokens)
        yield begin, end, round(share * end) - round(share * begin)


def span_places(
    starts: Sequence[bool],
    may_be: Sequence[bool],
    number: int,
    uniform: Callable[[], float],
    *,
    cumulative: Sequence[float],
    context_tokens: int,
) -> list[int]:
    """Places of a block's targets, ascending: spans with room around them, then single tokens up to the number.

    A span of n tokens takes context_tokens * n of the text: l before it, the rest behind. It goes on to the next start of a
    word. One that would touch the block's end is dropped, and is the last. As zihangdai/xlnet has it (data_utils.py,
    _sample_mask), whose spans count tokens, not words.

    starts: whether a token begins a word
    may_be: whether it may be a target
    number: of targets; fewer where fewer may be
    uniform: draws from [0, 1)
    cumulative: of the chances of lengths 1, 2, ...
    context_tokens: for each token of a span
    """
    size = len(starts)
    number = min(number, sum(may_be))
    taken = [False] * size
    count = at = 0
    while at < size and count < number:
        drawn = uniform()
        length = next((n for n, c in enumerate(cumulative, 1) if drawn < c), len(cumulative))
        length = min(length, number - count)
        context = length * context_tokens
        before = int(uniform() * context)
        begin = at + before
        while begin < size and not starts[begin]:
            begin += 1
        end = begin + length
        if end >= size:
            break
        for place in range(begin, end):
            taken[place] = may_be[place]
            count += may_be[place]
        at = end + context - before
    while count < number:
        place = int(uniform() * size)
        if may_be[place] and not taken[place]:
            taken[place] = True
            count += 1
    return [place for place in range(size) if taken[place]]


# who sees whom -------------------------------------------------------------------------------------------------------


def two_ranks(
    rank_T: Tensor,
    block_T: Tensor,
    *,
    is_target_T: Tensor,
    is_functional_T: Tensor,
    block_tokens: int,
) -> tuple[Tensor, Tensor]:
    """key_rank_T and query_rank_T: query i sees key j where key_rank_j < query_rank_i.

    Within a block: text that is no target is seen by all, and sees what all see; a target, in both streams, sees that and the
    targets and functional tokens of lower rank; a functional token also itself. A block sees all of the blocks before it.

    rank_T: of each token in the order of its block
    block_T: the number of its block
    is_target_T, is_functional_T: bool; a functional token is <sep> or <cls>
    block_tokens: more than any rank of a block that another follows
    """
    offset_T = block_T * (block_tokens + 1)
    ordered_T = is_target_T | is_functional_T
    key_rank_T = offset_T + torch.where(ordered_T, rank_T, -1)
    query_rank_T = offset_T + torch.where(ordered_T, rank_T, 0) + is_functional_T.to(torch.int64)
    return key_rank_T, query_rank_T


def rank_in_group(key_T: Tensor, group_T: Tensor) -> Tensor:
    """The place of each token among those of its group by ascending key, from 0; int64."""
    by_key_T = key_T.argsort(stable=True)
    order_T = by_key_T[group_T[by_key_T].argsort(stable=True)]
    sorted_T = group_T[order_T]
    # less the place of the group's first
    place_T = torch.arange(len(key_T), device=key_T.device)
    place_T = place_T - torch.searchsorted(sorted_T, sorted_T)
    return torch.empty_like(place_T).index_copy(0, order_T, place_T)


@dataclass(frozen=True, kw_only=True)
class _Laid:
    """The documents of a micro-batch, a number a token: int64 or bool [T]."""

    document_T: Tensor
    inside_T: Tensor  # place in the document, as it is laid
    text_T: Tensor  # tokens of the document's text
    backwards_T: Tensor
    place_T: Tensor  # in the text; read backwards its <sep> <cls> stand before it, at -1 and -2
    stream_T: Tensor  # in the order of reading
    is_frame_T: Tensor
    is_cls_T: Tensor

    def number_of(self, tokens: int) -> Tensor:
        """The number, in the order of reading, of the stretch of so many tokens that each is in; the frame is in the last."""
        last_T = ((self.text_T - 1).clamp(min=0)) // tokens
        number_T = self.inside_T.minimum((self.text_T - 1).clamp(min=0)) // tokens
        number_T = torch.where(self.backwards_T, last_T - number_T, number_T)
        return torch.where(self.is_frame_T, last_T, number_T)


def _lay(batch: TokenBatch, *, both: bool) -> _Laid:
    """Of each document a text and <sep> <cls> behind it; with `both` half of them are read from the end."""
    ends_S = batch.cu_seqlens_S1[1:].to(torch.int64)
    inside_T = batch.positions_T.to(torch.int64)
    place_T = torch.arange(len(inside_T), device=inside_T.device)
    document_T = torch.searchsorted(ends_S, place_T, right=True)
    text_T = batch.cu_seqlens_S1.diff().to(torch.int64)[document_T] - FRAME_TOKENS
    text_T = text_T.clamp(min=0)
    is_frame_T = inside_T >= text_T

    # a document's direction is a draw from the key of its first token
    backwards_T = torch.zeros_like(is_frame_T)
    if both:
        backwards_T = batch.token_key_T[place_T - inside_T] * _DIRECTION < 0
    from_end_T = text_T - 1 - inside_T
    return _Laid(
        document_T=document_T,
        inside_T=inside_T,
        text_T=text_T,
        backwards_T=backwards_T,
        place_T=torch.where(backwards_T & is_frame_T, from_end_T, inside_T),
        stream_T=torch.where(backwards_T & ~is_frame_T, from_end_T, inside_T),
        is_frame_T=is_frame_T,
        is_cls_T=inside_T == text_T + 1,
    )
