"""What the way to Hugging Face and back must know of a family: one table for each, in the family's own words.

our settings  <->  config.json        our logits  ==  transformers' logits, before a folder gets its name
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.base.errors import ExportError, ModelError, first_names
from encoder.models.contract import ModelConfig
from encoder.models.hf.use import Use, usual_use

Settings = dict[str, Any]  # config.json
Weights = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]  # of parameters, by name


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
    raw: Mapping[str, Tensor], config: Any, *, of: str, ours: Shapes
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
    # ours -> what a card says that it is for
    use: Callable[[Any], Use] = usual_use
    # (theirs, ours, of=, ours=shapes) -> our weights by name, and names of theirs that have no place
    weights_from: Callable[..., tuple[Weights, tuple[str, ...]]] = _read_as_they_are
    # of our parameters, those that a folder may lack: they are drawn
    head_names: Callable[[Sequence[str]], tuple[str, ...]] = lambda names: ()
    # parts of theirs' names that a folder may hold beyond the model: left out, and said
    leaves: tuple[str, ...] = ()
    # of theirs: copies that a file need not hold
    tied: tuple[str, ...] = ("decoder.weight",)
    padding: Callable[[Settings], Padding] = lambda values: BY_MASK
    # transformers' word for how it computes attention
    attention: str = "sdpa"
    # (ours, theirs) in fp64 -> the largest difference of what the family computes beside hidden states
    also_differs: Callable[[Any, Any], float] = lambda ours, theirs: 0.0


def without_data(shapes: Shapes) -> Weights:
    """Weights of these shapes on the meta device, which can be laid and cut as others."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_shapes(theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, of: str) -> None:
    """Tensors of a file have the shapes that their layout needs, before they are laid anew. Raises ModelError.

    theirs: by their names; those that are not expected are left to the check of names
    expected: what weights_to makes of a model's weights
    of: opens the error
    """
    unfit = [
        f"{name} {list(w.shape)} for {list(expected[name].shape)}"
        for name, w in theirs.items()
        if name in expected and w.shape != expected[name].shape
    ]
    if unfit:
        raise ModelError(
            f"{of}: the weights have another shape in {first_names(unfit)}. Give the config that"
            " the weights were trained with, or complete weights."
        )


def architecture_of(
    values: Mapping[str, Any], known: Sequence[str], *, where: str, unnamed: Sequence[str] = ()
) -> str:
    """The architecture of a config.json; the first known one where it says none. Raises ModelError for another.

    values: config.json
    known: architectures of the bridge
    where: opens the error
    unnamed: others that it takes, which no folder on a disk has
    """
    architectures = values.get("architectures") or [known[0]]
    if architectures[0] not in (*known, *unnamed) or len(architectures) != 1:
        raise ModelError(
            f"{where} is of a {', '.join(map(str, architectures))}; needed: one of"
            f" {', '.join(known)}. Give such a folder."
        )
    return str(architectures[0])


def check_only(values: Mapping[str, Any], only: Mapping[str, Any], *, where: str) -> None:
    """Raises ModelError for a setting that our model has one value of, where a config.json says another.

    values: config.json
    only: name -> that value
    where: opens the error
    """
    for name, needed in only.items():
        if values.get(name) not in (None, needed):
            raise ModelError(
                f"{where}: {name} is {values[name]!r}; needed: {needed!r}, our model has nothing"
                " else. Where the weights do not depend on it, change config.json."
            )


def without_words(
    config: Any, *, only: Mapping[str, object], activations: Collection[str]
) -> list[str]:
    """The settings of a model that its class has no word for, each with what is needed.

    config: ours
    only: settings that the class has one value of
    activations: of the MLP, those that it knows
    """
    strange = [
        f"{name} {getattr(config, name)} (needed: {value})"
        for name, value in only.items()
        if getattr(config, name) != value
    ]
    if config.mlp not in activations:
        strange.append(f"mlp {config.mlp} (needed: {' or '.join(activations)})")
    if config.head_width * config.num_attention_heads != config.hidden_size:
        strange.append(
            f"attention_head_width {config.attention_head_width} (needed: hidden_size /"
            f" num_attention_heads, {config.hidden_size / config.num_attention_heads:g})"
        )
    return strange


def blocker_text(strange: Sequence[str], *, family: str) -> str | None:
    """Why a model with such settings cannot become a Hugging Face folder, or None if it can."""
    if not strange:
        return None
    return f"not to Hugging Face, whose {family} has no word for {', '.join(strange)}"


def refuse_strange(strange: Sequence[str], *, family: str) -> None:
    """Raises ExportError where there are such settings."""
    if strange:
        raise ExportError(
            f"Hugging Face's {family} has no word for {', '.join(strange)}. Train with the needed"
            " setting, or keep the model as a weights folder."
        )
