"""The objectives by name."""

from __future__ import annotations

from encoder.objectives.contract import Corrupt, Specials
from encoder.objectives.mlm import MaskedLanguageModel, MlmConfig

OBJECTIVES: dict[str, type] = {"mlm": MlmConfig}


def build_objective(config: MlmConfig, *, vocab_size: int, specials: Specials) -> Corrupt:
    """The question maker of an objective's settings. Raises ConfigError if a special id is outside the vocabulary."""
    return MaskedLanguageModel(config, vocab_size=vocab_size, mask_id=specials.mask_id, pad_id=specials.pad_id,
                               special_ids=specials.all_special)
