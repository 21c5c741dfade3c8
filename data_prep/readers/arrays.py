"""One JSON array of objects in a file, read as a stream: an item is cut out by its outline and parsed alone.

[ {"text": "one"},
  {"text": "two"} ]          items 1 and 2
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data_prep.config import JsonArraySource
from data_prep.readers.blocks import SKIP, Block, Limits, ReadError, TooLarge, UntilBroken, readable
from data_prep.readers.files import InputFile
from data_prep.readers.packed import ByteStream, opened

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 2**20
SPACE = b" \t\r\n"
_OUTSIDE = re.compile(rb'["\[\]{},]')


def array_blocks(source: JsonArraySource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """The items of a JSON array in order, as raw bytes. Raises ReadError for what is no array, or one that does not end."""
    items: list[bytes] = []
    number, size, seen = 0, 0, 0

    def block(**content: Any) -> Block:
        return Block(
            source=source, file=file.place, unit="item", most_bytes=limits.document_bytes, **content
        )

    with (
        readable(lambda: f"{file.place} cannot be read beyond item {number:,}"),
        opened(file.at, file.packing, zstd_window_bytes=source.zstd_window_bytes) as (stream, raw),
    ):
        for item, item_bytes in (rest := UntilBroken(_items(stream, file, limits.document_bytes))):
            number += 1
            if item is not None:
                items.append(item)
                size += item_bytes
            # a block ends when it is full, and before an item that is too large: the order stays
            if items and (size >= limits.block_bytes or item is None):
                # `number` counts this item, which is one of `items` unless it is too large
                first = number - len(items) + (item is not None)
                yield block(first=first, items=items, file_bytes=raw.tell() - seen)
                items, size, seen = [], 0, raw.tell()
            if item is None:
                yield block(first=number, too_large=TooLarge(bytes=item_bytes))
        if items:
            yield block(first=number - len(items) + 1, items=items, file_bytes=raw.tell() - seen)
        rest.raise_error()


def _items(
    stream: ByteStream, file: InputFile, most_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    """Each item of the array (None where it is too large) and its bytes."""
    outline = _Outline(file, most_bytes)
    while piece := stream.read1(READ_BYTES):
        yield from outline.add(piece)
    outline.finish()


class _Outline:
    """Where items begin and end, by brackets outside of strings."""

    def __init__(self, file: InputFile, most_bytes: int) -> None:
        self._file, self._most = file, most_bytes
        self._pieces: list[bytes] = []  # of the item that has not ended
        self._bytes = self._depth = self._number = 0
        self._in_string = self._escaped = self._begun = self._ended = self._comma = False

    def add(self, data: bytes) -> Iterator[tuple[bytes | None, int]]:
        """The items that end in these bytes. Raises ReadError for what is no array."""
        at = 0
        if not self._begun:
            data = data.removeprefix(BYTE_ORDER_MARK).lstrip(SPACE)
            if not data:
                return
            if data[:1] != b"[":
                raise ReadError(
                    f"{self._file.place} does not begin with [; needed: one JSON array of objects. "
                    f"Set the format to what it is, or {SKIP}."
                )
            self._begun, at = True, 1
        # where the open item begins in these bytes; depth 0 is between the array's brackets
        begin = at
        while True:
            if self._ended:
                if data[at:].strip(SPACE):
                    raise ReadError(
                        f"{self._file.place} goes on after its array; needed: one JSON array. Cut"
                        f" it, or {SKIP}."
                    )
                return
            if self._in_string:
                at = self._string_end(data, at)
                if self._in_string:
                    break
                continue

            # the next mark that means something outside of a string
            found = _OUTSIDE.search(data, at)
            if not found:
                break
            mark, at = found[0], found.end()
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                self._depth += 1
            elif mark == b"," and not self._depth:
                yield from self._item(data[begin : at - 1], last=False)
                begin = at
            elif mark in b"]}" and self._depth:
                self._depth -= 1
            elif mark == b"]":
                yield from self._item(data[begin : at - 1], last=True)
                self._ended = True
            elif mark == b"}":
                raise ReadError(
                    f"{self._file.place} item {self._number + 1} closes an object that is not open."
                    f" Repair the file, or {SKIP}."
                )
        # the open item goes on in the next bytes
        self._keep(data[begin:])

    def finish(self) -> None:
        """Raises ReadError where the array has not ended."""
        if not self._ended:
            what = "does not end with ]" if self._begun else "is empty"
            raise ReadError(
                f"{self._file.place} {what}: it cannot be read beyond item {self._number:,};"
                f" needed: one JSON array. Fetch the file again, or {SKIP}."
            )

    def _string_end(self, data: bytes, at: int) -> int:
        """Behind the end of the open string, or of the data."""
        # an escape at the end of the last bytes took its character from these
        if self._escaped and at < len(data):
            self._escaped, at = False, at + 1
        while True:
            end = data.find(b'"', at)
            stop = len(data) if end < 0 else end
            # a quote ends the string unless an odd number of backslashes stands before it
            back = stop
            while back > at and data[back - 1] == 0x5C:
                back -= 1
            odd = (stop - back) % 2 == 1
            if end < 0:
                self._escaped = odd
                return len(data)
            if not odd:
                self._in_string = False
                return end + 1
            at = end + 1

    def _keep(self, rest: bytes) -> None:
        self._bytes += len(rest)
        # of an item that is too large only the size is kept
        if self._bytes > self._most:
            self._pieces.clear()
        elif rest:
            self._pieces.append(rest)

    def _item(self, rest: bytes, *, last: bool) -> Iterator[tuple[bytes | None, int]]:
        self._keep(rest)
        pieces, size = self._pieces, self._bytes
        self._pieces, self._bytes = [], 0
        item = b"".join(pieces).strip(SPACE) if size <= self._most else None
        pieces.clear()
        if item == b"" and last and not self._comma:
            return  # []
        self._comma = not last
        self._number += 1
        yield item, size
