"""The outline of JSON text, read without making values of it: where strings, lists and objects end, however deep they are.

{"text": "a b", "meta": [[[...]]], "id": 1}
 ^ key   ^ value begins, ends at the comma
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_SPACE = re.compile(rb"[ \t\r\n]*")
_MARKS = re.compile(rb'["\[\]{}]')
_SCALAR = re.compile(rb"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|NaN|-?Infinity")
_CLOSES = {ord("]"): ord("["), ord("}"): ord("{")}


class NotJson(ValueError):
    """Text whose outline is not that of JSON."""


def string_end(data: bytes, at: int) -> int:
    """The place behind the string whose first character is at `at`; -1 where it does not end."""
    while True:
        end = data.find(b'"', at)
        if end < 0:
            return -1
        back = end
        # a quote after an odd number of backslashes is a letter
        while back > at and data[back - 1] == 0x5C:
            back -= 1
        if (end - back) % 2 == 0:
            return end + 1
        at = end + 1


def value_end(data: bytes, at: int) -> int:
    """The place behind the value that begins at `at`. Raises NotJson."""
    first = data[at : at + 1]
    if first == b'"':
        end = string_end(data, at + 1)
        if end < 0:
            raise NotJson("a string does not end")
        return end
    if first not in (b"[", b"{"):
        if not (found := _SCALAR.match(data, at)):
            raise NotJson("no value")
        return found.end()

    # brackets that are open; one that closes must fit the last of them
    open_marks = bytearray()
    while True:
        found = _MARKS.search(data, at)
        if not found:
            raise NotJson("a list or an object does not end")
        mark, at = data[found.start()], found.end()
        if mark == 0x22:
            at = string_end(data, at)
            if at < 0:
                raise NotJson("a string does not end")
        elif mark in _CLOSES:
            if open_marks[-1] != _CLOSES[mark]:
                raise NotJson("a list ends as an object, or the other way round")
            open_marks.pop()
            if not open_marks:
                return at
        else:
            open_marks.append(mark)


def fields_of(data: bytes, wanted: Collection[str]) -> dict[str, Any]:
    """The values of some keys of one JSON object; of the others only the outline is looked at. Raises NotJson, and what
    json and UTF-8 raise for a value that is wanted."""
    at = _skip(data, 0)
    if data[at : at + 1] != b"{":
        raise NotJson("no object")
    found: dict[str, Any] = {}
    at = _skip(data, at + 1)
    while data[at : at + 1] != b"}":
        if data[at : at + 1] != b'"':
            raise NotJson("no key")
        key_end = value_end(data, at)
        # bad bytes are replaced, since such a key is none of those wanted
        key = json.loads(data[at:key_end].decode("utf-8", "replace"))
        at = _skip(data, key_end)
        if data[at : at + 1] != b":":
            raise NotJson("a key without a value")
        at = _skip(data, at + 1)
        end = value_end(data, at)
        if key in wanted:
            found[key] = json.loads(data[at:end].decode("utf-8"))
        at = _skip(data, end)
        if data[at : at + 1] == b",":
            at = _skip(data, at + 1)
            if data[at : at + 1] == b"}":
                raise NotJson("nothing after a comma")
        elif data[at : at + 1] != b"}":
            raise NotJson("no comma after a value")
    if _skip(data, at + 1) != len(data):
        raise NotJson("more after the object")
    return found


def _skip(data: bytes, at: int) -> int:
    found = _SPACE.match(data, at)
    assert found is not None, "it matches nothing, too"
    return found.end()
