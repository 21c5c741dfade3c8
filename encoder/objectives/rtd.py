"""Replaced-token detection: a generator fills masks in, and a discriminator says of every token whether it is the text's own.

    text             [CLS] the cat sat [SEP]
    generator sees   [CLS] the [MASK] sat [SEP]      mlm    cross entropy of `cat`               mean over masked tokens, weight 1
    draws            dog
    discriminator    [CLS] the dog sat [SEP]         rtd    yes or no: 0 0 1 0 0                 mean over all tokens, weight 50

A token that was drawn as it stood there counts as the text's own (Clark et al. 2020, section 3). Masks are ELECTRA's: 15 % of each
document, without replacement, of which 85 % become [MASK] and the others stay; its code draws with replacement, and mixes up the
ids of a place that it drew twice (google-research/electra, issue 41). No gradient passes the draw.

The noise of a draw is a function of the run's seed and the token's address, so it is the same on any ranks and micro-batches and
after any resume. What is drawn with it depends on the logits as well: it is the same up to their rounding (encoder/nn/sampling.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from encoder.base.batch import IGNORE, LossTerm, Targets, TokenBatch
from encoder.base.errors import ConfigError
from encoder.nn.heads import TokenDecoder
from encoder.nn.loss import drawn_cross_entropy_sum, yes_no_sum
from encoder.nn.sampling import Draws
from encoder.objectives.contract import MaskedRow, ObjectiveFacts, RowTargets
from encoder.objectives.masking import Count
from encoder.objectives.mlm import MLM, MaskedLanguageModel, MlmConfig

RTD = "rtd"  # the loss term


@dataclass(frozen=True, kw_only=True)
class RtdConfig(MlmConfig):
    """Masked tokens for the generator as in `mlm`, and for the discriminator every token; defaults of ELECTRA-small and base."""

    # a model of two networks has it
    model_needs: ClassVar[Mapping[str, int]] = {"generator_fraction": 0}

    mask_share: float = 0.15  # of the tokens that may be masked; ELECTRA-large: 0.25
    random_share: float = 0.0  # of the predicted ones: shown as a random id
    keep_share: float = 0.15  # of the predicted ones: shown as they are
    mask_count: Count = "round"  # of each document of n tokens: round(p n), at least 1
    mlm_weight: float = 1.0  # of the generator's mean over masked tokens in the loss
    rtd_weight: float = 50.0  # of the discriminator's mean over all tokens; DeBERTa-v3: 10
    temperature: float = 1.0  # T, by which the generator's logits are divided for the draw
    # true: the token that stood there is not drawn
    disallow_correct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mlm_weight", "rtd_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} {getattr(self, name)} must be at least 0. ELECTRA's weights are 1"
                    " (mlm) and 50 (rtd)."
                )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature} must be above 0. ELECTRA uses 1.")

    @property
    def task_text(self) -> str:
        """What is learned, for people."""
        return f"replaced tokens, by a generator of {super().task_text}"

    @property
    def asks_every_document(self) -> bool:
        """Of every token the discriminator is asked."""
        return True

    def expected_targets(
        self, *, documents: float, tokens: float, mask_share: float
    ) -> dict[str, float]:
        """Targets of each loss term in so many documents of so many tokens together."""
        masked = super().expected_targets(documents=documents, tokens=tokens, mask_share=mask_share)
        return {**masked, RTD: tokens}

    def build(self, facts: ObjectiveFacts) -> ReplacedTokens:
        """Raises ConfigError if a special id is outside the vocabulary."""
        return ReplacedTokens.of(self, facts)


class DetectingModel(Protocol):
    """What the loss asks of a model."""

    training: bool

    def generator_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC of the generator, after its last norm; or x_MC of tokens at_M."""

    def generator_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """The generator's head at some positions, and its decoder."""

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """x_TC of the discriminator, after its last norm."""

    def replaced_logits(self, x_MC: Tensor) -> Tensor:
        """Logits [M] of the discriminator's states: above 0, a token is not the text's own."""


class ReplacedTokens(MaskedLanguageModel):
    """Masked tokens, and of every token whether it was replaced."""

    config: RtdConfig
    scored_terms = (RTD,)

    @property
    def terms(self) -> tuple[str, ...]:
        """`mlm` of the generator, `rtd` of the discriminator."""
        return (MLM, RTD)

    def mask(
        self,
        ids: np.ndarray,
        generator: np.random.Generator,
        *,
        lengths: Sequence[int] = (),
        phase_tokens: int = 0,
    ) -> MaskedRow:
        """One row, masked as in `mlm`; of the discriminator every token is a target, whose value is the text's own id.

        ids: int64 [T], not changed
        generator: keyed by the row's address
        lengths: of the row's documents
        phase_tokens: tokens of the phase before this row
        """
        row = super().mask(ids, generator, lengths=lengths, phase_tokens=phase_tokens)
        # what the discriminator sees is drawn with the loss; here is what it is compared with
        every = RowTargets(np.arange(len(ids)), ids)
        return replace(row, targets={**row.targets, RTD: every})

    def capacity(self, term: str, tokens: int) -> int:
        """Of the discriminator every token of a row."""
        if term == RTD:
            return tokens
        return super().capacity(term, tokens)

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Every token of a document, for both networks."""
        targets = super().all_targets(ids_T)
        return {**targets, RTD: targets[MLM]}

    # its settings need a model of two networks
    def loss(  # type: ignore[override]
        self, model: DetectingModel, batch: TokenBatch
    ) -> dict[str, LossTerm]:
        """Sums over the masked tokens and over all, in fp32 (fp64 for fp64 weights): one forward of each network."""
        masked, every = batch.targets[MLM], batch.targets[RTD]
        mlm, drawn_M = self._generated(model, batch, masked)
        filled = replace(batch, ids_T=with_draws(batch.ids_T, masked, drawn_M))

        x_MC = model.hidden_states(filled).index_select(0, every.index_M)
        # a draw of the text's own id is none that was replaced
        replaced_M = filled.ids_T.index_select(0, every.index_M) != every.value_M
        rtd = yes_no_sum(model.replaced_logits(x_MC), replaced_M, every.value_M)
        return {
            MLM: mlm._replace(weight=self.config.mlm_weight),
            RTD: rtd._replace(weight=self.config.rtd_weight),
        }

    def _generated(
        self, model: DetectingModel, batch: TokenBatch, masked: Targets
    ) -> tuple[LossTerm, Tensor]:
        """The generator's loss, and an id [M] drawn at each masked position."""
        x_MC = model.generator_states(batch, at_M=masked.index_M)
        draws = Draws(
            key_M=batch.token_key_T.index_select(0, masked.index_M),
            temperature=self.config.temperature,
            leaves_target_out=self.config.disallow_correct,
        )
        return drawn_cross_entropy_sum(
            *model.generator_decoder(x_MC),
            masked.value_M,
            draws,
            z_loss_weight=self.config.z_loss_weight if model.training else 0.0,
        )


def with_draws(ids_T: Tensor, masked: Targets, drawn_M: Tensor) -> Tensor:
    """The ids [T] with what was drawn at the masked positions; targets that only fill the capacity change nothing."""
    # these write behind the last token, where nothing is read
    place_M = masked.index_M.where(masked.value_M != IGNORE, len(ids_T))
    room = torch.cat((ids_T, ids_T.new_zeros(1)))
    return room.scatter(0, place_M, drawn_M)[:-1]
