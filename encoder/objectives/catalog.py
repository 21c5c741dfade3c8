"""The objectives by name; a new one is a line here (docs/adding_a_model.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from encoder.objectives.contract import (
    MaskShare,
    Objective,
    ObjectiveConfig,
    ObjectiveFacts,
    Specials,
)
from encoder.objectives.distill import DistillConfig
from encoder.objectives.mlm import MlmConfig
from encoder.objectives.pairs import MlmNspConfig, MlmSopConfig
from encoder.objectives.plm import PlmConfig
from encoder.objectives.rtd import RtdConfig
from encoder.objectives.words import WordEdges

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "mlm": MlmConfig,
    "distill": DistillConfig,
    "mlm_nsp": MlmNspConfig,
    "mlm_sop": MlmSopConfig,
    "plm": PlmConfig,
    "rtd": RtdConfig,
}


def build_objective(
    config: ObjectiveConfig,
    *,
    vocab_size: int,
    specials: Specials,
    share: MaskShare | None = None,
    words: WordEdges | None = None,
    unused: Sequence[int] = (),
    models: Mapping[str, Any] | None = None,
) -> Objective:
    """The objective of its settings. Raises ConfigError if a special id is outside the vocabulary.

    config: its settings
    vocab_size: the tokenizer's
    specials: its special ids
    share: the phase's masking rate; None: the settings'
    words: where words begin, for whole words
    unused: ids that no text has
    models: those that it asks beside the trained one, for the loss alone
    """
    return config.build(
        ObjectiveFacts(
            vocab_size=vocab_size,
            specials=specials,
            share=share,
            words=words,
            unused_ids=unused,
            models=models or {},
        )
    )
