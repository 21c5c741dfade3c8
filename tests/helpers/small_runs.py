"""Settings of small runs, as the configuration takes them, without shards: which families and data it allows an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoder.base.errors import ConfigError
from encoder.models.catalog import SYSTEMS
from encoder.objectives.catalog import OBJECTIVES
from encoder.runs.config import RunConfig, run_of

ROW = 64
# shorter than what rounding to 64 adds, so that such padding is several documents
LONGEST = 24
SIZES = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=64,
)


def run_with(
    system: str, objective: str, *, data: Mapping[str, Any] | None = None, **settings: Any
) -> RunConfig:
    """A run of a small model. Raises ConfigError where the configuration refuses what is asked together.

    system: the model's family
    objective: its word
    data: settings of the data
    settings: of the objective
    """
    lr = {"schedule": "wsd", "peak": 1e-3, "warmup_tokens": 100, "decay_tokens": 100}
    phase = {"name": "a", "tokens": 1000, "batch_tokens": 128, "lr": lr}
    asked = dict.fromkeys(OBJECTIVES[objective].STORED_MODELS, "not read")
    given = {
        "name": "t",
        "out": "t",
        "model": {"system": system, **SIZES},
        "objective": {"name": objective, **asked, **settings},
        "data": {"sources": [{"path": "not read"}], "row_tokens": ROW, **(data or {})},
        "phases": [{**phase, "max_tokens_per_document": LONGEST}],
    }
    return run_of(given, where="a test")


def trained_by(objective: str) -> list[str]:
    """The families that the configuration lets an objective train."""
    found = []
    for system in SYSTEMS:
        try:
            run_with(system, objective)
        except ConfigError:
            continue
        found.append(system)
    return found
