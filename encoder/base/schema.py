"""Strict settings: YAML -> frozen dataclasses, where every unknown key is an error that names its neighbour.

A settings class is a frozen dataclass. What a field may hold follows from its type:
    int, float, bool, str, Tokens ("2T"), Literal["a", "b"], tuple[X, ...], X | None, another settings class,
    or Annotated[WSD | Cosine, chosen_by("schedule", {"wsd": WSD, "cosine": Cosine})]: a mapping whose key
    `schedule` picks the class, so that a key which has no effect under the chosen word is unknown, and refused.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar, Union

import yaml

from encoder.base.errors import ConfigError, nearest, shortened
from encoder.base.paths import expand_path, local_path, names_a_file
from encoder.base.units import parse_tokens
from encoder.base.untrusted import (
    MOST_DEPTH,
    MOST_DIGITS,
    missing,
    number_in_name,
    read_text,
)

Tokens = Annotated[int, "tokens"]  # an amount of tokens: 98304, 500K, 1.719T
# a file, a folder or a URL: ~/x and $HOME/x are expanded
PathText = Annotated[str, "path"]
LocalText = Annotated[str, "path", "local"]  # of this machine, and no URL
MOST_YAML_BYTES = 2**20  # the largest shipped settings file has 12 KB
MOST_KEPT_LETTERS = 2**14  # of a YAML text whose value is kept
MOST_NODES = 20_000  # of a YAML text, every alias counted as what it stands for
MOST_INT = 2**63  # what numpy, torch and the ledger can count
MOST_MISTAKES = 60  # named in one error: all of a file that somebody wrote


class Settings(Protocol):
    """What a settings class is to a type checker: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __hash__(self) -> int:
        """A frozen one has it."""


T = TypeVar("T", bound=Settings)


# by identity: a type's notes must have a hash where `X | None` is made of it, and a dict has none
@dataclasses.dataclass(frozen=True, eq=False)
class ChosenBy:
    """A mapping's key `tag` names one of the classes, or the default does."""

    tag: str
    choices: Mapping[str, type[Settings]]
    default: str | None = None


def chosen_by(
    tag: str, choices: Mapping[str, type[Settings]], *, default: str | None = None
) -> ChosenBy:
    """Beside a field's type: which key of the mapping picks the class.

    lr: Annotated[Schedule, chosen_by("schedule", SCHEDULES)]

    tag: the key
    choices: the classes by its word, all of them of the field's type; looked at anew at each reading
    default: the word that an absent key means
    """
    return ChosenBy(tag, choices, default)


def is_settings(hint: Any) -> TypeGuard[type[Settings]]:
    """Whether a field's type is a settings class."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def read_settings(cls: type[T], path: Path | str, overrides: typing.Sequence[str] = ()) -> T:
    """A settings file with `key=value` overrides (dotted, list items by number). Raises ConfigError."""
    return from_mapping(cls, read_mapping(Path(path), overrides), where=str(path))


def read_mapping(path: Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The YAML mapping of a file with the overrides put in, not yet checked against a class."""
    path = expand_path(path)
    try:
        text = read_text(path, error=ConfigError, most_bytes=MOST_YAML_BYTES)
    except ConfigError as error:
        if not missing(error):
            raise
        beside = []
        if path.parent.is_dir():
            beside = sorted(p.name for p in path.parent.glob("*.y*ml"))
        hint = "There is no settings file beside it."
        if beside:
            hint = nearest(path.name, beside)
        raise ConfigError(f"{path} does not exist. {hint}") from error

    mapping = parse_yaml(text, where=str(path))
    if not isinstance(mapping, dict):
        found = "is empty"
        if mapping is not None:
            found = f"holds {_kind(mapping)}"
        raise ConfigError(f"{path} {found}; a settings file is a mapping of keys to values.")
    put_overrides(mapping, overrides)
    return mapping


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML with duplicate keys refused and numbers such as 1e-4 read as numbers. Raises ConfigError, naming the line.

    Depth, digits and what aliases multiply are bounded, and no tag makes anything but plain values.
    """
    try:
        # copied anew each time: a caller may change what it gets
        return _unshared(_loaded(text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where} line {line}: a character that no text has"
            f" (U+{ord(text[error.position]):04X}). Take it out."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at_line = ""
        if mark:
            at_line = f" line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}{at_line}: {problem}.") from error
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError) as error:
        raise ConfigError(f"{where} is no YAML ({type(error).__name__}).") from error


def _loaded(text: str) -> Any:
    # the bound holds what is kept to some megabytes
    if len(text) > MOST_KEPT_LETTERS:
        return yaml.load(text, Loader=_StrictLoader)
    return _loaded_once(text)


@functools.lru_cache(maxsize=64)
def _loaded_once(text: str) -> Any:
    # a start reads its run file three times, at 15 ms for 120 lines
    return yaml.load(text, Loader=_StrictLoader)


def _unshared(value: Any) -> Any:
    """The same plain value without parts that stand in several places: an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


class Mistakes(ConfigError):
    """Several mistakes of one settings file, each a sentence that names its key."""

    def __init__(self, mistakes: Sequence[str], *, where: str = "") -> None:
        self.mistakes = tuple(mistakes)
        place = f"{where}: " if where else ""
        count = len(self.mistakes)
        shown = [mistake.removeprefix(place) for mistake in self.mistakes[:MOST_MISTAKES]]
        listed = [f"({number}) {text}" for number, text in enumerate(shown, start=1)]
        if count > MOST_MISTAKES:
            listed.append(f"And {count - MOST_MISTAKES} more.")
        super().__init__(f"{place}{count} mistakes: {' '.join(listed)}")

    def __reduce__(self) -> tuple:
        return ConfigError, (str(self),)


def from_mapping(
    cls: type[T],
    mapping: Any,
    *,
    where: str = "",
    key: str = "",
    tag: str | None = None,
    root: type[Settings] | None = None,
) -> T:
    """A settings object from plain values. Raises ConfigError with all mistakes, also a class's own, by their dotted keys.

    where: the file, for messages.
    key: dotted place of this mapping in the file; "" for all of it.
    tag: the key that chose the class and is not among the values any more; a misspelt key may have meant it.
    root: class of the whole file, which knows where else a word may belong and other programs' words for it.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{_at(where, key)} is {_kind(mapping)}; needed: a mapping with keys"
            f" {', '.join(_names(cls))}."
        )

    # all mistakes of a file are collected, so that one start names all of them
    root = root or cls
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    mistakes: list[str] = []
    meant: set[str] = set()
    # unknown keys, each with what it may have meant: here, elsewhere, or in another program
    for name in mapping:
        if name not in fields:
            known = [*filter(None, [tag]), *fields]
            hint = nearest(_shown_key(name), known)
            meant.add(hint.removeprefix("Did you mean ").rstrip("?"))
            if not hint.startswith("Did you mean"):
                hint = _where_else(str(name), root, cls) or hint
            mistakes.append(
                f"{_at(where, _join(key, _shown_key(name)))} is unknown."
                f" {_other_word(str(name), root) or hint}"
            )

    # known keys by their types. A missing key is no second mistake where a misspelt one meant it
    values = {}
    for name, field in fields.items():
        if name in mapping:
            try:
                values[name] = _value(hints[name], mapping[name], where, _join(key, name), root)
            except Mistakes as error:
                mistakes += error.mistakes
            except ConfigError as error:
                mistakes.append(str(error))
        elif (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and name not in meant
        ):
            mistakes.append(
                f"{_at(where, _join(key, name))} is missing. Add it: {name}:"
                f" {_example(name, hints[name])}."
            )

    if len(mistakes) > 1:
        raise Mistakes(mistakes, where=where)
    if mistakes:
        raise ConfigError(mistakes[0])

    # finally the class's own checks, which need values of the right types
    try:
        return cls(**values)
    except ConfigError as error:
        place = ""
        if where or key:
            place = f"{_at(where, key)}: "
        raise ConfigError(f"{place}{error}") from error
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{_at(where, key)}: {error}") from error


def expand_paths(cls: type[Settings], mapping: Any, *, where: str, key: str = "") -> Any:
    """A copy of plain values with every path of the class expanded; what does not fit the class stays. Raises ConfigError."""
    if not isinstance(mapping, Mapping):
        return mapping
    hints = _hints(cls)
    return {
        name: _expanded(hints[name], value, where, _join(key, name)) if name in hints else value
        for name, value in mapping.items()
    }


def _expanded(hint: Any, value: Any, where: str, key: str) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(o for o in typing.get_args(hint) if o is not type(None))

    if typing.get_origin(hint) is Annotated and "path" in hint.__metadata__:
        if isinstance(value, str):
            return _path(value, _at(where, key), local=False)
        return value

    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return [
            _expanded(typing.get_args(hint)[0], item, where, _join(key, i))
            for i, item in enumerate(value)
        ]

    chosen = choice_of(hint)
    if chosen and isinstance(value, Mapping):
        word = value.get(chosen.tag, chosen.default)
        hint = chosen.choices.get(word) if isinstance(word, str) else None
    if is_settings(hint):
        return expand_paths(hint, value, where=where, key=key)
    return value


def _path(value: str, at: str, *, local: bool) -> str:
    try:
        path = expand_path(value)
        if path != path.strip() and not os.path.lexists(path):
            raise ConfigError(f"{path!r} begins or ends with white space. Take it out.")
        if local:
            local_path(path)
        return path
    except ConfigError as error:
        raise ConfigError(f"{at}: {error}") from error


def to_plain(value: Any) -> Any:
    """Settings -> dicts, lists and scalars that `from_mapping` reads back to an equal object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        return {
            f.name: _tagged(getattr(value, f.name), hints[f.name])
            for f in dataclasses.fields(value)
            if f.init
        }
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return value


def _tagged(value: Any, hint: Any) -> Any:
    """A field's plain value; a choice, and each one of a list, gets back the key that picks its class, first of all."""
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple:
        item_hint = typing.get_args(hint)[0]
        return [_tagged(item, item_hint) for item in value]
    chosen = choice_of(hint)
    if chosen is None or value is None:
        return to_plain(value)
    tag = next(word for word, cls in chosen.choices.items() if type(value) is cls)
    return {chosen.tag: tag, **to_plain(value)}


def to_yaml(value: Any) -> str:
    """Settings as YAML text, keys in the order of the class."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=120)


def value_at(value: Any, key: str) -> Any:
    """What a plain value has under a key; None where it is no mapping, or has no such key."""
    if not isinstance(value, Mapping):
        return None
    return value.get(key)


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two plain values differ; an item that one of two lists lacks is None there."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        # keys of the old in their order, then those that are new
        for name in [*old, *(n for n in new if n not in old)]:
            found += differences(old.get(name), new.get(name), _join(key, name))
        return found
    if isinstance(old, list) and isinstance(new, list):
        found = []
        for number, (a, b) in enumerate(itertools.zip_longest(old, new)):
            found += differences(a, b, _join(key, number))
        return found
    if old == new:
        return []
    return [(key, old, new)]


def brief(value: Any) -> str:
    """A plain value in a message: a mapping by its name, a long text by its beginning."""
    if value is None:
        return "not there"
    if isinstance(value, dict):
        for key in ("name", "preset", "schedule", "path"):
            word = value.get(key)
            if word and isinstance(word, str):
                return f"{{{word}, ...}}"
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if type(value) is int and abs(value) >= 10**5:
        return shortened(f"{value:,}", 60)
    return shortened(str(value), 60)


_PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{word}"
    for word in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")
)


_RESOLVERS = {
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))\Z"
    ),
}
# words of YAML 1.1, taken where a truth value is due
_TRUTHS = {
    "yes": True,
    "on": True,
    "no": False,
    "off": False,
}


def _todays_resolvers(resolvers: list[tuple[str, re.Pattern[str]]]) -> list[tuple[str, Any]]:
    """Those of YAML 1.1 for one first letter as YAML 1.2 has them."""
    kept = []
    for tag, regexp in resolvers:
        kind = tag.rpartition(":")[2]
        if kind != "timestamp":
            kept.append((tag, _RESOLVERS.get(kind, regexp)))
    return kept


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's reader of plain values, with bounds; every mistake is one of its own errors, with a place."""

    # as YAML 1.2 has it, not 1.1: no dates, 1:30 is not 90, 017 not 15, and
    # the language no is not false
    yaml_implicit_resolvers: ClassVar = {
        letter: _todays_resolvers(resolvers)
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        # by identity of a node: its own and those below it, aliases counted again
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, after its depth, its tag and its size were judged."""
        event = self.peek_event()
        place = event.start_mark
        # counters go up before PyYAML composes what is below: bounds hold while it reads
        self._depth += 1
        self._nodes += 1
        if self._depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {MOST_DEPTH} levels deep; no settings file is", place
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        # an alias to a node that is not finished yet would be a value inside itself
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} stands inside of what it names", place
            )

        # a new node; an alias of it comes here with its size known, and
        # counts as often as it stands
        if id(node) not in self._sizes:
            if node.tag not in _PLAIN_TAGS:
                tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")[:60]
                raise yaml.composer.ComposerError(
                    None, None, f"the tag {tag} is not read here; write the value alone", place
                )
            below: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                below = node.value
            if isinstance(node, yaml.MappingNode):
                below = list(itertools.chain.from_iterable(node.value))
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in below)

        if max(self._nodes, self._sizes[id(node)]) > MOST_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_NODES:,} values with what aliases repeat", place
            )
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; one that its tag does not allow is an error with its place."""
        # Python refuses to read integers of thousands of digits, and
        # text may hold half characters
        try:
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
                raise ValueError
            if node.tag == "tag:yaml.org,2002:str" and not (
                _whole_text(node.value) or names_a_file(node.value)
            ):
                raise ValueError
            return super().construct_object(node, deep=deep)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            OverflowError,
        ) as error:
            kind = {
                "int": "a whole number",
                "float": "a number",
                "bool": "true or false",
                "str": "text",
            }.get(node.tag.rpartition(":")[2], "a value")
            shown = "this"
            if isinstance(node.value, str):
                shown = ascii(node.value)[:40]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown} cannot be read as {kind}", node.start_mark
            ) from error


def _mapping_without_duplicates(loader: yaml.Loader, node: yaml.MappingNode) -> dict:
    # keys by identity before <<: is resolved: what comes with it is not the mapping's own
    own = {id(key) for key, _ in node.value}
    loader.flatten_mapping(node)
    seen: dict = {}
    merged: set = set()
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if not isinstance(name, Hashable):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"a key is {_kind(name)}; needed: a word. Text that begins with {{{{ or [ needs"
                " quotes",
                key_node.start_mark,
            )
        # merged by <<: what stands in the mapping itself goes before it
        if id(key_node) not in own:
            merged.add(name)
        elif name in seen and name not in merged:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"the key {_shown_key(name)!r} stands twice in one mapping; keep one of them",
                key_node.start_mark,
            )
        else:
            merged.discard(name)
        seen[name] = loader.construct_object(value_node, deep=True)
    return seen


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def put_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put each of them. Raises ConfigError with the mistakes of all."""
    _all_or_mistakes([partial(put_override, mapping, override) for override in overrides], "")


def put_override(mapping: dict[str, Any], override: str) -> None:
    """Put `a.b.0.c=value` into nested dicts and lists; the value is read as YAML. Raises ConfigError."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(
            f"override {override!r} has no '='. Write key=value, for example engine.zero_stage=2."
        )
    parts = dotted.split(".")
    if len(parts) > MOST_DEPTH or not all(parts) or not _whole_text(dotted):
        raise ConfigError(
            f"override {ascii(dotted)[1:60]} is no key. Write key=value, for example"
            " engine.zero_stage=2."
        )
    value = parse_yaml(text, where=f"override {dotted}")
    # walk down to the last part; mappings on the way are made where they are missing
    at: Any = mapping
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(at, list):
            if (number := number_in_name(part)) is None or number >= len(at):
                place = ".".join(parts[:i])
                meant = ""
                if at and number is None:
                    meant = f" Did you mean {place}.0.{'.'.join(parts[i:])}?"
                raise ConfigError(
                    f"override {dotted}: {place} is a list of {len(at)} items, "
                    f"and {part!r} is none of 0 to {len(at) - 1}.{meant}"
                )
            if last:
                at[number] = value
            else:
                at = at[number]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            raise ConfigError(
                f"override {dotted}: {'.'.join(parts[:i])} is {_kind(at)} and has no key {part!r}."
            )


def _value(hint: Any, value: Any, where: str, key: str, root: type[Settings]) -> Any:
    """One value held against one type; raises ConfigError with the key's full name."""
    at = _at(where, key)
    chosen = choice_of(hint)
    origin = typing.get_origin(hint)
    # X | None: an empty value is None, any other is held against X
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None:
            if type(None) in options:
                return None
            raise ConfigError(f"{at} is empty; needed: {_wanted(hint)}.")
        return _value(next(o for o in options if o is not type(None)), value, where, key, root)

    # a mapping whose key picks the class
    if chosen:
        return _chosen(chosen, value, where, key, root)

    # paths and amounts of tokens; other notes leave the type as it is
    if origin is Annotated:
        if "path" in hint.__metadata__ and isinstance(value, str):
            return _path(value, at, local="local" in hint.__metadata__)
        if "tokens" in hint.__metadata__:
            try:
                return parse_tokens(value)
            except ConfigError as error:
                raise ConfigError(f"{at}: {error}") from error
        hint = typing.get_args(hint)[0]
        origin = typing.get_origin(hint)

    if is_settings(hint):
        return from_mapping(hint, value, where=where, key=key, root=root)

    if origin is Literal:
        words = typing.get_args(hint)
        if value is False and "off" in words:  # YAML 1.1 reads a bare off so
            return "off"
        # by type, too: True is not 1
        for word in words:
            if type(value) is type(word) and value == word:
                return word
        raise ConfigError(
            f"{at} is {_shown(value)}. {_nearest_value(value, [str(w) for w in words])}"
        )

    # tuple[X, ...] of any length, or tuple[X, Y] with a type for each item
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{at} is {_kind(value)}; needed: a list.")
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(
                _all_or_mistakes(
                    [
                        partial(_value, inner[0], item, where, _join(key, i), root)
                        for i, item in enumerate(value)
                    ],
                    where,
                )
            )
        if len(value) != len(inner):
            raise ConfigError(f"{at} has {len(value)} items; needed: {len(inner)}.")
        return tuple(
            _all_or_mistakes(
                [
                    partial(_value, kind, item, where, _join(key, i), root)
                    for i, (kind, item) in enumerate(zip(inner, value, strict=True))
                ],
                where,
            )
        )

    # dict[str, X]: keys are made text, as YAML reads 1: as a number
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at} is {_kind(value)}; needed: a mapping.")
        inner_kind = typing.get_args(hint)[1]
        values = _all_or_mistakes(
            [
                partial(_value, inner_kind, v, where, _join(key, _shown_key(k)), root)
                for k, v in value.items()
            ],
            where,
        )
        return dict(zip(map(str, value), values, strict=True))
    return _scalar(hint, value, at)


def _all_or_mistakes(asked: Sequence[Callable[[], Any]], where: str) -> list[Any]:
    """The value of each; the mistakes of all of them in one error."""
    values: list[Any] = []
    mistakes: list[str] = []
    for ask in asked:
        try:
            values.append(ask())
        except Mistakes as error:
            mistakes += error.mistakes
        except ConfigError as error:
            mistakes.append(str(error))
    if len(mistakes) > 1:
        raise Mistakes(mistakes, where=where)
    if mistakes:
        raise ConfigError(mistakes[0])
    return values


def _scalar(hint: Any, value: Any, at: str) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, str) and value.lower() in _TRUTHS:
        return _TRUTHS[value.lower()]

    if hint is str and isinstance(value, str):
        if "\0" in value or not _whole_text(value):
            raise ConfigError(
                f"{at} is {_shown(value)}, with a character that no text has. Take it out."
            )
        return value

    # 1.0e3 is a float in YAML; a whole float counts as an integer
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if not -MOST_INT <= value < MOST_INT:
            raise ConfigError(
                f"{at} is {_shown(value)}; needed: a whole number of at most 63 bits."
            )
        return value

    if hint is float and not isinstance(value, bool):
        try:
            # YAML 1.1 reads 1e-4, which has no point, as text
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number

    # no type took the value
    shown = "empty"
    if value is not None:
        shown = f"{_shown(value)} ({_kind(value)})"
    quotes = ""
    if hint is str and isinstance(value, (bool, int, float)):
        quotes = " Put it in quotes."
    raise ConfigError(f"{at} is {shown}; needed: {_wanted(hint)}.{quotes}")


def _chosen(chosen: ChosenBy, value: Any, where: str, key: str, root: type[Settings]) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{_at(where, key)} is {_kind(value)}; needed: a mapping with the key {chosen.tag}."
        )

    word = value.get(chosen.tag, chosen.default)
    if word is None:
        raise ConfigError(
            f"{_at(where, _join(key, chosen.tag))} is missing. Known: {', '.join(chosen.choices)}. "
            f"Add it: {chosen.tag}: {next(iter(chosen.choices))}."
        )
    if not isinstance(word, str) or word not in chosen.choices:
        wrong = (
            f"{_at(where, _join(key, chosen.tag))} is {_shown(word)}."
            f" {_nearest_value(word, list(chosen.choices))}"
        )
        # without the class no key can be judged but by all classes
        # together: what none of them knows
        known = list(itertools.chain.from_iterable(map(_names, chosen.choices.values())))
        unknown = [name for name in value if name != chosen.tag and name not in known]
        others = [
            f"{_at(where, _join(key, _shown_key(name)))} is unknown."
            f" {nearest(_shown_key(name), known)}"
            for name in unknown
        ]
        if others:
            raise Mistakes([wrong, *others], where=where)
        raise ConfigError(wrong)
    rest = {k: v for k, v in value.items() if k != chosen.tag}
    return from_mapping(chosen.choices[word], rest, where=where, key=key, tag=chosen.tag, root=root)


def choice_of(hint: Any) -> ChosenBy | None:
    """The ChosenBy of a type, also inside `X | None`."""
    if typing.get_origin(hint) is Annotated:
        return next((m for m in hint.__metadata__ if isinstance(m, ChosenBy)), None)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next((c for c in map(choice_of, typing.get_args(hint)) if c), None)
    return None


# other programs' words for values of ours; the first that the setting knows is meant
_OTHER_VALUES = {
    "gpu": ("cuda",),
    "cuda:0": ("cuda",),
    "mps": ("cpu",),
    "amp": ("autocast",),
    "mixed": ("autocast",),
    "amp_bf16": ("autocast",),
    "bf16-mixed": ("autocast",),
    "fp16": ("autocast",),
    "float16": ("autocast",),
    "amp_fp16": ("autocast",),
    "bfloat16": ("bf16", "autocast"),
    "float32": ("fp32",),
    "float": ("fp32",),
    "32-true": ("fp32",),
    "double": ("fp64",),
    "float64": ("fp64",),
    "adam": ("adamw",),
    "decoupled_adamw": ("adamw",),
    "adamw_torch": ("adamw",),
    "adamw_torch_fused": ("adamw",),
    "decoupled_stableadamw": ("stable_adamw",),
    "stableadamw": ("stable_adamw",),
    "warmup_stable_decay": ("wsd",),
    "trapezoidal": ("wsd",),
    "cosine_with_warmup": ("cosine",),
    "linear": ("wsd", "constant"),
    "constant_with_warmup": ("constant", "wsd"),
    "flash_attention_2": ("flash2",),
    "flash_attention_3": ("flash3",),
    "json": ("jsonl",),
    "gzip": ("zstd",),
    "huggingface": ("hub",),
    "hf": ("hub",),
    "txt": ("text",),
    "masked_lm": ("mlm",),
    "flex_bert": ("modernbert",),
    "error": ("stop",),
    "raise": ("stop",),
    "ignore": ("skip",),
}
# what a missing key may hold, where its type alone does not show it
_EXAMPLES = {
    "name": "first",
    "out": "runs/first",
    "path": "shards/web/train",
    "tokens": "1B",
    "peak": "1e-3",
    "seed": "17",
    "files": "[web/*.jsonl]",
    "tokenizer": "tokenizer.json",
    "max_tokens_per_document": "1024",
    "row_tokens": "1024",
    "batch_tokens": "64Ki",
    "every_tokens": "10M",
    "column": "language",
    "dataset": "organisation/name",
    "from_tokens": "8Ki",
    "over_tokens": "10M",
    "reference": "the dataset's card",
    "preset": "modernbert_base",
}


def _example(name: str, hint: Any, depth: int = 0) -> str:
    """A value that the key could have, as YAML in one line."""
    if name in _EXAMPLES:
        return _EXAMPLES[name]
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(o for o in typing.get_args(hint) if o is not type(None))

    chosen = choice_of(hint)
    tag = ""
    if chosen:
        word = chosen.default or next(iter(chosen.choices))
        hint, tag = chosen.choices[word], f"{chosen.tag}: {word}"

    if is_settings(hint):
        if depth > 3:
            return "{...}"

        hints = _hints(hint)
        needed = [
            f"{f.name}: {_example(f.name, hints[f.name], depth + 1)}"
            for f in dataclasses.fields(hint)
            if f.init
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        return "{" + ", ".join([tag] * bool(tag) + needed) + "}"
    if typing.get_origin(hint) is Annotated:
        if "tokens" in hint.__metadata__:
            return "1M"
        return "path/to/it"
    if typing.get_origin(hint) is Literal:
        return str(typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        kinds = inner
        if len(inner) == 2 and inner[1] is Ellipsis:
            kinds = inner[:1]
        return "[" + ", ".join(_example("", kind, depth + 1) for kind in kinds) + "]"
    if typing.get_origin(hint) is dict:
        return "{first: " + _example("", typing.get_args(hint)[1], depth + 1) + "}"
    return {int: "1", float: "0.1", bool: "true", str: "text"}.get(hint, "value")


def _nearest_value(value: Any, words: list[str]) -> str:
    meant = next((w for w in _OTHER_VALUES.get(str(value)[:200].lower(), ()) if w in words), None)
    if meant:
        return f"Did you mean {meant}?"
    return nearest(str(value)[:200], words)


def _other_word(name: str, root: type[Settings]) -> str | None:
    """What another program's word is called here, where the file's class knows it: `other_words`."""
    known: Mapping[str, str] = getattr(root, "other_words", {})
    plain = name.lower().replace("-", "_").lstrip("_")[:200]
    if plain in known:
        return f"Here it is {known[plain]}."
    return None


def _where_else(name: str, root: type[Settings], cls: type[Settings]) -> str | None:
    """The other places of the file where a key of this name belongs."""
    places = [place for place, owner in _places(name, root, "", ()) if owner is not cls]
    if places:
        return f"It belongs to {' or '.join(dict.fromkeys(places[:3]))}."
    return None


def _places(
    name: str, cls: type[Settings], key: str, above: tuple[type[Settings], ...]
) -> typing.Iterator[tuple[str, type[Settings]]]:
    # a class that holds itself has no end
    if cls in above:
        return
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        place = _join(key, field.name)
        if field.name == name:
            yield place, cls
        for kind, item in _classes_of(hints[field.name]):
            yield from _places(name, kind, place + item, (*above, cls))


def _classes_of(hint: Any) -> list[tuple[type[Settings], str]]:
    """The settings classes that a field may hold, and the number of a list's first item."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return list(itertools.chain.from_iterable(map(_classes_of, typing.get_args(hint))))
    chosen = choice_of(hint)
    if chosen:
        return [(kind, "") for kind in chosen.choices.values()]
    if typing.get_origin(hint) is tuple:
        return [(kind, ".0") for kind, _ in _classes_of(typing.get_args(hint)[0])]
    if is_settings(hint):
        return [(hint, "")]
    return []


def _shown(value: Any) -> str:
    """A value in a message, short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of {len(str(abs(value)))} digits"
    if isinstance(value, (dict, list)) and len(str(value)) > 60:
        return _kind(value)
    return shortened(repr(value), 80)


def _shown_key(name: Any) -> str:
    text = str(name)
    if not text or not text.isprintable():
        text = ascii(name)
    return shortened(text, 80)


def _whole_text(text: str) -> bool:
    """Whether a text is Unicode, without half characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# 0.5 ms a class, and a start asks a hundred times
@functools.cache
def _hints(cls: type[Settings]) -> dict[str, Any]:
    """What each field may hold, by name."""
    return typing.get_type_hints(cls, include_extras=True)


def _names(cls: type[Settings]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _join(key: str, part: Any) -> str:
    if not key:
        return str(part)
    return f"{key}.{part}"


def _at(where: str, key: str) -> str:
    return ": ".join(filter(None, (where, key)))


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return {
        dict: "a mapping",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true/false",
    }.get(type(value), type(value).__name__)


def _wanted(hint: Any) -> str:
    if choice_of(hint):
        return "a mapping"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(
            "nothing" if o is type(None) else _wanted(o) for o in typing.get_args(hint)
        )
    if typing.get_origin(hint) is Annotated:
        if "tokens" in hint.__metadata__:
            return "a number of tokens (98304, 500K, 1.5B)"
        if "path" in hint.__metadata__:
            return "a path"
        return "a value"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(w) for w in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    if is_settings(hint):
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, "a value"
    )
