"""CSV and TSV by the rules of Python's csv: a cell in quotes may hold delimiters, line ends and "" for one quote.

text,score            the first record names the columns, unless the source's `columns` does
"two
lines",0.7            one document, of line 2
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from data_prep.config import CsvSource
from data_prep.filters import ABSENT, Filter
from data_prep.readers.blocks import (
    SET_TEXT,
    SKIP,
    Block,
    Limits,
    NotUtf8,
    ReadError,
    TooLarge,
    UntilBroken,
    has_surrogates,
    readable,
)
from data_prep.readers.cures import nearest_column
from data_prep.readers.files import InputFile
from data_prep.readers.packed import ByteStream, opened

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 2**20  # records that lie whole in it are taken at once
LONG_CELL_CHARS = 150
SEPARATORS = (",", ";", "\t", "|")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,300}", re.ASCII)
_LINE_END = re.compile(rb"\n|\r\n?")
# bytes that are not UTF-8, as surrogateescape keeps them
_ESCAPED = re.compile("[\udc80-\udcff]")
# a record of our own: inside an open quote it would be a part of a cell. No letter of it is anybody's delimiter
_END = "\ue000\ue001\ue002"


def delimited_blocks(source: CsvSource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """The records of a CSV file in order, as columns; `numbers` are those of the lines where they begin."""
    records = _Records(source, file, limits)
    with (
        readable(records.place, (OSError, EOFError, ValueError, csv.Error)),
        opened(file.at, file.packing, zstd_window_bytes=source.zstd_window_bytes) as (stream, raw),
    ):
        records.open(stream)
        chosen = records.chosen_cells()
        seen, made = 0, _Columns(source, file, limits)
        for line, cells, size in (rest := UntilBroken(records)):
            if len(cells) > records.width:
                made.malformed.append((line, len(cells), records.width))
            elif cells:  # an empty line is no record
                made.add(line, [cells[at] if at < len(cells) else ABSENT for at in chosen], size)
            if made.bytes >= limits.block_bytes:
                yield from made.flush(raw.tell() - seen)
                seen = raw.tell()
        yield from made.flush(raw.tell() - seen)
        rest.raise_error()


class _Records:
    """The records of a stream, each with the number of its first line and its bytes."""

    def __init__(self, source: CsvSource, file: InputFile, limits: Limits) -> None:
        self._source, self._file, self._limits = source, file, limits
        self._line = self._bytes = 0
        # whole lines that were read, and how far they were taken
        self._data = b""
        self._at = self._end = 0
        self._is_plain = False
        self._has_lone_returns = False
        self._cell = _cell_pattern(source)
        self.width = 0
        self._names: list[str] = []

    def place(self) -> str:
        """How far it came, for messages."""
        return f"{self._file.place} cannot be read beyond line {self._line:,}"

    def open(self, stream: ByteStream) -> None:
        """Read the header, where there is one. Raises ReadError."""
        # a cell is bounded before csv sees it, by the bytes of its lines
        csv.field_size_limit(2**31 - 1)
        quoting: Literal[0, 3] = csv.QUOTE_NONE
        if self._source.quotes:
            quoting = csv.QUOTE_MINIMAL
        self._reader = csv.reader(
            self._lines(stream), delimiter=self._source.delimiter, quoting=quoting, strict=False
        )
        # the header is the first record that is no empty line
        self._names = list(self._source.columns) or next(
            (cells for _, cells, _ in self if cells), []
        )
        self.width = len(self._names)

    def chosen_cells(self) -> list[int]:
        """Which cells of a record are the columns that the source uses. Raises ReadError."""
        names, source = self._names, self._source
        if not names:
            return []
        for column in source.used_columns:
            if names.count(column) != 1:
                what = "twice" if column in names else ""
                # one column alone, with another separator in its name: a wrong delimiter
                other = next(
                    (
                        d
                        for d in SEPARATORS
                        if d != source.delimiter and len(names) == 1 and d in names[0]
                    ),
                    "",
                )
                hint = (
                    f"Its first line holds {other!r}: set the source's delimiter to it."
                    if other
                    else (
                        f"{nearest_column(column, names)} {SET_TEXT} or filters, or"
                        " columns where no line names them."
                    )
                )
                problem = (
                    f"names the column {column!r} twice." if what else f"has no column {column!r}."
                )
                raise ReadError(
                    f"{self._file.place} {problem} {hint} Or leave the file out, or {SKIP}."
                )
        return [names.index(column) for column in source.used_columns]

    def __iter__(self) -> Iterator[tuple[int, list[str], int]]:
        while True:
            # csv takes as many lines as the record has; `_counted` counts them and their bytes
            line = self._line + 1
            self._bytes = 0
            cells = self._well_formed()
            if cells is not None:
                yield line, cells, self._bytes
                continue
            cells = next(self._reader, None)
            if cells is None or cells == [_END]:
                return
            # the end was read as a part of a cell: its quote is still open
            if cells and cells[-1].endswith(_END + "\n"):
                raise ReadError(
                    f"{self._file.place} line {line}: a quote is opened and never closed. Close it,"
                    f" or set quotes: false where quotes are letters as others, or {SKIP}."
                )
            yield line, cells, self._bytes

    def _lines(self, stream: ByteStream) -> Iterator[str]:
        """Lines with their ends, which may be \\n, \\r\\n or \\r; at the end a record of our own."""
        rest: list[bytes] = []
        size = 0
        pieces = _pieces(stream)
        while True:
            piece = next(pieces, b"")
            # joined only when a line end has come: else each piece would copy a long line
            ends_a_line = b"\n" in piece or b"\r" in piece
            if piece and rest and not ends_a_line:
                rest.append(piece)
                size += len(piece)
                self._check(self._line + 1, size)
                continue
            data = piece
            if rest:
                data = b"".join([*rest, piece])
            # what has not ended, or ends in a \r whose \n may follow, waits for the next piece
            end = _last_line(data) if piece else len(data)
            rest = [data[end:]] if end < len(data) else []
            size = len(data) - end
            self._data = data
            self._at = 0
            self._end = end
            # Python 3.10 refuses NUL characters
            self._is_plain = b"\0" not in data
            self._has_lone_returns = _has_lone_returns(data)
            # records that are well formed are taken between two lines
            while self._at < self._end:
                begin = self._at
                # inside of quotes csv asks for more of its record: it gets all up to the next quote
                quote = data.find(b'"', begin, end) if self._bytes else begin
                found = _LINE_END.search(data, quote, end) if quote >= 0 else None
                self._at = found.end() if found else end
                self._count(data, begin, self._at)
                yield data[begin : self._at].decode("utf-8", "surrogateescape")
            if not piece:
                yield _END + "\n"
                return

    def _well_formed(self) -> list[str] | None:
        """The next record, if it lies whole in what was read, and its quotes stand around cells alone; a quarter of csv's time."""
        if not self._is_plain or self._cell is None:
            return None
        cells: list[bytes] = []
        at = self._at
        end = b""
        while not end.endswith(b"\n"):
            found = self._cell.match(self._data, at, self._end)
            if found is None:
                return None
            quoted, bare, end = found.groups()
            cell = bare if quoted is None else quoted
            # a look for one letter is ten times as fast as one for two
            cells.append(cell.replace(b'""', b'"') if b'"' in cell else cell)
            at = found.end()
            # csv gives no cell of an empty line
            if at == self._at + len(end) and end.endswith(b"\n"):
                cells.pop()
        self._count(self._data, self._at, at)
        self._at = at
        return [cell.decode("utf-8", "surrogateescape") for cell in cells]

    def _count(self, data: bytes, begin: int, end: int) -> None:
        # a line ends in \n, \r\n or \r, and the last of a file may have no end
        ends = data.count(b"\n", begin, end)
        if self._has_lone_returns:
            ends += data.count(b"\r", begin, end) - data.count(b"\r\n", begin, end)
        self._line += max(1, ends)
        self._bytes += end - begin
        self._check(self._line, self._bytes)

    def _check(self, line: int, size: int) -> None:
        """A record that does not end is most often a quote that was left open. Raises ReadError."""
        if size > self._limits.document_bytes:
            place = f"{self._file.place} line {line}: its record"
            large = TooLarge().sentence(place, self._limits.document_bytes)
            raise ReadError(
                f"{large} A quote that is never closed, or a wrong delimiter, makes such records,"
                " too."
            )


def _cell_pattern(source: CsvSource) -> re.Pattern[bytes] | None:
    """A cell in quotes or one without any, and the delimiter or line end behind it; None where quotes are letters."""
    if not source.quotes:
        return None
    delimiter = re.escape(source.delimiter.encode("utf-8"))
    return re.compile(
        rb'(?:"([^"]*(?:""[^"]*)*)"|([^"\r\n' + delimiter + rb"]*))(" + delimiter + rb"|\r?\n)"
    )


def _has_lone_returns(data: bytes) -> bool:
    """Whether \\r ends a line, as on old Macs."""
    letters = np.frombuffer(data, np.uint8)
    returns = np.flatnonzero(letters == ord("\r"))
    # behind the last letter stands nothing: it is compared with itself
    behind = letters[np.minimum(returns + 1, len(letters) - 1)]
    return bool((behind != ord("\n")).any())


def _last_line(data: bytes) -> int:
    """Where the last line begins; behind the data where it ends in \\n."""
    if data.endswith(b"\n"):
        return len(data)
    return max(data.rfind(b"\n"), data.rfind(b"\r", 0, max(0, len(data) - 1))) + 1


def _pieces(stream: ByteStream) -> Iterator[bytes]:
    """What a stream gives, without a byte order mark at its beginning; no empty pieces."""
    first = stream.read1(READ_BYTES)
    # the first piece may be shorter than the mark
    while len(first) < len(BYTE_ORDER_MARK) and (more := stream.read1(READ_BYTES)):
        first += more
    if first := first.removeprefix(BYTE_ORDER_MARK):
        yield first
    while piece := stream.read1(READ_BYTES):
        yield piece


class _Columns:
    """Records put together to blocks."""

    def __init__(self, source: CsvSource, file: InputFile, limits: Limits) -> None:
        self._source, self._file, self._limits = source, file, limits
        self._convert = []
        for name in source.used_columns:
            of_column = [f for f in source.filters if f.column == name]
            self._convert.append(_converter(of_column))
        self._numbers: list[int] = []
        self._rows: list[list[Any]] = []
        self.malformed: list[tuple[int, int, int]] = []  # line, cells, columns
        self.bytes = 0

    def add(self, line: int, cells: list[Any], size: int) -> None:
        """One record: the cells that are used, ABSENT where it has fewer."""
        self._numbers.append(line)
        self._rows.append(
            [
                cell if cell is ABSENT else convert(_text(cell))
                for cell, convert in zip(cells, self._convert, strict=True)
            ]
        )
        self.bytes += size

    def flush(self, file_bytes: int) -> Iterator[Block]:
        """The records so far."""
        if self._rows or self.malformed:
            columns: dict[str, list[Any]] = {}
            for k, name in enumerate(self._source.used_columns):
                columns[name] = [row[k] for row in self._rows]
            problems = [
                (
                    f"line {line}",
                    (
                        f"has {cells} cells, there are {width} columns; needed: as many. Put cells"
                        f" that hold the delimiter in quotes, or {SKIP}."
                    ),
                )
                for line, cells, width in self.malformed
            ]
            yield Block(
                source=self._source,
                file=self._file.place,
                most_bytes=self._limits.document_bytes,
                first=1,
                unit="line",
                columns=columns,
                numbers=self._numbers,
                malformed=problems,
                file_bytes=file_bytes,
            )
            self._numbers, self._rows, self.malformed, self.bytes = [], [], [], 0


def _text(cell: str) -> Any:
    """A cell, or what stands for one whose bytes are not UTF-8."""
    if cell.isascii():
        return cell
    # a long one is looked through faster by what encodes it
    if len(cell) >= LONG_CELL_CHARS and not has_surrogates(cell):
        return cell
    found = _ESCAPED.search(cell)
    if found is None:
        return cell
    return NotUtf8(byte=len(cell[: found.start()].encode("utf-8")) + 1)


def _converter(filters: list[Filter]) -> Any:
    """Cells are text; where a filter compares with a number or a truth value, they are read as such. An empty cell of a
    filter's column is no value."""
    if not filters:
        return lambda cell: cell
    # what the filters compare with decides what a cell is read as
    wanted: list[Any] = []
    for f in filters:
        given = (f.equals, *(f.one_of or ()), *(f.none_of or ()))
        wanted += [value for value in given if value is not None]
    numeric = any(f.at_least is not None or f.at_most is not None for f in filters)
    numeric = numeric or any(
        isinstance(value, int | float) and not isinstance(value, bool) for value in wanted
    )
    truth = any(isinstance(value, bool) for value in wanted)

    def convert(cell: Any) -> Any:
        if not isinstance(cell, str) or not (numeric or truth):
            return cell
        word = cell.strip()
        if not word:
            return None
        if truth and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if numeric and _WHOLE.fullmatch(word):
            return int(word)
        if numeric and _NUMBER.fullmatch(word):
            return float(word)
        return cell

    return convert
