"""From a stored model to a weights folder that holds a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from encoder.base.file_kinds import refuse_other_kinds
from encoder.base.schema import chosen_by, from_mapping, put_overrides, read_mapping, to_plain
from encoder.base.units import counted
from encoder.models.catalog import PRESETS, SYSTEMS, system_of
from encoder.models.contract import ModelConfig
from encoder.models.growth import Growth, GrowthConfig, grow
from encoder.models.stored import StoredModel
from encoder.runs.config import with_preset
from encoder.runs.defaults import initializer_range_of
from encoder.tools.weights.derived import read_source, write_derived

FOLLOWS = ("vocab_size",)  # the source's, where a run file does not say


@dataclass(frozen=True, kw_only=True)
class Grown:
    """What was made of what."""

    source: StoredModel
    model: StoredModel
    growth: Growth


def grow_model(
    source: Path,
    out: Path,
    *,
    preset: str | None = None,
    run: Path | None = None,
    overrides: Sequence[str] = (),
    settings: GrowthConfig,
) -> Grown:
    """Reads any stored model, grows it and writes the weights folder `out`, whole or not at all.

    The new model is the published one called `preset`, with the source's thetas, window and other settings that change no
    weight; or that of the run file `run`; or the source's own settings; `overrides` (hidden_size=256) are put over.
    Raises UserError.
    """
    old = read_source(source, out=out)
    config = new_config(old.config, preset=preset, run=run, overrides=overrides)

    growth = grow(old.weights, old.config, config, settings)
    how = ", ".join(f"{key} {word}" for key, word in to_plain(settings).items())
    origin = f"grown ({how}) from {old.origin}"
    model = write_derived(old, out, config=config, weights=growth.weights, origin=origin)
    return Grown(source=old, model=model, growth=growth)


def new_config(
    old: ModelConfig, *, preset: str | None, run: Path | None, overrides: Sequence[str]
) -> ModelConfig:
    """The settings of the model to be. Raises ConfigError."""
    where = str(run) if run else "the new model"
    if run:
        content = read_mapping(run)
        refuse_other_kinds(content, "run", path=run)
        model = content.get("model")
        if isinstance(model, dict):
            # what a run file leaves out follows the weights that it starts from, or the width
            followed = {name: getattr(old, name) for name in (*FOLLOWS, *old.PHASE_SETTINGS)}
            width = model.get("hidden_size")
            if isinstance(width, int) and width > 0 and "preset" not in model:
                followed["initializer_range"] = initializer_range_of(width)
            model = {
                "system": system_of(old),
                **followed,
                **model,
            }
    else:
        # no run file: the source's own settings, or a preset's
        model = to_plain(_Target(model=old))["model"]
        if preset:
            # what changes no weight is the source's, where the preset does not say it
            left_open = (
                n
                for n in (*old.growth().free, "max_position_embeddings")
                if n not in PRESETS.get(preset, {})
            )
            model = {"preset": preset, **{name: model[name] for name in left_open}}
    mapping = {"model": model}
    put_overrides(mapping, [f"model.{override}" for override in overrides])
    return from_mapping(_Target, with_preset(mapping, where=where), where=where).model


def growth_text(grown: Grown) -> str:
    """What a person should know about a growth: sizes, where each layer comes from, and what was not inherited."""
    old, new, sources = grown.source.config, grown.model.config, grown.growth.layer_sources
    kinds_old, kinds_new = old.growth().layer_kinds, new.growth().layer_kinds
    changed = [str(i) for i, s in enumerate(sources) if kinds_old[s] != kinds_new[i]]
    lines = [
        f"source      {grown.source.origin}",
        *(
            f"{name.replace('num_', ''):<22}{getattr(old, name):>9,} -> {getattr(new, name):,}"
            for name in new.growth().grows
        ),
        f"{'values':<22}{_values(grown.source):>9,} -> {_values(grown.model):,}",
    ]
    lines += _layer_lines(sources, shared=new.growth().shared_blocks)
    if changed:
        lines.append(
            f"global here and local there, or the other way round: {', '.join(changed)} "
            "(layer_map same_kind keeps them apart)"
        )
    lines += [f"not inherited: {line}" for line in grown.growth.not_inherited]
    lines += [f"not the source's: {line}" for line in grown.growth.other_settings]
    if grown.model.tokenizer_json is None:
        lines.append("the source has no tokenizer.json, so the new folder has none")
    return "\n".join(lines)


def _layer_lines(sources: Sequence[int], *, shared: int) -> list[str]:
    """Where each layer comes from; of layers that share their weights, that none does.

    sources: old layer of each new one
    shared: sets of weights that the layers share; 0: each has its own
    """
    if shared:
        return [
            f"layers share {counted(shared, 'block')} of weights: their number is a setting, no"
            " weight is new for it"
        ]
    lines = []
    # 28 layers a line
    for start in range(0, len(sources), 28):
        part = range(start, min(start + 28, len(sources)))
        lines += [
            "new layer   " + "".join(f"{i:>4}" for i in part),
            "source      " + "".join(f"{sources[i]:>4}" for i in part),
        ]
    return lines


def _values(model: StoredModel) -> int:
    return sum(w.numel() for w in model.weights.values())


@dataclass(frozen=True, kw_only=True)
class _Target:
    model: Annotated[ModelConfig, chosen_by("system", SYSTEMS)]
