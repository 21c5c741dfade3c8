"""The objectives by name."""

from __future__ import annotations

from collections.abc import Sequence

from encoder.objectives.contract import Objective, Specials
from encoder.objectives.mlm import MaskedLanguageModel, MaskShare, MlmConfig
from encoder.objectives.words import WordEdges

OBJECTIVES: dict[str, type] = {"mlm": MlmConfig}


def build_objective(config: MlmConfig, *, vocab_size: int, specials: Specials, share: MaskShare | None = None,
                    words: WordEdges | None = None, unused: Sequence[int] = ()) -> Objective:
    """The objective of its settings; `share`, `words` and `unused` as for MaskedLanguageModel.

    Raises ConfigError if a special id is outside the vocabulary.
    """
    return MaskedLanguageModel(config, vocab_size=vocab_size, mask_id=specials.mask_id, pad_id=specials.pad_id,
                               special_ids=specials.all_special, share=share, words=words, unused=unused)
