"""The sizes of the pages of a Parquet column, from their headers: a page is what any reader must unpack as a whole.

A page has 1 MiB as a rule; writers make one of gigabytes from a few huge rows. Headers are structs of Thrift's compact
protocol, of which the first fields are the kind, the unpacked and the packed size:

    15 04 | 15 80 80 80 01 | 15 96 02 | ... | 00        kind 2 (dictionary), 1,048,576 bytes, 139 in the file
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

HEADER_BYTES = 2**12
# kinds of values in Thrift's compact protocol
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (
    (1, 2),
    3,
    (4, 5, 6),
    7,
    8,
    (9, 10),
    12,
)
DICTIONARY = 2


@dataclass(frozen=True)
class Page:
    """One page of a column chunk."""

    kind: int
    bytes: int  # unpacked


def pages_of(file: IO[bytes], begin: int, size: int) -> Iterator[Page]:
    """The pages of a column chunk that lies at `begin` with `size` bytes. Raises ValueError for what is none."""
    at, end = begin, begin + size
    while at < end:
        header = _Compact(file, at)
        # fields of a page's header: 1 is its kind, 2 its unpacked and 3 its packed size
        fields = header.struct()
        if not {1, 2, 3} <= fields.keys() or fields[2] < 0 or fields[3] < 0:
            raise ValueError("a page without sizes")
        yield Page(kind=fields[1], bytes=fields[2])
        # behind the header the packed page, then the next header
        at = header.at + fields[3]


class _Compact:
    """A reader of Thrift's compact protocol over a file; long values are passed over, not read."""

    def __init__(self, file: IO[bytes], at: int) -> None:
        self._file, self.at = file, at
        self._load()

    def _load(self) -> None:
        self._file.seek(self.at)
        self._base, self._data = self.at, self._file.read(HEADER_BYTES)

    def _byte(self) -> int:
        if not self._base <= self.at < self._base + len(self._data):
            self._load()
            if not self._data:
                raise ValueError("a page header that is cut short")
        self.at += 1
        return self._data[self.at - 1 - self._base]

    def _number(self) -> int:
        # 7 bits a byte, the lowest first; the highest bit says that more follow
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a page header of no sense")

    def _signed(self) -> int:
        value = self._number()
        # 0, -1, 1, -2 ... are written as 0, 1, 2, 3 ...
        return value >> 1 ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The integer fields of a struct by number; others are passed over."""
        if depth > 8:
            raise ValueError("a page header of no sense")
        found, field = {}, 0
        while head := self._byte():
            # upper 4 bits: distance from the last field's number, 0: it follows; lower 4: the kind
            field = field + (head >> 4) if head >> 4 else self._signed()
            value = self._value(head & 15, depth, in_list=False)
            if value is not None:
                found[field] = value
        return found

    def _value(self, kind: int, depth: int, *, in_list: bool) -> int | None:
        if kind in _BOOLEANS:
            # in a struct the kind is the value (1 true, 2 false), in a list each takes a byte
            if in_list:
                self.at += 1
        elif kind == _BYTE:
            self.at += 1
        elif kind in _INTEGERS:
            return self._signed()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            size = self._number()
            self.at += size
        elif kind in _LISTS:
            head = self._byte()
            # up to 14 items are counted in the head, more in a number behind it
            count = self._number() if head >> 4 == 15 else head >> 4
            for _ in range(min(count, HEADER_BYTES)):
                self._value(head & 15, depth + 1, in_list=True)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError("a page header of no sense")
        return None
