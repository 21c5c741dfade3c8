"""The families that have a class in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoder.models.contract import ModelConfig
from encoder.models.hf.bridge import Bridge
from encoder.models.hf.modernbert import MODERNBERT
from encoder.models.modernbert import ModernBertConfig

BRIDGES: dict[type, Bridge] = {ModernBertConfig: MODERNBERT}


def bridge_of(config: ModelConfig) -> Bridge | None:
    """The bridge of a settings object's family, or None: it stays ours."""
    return BRIDGES.get(type(config))


def export_blocker(config: ModelConfig) -> str | None:
    """Why a model of this shape cannot become a Hugging Face folder, or None if it can."""
    bridge = bridge_of(config)
    return (
        "not to Hugging Face, which has no class for it"
        if bridge is None
        else bridge.blocker(config)
    )


def bridge_of_settings(settings: Mapping[str, Any]) -> Bridge:
    """The bridge of a config.json by its model_type; for an unknown one the first, which says what is needed."""
    kind = settings.get("model_type")
    return next((bridge for bridge in BRIDGES.values() if bridge.model_type == kind), MODERNBERT)
