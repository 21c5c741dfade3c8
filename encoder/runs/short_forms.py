"""The short forms of a run file, written out; needs no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder.base.file_kinds import refuse_other_kinds
from encoder.base.schema import put_overrides, read_mapping
from encoder.runs.mixtures import keys_written_out, write_out_mixtures


def read_run_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The long form of a run file with the overrides put in. Raises ConfigError.

    An override may name a place of the long form, phases.0.tokens=1M, and hold a short one, phases.0.lr=1e-3.
    It may name a mixture, data.mixture.name=long, or a source that a mixture is written out to, data.sources.0.weight=3.
    """
    mapping = read_mapping(path)
    refuse_other_kinds(mapping, "run", path=path)
    mapping = long_form(mapping)
    # overrides of sources that a mixture stands for wait until it is written out
    written_out = tuple(f"{key}." for key in keys_written_out(mapping))

    def waits(override: str) -> bool:
        # data.sources=... and data.sources.0.weight=...
        return override.replace("=", ".", 1).startswith(written_out)

    put_overrides(mapping, [o for o in overrides if not waits(o)])
    mapping = long_form(mapping)
    write_out_mixtures(mapping, run_file=Path(path))
    put_overrides(mapping, list(filter(waits, overrides)))
    return long_form(mapping)


def long_form(mapping: dict[str, Any]) -> dict[str, Any]:
    """A copy of a run file's mapping with its short forms written out; what is no short form stays as it is.

    data: shards/web/train            ->    data: {sources: [{path: shards/web/train}]}
    phases: {tokens: 10M, lr: 1e-3}   ->    phases: [{tokens: 10M, lr: {peak: 1e-3}}]
    optimizer: adamw                  ->    optimizer: {name: adamw}
    model: null, with init_from       ->    no model: it is that of init_from
    """
    mapping = copy.deepcopy(mapping)
    # an explicit null, which means what leaving it out means
    if mapping.get("model", ...) is None and (
        mapping.get("init_from") or mapping.get("branch_from")
    ):
        del mapping["model"]
    for key in ("data", "evaluation"):
        if isinstance(mapping.get(key), (str, list)):
            mapping[key] = {"sources": mapping[key]}
    for key in ("objective", "optimizer"):
        if isinstance(mapping.get(key), str):
            mapping[key] = {"name": mapping[key]}
    if isinstance(mapping.get("phases"), dict):
        mapping["phases"] = [mapping["phases"]]
    for holder in (mapping.get("data"), mapping.get("evaluation"), *phases_of(mapping)):
        if isinstance(holder, dict):
            _write_out_sources(holder)
    for phase in phases_of(mapping):
        # true and false are ints to Python
        if isinstance(phase.get("lr"), (int, float, str)) and not isinstance(phase["lr"], bool):
            phase["lr"] = {"peak": phase["lr"]}
    return mapping


def run_folder(mapping: Mapping[str, Any]) -> str | None:
    """`out` of a run file, or runs/NAME; None where there is neither."""
    out, name = mapping.get("out"), mapping.get("name")
    if "out" in mapping:
        return out if isinstance(out, str) and out else None
    return (
        f"runs/{name}" if isinstance(name, str) and name.strip("./") and "/" not in name else None
    )


def phases_of(mapping: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The phases of a long form that are mappings."""
    phases = mapping.get("phases")
    yield from (p for p in (phases if isinstance(phases, list) else []) if isinstance(p, dict))


def _write_out_sources(holder: dict[str, Any]) -> None:
    sources = holder.get("sources")
    if isinstance(sources, (str, dict)):
        sources = [sources]
    if isinstance(sources, list):
        holder["sources"] = [{"path": s} if isinstance(s, str) else s for s in sources]
