"""Strict settings: YAML -> frozen dataclasses, where every unknown key is an error that names its neighbour.

A settings class is a frozen dataclass. What a field may hold follows from its type:
    int, float, bool, str, Tokens ("2T"), Literal["a", "b"], tuple[X, ...], X | None, another settings class,
    or `chosen_by("schedule", {"wsd": WSD, "cosine": Cosine})`: a mapping whose key `schedule` picks the class,
    so that a key which has no effect under the chosen word is unknown, and refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from encoder.base.errors import ConfigError, nearest
from encoder.base.units import parse_tokens

Tokens = Annotated[int, "tokens"]     # an amount of tokens: 98304, 500K, 1.719T
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _ChosenBy:
    tag: str
    choices: dict[str, type]
    default: str | None = None


def chosen_by(tag: str, choices: dict[str, type], *, default: str | None = None) -> Any:
    """A field type: the mapping's key `tag` names one of the classes. Use: `lr: chosen_by("schedule", SCHEDULES)`."""
    return Annotated[Any, _ChosenBy(tag, choices, default)]


def read_settings(cls: type[T], path: Path | str, overrides: typing.Sequence[str] = ()) -> T:
    """A settings file with `key=value` overrides (dotted, list items by number). Raises ConfigError."""
    return from_mapping(cls, read_mapping(Path(path), overrides), where=str(path))


def read_mapping(path: Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The YAML mapping of a file with the overrides put in, not yet checked against a class."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path} does not exist. " + (nearest(path.name, beside) if beside
                          else "There is no settings file beside it.")) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    mapping = parse_yaml(text, where=str(path))
    if not isinstance(mapping, dict):
        found = "is empty" if mapping is None else f"holds {_kind(mapping)}"
        raise ConfigError(f"{path} {found}; a settings file is a mapping of keys to values.")
    for override in overrides:
        put_override(mapping, override)
    return mapping


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML with duplicate keys refused and numbers such as 1e-4 read as numbers."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}{line}: {problem}.") from error


def from_mapping(cls: type[T], mapping: Any, *, where: str = "", key: str = "", tag: str | None = None) -> T:
    """A settings object from plain values. Raises ConfigError, also for a class's own ValueError, naming the dotted key.

    `tag`: the key that chose the class and is not among the values any more; a misspelt key may have meant it.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{_at(where, key)} is {_kind(mapping)}; needed: a mapping with keys {', '.join(_names(cls))}."
        )
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in mapping:
        if name not in fields:
            raise ConfigError(f"{_at(where, _join(key, name))} is unknown. "
                              f"{nearest(str(name), [*([tag] if tag else []), *fields])}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], where, _join(key, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_at(where, _join(key, name))} is missing. Add it: {name}: {_wanted(hints[name])}.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{_at(where, key)}: {error}" if (where or key) else str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{_at(where, key)}: {error}") from error


def to_plain(value: Any) -> Any:
    """Settings -> dicts, lists and scalars that `from_mapping` reads back to an equal object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value), include_extras=True)
        plain = {}
        for f in dataclasses.fields(value):
            if f.init:
                item = getattr(value, f.name)
                plain[f.name] = to_plain(item)
                chosen = _choice_of(hints[f.name])
                if chosen and item is not None:
                    tag = next(word for word, cls in chosen.choices.items() if type(item) is cls)
                    plain[f.name] = {chosen.tag: tag, **plain[f.name]}
        return plain
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return value


def to_yaml(value: Any) -> str:
    """Settings as YAML text, keys in the order of the class."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two plain values differ; an item that one of two lists lacks is None there."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in [*old, *(n for n in new if n not in old)]:
            found += differences(old.get(name), new.get(name), _join(key, name))
        return found
    if isinstance(old, list) and isinstance(new, list):
        pairs = enumerate(itertools.zip_longest(old, new))
        return [d for i, (a, b) in pairs for d in differences(a, b, _join(key, i))]
    return [] if old == new else [(key, old, new)]


def brief(value: Any) -> str:
    """A plain value in a message: a mapping by its name, a long text by its beginning."""
    if value is None:
        return "not there"
    if isinstance(value, dict):
        word = next((value[key] for key in ("name", "preset", "schedule", "path") if isinstance(value.get(key), str)), "")
        return f"{{{word}, ...}}" if word else "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = f"{value:,}" if type(value) is int and abs(value) >= 10**5 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _StrictLoader(yaml.SafeLoader):
    pass


def _mapping_without_duplicates(loader: yaml.Loader, node: yaml.MappingNode) -> dict:
    loader.flatten_mapping(node)
    seen: dict = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if not isinstance(name, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key is {_kind(name)}; needed: a word. Text that begins with {{{{ or [ needs quotes",
                key_node.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {name!r} stands twice in one mapping; keep one of them", key_node.start_mark)
        seen[name] = loader.construct_object(value_node, deep=True)
    return seen


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def put_override(mapping: dict[str, Any], override: str) -> None:
    """Put `a.b.0.c=value` into nested dicts and lists; the value is read as YAML. Raises ConfigError."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} has no '='. Write key=value, for example engine.zero_stage=2.")
    value = parse_yaml(text, where=f"override {dotted}")
    at: Any = mapping
    parts = dotted.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                raise ConfigError(f"override {dotted}: {'.'.join(parts[:i])} is a list of {len(at)} items, "
                                  f"and {part!r} is none of 0 to {len(at) - 1}.")
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            raise ConfigError(f"override {dotted}: {'.'.join(parts[:i])} is {_kind(at)} and has no key {part!r}.")


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """One value held against one type; raises ConfigError with the key's full name."""
    at = _at(where, key)
    chosen = _choice_of(hint)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None:
            if type(None) in options:
                return None
            raise ConfigError(f"{at} is empty; needed: {_wanted(hint)}.")
        return _value(next(o for o in options if o is not type(None)), value, where, key)
    if chosen:
        return _chosen(chosen, value, where, key)
    if origin is Annotated:
        if "tokens" in hint.__metadata__:
            try:
                return parse_tokens(value)
            except ConfigError as error:
                raise ConfigError(f"{at}: {error}") from error
        hint = typing.get_args(hint)[0]
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where=where, key=key)
    if origin is Literal:
        words = typing.get_args(hint)
        if value is False and "off" in words:      # YAML 1.1 reads a bare off so
            return "off"
        for word in words:
            if type(value) is type(word) and value == word:
                return word
        raise ConfigError(f"{at} is {value!r}. {nearest(str(value), [str(w) for w in words])}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{at} is {_kind(value)}; needed: a list.")
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_value(inner[0], item, where, _join(key, i)) for i, item in enumerate(value))
        if len(value) != len(inner):
            raise ConfigError(f"{at} has {len(value)} items; needed: {len(inner)}.")
        return tuple(_value(kind, item, where, _join(key, i)) for i, (kind, item) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at} is {_kind(value)}; needed: a mapping.")
        inner_kind = typing.get_args(hint)[1]
        return {str(k): _value(inner_kind, v, where, _join(key, k)) for k, v in value.items()}
    return _scalar(hint, value, at)


def _scalar(hint: Any, value: Any, at: str) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and not isinstance(value, bool):
        try:                                # YAML 1.1 reads 1e-4 as text
            number = float(value) if isinstance(value, (int, float, str)) else None
        except ValueError:
            number = None
        if number is not None and math.isfinite(number):
            return number
    shown = f"{value!r} ({_kind(value)})" if value is not None else "empty"
    raise ConfigError(f"{at} is {shown}; needed: {_wanted(hint)}.")


def _chosen(chosen: _ChosenBy, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_at(where, key)} is {_kind(value)}; needed: a mapping with the key {chosen.tag}.")
    word = value.get(chosen.tag, chosen.default)
    if word is None:
        raise ConfigError(f"{_at(where, _join(key, chosen.tag))} is missing. Known: {', '.join(chosen.choices)}.")
    if not isinstance(word, str) or word not in chosen.choices:
        raise ConfigError(
            f"{_at(where, _join(key, chosen.tag))} is {word!r}. {nearest(str(word), list(chosen.choices))}"
        )
    rest = {k: v for k, v in value.items() if k != chosen.tag}
    return from_mapping(chosen.choices[word], rest, where=where, key=key, tag=chosen.tag)


def _choice_of(hint: Any) -> _ChosenBy | None:
    """The _ChosenBy of a type, also inside `X | None`."""
    if typing.get_origin(hint) is Annotated:
        return next((m for m in hint.__metadata__ if isinstance(m, _ChosenBy)), None)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next((c for c in map(_choice_of, typing.get_args(hint)) if c), None)
    return None


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _join(key: str, part: Any) -> str:
    return f"{key}.{part}" if key else str(part)


def _at(where: str, key: str) -> str:
    return f"{where}: {key}" if where and key else (where or key)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false"}.get(
        type(value), type(value).__name__)


def _wanted(hint: Any) -> str:
    if _choice_of(hint):
        return "a mapping"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join("nothing" if o is type(None) else _wanted(o) for o in typing.get_args(hint))
    if typing.get_origin(hint) is Annotated:
        return "a number of tokens (98304, 500K, 1.5B)" if "tokens" in hint.__metadata__ else "a value"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(w) for w in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "a value")
