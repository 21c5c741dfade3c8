"""Distillation: a student learns masked tokens, and to predict and to represent every token as its teacher does.

    soft      T^2 KL(teacher || student) of their predictions at temperature T      mean over tokens, weight 5
    mlm       cross entropy of the masked tokens                                    mean over these, weight 2
    cosine    1 - cos(student's last state, teacher's)                              mean over tokens, weight 1

Both models see the same masked text (Sanh et al. 2019, section 3; weights of its code's example). Any two models of one
tokenizer will do. The teacher is a stored model: it trains nothing, and no checkpoint holds it. docs/distillation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from encoder.base.batch import LossTerm, Targets, TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.schema import PathText
from encoder.nn.soft_targets import cosine_distance_sum, soft_target_sum
from encoder.objectives.contract import MaskedRow, ModelShape, ObjectiveFacts, RowTargets
from encoder.objectives.mlm import MLM, MaskedLanguageModel, MlmConfig, TokenModel, mlm_loss

SOFT, COSINE = "soft", "cosine"  # loss terms
TEACHER = "teacher"  # the setting


@dataclass(frozen=True, kw_only=True)
class DistillConfig(MlmConfig):
    """Masked tokens as in `mlm`, and a teacher's predictions and last states."""

    STORED_MODELS: ClassVar[tuple[str, ...]] = (TEACHER,)

    # a stored model of the shards' tokenizer: a run, a checkpoint, a weights or Hugging Face folder, or a name on its hub
    teacher: PathText
    temperature: float = 2.0  # T, by which both models' logits are divided for the soft targets
    soft_weight: float = 5.0  # of the soft targets' mean; 0: without them
    mlm_weight: float = 2.0  # of the masked tokens' mean
    # of the mean of 1 - cos(last states), which needs models of one width; 0: without it
    cosine_weight: float = 1.0
    # soft targets and cosine: at all tokens of documents, or at the masked ones, which costs less
    soft_targets: Literal["all", "masked"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature} must be above 0. DistilBERT uses 2.")
        for name in ("soft_weight", "mlm_weight", "cosine_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} {getattr(self, name)} must be at least 0. DistilBERT's weights are 5"
                    " (soft), 2 (mlm) and 1 (cosine)."
                )
        if not self.soft_weight and not self.cosine_weight:
            raise ConfigError(
                "soft_weight and cosine_weight are 0: nothing is learned from the teacher. Raise"
                " one of them, or use objective: {name: mlm}."
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """The loss terms that have a weight; masked tokens always, which ledgers count."""
        terms = [MLM]
        if self.soft_weight:
            terms.append(SOFT)
        if self.cosine_weight:
            terms.append(COSINE)
        return tuple(terms)

    @property
    def task_text(self) -> str:
        """What is learned, for people."""
        return f"{super().task_text} and a teacher's answers"

    @property
    def asks_every_document(self) -> bool:
        """Whether no document is without a target."""
        return self.soft_targets == "all" or super().asks_every_document

    def held_out(self, *, mask_share: float) -> DistillConfig:
        """That of `mlm`, as of every other model: the teacher is not asked."""
        masked = super().held_out(mask_share=mask_share)
        return _HeldOutConfig(**{f.name: getattr(masked, f.name) for f in fields(masked)})

    def without_effect(self, given: Callable[[str], bool]) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each; `given`: whether the run file has one."""
        yield from super().without_effect(given)
        if not self.soft_weight and given("temperature"):
            yield "objective.temperature has no effect: soft_weight is 0."
        if not self.mlm_weight and self.z_loss_weight:
            yield "objective.z_loss_weight has no effect: mlm_weight is 0."

    def check_models(self, model: ModelShape, stored: Mapping[str, ModelShape]) -> None:
        """The cosine needs states of one width. Raises ConfigError."""
        teacher = stored.get(TEACHER)
        if teacher and self.cosine_weight and teacher.hidden_size != model.hidden_size:
            raise ConfigError(
                f"cosine_weight {self.cosine_weight:g} needs states of one width, but hidden_size"
                f" is {model.hidden_size:,} in the run's model and {teacher.hidden_size:,} in the"
                f" teacher {self.teacher}. Set objective.cosine_weight: 0, or hidden_size:"
                f" {teacher.hidden_size}."
            )

    def expected_targets(
        self, *, documents: float, tokens: float, mask_share: float
    ) -> dict[str, float]:
        """Targets of each loss term in so many documents of so many tokens together."""
        masked = mask_share * tokens
        taught = masked
        if self.soft_targets == "all":
            taught = tokens
        return {MLM: masked, **dict.fromkeys(self.terms[1:], taught)}

    def train_flops(
        self,
        model: ModelShape,
        stored: Mapping[str, ModelShape],
        *,
        lengths: Sequence[int] | np.ndarray,
        targets: Mapping[str, float],
    ) -> float:
        """Model FLOP of documents: the student's forward and backward, and the teacher's forward.

        model: the student; its head and decoder meet masked tokens, and the soft targets once more
        stored: the teacher, where it is at hand
        lengths: of the documents, in tokens
        targets: of each loss term
        """
        soft = targets.get(SOFT, 0.0)
        student = model.train_flops(lengths=lengths, targets={MLM: targets[MLM] + soft})
        teacher = stored.get(TEACHER)
        if teacher is None:
            return student
        # a forward is a third of a step
        return student + teacher.train_flops(lengths=lengths, targets={MLM: soft}) / 3

    def build(self, facts: ObjectiveFacts) -> Distillation:
        """Raises ConfigError if a special id is outside the vocabulary."""
        objective = Distillation.of(self, facts)
        objective.teacher = facts.models.get(TEACHER)
        return objective


class Distillation(MaskedLanguageModel):
    """Masked tokens, and a teacher's predictions and last states at all tokens or at the masked ones."""

    config: DistillConfig
    # any Model; None where rows are masked and no loss is computed
    teacher: Any = None

    @property
    def terms(self) -> tuple[str, ...]:
        """`mlm`, and `soft` and `cosine` where they have a weight."""
        return self.config.terms

    def __getstate__(self) -> dict[str, Any]:
        # loader workers mask rows, and ask no teacher
        return {**self.__dict__, TEACHER: None}

    def mask(
        self,
        ids: np.ndarray,
        generator: np.random.Generator,
        *,
        lengths: Sequence[int] = (),
        phase_tokens: int = 0,
    ) -> MaskedRow:
        """One row, masked as in `mlm`, and the places where the teacher is asked.

        ids: int64 [T], not changed
        generator: keyed by the row's address
        lengths: of the row's documents
        phase_tokens: tokens of the phase before this row
        """
        row = super().mask(ids, generator, lengths=lengths, phase_tokens=phase_tokens)
        index = self._asked(row)
        # the teacher's distribution is the target: there is no value
        asked = RowTargets(index, np.zeros_like(index))
        return replace(row, targets={**row.targets, **dict.fromkeys(self.terms[1:], asked)})

    def _asked(self, row: MaskedRow) -> np.ndarray:
        if self.config.soft_targets == "masked":
            return row.targets[MLM].index
        return np.arange(len(row.ids))

    def capacity(self, term: str, tokens: int) -> int:
        """Of the teacher's terms every token of a row, or as many as are masked."""
        if term == MLM or self.config.soft_targets == "masked":
            return super().capacity(MLM, tokens)
        return tokens

    def all_targets(self, ids_T: Tensor) -> dict[str, Targets]:
        """Every token of a document."""
        targets = super().all_targets(ids_T)
        return {term: targets[MLM] for term in self.terms}

    def loss(self, model: TokenModel, batch: TokenBatch) -> dict[str, LossTerm]:
        """Sums over the masked tokens, and over those where the teacher is asked, in fp32 (fp64 for fp64 weights)."""
        # all of the teacher's terms have the same places, those of the first of them
        asked = batch.targets[self.terms[1]]
        # an evaluation of masked tokens alone
        is_plain = asked.count == 0 and not torch.is_grad_enabled()
        # before the student's forward: what the teacher's needs on its way is free again by then
        taught_MC = None
        if not is_plain:
            taught_MC = self._teacher_states(batch, asked.index_M)
        x_TC = model.hidden_states(batch)

        mlm = mlm_loss(model, batch, x_TC=x_TC, z_loss_weight=self.config.z_loss_weight)
        found = {MLM: mlm._replace(weight=self.config.mlm_weight)}

        # every term is answered, also where it has no target: sums of zero
        if taught_MC is None:
            return found | dict.fromkeys(self.terms[1:], _nothing(mlm))

        # student and teacher at the same places, [M, C]
        x_MC = x_TC.index_select(0, asked.index_M)
        if SOFT in self.terms:
            soft = self._soft_loss(model, x_MC, taught_MC, asked)
            found[SOFT] = soft._replace(weight=self.config.soft_weight)
        if COSINE in self.terms:
            cosine = cosine_distance_sum(x_MC, taught_MC, asked.value_M)
            found[COSINE] = cosine._replace(weight=self.config.cosine_weight)
        return found

    def _teacher_states(self, batch: TokenBatch, index_M: Tensor) -> Tensor:
        assert self.teacher is not None, "the loss of a distillation without a teacher"
        with torch.no_grad():
            return self.teacher.hidden_states(batch, at_M=index_M)

    def _soft_loss(
        self, model: TokenModel, x_MC: Tensor, taught_MC: Tensor, asked: Targets
    ) -> LossTerm:
        # no gradient leads into the teacher
        with torch.no_grad():
            teacher = self.teacher.token_decoder(taught_MC)
        return soft_target_sum(
            model.token_decoder(x_MC),
            teacher,
            asked.value_M,
            temperature=self.config.temperature,
        )


def _nothing(term: LossTerm) -> LossTerm:
    """A term without a target."""
    total, loss, count, correct = (torch.zeros_like(value) for value in term[:4])
    return LossTerm(total, loss, count, correct)


@dataclass(frozen=True, kw_only=True)
class _HeldOutConfig(DistillConfig):
    """Masked tokens alone; the teacher's terms are there and have no target."""

    def build(self, facts: ObjectiveFacts) -> _HeldOut:
        return _HeldOut.of(self, facts)


class _HeldOut(Distillation):
    def _asked(self, row: MaskedRow) -> np.ndarray:
        return np.zeros(0, dtype=np.int64)

    def capacity(self, term: str, tokens: int) -> int:
        if term != MLM:
            return 0
        return super().capacity(term, tokens)
