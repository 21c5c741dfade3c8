"""A table of SentencePiece's normalizer, as tokenizers reads it: a trie in a double array, and what is put in place of a key."""

from __future__ import annotations

import struct

_LEAF = 1 << 31


def charsmap(replacements: dict[str, str]) -> bytes:
    """The table that replaces these characters or graphemes."""
    texts = b""
    values: dict[bytes, int] = {}
    for key, text in replacements.items():
        values[key.encode("utf-8")] = len(texts)
        texts += text.encode("utf-8") + b"\0"
    units = _double_array(values)
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + texts


def _double_array(values: dict[bytes, int]) -> list[int]:
    """The trie of some keys, none of which begins another."""
    units = {0: 0}
    _place(units, 0, values)
    return [units.get(at, 0) for at in range(max(units) | 0xFF)] + [0]


def _place(units: dict[int, int], at: int, values: dict[bytes, int]) -> None:
    """The children of the node at a place: child `label` stands at base ^ label, 0 is the end of a key."""
    labels = {key[0] if key else 0 for key in values}
    base = 1
    while any(base ^ label in units for label in labels):
        base += 1
    units[at] |= (at ^ base) << 10 | (0 in labels) << 8
    for label in labels:
        units[base ^ label] = label
    for label in sorted(labels):
        below = {key[1:]: value for key, value in values.items() if key[:1] == bytes([label])}
        if label:
            _place(units, base ^ label, below)
        else:
            units[base] = _LEAF | values[b""]
