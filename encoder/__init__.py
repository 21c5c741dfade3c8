"""Tessera's library: rooms for words (base), mathematics (nn, optim), models, data, the engine and the story (train).

    import encoder
    run = encoder.read_run("run.yaml", ["seed=3"])       # names come from their rooms when they are asked for: torch takes seconds
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = {"read_run": "encoder.runs.config", "RunConfig": "encoder.runs.config", "pretrain": "encoder.train.loop",
          "World": "encoder.base.dist", "read_model": "encoder.runs.weights", "ModernBertConfig": "encoder.models.modernbert",
          "ModernBertForMaskedLM": "encoder.models.modernbert", "PRESETS": "encoder.models.catalog",
          "UserError": "encoder.base.errors"}
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'encoder' has no attribute {name!r}. It has {', '.join(_ROOMS)}.")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
