"""What the way to Hugging Face and back must know of a family: one table for each, in the family's own words.

our settings  <->  config.json        our logits  ==  transformers' logits, before a folder gets its name
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from encoder.models.contract import ModelConfig

Settings = dict[str, Any]  # config.json


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """A family and its class in transformers."""

    model_type: str  # of config.json
    config_class: str  # in transformers
    without_word: str  # the setting that config.json cannot say
    blocker: Callable[[Any], str | None]  # why a model cannot become such a folder; None: it can
    to_settings: Callable[[Any, Any], Settings]  # (ours, special ids) -> config.json
    from_settings: Callable[..., ModelConfig]  # (config.json, where=) -> ours
    completed: Callable[
        [Settings, Any], Settings
    ]  # with the words that one version of transformers lacks
    smaller: Callable[
        [Settings, Any], tuple[Settings, ModelConfig]
    ]  # the same kind of model, small enough to try
    edges: Callable[[Any], tuple[int, ...]]  # document lengths at which its attention changes
    hidden_states: Callable[
        [nn.Module, Tensor, Tensor], Tensor
    ]  # (theirs, ids_BL, attention mask) -> x_BLC
    logits: Callable[[nn.Module, Tensor], Tensor]  # (theirs, x_MC) -> logits_MV
