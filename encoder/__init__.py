"""Tessera's library: rooms for words (base), mathematics (nn, optim), models, data, the engine and the story (train).

import encoder
bert = encoder.load("runs/small")                    # a run, a checkpoint, a Hugging Face folder: docs/python.md
run = encoder.read_run("run.yaml", ["seed=3"])       # names come from their rooms when they are asked for: torch takes seconds
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from encoder.base.dist import World as World
    from encoder.base.errors import UserError as UserError
    from encoder.models.catalog import PRESETS as PRESETS
    from encoder.models.modernbert import ModernBertConfig as ModernBertConfig
    from encoder.models.modernbert import ModernBertForMaskedLM as ModernBertForMaskedLM
    from encoder.runs.config import RunConfig as RunConfig
    from encoder.runs.config import read_run as read_run
    from encoder.runs.weights import read_model as read_model
    from encoder.tools.notebook import LoadedModel as LoadedModel
    from encoder.tools.notebook import Shards as Shards
    from encoder.tools.notebook import load as load
    from encoder.tools.notebook import metrics as metrics
    from encoder.tools.notebook import open_shards as open_shards
    from encoder.tools.notebook import preset as preset
    from encoder.train.pretraining import pretrain as pretrain

__version__ = "0.1.0"

_ROOMS = {
    "preset": "encoder.tools.notebook",
    "load": "encoder.tools.notebook",
    "metrics": "encoder.tools.notebook",
    "open_shards": "encoder.tools.notebook",
    "LoadedModel": "encoder.tools.notebook",
    "Shards": "encoder.tools.notebook",
    "read_run": "encoder.runs.config",
    "RunConfig": "encoder.runs.config",
    "pretrain": "encoder.train.pretraining",
    "World": "encoder.base.dist",
    "read_model": "encoder.runs.weights",
    "ModernBertConfig": "encoder.models.modernbert",
    "ModernBertForMaskedLM": "encoder.models.modernbert",
    "PRESETS": "encoder.models.catalog",
    "UserError": "encoder.base.errors",
}
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(
            f"module 'encoder' has no attribute {name!r}. It has {', '.join(_ROOMS)}."
        )
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
