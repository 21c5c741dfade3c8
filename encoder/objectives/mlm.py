"""Masked language modelling: some tokens are masked, replaced or kept, and all of those are to be predicted.

Each token draws u ~ U(0, 1), p = mask_share, as in the released ModernBERT (fact sheet 3.6; Devlin et al. 2018, 3.1):

    0 ------------------- 0.8 p ------- 0.9 p ------- p --------------------------- 1
      [MASK]                    random id     kept        not predicted

With whole words each word draws whether it is predicted (the share of the tokens is p again), and each of its tokens, of
another draw, how it is shown (Devlin et al.'s later models).

With a `mask_count` the number of predicted tokens of each document is exact (masking.py), and each of them draws how it is
shown. docs/masking.md has the settings of each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.tokenizer_json import Frame
from encoder.nn.heads import TokenDecoder
from encoder.nn.loss import cross_entropy_sum
from encoder.objectives.contract import (
    MaskedRow,
    MaskShare,
    ModelShape,
    ObjectiveFacts,
    PairRule,
    RowTargets,
    Stretch,
)
from encoder.objectives.masking import LONGEST_SPAN, Count, ExactChoice, Spans
from encoder.objectives.words import WordEdges

# Variance of a row's count of predicted tokens over that of single tokens: mean squared over mean
# length of its words. Rows of 16,384 have 1.2 to 1.5, the worst of 659 rows (web, books, science,
# code; ModernBERT's vocabulary) 4.1, none over 8
WORDS_VARIANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """Which share of the tokens is predicted, and how they are shown."""

    STORED_MODELS: ClassVar[tuple[str, ...]] = ()  # the loss asks no other model

    mask_share: float = 0.3  # of the tokens that may be masked
    random_share: float = 0.1  # of the predicted ones: shown as a random id
    keep_share: float = 0.1  # of the predicted ones: shown as they are
    # random ids are drawn from: used, tokens that text can hold; all, those and [unused12] and the like; vocabulary, every
    # id, special ones too (BERT); not_special, as all, with mask_special_tokens too (RoBERTa)
    random_tokens: Literal["used", "all", "vocabulary", "not_special"] = "used"
    # true: the released ModernBERT objective, [CLS] and [SEP] masked as well
    mask_special_tokens: bool = False
    whole_words: bool = False  # true: all tokens of a word are predicted, or none
    # predicted tokens: bernoulli, each draws; else of each document of n: round(p n), at least 1 (BERT, ALBERT, ELECTRA);
    # round_at_random, int(p n + u) (RoBERTa); floor, int(p n) (MiniRoBERTa)
    mask_count: Count = "bernoulli"
    # n counts [CLS] and [SEP], too; false: only tokens that may be masked
    count_special_tokens: bool = True
    max_predicted_tokens: int | None = None  # of a document; BERT: 20 at 128; default: no limit
    # runs of tokens, or of words: ngram, p(k) ~ 1/k (ALBERT); geometric, p(k) ~ 0.8^k, shown alike (SpanBERT)
    spans: Spans = "none"
    longest_span: int | None = None  # tokens or words; default: 3 of ngram, 10 of geometric
    # times logsumexp(logits)^2, added to a position's loss in training; PaLM: 1e-4
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.mask_share < 1:
            raise ConfigError(
                f"mask_share {self.mask_share} must lie between 0 and 1. ModernBERT uses 0.3, BERT"
                " 0.15."
            )
        if not (
            0 <= self.random_share
            and 0 <= self.keep_share
            and self.random_share + self.keep_share <= 1
        ):
            raise ConfigError(
                f"random_share {self.random_share} and keep_share {self.keep_share} are shares of"
                " the predicted tokens: each at least 0, together at most 1."
            )
        self._check_count()
        if not 0 <= self.z_loss_weight < math.inf:
            raise ConfigError(
                f"z_loss_weight {self.z_loss_weight} must be at least 0. 0 is without it, PaLM uses"
                " 1e-4."
            )

    def _check_count(self) -> None:
        if self.spans != "none" and self.mask_count == "bernoulli":
            raise ConfigError(
                f"spans {self.spans} need a number of tokens to predict. Set mask_count: round, as"
                " ALBERT has it."
            )
        if self.max_predicted_tokens is not None and self.mask_count == "bernoulli":
            raise ConfigError(
                f"max_predicted_tokens {self.max_predicted_tokens} needs a number of tokens to"
                " predict. Set mask_count: round, as BERT has it."
            )
        if self.max_predicted_tokens is not None and self.max_predicted_tokens < 1:
            raise ConfigError(
                f"max_predicted_tokens {self.max_predicted_tokens} must be at least 1; leave it out"
                " for no limit."
            )
        if self.longest_span is not None and not 1 <= self.longest_span <= MOST_SPAN:
            raise ConfigError(f"longest_span {self.longest_span} must be 1 to {MOST_SPAN}.")

    # least values of the model's settings
    model_needs: ClassVar[Mapping[str, int]] = {}
    frame: ClassVar[Frame | None] = None  # documents may have any
    target_text: ClassVar[str] = "masked token"

    @property
    def task_text(self) -> str:
        """What is learned, for people."""
        return f"masked tokens, {self.mask_share:.0%} of the text"

    @property
    def pairs(self) -> PairRule | None:
        """How the loader makes pairs of sentences of documents: it does not."""
        return None

    @property
    def needs_word_edges(self) -> bool:
        """Whether build() must know where words begin."""
        return self.whole_words

    @property
    def needs_unused_ids(self) -> bool:
        """Whether build() must know the ids that no text has."""
        return self.random_tokens == "used"

    @property
    def asks_every_document(self) -> bool:
        """Whether no document is without a predicted token."""
        return self.mask_count == "round"

    def check_documents(self, *, longest_tokens: int) -> None:
        """Any length does."""

    def held_out(self, *, mask_share: float) -> MlmConfig:
        """The objective of the held-out loss: the same for all models."""
        return replace(
            self,
            mask_share=mask_share,
            mask_special_tokens=False,
            whole_words=False,
            random_tokens="all",
            mask_count="bernoulli",
            max_predicted_tokens=None,
            spans="none",
        )

    def without_effect(self, given: Callable[[str], bool]) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each; `given`: whether the run file has one."""
        if self.mask_count == "bernoulli" and given("count_special_tokens"):
            yield (
                "objective.count_special_tokens has no effect: with mask_count bernoulli no token"
                " is counted."
            )
        elif self.mask_special_tokens and not self.count_special_tokens:
            yield (
                "objective.count_special_tokens false has no effect: with mask_special_tokens they"
                " may be masked, and are counted."
            )
        if self.spans == "none" and given("longest_span"):
            yield "objective.longest_span has no effect: spans is none."
        if (
            self.mask_special_tokens
            and self.random_tokens in ("used", "all")
            and given("random_tokens")
        ):
            yield (
                "objective.random_tokens has no effect: with mask_special_tokens ids are drawn as"
                " for the released ModernBERT. vocabulary and not_special have one."
            )

    def check_models(self, model: ModelShape, stored: Mapping[str, ModelShape]) -> None:
        """Every model fits."""

    def expected_targets(
        self, *, documents: float, tokens: float, mask_share: float
    ) -> dict[str, float]:
        """Targets of each loss term in so many documents of so many tokens together."""
        return {MLM: mask_share * tokens}

    def longest_stretch(self, *, longest_tokens: int, mask_share: float) -> Stretch:
        """A document sees all of itself."""
        return Stretch(longest_tokens)

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
        return model.train_flops(lengths=lengths, targets=targets)

    def build(self, facts: ObjectiveFacts) -> MaskedLanguageModel:
        """Raises ConfigError if a special id is outside the vocabulary."""
        return MaskedLanguageModel.of(self, facts)


MLM = "mlm"  # the loss term
MOST_SPAN = 64  # units


class TokenModel(Protocol):
    """What the loss asks of a model."""

    training: bool

    def hidden_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC after the last norm, or x_MC of tokens at_M."""

    def token_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """The prediction head's output at some positions, and the decoder."""


def mlm_loss(
    model: TokenModel, batch: TokenBatch, *, x_TC: Tensor | None = None, z_loss_weight: float = 0.0
) -> LossTerm:
    """Sums of -log p(target) over the masked tokens of a micro-batch, in fp32 (fp64 for fp64 weights).

    model: packed tokens to hidden states, and a decoder
    batch: with targets `mlm`
    x_TC: the batch's hidden states, where another loss term has them already
    z_loss_weight: times logsumexp(logits)^2, added at each of them in training
    """
    # head and decoder, and the last layer behind its attention, see the masked positions alone: M of T
    targets = batch.targets[MLM]
    if x_TC is None:
        x_MC = model.hidden_states(batch, at_M=targets.index_M)
    else:
        x_MC = x_TC.index_select(0, targets.index_M)
    if not model.training:
        z_loss_weight = 0.0
    return cross_entropy_sum(
        *model.token_decoder(x_MC), targets.value_M, z_loss_weight=z_loss_weight
    )


M = TypeVar("M", bound="MaskedLanguageModel")


class MaskedLanguageModel:
    """The objective of masked language modelling.

    By default special tokens are neither predicted nor drawn as random replacements, which are uniform over all other ids but
    those in `unused`, and over these, too, with `random_tokens` all.
    With `mask_special_tokens` only padding is left out, and random ids are uniform over 0 to `mask_id` inclusive, as
    the released models were trained (fact sheet 3.6: in practice [0, 50284], the specials included). `random_tokens` vocabulary
    and not_special say otherwise with and without it.
    `share`: a phase's own, instead of the settings'. `words`: needed for whole words.
    """

    has_segments: bool = False
    scored_terms: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[str, ...]:
        """Its loss terms."""
        return (MLM,)

    @property
    def pairs(self) -> PairRule | None:
        """How the loader makes pairs of documents: it does not."""
        return None

    def __init__(
        self,
        config: MlmConfig,
        *,
        vocab_size: int,
        mask_id: int,
        pad_id: int,
        special_ids: tuple[int, ...],
        share: MaskShare | None = None,
        words: WordEdges | None = None,
        unused: Sequence[int] = (),
    ) -> None:
        assert words is not None or not config.whole_words, (
            "whole words need the vocabulary's word edges"
        )
        # what is never predicted: with mask_special_tokens only padding, else all special ids
        left_out = {*special_ids, pad_id, mask_id}
        if config.mask_special_tokens:
            left_out = {pad_id}
        if max(left_out | {mask_id}) >= vocab_size:
            raise ConfigError(
                f"special id {max(left_out | {mask_id})} is outside the vocabulary of"
                f" {vocab_size:,}. Use the tokenizer's own vocab_size, or larger."
            )

        self.config = config
        self.share = share or MaskShare(start=config.mask_share)
        self._words = words if config.whole_words else None
        self._exact = _exact_choice(config, self._words)
        self.mask_id = mask_id

        # by id, so that a row's mask is one look-up
        self._maskable_V = np.ones(vocab_size, dtype=bool)
        self._maskable_V[list(left_out)] = False

        self._replacements = _replacements(
            config,
            vocab_size=vocab_size,
            mask_id=mask_id,
            specials={*special_ids, pad_id, mask_id},
            unused=unused,
        )
        if len(self._replacements) == 0:
            raise ConfigError(
                f"a vocabulary of {vocab_size} holds special tokens only; needed: an ordinary"
                " token."
            )

    @classmethod
    def of(cls: type[M], config: MlmConfig, facts: ObjectiveFacts) -> M:
        """The objective of a phase, also of a class that adds loss terms to this one. Raises ConfigError."""
        ids = facts.specials
        return cls(
            config,
            vocab_size=facts.vocab_size,
            mask_id=ids.mask_id,
            pad_id=ids.pad_id,
            special_ids=ids.all_special,
            share=facts.share,
            words=facts.words,
            unused=facts.unused_ids,
        )

    def mask(
        self,
        ids: np.ndarray,
        generator: np.random.Generator,
        *,
        lengths: Sequence[int] = (),
        phase_tokens: int = 0,
    ) -> MaskedRow:
        """One row, masked. One number is drawn for every token, or for every word and then for every predicted token.

        ids: int64 [T], not changed
        generator: keyed by the row's address
        lengths: of the row's documents, each of which has a number of its own with a `mask_count`
        phase_tokens: tokens of the phase before this row, for a masking rate that changes
        """
        p = self.share.at(phase_tokens)
        hidden_share = 1.0 - self.config.random_share - self.config.keep_share

        # each branch gives the predicted places and u ~ U(0, p) of each, by which it is shown
        maskable_T = self._maskable_V[ids]
        if self._exact is not None:
            chosen = self._exact.choose(ids, maskable_T, lengths, generator, share=p)
            index = chosen.index_M
            u_M = generator.random(len(index)) * p
            if self.config.spans == "geometric":
                # a run's number picks its draw, so that a span is shown alike
                u_M = u_M[chosen.run_M]
        elif self._words is None:
            # u < p is a Bernoulli draw of p, and u is uniform below p where
            # it holds: one draw serves both
            u_T = generator.random(len(ids))
            index = np.flatnonzero((u_T < p) & maskable_T)
            u_M = u_T[index]
        else:
            # a draw for each word, and another for each of its tokens
            word_T = self._words.words(ids)
            u_W = generator.random(int(word_T[-1]) + 1)
            index = np.flatnonzero((u_W < p)[word_T] & maskable_T)
            u_M = generator.random(len(index)) * p

        # [MASK] below p * hidden_share, a random id below p (1 - keep_share), else as it is
        shown = ids.copy()
        shown[index[u_M < p * hidden_share]] = self.mask_id
        replaced = index[(u_M >= p * hidden_share) & (u_M < p * (1.0 - self.config.keep_share))]
        shown[replaced] = self._replacements[
            generator.integers(len(self._replacements), size=len(replaced))
        ]

        return MaskedRow(ids=shown, targets={MLM: RowTargets(index, ids[index])})

    def loss(self, model: TokenModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """Sums of -log p(target) over the predicted positions, in fp32 (fp64 for fp64 weights)."""
        return {MLM: mlm_loss(model, batch, z_loss_weight=self.config.z_loss_weight)}

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Every token of a document, also special ones."""
        return {MLM: Targets(index_M=torch.arange(len(ids_T)), value_M=ids_T, count=len(ids_T))}

    def capacity(self, term: str, tokens: int) -> int:
        """Mean plus six standard deviations at the highest share, at most `tokens`: exceeded once in 10^9.

        `round` has up to 4/3 of its mean in a document of 3 / (4 p) tokens and more (5 for a share of 0.15): shorter ones must
        be most of a row to exceed it.
        """
        # the count is Binomial(tokens, p) for single tokens, and wider
        # for words: variance as measured
        p = self.share.highest
        variance = WORDS_VARIANCE if self._words else 1.0
        room = tokens * p + 6.0 * math.sqrt(tokens * p * (1.0 - p) * variance)
        if self.config.mask_count == "round":
            room = tokens * p * 4.0 / 3.0
        if self.config.mask_count == "round_at_random":
            # documents have three tokens and more, the number of each a variance of 1/4 at most
            room = tokens * p + 6.0 * math.sqrt(tokens / 12.0)
        if self.config.mask_count == "floor":
            room = tokens * p
        return min(tokens, math.ceil(room))


def _exact_choice(config: MlmConfig, words: WordEdges | None) -> ExactChoice | None:
    if config.mask_count == "bernoulli":
        return None
    return ExactChoice(
        count=config.mask_count,
        counts_special=config.count_special_tokens,
        most_tokens=config.max_predicted_tokens,
        spans=config.spans,
        longest_span=config.longest_span or LONGEST_SPAN[config.spans],
        words=words,
    )


def _replacements(
    config: MlmConfig, *, vocab_size: int, mask_id: int, specials: set[int], unused: Sequence[int]
) -> np.ndarray:
    """The ids that random replacements are drawn from.

    config: its random_tokens and mask_special_tokens
    vocab_size: the tokenizer's
    mask_id: the last of them as the released ModernBERT was trained
    specials: ids of special tokens
    unused: ids that no text has
    """
    if config.random_tokens == "vocabulary":
        return np.arange(vocab_size)
    if config.random_tokens != "not_special" and config.mask_special_tokens:
        return np.arange(mask_id + 1)
    may_show_V = np.ones(vocab_size, dtype=bool)
    may_show_V[[*specials]] = False
    if config.random_tokens == "used":
        may_show_V[list(unused)] = False
    return np.flatnonzero(may_show_V)
