"""The models a run file can name, and presets of published shapes."""

from __future__ import annotations

from typing import Any

from torch import nn

from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

SYSTEMS: dict[str, type] = {"modernbert": ModernBertConfig}

PRESETS: dict[str, dict[str, Any]] = {
    "modernbert_base": {"system": "modernbert", "hidden_size": 768, "intermediate_size": 1152,
                        "num_hidden_layers": 22, "num_attention_heads": 12},
    "modernbert_large": {"system": "modernbert", "hidden_size": 1024, "intermediate_size": 2624,
                         "num_hidden_layers": 28, "num_attention_heads": 16},
}

_BUILDERS = {ModernBertConfig: ModernBertForMaskedLM}


def build_model(config: ModernBertConfig, *, attention: str = "auto", seed: int, z_loss_weight: float = 0.0) -> nn.Module:
    """The model of a settings object, its weights drawn from the seed."""
    return _BUILDERS[type(config)](config, attention=attention, seed=seed, z_loss_weight=z_loss_weight)
