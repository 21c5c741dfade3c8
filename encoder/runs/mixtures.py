"""The short form `mixture` of a run file, written out as the sources that it stands for; needs no torch.

    data:
      mixture: {file: configs/prep/mixture_2t.yaml, name: pretrain_1024}
    phases:
      - ...
      - mixture: {name: extend_8192}        # of the same file
    evaluation:
      mixture: {name: pretrain_1024}        # the held-out documents of its sources

The budgets of the preparation file become weights, and its `out` the folder of the shards.
`data-prep plan configs/prep/mixture_2t.yaml --mixture pretrain_1024 --yaml` prints the same sources.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder.base.errors import ConfigError, nearest
from encoder.base.home import home
from encoder.base.mixtures import Mixture, held_out_of, sources_of
from encoder.base.paths import expand_path
from encoder.base.schema import LocalText, from_mapping, read_mapping


@dataclass(frozen=True, kw_only=True)
class MixtureChoice:
    """What stands under `mixture`."""

    file: LocalText  # a preparation file; in phases and evaluation, default: that of data.mixture
    name: str  # one of its mixtures


@dataclass(frozen=True, kw_only=True)
class _Preparation:
    """What is read of a preparation file."""

    out: LocalText
    mixtures: dict[str, Any] = field(default_factory=dict)


def write_out_mixtures(mapping: dict[str, Any], *, run_file: Path) -> None:
    """Put `sources` in the place of each `mixture`. Raises ConfigError.

    mapping: the long form of a run file, which is changed.
    run_file: for messages, and for the folder that the mixtures' files are looked for in.
    """
    data = mapping.get("data")
    # phases and evaluation name a mixture of the same file unless they say another
    of_data = data.get("mixture") if isinstance(data, dict) else None
    usual_file = of_data.get("file") if isinstance(of_data, dict) else None

    for key, holder in _holders(mapping):
        choice = holder.pop("mixture")
        if choice is None:
            continue
        if holder.get("sources") is not None:
            raise ConfigError(
                f"{run_file}: {key} has both sources and mixture; needed: one of them. Leave the"
                " other out."
            )
        if isinstance(choice, dict) and usual_file is not None:
            choice = {"file": usual_file, **choice}
        mixture, out = _read_mixture(choice, key=f"{key}.mixture", run_file=run_file)
        if key == "evaluation":
            holder["sources"] = held_out_of(mixture, out=out)
        else:
            holder["sources"] = sources_of(mixture, out=out)


def keys_written_out(mapping: dict[str, Any]) -> tuple[str, ...]:
    """The dotted key of each `sources` that a `mixture` stands for."""
    return tuple(f"{key}.sources" for key, _ in _holders(mapping))


def _holders(mapping: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(dotted key, mapping) of every part of a long form that has a mixture."""
    phases = mapping.get("phases")
    parts = [("data", mapping.get("data")), ("evaluation", mapping.get("evaluation"))]
    parts += [
        (f"phases.{i}", phase) for i, phase in enumerate(phases if isinstance(phases, list) else [])
    ]
    return [(key, part) for key, part in parts if isinstance(part, dict) and "mixture" in part]


def _read_mixture(choice: Any, *, key: str, run_file: Path) -> tuple[Mixture, str]:
    """A mixture, and the folder that its file puts shards in.

    choice: what stands under `mixture`.
    key: where it stands, dotted.
    """
    choice = from_mapping(MixtureChoice, choice, where=str(run_file), key=key)
    file = _find(choice.file, key=key, run_file=run_file)
    content = read_mapping(file)
    # only what is read here is held against the schema: the rest is data preparation's
    needed = {name: content[name] for name in ("out", "mixtures") if name in content}
    preparation = from_mapping(_Preparation, needed, where=str(file))

    if choice.name not in preparation.mixtures:
        known = list(preparation.mixtures)
        hint = "It has none; `mixtures` is where they stand."
        if known:
            hint = nearest(choice.name[:200], known)
        raise ConfigError(
            f"{run_file}: {key}.name is {choice.name[:80]!r}, which is no mixture of {file}. {hint}"
        )
    place = f"mixtures.{choice.name}"
    mixture = from_mapping(Mixture, preparation.mixtures[choice.name], where=str(file), key=place)
    if not mixture.sources:
        raise ConfigError(
            f"{file}: {place}.sources is empty; needed: tokens by source, such as web: 8B."
        )
    return mixture, preparation.out


def _find(file: str, *, key: str, run_file: Path) -> Path:
    """The preparation file: from the run file's folder, from the working folder, or one that Tessera brings."""
    places = [expand_path(run_file).parent / file, Path(file), home() / file]
    found = next((place for place in places if os.path.exists(place)), None)
    if found is not None:
        return found
    # names for "did you mean": the YAML files where it was looked for
    beside: set[str] = set()
    for place in places:
        beside.update(path.name for path in place.parent.glob("*.y*ml"))
    beside.discard(run_file.name)
    hint = "Needed: the path of a preparation file."
    if beside:
        hint = nearest(Path(file).name, sorted(beside))
    raise ConfigError(
        f"{run_file}: {key}.file {file} does not exist, neither from the run file's folder nor from"
        f" {os.getcwd()}. {hint}"
    )
