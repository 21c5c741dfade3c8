"""The models a run file can name, and presets of published shapes."""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder.models.contract import Family, ModelConfig
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

# a new family is one line here (docs/adding_a_model.md)
FAMILIES: dict[str, Family] = {
    "modernbert": Family(settings=ModernBertConfig, model=ModernBertForMaskedLM),
}
SYSTEMS: dict[str, type] = {name: family.settings for name, family in FAMILIES.items()}

# The first three are Ettin's shapes (Weller et al. 2025), their initial weights by Megatron's rule, sqrt(2 / (5 hidden));
# the others are ModernBERT's as published (Warner et al. 2024).
PRESETS: dict[str, dict[str, Any]] = {
    "modernbert_17m": {
        "system": "modernbert",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "initializer_range": 0.03953,
    },
    "modernbert_32m": {
        "system": "modernbert",
        "hidden_size": 384,
        "intermediate_size": 576,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "initializer_range": 0.03227,
    },
    "modernbert_68m": {
        "system": "modernbert",
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 19,
        "num_attention_heads": 8,
        "initializer_range": 0.02795,
    },
    "modernbert_base": {
        "system": "modernbert",
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "initializer_range": 0.02,
    },
    "modernbert_large": {
        "system": "modernbert",
        "hidden_size": 1024,
        "intermediate_size": 2624,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "initializer_range": 0.02,
    },
}


def system_of(config: ModelConfig) -> str:
    """The name of a settings object's family."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.settings)


def build_model(config: ModelConfig, *, attention: str = "auto", seed: int) -> nn.Module:
    """The model of a settings object, its weights drawn from the seed."""
    return FAMILIES[system_of(config)].model(config, attention=attention, seed=seed)
