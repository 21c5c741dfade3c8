"""A larger model that starts from a smaller one's weights: tiled features, repeated layers (ModernBERT-large from base).

Every parameter is a few axes, every axis has a length in both models, and one function grows them all:

    out[k] = src[(k - o) mod n]    k = 0 .. N-1    o = (N - n) // 2        mode middle: the source in the centre, wrapped around
    out[k] = src[k mod n]                                                  mode edge:   the source first, then again
    out[o .. o+n-1] = src, the rest as drawn for the new model             mode centre: the border keeps its initial weights

on each axis by itself, without scaling or noise. An axis that is several matrices in one (query, key and value; both halves
of a gated layer) grows block by block. Source: Warner et al. 2024, appendix A.2, and ModernBERT's initialization.py; the
depth follows Gopher (Rae et al. 2021): layer i of the new model is layer round(i L_old / L_new) of the old.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.base.errors import ModelError, first_names
from encoder.base.units import counted, with_article
from encoder.models.catalog import build_model, system_of
from encoder.models.contract import Axis, GrowthRules, ModelConfig

Mode = Literal["middle", "edge", "centre"]


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How the new model takes over the old one's weights."""

    mode: Mode = "middle"
    layer_map: Literal["modernbert", "same_kind"] = (
        "modernbert"  # modernbert gives global layers local ones' weights
    )
    # ModernBERT's own code left the final norm at ones. It copies every other norm, and nothing says that it was meant.
    final_norm: Literal["copy", "ones"] = "copy"
    seed: int = 0  # of the new model's own values, where they stay


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The new weights, and what a person should know about them."""

    weights: dict[str, Tensor]  # as ModernBertForMaskedLM.state_dict() names them
    layer_sources: tuple[int, ...]  # the old layer that each new layer comes from
    not_inherited: tuple[str, ...]  # what keeps the new model's own initial weights, and why
    # settings that are not those the source was trained with
    other_settings: tuple[str, ...]


def grow(
    weights: dict[str, Tensor], old: ModelConfig, new: ModelConfig, settings: GrowthConfig
) -> Growth:
    """The new model with the old one's weights in it. Raises ModelError naming the setting that cannot grow.

    weights: of the `old` model, as its state_dict() names them; the result is fp32. Building draws the new model from
    settings.seed, so that what stays uninherited has its usual initial weights.
    """
    if why := new.growth().refused:
        raise ModelError(f"{why}. Train another one from the seed.")
    _check_settings(old, new)
    _check_sizes(old, new, settings)
    sources = layer_sources(old, new, layer_map=settings.layer_map)
    # the new model as it is drawn: what finds no source below keeps these values
    grown = {
        name: w.detach().float()
        for name, w in build_model(new, seed=settings.seed).state_dict().items()
    }
    _check_names(weights, old)

    final_norm = new.growth().final_norm or ()
    fresh = []
    for name, own in grown.items():
        source = source_name(name, sources)
        if settings.final_norm == "ones" and name.startswith(final_norm):
            fresh.append(
                f"{name}: as the new model has it, as final_norm {settings.final_norm} asks"
            )
        elif source not in weights:
            fresh.append(
                f"{name}: as the new model has it, for layer {sources[_layer_of(name)]} of the"
                " source has none"
            )
        else:
            grown[name] = _grown(
                weights[source], own, axes_of(name, new.growth()), old, new, mode=settings.mode
            )
    if settings.mode == "centre":
        fresh.append("everything outside the centre of an axis that grew, as mode centre asks")
    return Growth(
        weights=grown,
        layer_sources=sources,
        not_inherited=tuple(fresh),
        other_settings=tuple(
            f"{n}: {there} in the source, {here} in the new model"
            for n, there, here in differing(old, new)
            if n not in new.growth().grows
        ),
    )


def _check_names(weights: Mapping[str, Tensor], old: ModelConfig) -> None:
    """Raises ModelError for a weight that a model of the old settings has not: it would be lost without a word."""
    with torch.device("meta"):
        known = build_model(old, seed=0).state_dict()
    unknown = sorted(weights.keys() - known.keys())
    if unknown:
        raise ModelError(
            f"the source has {first_names(unknown, 1)}, which no model of its settings has. It was written"
            " by other code: load it with that, or leave these weights out."
        )


def differing(old: ModelConfig, new: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(setting, old value, new value) wherever two models differ; what follows from others by its number, however it was given.

    Raises ModelError for two families.
    """
    # one family has the same settings in the same order, so values can be zipped
    if _setting_names(old) != _setting_names(new):
        raise ModelError(
            f"the source is {with_article(system_of(old))}, the new model"
            f" {with_article(system_of(new))}; needed: one"
            f" family. Set model.system: {system_of(old)}, or name another source."
        )

    def settings(config: ModelConfig) -> dict[str, object]:
        return {**dataclasses.asdict(config), **config.growth().derived}

    return [
        (name, there, here)
        for (name, there), here in zip(settings(old).items(), settings(new).values(), strict=True)
        if there != here
    ]


def must_be_equal(config: ModelConfig) -> list[str]:
    """The settings that decide what the weights mean, sizes aside."""
    rules = config.growth()
    return [f.name for f in dataclasses.fields(config) if f.name not in (*rules.grows, *rules.free)]


def layer_sources(old: ModelConfig, new: ModelConfig, *, layer_map: str) -> tuple[int, ...]:
    """The old layer that each new layer comes from.

    modernbert: round(i L_old / L_new), halves to even, as Python rounds; whether a layer is global or local is not asked.
    same_kind:  the same rule among the global layers by themselves, and among the local ones. Raises ModelError where
                the source has none of a kind, or more of them than the new model.

    Of layers that share their weights: the block of each block, and ModelError for a map other than the default.
    """
    shared = new.growth().shared_blocks
    if shared:
        _check_shared(shared, layer_map=layer_map)
        return tuple(range(shared))
    every_old, every_new = range(old.num_hidden_layers), range(new.num_hidden_layers)
    if layer_map == "modernbert":
        return tuple(_spread(len(every_old), len(every_new)))
    found: dict[int, int] = {}
    kinds_old, kinds_new = old.growth().layer_kinds, new.growth().layer_kinds
    for kind in sorted({*kinds_old, *kinds_new}):
        there = [i for i in every_old if kinds_old[i] == kind]
        here = [i for i in every_new if kinds_new[i] == kind]
        if len(there) > len(here) or here and not there:
            raise ModelError(
                f"layer_map same_kind: the source has {len(there)} {kind} layers, the new model"
                f" {len(here)}; needed: no fewer than the source, and none where the source has"
                " none. Change num_hidden_layers or global_attn_every_n_layers, or use layer_map"
                " modernbert."
            )
        found.update(
            (i, there[j]) for i, j in zip(here, _spread(len(there), len(here)), strict=True)
        )
    return tuple(found[i] for i in every_new)


def _check_shared(blocks: int, *, layer_map: str) -> None:
    """Raises ModelError for a map of layers that have no weights of their own."""
    if layer_map != GrowthConfig.layer_map:
        raise ModelError(
            f"layer_map {layer_map}: the layers of this model share {counted(blocks, 'block')} of"
            " weights, so none has a source of its own. Leave layer_map out."
        )


def _setting_names(config: ModelConfig) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]


def axes_of(name: str, rules: GrowthRules) -> tuple[Axis, ...]:
    """The axes of a parameter by its name. Raises ModelError where the family has none for it."""
    network, _, own = name.partition(".")
    if network in rules.networks:
        part = rules.networks[network]
        return tuple(_of_network(axis, part.config) for axis in axes_of(own, part.rules))
    stem, _, kind = name.rpartition(".")
    for end, axes in rules.axes.items():
        if stem.endswith(end):
            if kind == "bias":
                return axes[:1]
            return axes
    raise ModelError(
        f"{name} cannot grow: its family's growth() names no axes for it. Needed: an entry whose"
        f" key ends {stem or 'the name before .weight'}, and parameters called weight or bias."
    )


def _of_network(axis: Axis, config: Callable[[Any], Any]) -> Axis:
    """The axis of one network, asked of the settings of all of them."""
    return Axis(
        name=axis.name,
        length=lambda whole: axis.length(config(whole)),
        blocks=lambda whole: axis.blocks(config(whole)),
    )


def _spread(old: int, new: int) -> Sequence[int]:
    # more than twice as many layers would round past the last one; ModernBERT's 22 -> 28 never comes there
    return [min(round(i * old / new), old - 1) for i in range(new)]


def _grown(
    source: Tensor,
    own: Tensor,
    axes: tuple[Axis, ...],
    old: ModelConfig,
    new: ModelConfig,
    *,
    mode: Mode,
) -> Tensor:
    """One parameter: `source` of the old model spread over the shape of `own`, the new model's initial weights."""
    # axis by axis; a value is inherited where it is on every axis
    out, inherited = source.float(), torch.ones((), dtype=torch.bool)
    for dim, axis in enumerate(axes):
        index = _places(axis.length(old), axis.length(new), blocks=axis.blocks(old), mode=mode)
        # places from nowhere (-1) take any value here, and are the new model's own at the end
        out = out.index_select(dim, index.clamp(min=0))
        shape = [1] * len(axes)
        shape[dim] = -1
        inherited = inherited & (index >= 0).view(shape)
    assert out.shape == own.shape, f"{list(out.shape)} grew where {list(own.shape)} is needed"
    if inherited.all():
        return out
    return torch.where(inherited, out, own)


def _places(old: int, new: int, *, blocks: int, mode: Mode) -> Tensor:
    """[blocks * new]: the place in the old axis that each place of the new one comes from; -1: from nowhere."""
    # place[k] = (k - shift) mod old: the source in the middle (edge: in front), wrapped around
    k = torch.arange(new)
    shift = (new - old) // 2
    if mode == "edge":
        shift = 0
    place = (k - shift) % old
    if mode == "centre":
        place[(k < shift) | (k >= shift + old)] = -1
    # block b of the old axis begins at b * old
    return torch.cat([torch.where(place < 0, -1, place + block * old) for block in range(blocks)])


def source_name(name: str, sources: tuple[int, ...]) -> str:
    """The parameter of the old model that one of the new model comes from."""
    return re.sub(r"(?<=\blayers\.)\d+", lambda layer: str(sources[int(layer[0])]), name)


def _layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def _check_settings(old: ModelConfig, new: ModelConfig) -> None:
    equal = must_be_equal(old)
    wrong = next(((n, there, here) for n, there, here in differing(old, new) if n in equal), None)
    if wrong:
        name, there, here = wrong
        hint = f" Set {name}: {there}"
        # a size that follows from others, such as the head width: say which setting would keep it
        rules = old.growth()
        if name in rules.derived:
            for size, features in rules.uncut.items():
                hint += _blocks_hint(size, features, old, new)
        raise ModelError(
            f"{name} is {there} in the source and {here} in the new model; it cannot grow and must"
            f" be equal.{hint}."
        )


def _blocks_hint(size: str, features: int, old: ModelConfig, new: ModelConfig) -> str:
    """How many blocks of the old number of features the new width has, or the nearest width that has whole ones."""
    # whole blocks alone; where they do not fill the new width, the nearest width that they do
    blocks = max(getattr(old, size), round(new.hidden_size / features))
    hint = f", or {size}: {blocks}"
    if blocks * features != new.hidden_size:
        hint += f" with hidden_size: {blocks * features}"
    return hint


def _check_sizes(old: ModelConfig, new: ModelConfig, settings: GrowthConfig) -> None:
    sizes = {name: (getattr(old, name), getattr(new, name)) for name in new.growth().grows}
    for name, (there, here) in sizes.items():
        if here < there:
            raise ModelError(
                f"{name} is {there:,} in the source and {here:,} in the new model; needed: at least"
                f" {there:,}, for no axis can shrink. Raise {name}."
            )
    if all(there == here for there, here in sizes.values()):
        raise ModelError(
            "the new model is as large as the source"
            f" ({', '.join(f'{n} {t:,}' for n, (t, _) in sizes.items())}); needed: one of these"
            " larger. To train it on, name the source as init_from."
        )
    for name, features in old.growth().uncut.items():
        there, here = sizes[name]
        # the shift is half the difference: of an odd number of heads it would cut one in two
        if settings.mode != "edge" and (here - there) % 2:
            raise ModelError(
                f"{name} {there} -> {here} in mode {settings.mode} shifts by {(here - there) / 2:g}"
                f" of them ({features} features each), and one would be cut in two; needed: a whole"
                f" number. Nearest {name}: {here - 1} or {here + 1}; or use mode edge."
            )
    if settings.final_norm == "ones" and new.growth().final_norm is None:
        raise ModelError("final_norm ones: this model has no final norm. Leave final_norm at copy.")
