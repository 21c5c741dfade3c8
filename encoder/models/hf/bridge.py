"""What the way to Hugging Face and back must know of a family: one table for each, in the family's own words.

our settings  <->  config.json        our logits  ==  transformers' logits, before a folder gets its name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from encoder.models.contract import ModelConfig

Settings = dict[str, Any]  # config.json
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How transformers' model may be padded."""

    # its positions follow the attention mask, so the left side may be padded as well
    left: bool = True
    # tokens of this id are padding to it whatever the mask says; None: the mask alone decides
    pad_id: int | None = None
    # of a batch's width, padding included; None: as many as you like
    most_tokens: int | None = None


BY_MASK = Padding()


def _same_weights(weights: Mapping[str, Tensor], config: Any) -> Weights:
    return dict(weights)


def _read_as_they_are(
    raw: Mapping[str, Tensor], config: Any, *, of: str, ours: Sequence[str]
) -> tuple[Weights, tuple[str, ...]]:
    return dict(raw), ()


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """A family and its class in transformers."""

    model_type: str  # of config.json
    title: str  # for people
    config_class: str  # in transformers
    without_word: str | None  # the setting that config.json cannot say
    # why a model cannot become such a folder; None: it can
    blocker: Callable[[Any], str | None]
    to_settings: Callable[[Any, Any], Settings]  # (ours, special ids) -> config.json
    from_settings: Callable[..., ModelConfig]  # (config.json, where=, names=) -> ours
    # with the words that one version of transformers lacks
    completed: Callable[[Settings, Any], Settings]
    # the same kind of model, small enough to try
    smaller: Callable[[Settings, Any], tuple[Settings, ModelConfig]]
    # document lengths at which its attention changes
    edges: Callable[[Any], tuple[int, ...]]
    # (theirs, ids_BL, attention mask) -> x_BLC
    hidden_states: Callable[[Any, Tensor, Tensor], Tensor]
    # (theirs, x_MC) -> logits_MV, and beside them those of the sentence head, where there is one
    logits: Callable[[Any, Tensor], Tensor]
    # the class of transformers that loads such a config.json
    auto_class: Callable[[Settings], str] = lambda values: "AutoModelForMaskedLM"
    # (our weights, ours) -> theirs by name; by default the names are the same
    weights_to: Callable[[Mapping[str, Tensor], Any], Weights] = _same_weights
    # (theirs, ours, of=, ours=) -> our weights by name, and names of theirs that have no place
    weights_from: Callable[..., tuple[Weights, tuple[str, ...]]] = _read_as_they_are
    # of our parameters, those that a folder may lack: they are drawn
    head_names: Callable[[Sequence[str]], tuple[str, ...]] = lambda names: ()
    # parts of theirs' names that a folder may hold beyond the model: left out, and said
    leaves: tuple[str, ...] = ()
    # of theirs: copies that a file need not hold
    tied: tuple[str, ...] = ("decoder.weight",)
    padding: Callable[[Settings], Padding] = lambda values: BY_MASK
