"""Parquet and Arrow: the columns in use, some rows at a time, counted in bytes whatever the rows are."""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from data_prep.config import ArrowSource, HubSource, ParquetSource
from data_prep.readers.blocks import (
    SET_TEXT,
    SKIP,
    Block,
    Limits,
    NotUtf8,
    ReadError,
    TooLarge,
    UntilBroken,
    opening,
    readable,
)
from data_prep.readers.cures import holds, nearest_column
from data_prep.readers.files import InputFile
from data_prep.readers.parquet_pages import DICTIONARY, pages_of

TableSource = ParquetSource | ArrowSource | HubSource
TABLE_ROWS = 1024  # in one block, fewer when they are long
BATCH_BYTES = 2**26  # of a Parquet batch, where pages tell how long a row may be
ARROW_FILE = b"ARROW1"  # first and last
ARROW_STREAM_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")  # since Arrow 0.15; before
# a Parquet page may have as many times max_document_bytes: 8 took 2.1 GB
PAGE_DOCUMENTS = 5
BATCH_DOCUMENTS = 8  # a compressed Arrow batch, too


def parquet_blocks(
    source: ParquetSource | HubSource,
    file: InputFile,
    limits: Limits,
    stream: IO[bytes] | None = None,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[Block]:
    """The rows of a Parquet file, a row group after the other, so that those before a broken one are read.

    stream: the open file, where it lies elsewhere.
    begin, end: the row groups whose place (`_RowGroups`) is in these bytes are read; all where end is None.
    """
    import pyarrow
    import pyarrow.parquet

    made = _Maker(source, file, limits)
    # a remote file fails in as many ways as there are libraries below fsspec
    errors = (OSError, ValueError, pyarrow.ArrowException) if stream is None else (Exception,)
    with readable(made.place, errors), contextlib.ExitStack() as held:
        with opening(), readable(made.place, errors):
            raw = stream or held.enter_context(open(file.at, "rb"))
            # stretches of a file share its footer; without a fingerprint it may be another file's
            footer = _footer(file) if end is not None and file.fingerprint else None
            f = held.enter_context(pyarrow.parquet.ParquetFile(raw, metadata=footer))
            columns = _columns(source, file, f)
        groups = _RowGroups(f.metadata, file.bytes)
        chosen = groups.between(begin, end)
        made.pass_over(sum(groups.rows[: chosen.start]))

        # chunks of the columns in use, with all fields inside these
        leaves = f.schema
        paths = [leaves.column(i).path for i in range(f.metadata.num_columns)]
        used = [
            i
            for i, path in enumerate(paths)
            if path.partition(".")[0] in columns or path in columns
        ]
        for group in chosen:
            facts = f.metadata.row_group(group)
            chunks = [facts.column(i) for i in used]
            rows = facts.num_rows
            made.expect(rows, groups.bytes[group])
            # a page is unpacked as a whole, so one that is too large keeps its whole row group out
            largest, dictionary = _largest_pages(
                raw, chunks, PAGE_DOCUMENTS * limits.document_bytes
            )
            if largest > PAGE_DOCUMENTS * limits.document_bytes:
                yield made.too_large(
                    rows,
                    largest,
                    f"{file.place} row group {group + 1} has a Parquet page",
                    PAGE_DOCUMENTS,
                )
                continue
            # any row may be as long as the largest page, or an entry of the dictionary
            batch_rows = min(TABLE_ROWS, max(1, BATCH_BYTES // max(1, largest, dictionary)))
            batches = f.iter_batches(batch_rows, row_groups=[group], columns=columns)
            for table in _together(rest := UntilBroken(batches), limits.block_bytes):
                yield from made.blocks(table)
            rest.raise_error()


def _together(batches: Iterable[Any], block_bytes: int) -> Iterator[Any]:
    """Tables of several batches: where a dictionary is large, a batch has few rows, and a block of it costs as much."""
    import pyarrow

    held: list[Any] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        size += batch.nbytes
        if size >= block_bytes or rows >= TABLE_ROWS:
            yield pyarrow.Table.from_batches(held)
            held = []
            rows = size = 0
    if held:
        yield pyarrow.Table.from_batches(held)


@functools.lru_cache(maxsize=1)
def _footer(file: InputFile) -> Any:
    """The metadata of a local file: 2 million column chunks take 4 s to read."""
    import pyarrow.parquet

    with open(file.at, "rb") as raw:
        return pyarrow.parquet.read_metadata(raw)


def _columns(source: ParquetSource | HubSource, file: InputFile, f: Any) -> list[str]:
    """The columns of a file to be read, each once. Raises ReadError where the documents cannot be made of them."""
    import pyarrow

    schema = f.schema_arrow
    columns = list(dict.fromkeys(top(name, schema, file) for name in source.used_columns))
    # a file without rows may have columns of any type
    if f.metadata.num_rows:
        empty = pyarrow.schema([schema.field(name) for name in columns]).empty_table()
        for name in source.used_columns:
            _column(empty, name, source, file)
    return columns


class _RowGroups:
    """Where the row groups of a file lie, so that each is read by one stretch of it.

    The place of a row group is the first byte of its first column, in use or not. No footer is trusted in that: a place
    is never before that of the row group in front, and never outside of the file.

        said by the footer     4   900   none   300   10^9        in a file of 1,000 bytes
        place                  4   900    900   900    999
    """

    def __init__(self, facts: Any, file_bytes: int) -> None:
        # (first byte, rows) of each
        said = [_begin_and_rows(facts, group) for group in range(facts.num_row_groups)]
        last = max(0, file_bytes - 1)
        inside = (min(max(0, begin), last) for begin, _ in said)
        self.places = list(itertools.accumulate(inside, max))
        self.rows = [max(0, rows) for _, rows in said]
        # from a place to the next, of those with rows: together all bytes of the file
        filled = [group for group, rows in enumerate(self.rows) if rows]
        cuts = [0, *(self.places[group] for group in filled[1:]), file_bytes]
        self.bytes = [0] * len(said)
        for group, begin, end in zip(filled, cuts, cuts[1:], strict=False):
            self.bytes[group] = end - begin

    def between(self, begin: int, end: int | None) -> range:
        """Those with a place in [begin, end)."""
        stop = len(self.places) if end is None else bisect_left(self.places, end)
        return range(bisect_left(self.places, begin), stop)


def _begin_and_rows(facts: Any, group: int) -> tuple[int, int]:
    """First byte of the first column of a row group, and its rows; 0 for what the footer does not tell."""
    import pyarrow

    begin = rows = 0
    # what is wrong here is reported where the row group is read
    with contextlib.suppress(OSError, ValueError, pyarrow.ArrowException):
        found = facts.row_group(group)
        rows = found.num_rows
        if found.num_columns:
            begin = _begin_of(found.column(0))
    return begin, rows


def _begin_of(chunk: Any) -> int:
    """The first byte of a column chunk: a dictionary stands before the pages of data."""
    begin = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    return chunk.data_page_offset if begin is None or begin <= 0 else begin


def _largest_pages(raw: IO[bytes], chunks: list[Any], most: int) -> tuple[int, int]:
    """Bytes of the largest page where a chunk has more than `most`, else 0; bytes of the largest dictionary."""
    largest = dictionary = 0
    at = raw.tell()
    for chunk in chunks:
        # what is no header is the reader's to report
        with contextlib.suppress(ValueError):
            for page in pages_of(raw, _begin_of(chunk), chunk.total_compressed_size):
                if page.kind == DICTIONARY:
                    dictionary = max(dictionary, page.bytes)
                # a chunk within the limit has no page beyond it, and a dictionary comes first
                if chunk.total_uncompressed_size <= most:
                    break
                largest = max(largest, page.bytes)
    raw.seek(at)
    return largest, dictionary


def arrow_blocks(source: ArrowSource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """The rows of an Arrow file or stream, from a memory map whose pages are let go of as soon as they are read."""
    import pyarrow
    import pyarrow.ipc

    made = _Maker(source, file, limits)
    with (
        readable(made.place, (OSError, ValueError, pyarrow.ArrowException)),
        open(file.at, "rb") as raw,
    ):
        if not file.bytes:
            raise ReadError(_cut_short(file))
        # closed with the last array that looks into it
        pages = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        unpacked = _check_arrow(file, pages)
        _let_go(pages)
        # compressed batches are unpacked as a whole, so one that is too large ends the file
        if unpacked > BATCH_DOCUMENTS * limits.document_bytes:
            yield made.too_large(
                1,
                unpacked,
                f"{file.place} has a compressed batch, to be unpacked as a whole,",
                BATCH_DOCUMENTS,
            )
            return
        for batch in _arrow_batches(source, file, pages, compressed=unpacked > 0):
            for at in range(0, batch.num_rows, TABLE_ROWS):
                for block in made.blocks(pyarrow.Table.from_batches([batch.slice(at, TABLE_ROWS)])):
                    yield block
                    _let_go(pages)


def _arrow_batches(
    source: ArrowSource, file: InputFile, pages: mmap.mmap, *, compressed: bool
) -> Iterator[Any]:
    """The record batches. Of compressed ones the columns in use alone are unpacked; others stay where they lie, which the
    choice of columns would copy."""
    import pyarrow
    import pyarrow.ipc

    data, is_file = pyarrow.py_buffer(memoryview(pages)), pages[:6] == ARROW_FILE
    open_it = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    schema = open_it(data).schema
    tops = [top(name, schema, file) for name in source.used_columns]
    chosen = sorted({schema.names.index(name) for name in tops}) if compressed else []
    reader = open_it(data, options=pyarrow.ipc.IpcReadOptions(included_fields=chosen))
    if is_file:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from reader


def _let_go(pages: mmap.mmap) -> None:
    """Pages that were read are no more this process's memory; they stay in the machine's cache."""
    if hasattr(pages, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _check_arrow(file: InputFile, pages: mmap.mmap) -> int:
    """Bytes of the largest compressed batch once it is unpacked. Raises ReadError for a file that is cut short.

    A stream that was cut between two of its batches reads as if it were whole, but for the mark at its end. The mark is
    looked for where the last batch ends: zeros that fill up a batch look like one of before Arrow 0.15.
    """
    import pyarrow
    import pyarrow.ipc

    is_file = pages[:6] == ARROW_FILE
    # a file begins with its mark in 8 bytes; batches follow as in a stream
    whole, unpacked, end = is_file and pages[-6:] == ARROW_FILE, 0, 8 if is_file else 0
    reader = pyarrow.BufferReader(pyarrow.py_buffer(memoryview(pages)))
    with contextlib.suppress(EOFError, OSError, pyarrow.ArrowException):
        # from message to message, by their headers
        while end < file.bytes:
            if not is_file:
                whole = pages[end : end + 8].startswith(ARROW_STREAM_ENDS)
            reader.seek(end)
            message = pyarrow.ipc.read_message(reader)  # its content is not touched
            end = reader.tell()
            if not is_file:
                whole = False
            unpacked = max(unpacked, unpacked_bytes(message))
    if not whole:
        raise ReadError(_cut_short(file))
    return unpacked


def _cut_short(file: InputFile) -> str:
    return (
        f"{file.place} is cut short: it does not end as an Arrow file or stream does. Fetch the"
        f" file again, or {SKIP}."
    )


def unpacked_bytes(message: Any) -> int:
    """What the compressed buffers of a record batch take when unpacked, 0 for a batch that is not compressed.

    Reads the FlatBuffers table of the message (header, field 2: a RecordBatch) for buffers (2) and compression (3); each
    compressed buffer begins with its size in 8 bytes."""
    import struct

    if message.type != "record batch":
        return 0
    data, body = memoryview(message.metadata), message.body

    # where a field of a table lies, 0 where it is absent: the table's vtable has 4 bytes of sizes,
    # then 2 bytes a field
    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * number + 2 > struct.unpack_from("<H", data, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
        return table + offset if offset else 0

    try:
        root = struct.unpack_from("<I", data, 0)[0]
        at = field(root, 2)
        batch = at + struct.unpack_from("<I", data, at)[0]
        # no compression
        if not field(batch, 3):
            return 0
        at = field(batch, 2)
        buffers = at + struct.unpack_from("<I", data, at)[0]
        total, view = 0, memoryview(body)
        for k in range(struct.unpack_from("<I", data, buffers)[0]):
            # a buffer is its place and its length, 8 bytes each
            offset, length = struct.unpack_from("<qq", data, buffers + 4 + 16 * k)
            if length >= 8:
                # -1: this buffer is stored as it is, behind its 8 bytes
                size = struct.unpack_from("<q", view, offset)[0]
                total += length - 8 if size < 0 else size
        return total
    except struct.error:
        return 0  # the reader says what is wrong


class _Maker:
    """Tables to blocks of one file, with rows counted through it."""

    def __init__(self, source: TableSource, file: InputFile, limits: Limits) -> None:
        self._source, self._file, self._limits = source, file, limits
        self._first, self._left = 1, file.bytes
        # of those that `expect` told of; None where nothing was told
        self._rows_left: int | None = None

    def place(self) -> str:
        """How far it came, for messages."""
        return f"{self._file.place} cannot be read beyond row {self._first - 1:,}"

    def pass_over(self, rows: int) -> None:
        """Rows that others read are counted."""
        self._first += rows

    def expect(self, rows: int, size: int) -> None:
        """The next `rows` lie in `size` bytes of the file, which they share evenly in the progress bar."""
        self._left, self._rows_left = size, rows

    def too_large(self, rows: int, size: int, what: str, documents: int) -> Block:
        """Rows that cannot be read one by one."""
        first, self._first = self._first, self._first + rows
        return self._made(
            first,
            self._share(rows, 0),
            too_large=TooLarge(number=1, bytes=size, documents=rows, what=what, times=documents),
        )

    def _share(self, rows: int, size: int) -> int:
        """The bytes of the file that rows with `size` bytes of text stand for."""
        # never more than is left, so that a progress bar ends at the file's end
        share = min(self._left, size)
        if self._rows_left is not None:
            share = min(self._left, self._left * rows // max(1, self._rows_left))
            self._rows_left -= rows
        self._left -= share
        return share

    def _made(self, first: int, file_bytes: int, **content: Any) -> Block:
        return Block(
            source=self._source,
            file=self._file.place,
            first=first,
            file_bytes=file_bytes,
            most_bytes=self._limits.document_bytes,
            **content,
        )

    def blocks(self, table: Any) -> Iterator[Block]:
        """Blocks of at most block_bytes, or of one row."""
        columns = {
            name: _column(table, name, self._source, self._file)
            for name in self._source.used_columns
        }
        bytes_R = _row_bytes(columns[self._source.text], table)
        ends_R = np.cumsum(bytes_R)
        at = 0
        while at < table.num_rows:
            # as many rows as fit, one at least
            before = int(ends_R[at - 1]) if at else 0
            stop = max(
                at + 1,
                int(np.searchsorted(ends_R, before + self._limits.block_bytes, side="right")),
            )
            first, self._first = self._first, self._first + stop - at
            size = int(ends_R[stop - 1]) - before
            share = self._share(stop - at, size)
            if stop == at + 1 and size > self._limits.document_bytes:
                yield self._made(first, share, too_large=TooLarge(number=1, bytes=size))
            else:
                yield self._made(
                    first,
                    share,
                    columns={name: _values(c.slice(at, stop - at)) for name, c in columns.items()},
                )
            at = stop


def _row_bytes(text: Any, table: Any) -> np.ndarray:
    """About the bytes of each row [R] int64: of its text exactly, of the other columns their mean."""
    import pyarrow
    import pyarrow.compute

    rows = max(1, table.num_rows)
    try:
        lengths = pyarrow.chunked_array(
            [_text_bytes(chunk) for chunk in text.chunks], pyarrow.int64()
        )
        exact = lengths.fill_null(0).to_numpy().astype(np.int64)
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowTypeError, pyarrow.ArrowInvalid):
        return np.full(table.num_rows, table.nbytes // rows, np.int64)
    others = max(0, table.nbytes - int(exact.sum())) // rows
    return exact + others


def _text_bytes(chunk: Any) -> Any:
    import pyarrow
    import pyarrow.compute

    # each row takes the length of its entry
    if pyarrow.types.is_dictionary(chunk.type):
        return (
            pyarrow.compute.binary_length(chunk.dictionary)
            .cast(pyarrow.int64())
            .take(chunk.indices)
        )
    if pyarrow.types.is_null(chunk.type):
        return pyarrow.nulls(len(chunk), pyarrow.int64())
    return pyarrow.compute.binary_length(chunk).cast(pyarrow.int64())


def _values(column: Any) -> list[Any]:
    """A column as objects of Python; a value with text that is not UTF-8 is the NotUtf8 of it."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return NotUtf8(byte=error.start + 1)


def _column(table: Any, column: str, source: TableSource, file: InputFile) -> Any:
    """A column of a table, or a field inside a structure (a.b.c). Raises ReadError."""
    import pyarrow
    import pyarrow.compute

    found = top(column, table.schema, file)
    array = table.column(found)
    # from the column down to the field that is named
    for name in column.split(".")[1:] if found != column else ():
        fields = [f.name for f in array.type] if pyarrow.types.is_struct(array.type) else []
        if name not in fields:
            raise ReadError(
                f"{file.place} has no column {column!r}: nothing in {found!r} is named {name!r}."
                f" {nearest_column(column, _dotted_names(table.schema))} {SET_TEXT} or filters, or"
                f" {SKIP}."
            )
        array = pyarrow.compute.struct_field(array, name)
    # texts may be stored as numbers of a dictionary's entries
    kind = array.type
    if pyarrow.types.is_dictionary(array.type):
        kind = array.type.value_type
    words = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
        pyarrow.types.is_null,
    )
    if column == source.text and not any(is_kind(kind) for is_kind in words):
        meant = ""
        if pyarrow.types.is_struct(array.type):
            meant = f" {holds(_dotted_names(array.type, above=f'{column}.'))}"
        raise ReadError(
            f"{file.place}: column {column!r} is {kind}; needed: text.{meant} {SET_TEXT}, or {SKIP}."
        )
    return array


def _dotted_names(fields: Any, *, above: str = "") -> list[str]:
    """As cures.dotted_names, of the fields of a schema or a structure."""
    import pyarrow

    found: list[str] = []
    for field in sorted(fields, key=lambda field: field.name):
        name = f"{above}{field.name}"
        if pyarrow.types.is_struct(field.type) and field.type.num_fields:
            found += _dotted_names(field.type, above=f"{name}.")
        else:
            found.append(name)
    return found


def top(column: str, schema: Any, file: InputFile) -> str:
    """The column of a table that holds `column`: itself, or the a of a.b.c. Raises ReadError.

    column: a name, dotted or not
    schema: of the table
    file: for messages
    """
    names = schema.names
    if column in names:
        found = column
    else:
        found = column.partition(".")[0]
    if found not in names:
        raise ReadError(
            f"{file.place} has no column {column!r}. {nearest_column(column, _dotted_names(schema))}"
            f" {SET_TEXT} or filters, or name files that have it, or {SKIP}."
        )
    if names.count(found) > 1:
        raise ReadError(
            f"{file.place} has the column {found!r} {names.count(found)} times; needed: once. Write"
            f" the file anew with columns of different names, or {SKIP}."
        )
    return found


def table_blocks(
    source: TableSource,
    file: InputFile,
    tables: Iterator[Any],
    limits: Limits,
    errors: tuple[type[Exception], ...],
) -> Iterator[Block]:
    """The rows of tables that another library reads."""
    made = _Maker(source, file, limits)
    with readable(made.place, errors):
        for table in tables:
            yield from made.blocks(table)
