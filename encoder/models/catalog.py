"""The models a run file can name, and presets of published shapes."""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

SYSTEMS: dict[str, type] = {"modernbert": ModernBertConfig}

# The first three are Ettin's shapes (Weller et al. 2025), their initial weights by Megatron's rule, sqrt(2 / (5 hidden));
# the others are ModernBERT's as published (Warner et al. 2024).
PRESETS: dict[str, dict[str, Any]] = {
    "modernbert_17m": {"system": "modernbert", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 7,
                       "num_attention_heads": 4, "initializer_range": 0.03953},
    "modernbert_32m": {"system": "modernbert", "hidden_size": 384, "intermediate_size": 576, "num_hidden_layers": 10,
                       "num_attention_heads": 6, "initializer_range": 0.03227},
    "modernbert_68m": {"system": "modernbert", "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 19,
                       "num_attention_heads": 8, "initializer_range": 0.02795},
    "modernbert_base": {"system": "modernbert", "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
                        "num_attention_heads": 12, "initializer_range": 0.02},
    "modernbert_large": {"system": "modernbert", "hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28,
                         "num_attention_heads": 16, "initializer_range": 0.02},
}

_BUILDERS = {ModernBertConfig: ModernBertForMaskedLM}


def build_model(config: ModernBertConfig, *, attention: str = "auto", seed: int) -> nn.Module:
    """The model of a settings object, its weights drawn from the seed."""
    return _BUILDERS[type(config)](config, attention=attention, seed=seed)
