"""Which documents of a source are taken: a small exact language over the columns beside the text.

    filters:
      - {column: language, equals: en}
      - {column: language_score, at_least: 0.65}
      - {column: metadata.license, one_of: [CC0, CC-BY-4.0]}       # a.b is field b inside column a
      - {column: detected_licenses, one_of: [MIT, Apache-2.0]}     # of a list every item must be one of them
      - {column: text, at_least_chars: 16384}

A document is taken when it passes all filters. The value of a filter's column that is null, absent or an empty list
passes `none_of` and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from encoder.base.errors import ConfigError, shortened

ABSENT = object()
LABEL_CHARS = 70


class WrongType(Exception):
    """A value that a filter cannot judge, as a sentence: 'score' is a text; needed: a number."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One column and what its value must be; several rules must all hold."""

    column: str  # a.b.c reaches into nested fields
    equals: Any = None  # text, number, true or false
    one_of: tuple[Any, ...] | None = None  # a list of such
    none_of: tuple[Any, ...] | None = None  # a list of what is left out
    at_least: float | None = None  # of a number
    at_most: float | None = None  # of a number
    # length of a text; 1,000 tokens of English prose have about 4,500
    at_least_chars: int | None = None
    at_most_chars: int | None = None  # length of a text
    not_empty: bool = False  # a text with more than white space, a list or mapping with items

    def __post_init__(self) -> None:
        if not self.rules:
            known = ", ".join(f.name for f in fields(self)[1:])
            raise ConfigError(f"the filter on {self.column} has no rule. Known: {known}.")
        # an empty list would let nothing pass, or everything
        for given in (self.one_of, self.none_of):
            if given is not None and not given:
                raise ConfigError(
                    f"the filter on {self.column} has an empty list; needed: at least one value."
                )
        for value in (self.equals, *(self.one_of or ()), *(self.none_of or ())):
            if not isinstance(value, str | int | float | None):
                raise ConfigError(
                    f"the filter on {self.column} compares with {value!r}; needed: a text, a"
                    " number, true or false."
                )
        for word in ("one_of", "none_of"):
            values = getattr(self, word) or ()
            if bool in (kinds := {type(value) for value in values}) and len(kinds) > 1:
                raise ConfigError(
                    f"the filter on {self.column} has {_shown(values)} in {word}: true and false"
                    " beside others. YAML reads no, yes, on and off so; put quotes around the"
                    " word."
                )
        for low, high in ((self.at_least, self.at_most), (self.at_least_chars, self.at_most_chars)):
            if low is not None and high is not None and low > high:
                raise ConfigError(
                    f"the filter on {self.column} asks for at least {low:,} and at most {high:,}; "
                    "no value is both."
                )

    @property
    def rules(self) -> dict[str, Any]:
        """The rules that were given, by word."""
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        return {
            word: value
            for word, value in given.items()
            if value is not None and (word, value) != ("not_empty", False)
        }

    @property
    def label(self) -> str:
        """The reason under which documents that do not pass are counted: 'language not equals en'."""
        said = ", ".join(
            word if value is True and word == "not_empty" else f"{word} {_shown(value)}"
            for word, value in self.rules.items()
        )
        return shortened(f"{self.column} not {said}", LABEL_CHARS)

    def passes(self, value: Any) -> bool:
        """Whether a document with this value is taken; ABSENT and None are no value. Raises WrongType."""
        items = [value]
        if isinstance(value, list):
            items = value
        if value is ABSENT or value is None or items == []:
            return list(self.rules) == ["none_of"]

        # a text against a number is a mistake in the filter, not a document to leave out
        equals = [w for w in (self.equals,) if w is not None]
        for given in (equals, self.one_of or (), self.none_of or ()):
            self._check_comparable(items, [w for w in given if w is not None])

        # of a list every item must be wanted, and none be unwanted
        for item in items:
            if equals and not _is_among(item, equals):
                return False
            if self.one_of and not _is_among(item, self.one_of):
                return False
            if _is_among(item, self.none_of or ()):
                return False

        if self.not_empty and _is_empty(value):
            return False
        return self._within(value, self.at_least, self.at_most) and self._within_chars(value)

    def _check_comparable(self, items: list[Any], wanted: list[Any]) -> None:
        """Every item is a text, a number or a truth value as one of those wanted is; null is no value."""
        kinds = {named(w) for w in wanted}
        for item in items if kinds else ():
            if item is not None and named(item) not in kinds:
                raise WrongType(
                    f"{self.column!r} is {named(item)}; needed: {' or '.join(sorted(kinds))}, "
                    "as in the filter"
                )

    def _within(self, value: Any, low: float | None, high: float | None) -> bool:
        if low is None and high is None:
            return True
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WrongType(f"{self.column!r} is {named(value)}; needed: a number")
        return (low is None or value >= low) and (high is None or value <= high)

    def _within_chars(self, value: Any) -> bool:
        if self.at_least_chars is None and self.at_most_chars is None:
            return True
        if not isinstance(value, str):
            raise WrongType(f"{self.column!r} is {named(value)}; needed: text")
        return self._within(len(value), self.at_least_chars, self.at_most_chars)


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field inside one (a.b.c); ABSENT where it is not. A name with dots comes first."""
    value = row.get(column, ABSENT)
    if value is ABSENT and "." in column:
        value = row
        for name in column.split("."):
            value = value.get(name, ABSENT) if isinstance(value, Mapping) else ABSENT
    return value


def named(value: Any) -> str:
    """What a value is, in a person's words."""
    words = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        bytes: "bytes without an encoding",
    }
    return "null" if value is None else words.get(type(value), f"a {type(value).__name__}")


def _same(a: Any, b: Any) -> bool:
    """Equal, and true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _is_among(item: Any, wanted: Iterable[Any]) -> bool:
    return any(_same(item, w) for w in wanted)


def _is_empty(value: Any) -> bool:
    """A text of white space, or a mapping without keys; an empty list never comes here."""
    if isinstance(value, str):
        return not value.strip()
    return value == {}
