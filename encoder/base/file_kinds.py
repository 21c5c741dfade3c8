"""Which kind of settings file a mapping is, by its keys: a file of another kind is one mistake, not one a key.

{phases: ..., model: ...}      run file             tessera pretrain
{task: ..., data: ...}         task file            tessera finetune
{base: task.yaml, seeds: ...}  sweep file           tessera sweep
{data: {beir: ...}}            embedding file       tessera embed
{sources: ..., tokenizer: ...} preparation file     data-prep prepare
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from encoder.base.errors import ConfigError

Kind = Literal["run", "task", "sweep", "embedding", "preparation"]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A kind of settings file."""

    name: str  # in a sentence
    command: str  # that takes it
    marks: tuple[frozenset[str], ...]  # dotted keys; a file with all of one set is of this kind


_KINDS: dict[Kind, _Known] = {
    "run": _Known(
        name="a pretraining run file", command="tessera pretrain", marks=(frozenset({"phases"}),)
    ),
    "task": _Known(name="a task file", command="tessera finetune", marks=(frozenset({"task"}),)),
    "sweep": _Known(name="a sweep file", command="tessera sweep", marks=(frozenset({"base"}),)),
    "embedding": _Known(
        name="an embedding file",
        command="tessera embed",
        marks=(
            frozenset({"start_from", "data.beir"}),
            frozenset({"start_from", "data.pairs"}),
        ),
    ),
    "preparation": _Known(
        name="a preparation file",
        command="data-prep prepare",
        marks=(frozenset({"sources", "tokenizer"}),),
    ),
}


def refuse_other_kinds(mapping: Mapping[str, Any], needed: Kind, *, path: object) -> None:
    """Raises ConfigError for a file that is surely of another kind.

    mapping: of the file, without overrides
    needed: by the command
    path: of the file
    """
    # a file with the marks of the needed kind is of it, whatever else was put in
    if _is(mapping, _KINDS[needed]):
        return
    for known in _KINDS.values():
        if _is(mapping, known):
            raise ConfigError(
                f"{path} is {known.name}; needed: {_KINDS[needed].name}. It is for:"
                f" {known.command} {shlex.quote(str(path))}"
            )


def _is(mapping: Mapping[str, Any], known: _Known) -> bool:
    return any(all(_has(mapping, key) for key in keys) for keys in known.marks)


def _has(mapping: Mapping[str, Any], key: str) -> bool:
    outer, dot, inner = key.partition(".")
    if not dot:
        return key in mapping
    below = mapping.get(outer)
    return isinstance(below, Mapping) and inner in below
