#!/usr/bin/env python3
"""Write the reference of all settings, docs/run_file.md and others, from the settings classes and their comments.

python launch/reference.py           write the files of this clone; a test holds them against the classes
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union

from encoder.base import schema
from encoder.base.command import CommandLine, run_command
from encoder.base.home import home
from encoder.base.units import short_count

_HEAD = (
    "<!-- written by launch/reference.py from the settings classes: change their comments, then run"
    " it -->\n"
)
_RUN_INTRO = """# The run file

All settings of `tessera pretrain RUN.yaml`. Needed are `name`, `data`, `model` (or `init_from`) and `phases`, each phase with
`tokens`, `batch_tokens` and `lr`; the rest has a default, and `tessera plan RUN.yaml` shows what it is and why. Any of them can
be put over the file's on the command line: `engine.zero_stage=2 phases.0.tokens=1M`. `tessera new --list` has files to start from.

Short forms: `data: FOLDER` or a list of folders for `data: {sources: [{path: FOLDER}]}`, `phases: {...}` for a list of one,
`lr: 1e-3` for `lr: {peak: 1e-3}`. `model: {preset: NAME}` takes a published shape: PRESETS.

`mixture: {file: configs/prep/mixture_2t.yaml, name: pretrain_1024}` stands for the `sources` that
`data-prep plan configs/prep/mixture_2t.yaml --mixture pretrain_1024 --yaml` prints. `data`, a phase and `evaluation` (there the
held-out documents) may have one; `file` is said once, in `data`. It is looked for from the run file's folder, from the working
folder, and among the files that Tessera brings. The `run.yaml` of the run folder has the plain sources.
"""
_TASK_INTRO = """# The task file

All settings of `tessera finetune TASK.yaml`. Needed are `name`, `start_from`, `task`, `data` and `lr`; `lr: 5e-5` stands for
`lr: {peak: 5e-5}`. Any of them can be put over the file's on the command line: `epochs=5 lr.peak=3e-5`. What they mean together
is told in [finetune.md](finetune.md).
"""
_EMBED_INTRO = """# The embedding file

All settings of `tessera embed EMBED.yaml`. Needed are `name`, `start_from`, `data` and `lr`; `lr: 2e-5` stands for
`lr: {peak: 2e-5}`. Any of them can be put over the file's on the command line: `seed=3 lr.peak=3e-5`. What they mean together is
told in [embedding.md](embedding.md).
"""
_SWEEP_INTRO = """# The sweep file

All settings of `tessera sweep SWEEP.yaml`. What they mean together is told in [sweeps.md](sweeps.md).
"""
_PREP_INTRO = """# The preparation file

All settings of `data-prep prepare FILE.yaml` and `data-prep plan FILE.yaml`. `tessera new prep own_text` writes one to start from.
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the reference."""

    key: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one class, under the dotted key that holds it."""

    title: str
    text: str
    settings: tuple[Setting, ...]


def main(argv: list[str] | None = None) -> int:
    """Parses, writes, returns the exit code."""
    CommandLine(description=__doc__).parse_args(argv)

    def body() -> None:
        for name, text in pages().items():
            (home() / "docs" / name).write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")

    return run_command(body)


def pages() -> dict[str, str]:
    """File name -> text of each page."""
    from data_prep.config import PrepareConfig
    from encoder.finetune.config import FineTuneConfig
    from encoder.finetune.sweeps.config import SweepConfig
    from encoder.models.catalog import PRESETS
    from encoder.runs.config import RunConfig
    from encoder.tools.embedding.config import EmbedConfig

    presets = ", ".join(f"`{name}`" for name in PRESETS)
    return {
        "run_file.md": _page(RunConfig, _RUN_INTRO.replace("PRESETS", presets)),
        "task_file.md": _page(FineTuneConfig, _TASK_INTRO),
        "embed_file.md": _page(EmbedConfig, _EMBED_INTRO),
        "sweep_file.md": _page(SweepConfig, _SWEEP_INTRO),
        "prep_file.md": _page(PrepareConfig, _PREP_INTRO),
    }


def sections_of(cls: type, title: str = "") -> Iterator[Section]:
    """The settings of a class and, after it, of the classes in it; a class that stands in several places is told once."""
    told: set[type] = set()
    waiting = [(cls, title)]
    while waiting:
        cls, title = waiting.pop(0)
        if cls in told:
            continue
        told.add(cls)
        hints = typing.get_type_hints(cls, include_extras=True)
        # a class that was told has its section already
        fields = [f for f in dataclasses.fields(cls) if f.init]
        yield Section(
            title=title,
            text=_first_paragraph(cls),
            settings=tuple(_setting(cls, f, hints[f.name]) for f in fields),
        )
        # without the tag of a choice, which stands in brackets
        below = title.partition(" (")[0]
        for f in fields:
            waiting += _classes_in(hints[f.name], f"{below}.{f.name}" if below else f.name)


def _page(cls: type, intro: str) -> str:
    lines = [_HEAD, intro]
    for section in sections_of(cls):
        if section.title:
            lines += [f"## `{section.title}`\n", f"{section.text}\n"]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{s.key}` | {s.kind} | {s.default} | {s.meaning} |" for s in section.settings]
        lines.append("")
    return "\n".join(lines)


def _setting(cls: type, f: dataclasses.Field, hint: Any) -> Setting:
    # a comment ends in the rule by which a default follows from other settings
    meaning, _, derived = comment_of(cls, f.name).partition("; default: ")
    if meaning.startswith("default: "):
        meaning, derived = "", meaning.removeprefix("default: ")
    if f.default is not dataclasses.MISSING:
        default = _value_text(f.default, hint)
    elif f.default_factory is not dataclasses.MISSING:
        made = f.default_factory()
        default = "see below" if dataclasses.is_dataclass(made) else _value_text(made, hint)
    else:
        default = "*needed*"
    held = _classes_in(hint, "")
    if not meaning and held:
        meaning = "each kind has its settings below"
        if len({cls for cls, _ in held}) == 1:
            meaning = _first_sentence(held[0][0])
    return Setting(
        key=f.name, kind=_kind_text(hint), default=_cell(derived or default), meaning=_cell(meaning)
    )


def comment_of(cls: type, name: str) -> str:
    """What stands behind a field in its class's source, or above it, as one line."""
    for owner in cls.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            return _comments(owner).get(name, "")
    return ""


@cache
def _comments(cls: type) -> dict[str, str]:
    lines, start = inspect.getsourcelines(cls)
    source = inspect.getsource(sys.modules[cls.__module__]).splitlines()
    found = {}
    # lines of `definition` count from the class's first, which is line `start` of its module
    (definition,) = ast.parse("".join(_dedented(lines))).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            last = source[start + node.end_lineno - 2]
            behind = last[node.end_col_offset :].partition("#")[2].strip()
            above: list[str] = []
            row = start + node.lineno - 3
            # else the comment lines above the field, upwards to the first line that is none
            while not behind and source[row].strip().startswith("#"):
                above.insert(0, source[row].strip().removeprefix("#").strip())
                row -= 1
            found[node.target.id] = behind or " ".join(above)
    return found


def _dedented(lines: list[str]) -> list[str]:
    indent = len(lines[0]) - len(lines[0].lstrip())
    return [line[indent:] for line in lines]


def _classes_in(hint: Any, key: str) -> list[tuple[type[schema.Settings], str]]:
    """The settings classes that a type may hold, with the titles of their sections."""
    chosen = schema.choice_of(hint)
    if chosen:
        return [(cls, f"{key} ({chosen.tag}: {word})") for word, cls in chosen.choices.items()]
    if schema.is_settings(hint):
        return [(hint, key)]
    origin = typing.get_origin(hint)
    inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
    # a list, or a mapping from names: the settings of an item
    if origin is tuple:
        return _classes_in(inner[0], f"{key}[]")
    if origin is dict:
        return _classes_in(inner[1], f"{key}.NAME")
    found: list[tuple[type, str]] = []
    if origin in (Union, types.UnionType):
        for option in inner:
            found += _classes_in(option, key)
    return found


def _first_paragraph(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _first_sentence(cls: type) -> str:
    return _first_paragraph(cls).partition(". ")[0].rstrip(".")


def _kind_text(hint: Any) -> str:
    chosen = schema.choice_of(hint)
    if chosen:
        kinds = len(chosen.choices)
        return f"one of {kinds} kinds, see below" if kinds > 1 else "see below"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind_text(a) for a in inner if a is not type(None))
    if origin is Annotated:
        return "tokens" if "tokens" in hint.__metadata__ else _kind_text(inner[0])
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin is tuple:
        return "list" if inner[-1] is Ellipsis else f"list of {len(inner)} numbers"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping, see below"
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}.get(
        hint, "value"
    )


def _value_text(value: Any, hint: Any) -> str:
    if value is None or value in ((), {}, [], ""):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if typing.get_origin(hint) is Annotated and isinstance(value, int):
        return short_count(value)
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{v:g}' for v in value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
