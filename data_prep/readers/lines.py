"""JSON lines and plain text: files as blocks of whole lines or paragraphs, which any process can enter in their middle.

Lines stay raw bytes in a block, so that the process that encodes also parses; who reads only looks for line ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import IO

from data_prep.config import HubSource, JsonlSource, Source, TextSource
from data_prep.readers.blocks import READ_ERRORS, Block, Limits, TooLarge, readable
from data_prep.readers.files import InputFile
from data_prep.readers.packed import STEP_BYTES, USUAL_ZSTD_WINDOW, ByteStream, opened


def line_blocks(
    source: JsonlSource | TextSource, file: InputFile, begin: int, end: int | None, limits: Limits
) -> Iterator[Block]:
    """Blocks of the whole lines that begin in [begin, end); of whole paragraphs where these are the documents."""
    by_paragraph = isinstance(source, TextSource) and source.document == "paragraph"
    ends: tuple[bytes, ...] = (b"\n",)
    if by_paragraph:
        ends = (b"\n\n", b"\n\r\n")
    rest = _Rest(ends, limits.document_bytes)
    at = 0  # where it begins

    def place() -> str:
        before = line_ends(file, source, at, limits) + rest.line_ends
        return f"{file.place} cannot be read beyond line {before:,}"

    with (
        readable(place),
        opened(file.at, file.packing, zstd_window_bytes=source.zstd_window_bytes) as (stream, raw),
    ):
        left = None

        # from the first document that begins at or after `begin` to the first at or after `end`:
        # stretches side by side read each document once
        if begin or end is not None:
            at, stop = (
                _next_document(raw, x, ends) for x in (begin, file.bytes if end is None else end)
            )
            left = stop - at
            raw.seek(at)
        seen = raw.tell()
        made = Block(
            source=source, file=file.place, first=1, unit="line", most_bytes=limits.document_bytes
        )
        for piece in _pieces(stream, left, limits.block_bytes, compressed=stream is not raw):
            # None: a document that is too large, of which the size alone is known
            for lines, size in rest.add(piece):
                now = raw.tell()
                too_large = TooLarge(number=1, bytes=size) if lines is None else None
                yield dataclasses.replace(
                    made, lines=lines, too_large=too_large, file_bytes=now - seen, counted_from=at
                )
                at, seen = at + size, now
        for lines, size in rest.finish():
            too_large = TooLarge(number=1, bytes=size) if lines is None else None
            yield dataclasses.replace(
                made,
                lines=lines,
                too_large=too_large,
                file_bytes=raw.tell() - seen,
                counted_from=at,
            )


class _Rest:
    """What was read of a document that has not ended yet; of one beyond `most_bytes` only its size is kept."""

    def __init__(self, ends: tuple[bytes, ...], most_bytes: int) -> None:
        self._ends, self._most = ends, most_bytes
        self._end = re.compile(b"|".join(map(re.escape, ends)))
        self._pieces: list[bytes] = []  # joined once: a line may have many megabytes
        self._bytes = self._lines = 0  # of the document that has not ended
        # its last bytes: an end between paragraphs may lie in two pieces
        self._seam = b""

    @property
    def line_ends(self) -> int:
        """How many the unfinished document has."""
        return self._lines

    def add(self, piece: bytes) -> Iterator[tuple[bytes | None, int]]:
        """Whole documents, end to end (None for one that is too large), and their bytes."""
        seam, before = self._seam, self._bytes
        # `cut` is behind the last document that ends in this piece
        if cut := self._last_end(seam, piece):
            pieces, self._pieces = self._pieces, []
            self._bytes = self._lines = 0
            self._seam, begin = b"", 0
            # the open document ends at the first end; if it is small enough it joins the others
            if before:
                found = self._end.search(seam + piece)
                assert found is not None, "the last end was found above"
                begin = found.end() - len(seam)
                if before + begin > self._most:
                    pieces.clear()
                    yield None, before + begin
                else:
                    begin = 0
            lines = b"".join([*pieces, piece[begin:cut]])
            pieces.clear()
            yield from self._within(lines)

        # what follows the last end is the new open document, or more of the old one
        left = piece[cut:]
        self._bytes += len(left)
        self._lines += left.count(b"\n")
        if self._bytes > self._most:
            self._pieces.clear()  # too large: only counted from here on
        else:
            self._pieces.append(left)
        keep = max(map(len, self._ends)) - 1
        self._seam = (self._seam + left[-keep:])[-keep:] if keep else b""

    def finish(self) -> Iterator[tuple[bytes | None, int]]:
        """The last document, which no line end follows."""
        if self._bytes > self._most:
            yield None, self._bytes
        elif self._bytes:
            lines = b"".join(self._pieces)
            self._pieces.clear()
            yield lines, len(lines)

    def _last_end(self, seam: bytes, piece: bytes) -> int:
        """Where the last document that ends in the piece ends, 0 where none does."""
        whole = seam + piece
        return max(
            0,
            max(
                i + len(mark) - len(seam) if (i := whole.rfind(mark)) >= 0 else 0
                for mark in self._ends
            ),
        )

    def _within(self, lines: bytes) -> Iterator[tuple[bytes | None, int]]:
        """Whole documents, without those that are too large."""
        # a document has at most as many bytes as all together
        if len(lines) <= self._most:
            if lines:
                yield lines, len(lines)
            return
        begin = at = 0
        for found in self._end.finditer(lines):
            if found.end() - at > self._most:
                if begin < at:
                    yield lines[begin:at], at - begin
                yield None, found.end() - at
                begin = found.end()
            at = found.end()
        if begin < at:
            yield lines[begin:at], at - begin


def text_blocks(source: TextSource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """A whole file as one document."""
    made = Block(source=source, file=file.place, first=1, most_bytes=limits.document_bytes)
    with (
        readable(lambda: f"{file.place} cannot be read to its end"),
        opened(file.at, file.packing, zstd_window_bytes=source.zstd_window_bytes) as (stream, raw),
    ):
        # without packing the file's size tells it before anything is read
        if stream is raw and file.bytes > limits.document_bytes:
            yield dataclasses.replace(
                made, too_large=TooLarge(number=1, bytes=file.bytes), file_bytes=file.bytes
            )
            return
        # one byte more than is allowed
        content = stream.read(limits.document_bytes + 1)
        if len(content) > limits.document_bytes:
            yield dataclasses.replace(made, too_large=TooLarge(number=1), file_bytes=file.bytes)
            return
        yield dataclasses.replace(made, lines=content, file_bytes=raw.tell())


def line_ends(file: InputFile, source: Source, before: int, limits: Limits) -> int:
    """Line ends in the first `before` bytes of a file, decompressed, as far as it can be read."""
    count = 0
    if isinstance(source, HubSource):
        window = USUAL_ZSTD_WINDOW
    else:
        window = source.zstd_window_bytes
    with (
        contextlib.suppress(*READ_ERRORS),
        opened(file.at, file.packing, zstd_window_bytes=window) as (stream, raw),
    ):
        for piece in _pieces(stream, before, limits.block_bytes, compressed=stream is not raw):
            count += piece.count(b"\n")
    return count


def _pieces(
    stream: ByteStream, left: int | None, block_bytes: int, *, compressed: bool
) -> Iterator[bytes]:
    """The next `left` bytes (None: all) by `block_bytes`; where reading breaks, first what was read until there."""
    # packed: in small steps, so that a break costs little of what comes before it
    step = STEP_BYTES if compressed else block_bytes
    while True:
        parts, missing, error = [], block_bytes if left is None else min(left, block_bytes), None
        try:
            while missing and (part := stream.read1(min(missing, step))):
                parts.append(part)
                missing -= len(part)
        except READ_ERRORS as broken:
            error = broken
        if parts:
            yield b"".join(parts)
            left = None if left is None else left - sum(map(len, parts))
        if error:
            raise error
        if not parts:
            return


def _next_document(f: IO[bytes], at: int, ends: tuple[bytes, ...]) -> int:
    """The first place at or after byte `at` where a document begins; the end of the file where none does."""
    if at == 0:
        return 0
    longest = max(map(len, ends))
    # from a little before, since an end may reach up to `at`
    base = f.seek(max(0, at - longest))
    data = b""
    while piece := f.read(2**16):
        data += piece
        # ends that lie at `at` or behind it
        found = [i + len(e) for e in ends if (i := data.find(e, max(0, at - base - len(e)))) >= 0]
        if found:
            return base + min(found)
        # the last bytes stay, in which an end may have begun
        base, data = base + len(data[:-longest]), data[-longest:]
    return base + len(data)
