"""Sources to blocks of documents: the only importer of `datasets`.

A block is a few MiB of one file. Lines stay raw bytes in it, so that the process that encodes also parses; the process
that reads only looks for line ends. Local JSON lines, plain text and Parquet are read here; Arrow and the hub through
the builders of `datasets`, streamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.config import ArrowSource, HubSource, JsonlSource, ParquetSource, Source, TextSource
from data_prep.filters import ABSENT, WrongType, look_up, named
from encoder.base.errors import ConfigError, UserError, nearest

BLOCK_BYTES = 2**22
COMPRESSED_STEP_BYTES = 2**16                  # of decompressed text in one step: no more is lost before a break
TABLE_ROWS = 1024                              # of a table in one block, fewer when they are long
HUB_FILE_BYTES = 2**28                         # a hub file whose size is not known: for the bar and the processes alone
ARROW_FILE = b"ARROW1"                         # first and last
ARROW_STREAM_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")       # since Arrow 0.15; before
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SKIP = "set on_error: skip"
READ_ERRORS = (OSError, EOFError, zlib.error)


class ReadError(UserError):
    """A file that cannot be read to its end; under on_error: skip, the rest of it is left out."""


@dataclass(frozen=True, kw_only=True)
class NotUtf8:
    """Stands for a text of a table that cannot be decoded."""

    byte: int                             # the first bad one, from 1


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a source: the unit that is read from beginning to end."""

    name: str                             # on the card: the path below root, or repository@commit/path on the hub
    place: str                            # in messages
    bytes: int                            # a guess on the hub
    path: Path | None = None              # None: on the hub, where it is
    number: int = 0                       # this one of the split's files
    fingerprint: str | None = None        # when the work was planned

    def described(self) -> dict[str, Any]:
        """For the card: what a change of the file would change. Raises ReadError."""
        if self.path is None:
            return {"name": self.name}
        return {"name": self.name, "bytes": self.bytes, "fingerprint": fingerprint(self.path)}

    def check_unchanged(self) -> None:
        """Raises ConfigError when the file is not what it was when the work was planned."""
        if self.fingerprint and (_size_of(self.path), fingerprint(self.path)) != (self.bytes, self.fingerprint):
            raise ConfigError(f"{self.place} was changed while the source was being made (it had {self.bytes:,} bytes and has "
                              f"{_size_of(self.path):,}). Run the command again when nothing writes to it.")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some neighbouring documents of one file: raw lines, or the columns that the source names."""

    source: Source
    file: str
    first: int                            # number of the first line (row), from 1: counted from `counted_from`
    lines: bytes | None = None
    columns: Mapping[str, list[Any]] | None = None
    file_bytes: int = 0                   # bytes of the file that were read for this block, for the progress bar
    counted_from: int = 0                 # byte of the (decompressed) file; only messages need more, see `numbered`


@dataclass(kw_only=True)
class Parsed:
    """The texts of a block, and what was left out of it by reason. `problem` is the first bad document, as a sentence."""

    texts: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    problem: str | None = None

    def leave_out(self, reason: str, problem: str) -> None:
        """Count one bad document and keep the first one's sentence."""
        self.left_out[reason] += 1
        self.problem = self.problem or problem


def find_files(source: Source, root: Path) -> list[InputFile]:
    """The files of a source: its patterns in order, each pattern's matches sorted. Raises ConfigError for no match."""
    if isinstance(source, HubSource):
        return _hub_files(source)
    found: dict[Path, None] = {}
    for pattern in source.files:
        matches = [Path(p) for p in sorted(glob.glob(os.path.join(root, pattern), recursive=True)) if os.path.isfile(p)]
        if not matches:
            place = root / pattern
            beside = sorted(p.name for p in place.parent.glob("*") if p.is_file())[:50] if place.parent.is_dir() else []
            if place.is_dir():
                raise ConfigError(f"source {source.name}: {place} is a folder; needed: files, "
                                  f"such as {place / '*.jsonl'}.")
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            hint = nearest(place.name, beside) if beside else f"No file is in {place.parent}. Set root or the files."
            raise ConfigError(f"source {source.name}: {place} {what}. {hint}")
        found.update(dict.fromkeys(matches))
    once: dict[tuple[int, int], Path] = {}
    for path in found:
        first = once.setdefault(_file_number(path), path)
        if first is not path:
            raise ConfigError(f"source {source.name}: {first} and {path} are the same file; needed: each file once. "
                              "Name it in one way.")
    return [InputFile(name=_name_below(root, path), place=str(path), bytes=_size_of(path), path=path) for path in found]


def pinned(source: Source, files: list[InputFile]) -> Source:
    """A source of the hub at the commit that its files were found at, so that every process reads the same."""
    if isinstance(source, HubSource) and (found := re.search(r"@([0-9a-f]{40})/", files[0].name)):
        return dataclasses.replace(source, revision=found[1])
    return source


def can_be_cut(source: Source, file: InputFile) -> bool:
    """Whether the documents that begin in a range of the file's bytes can be read without those before."""
    by_lines = isinstance(source, JsonlSource) or isinstance(source, TextSource) and source.document != "file"
    return by_lines and file.path.suffix not in (".gz", ".zst")


def read_blocks(source: Source, file: InputFile, begin: int = 0, end: int | None = None) -> Iterator[Block]:
    """The blocks of one file in order; memory is bounded by one block or the longest document. Raises ReadError.

    Of a file that can be cut, the documents that begin in bytes [begin, end)."""
    if isinstance(source, JsonlSource):
        return _lines(source, file, begin, end)
    if isinstance(source, TextSource):
        return _whole_text(source, file) if source.document == "file" else _lines(source, file, begin, end)
    return _tables(source, file)


def numbered(block: Block, file: InputFile) -> Block:
    """The block with `first` counted from the beginning of its file: reads what lies before, for messages alone, where
    counting all along would take 5 % of the time of preparing."""
    if not block.counted_from:
        return block
    return dataclasses.replace(block, first=block.first + _line_ends(file.path, block.counted_from), counted_from=0)


def parse(block: Block) -> Parsed:
    """Texts of a block in order. Documents that do not pass a filter, and those without any character but white space,
    are left out and counted; what should not be there at all is a problem as well."""
    source, result = block.source, Parsed()
    if isinstance(source, TextSource):
        for place, text in _plain_texts(block, result):
            _take(place, text, result)
        return result
    rows = _json_rows(block, result) if block.lines is not None else _table_rows(block)
    for place, row in rows:
        try:
            stopped_by = next((f for f in source.filters if not f.passes(look_up(row, f.column))), None)
        except WrongType as error:
            result.leave_out("filter cannot judge", f"{place}: {error}. Change the filter, or {SKIP}.")
            continue
        if stopped_by:
            result.left_out[stopped_by.label] += 1
            continue
        text = look_up(row, source.text)
        if isinstance(text, str):
            _take(place, text, result)
        elif isinstance(text, NotUtf8):
            result.leave_out("not utf-8", f"{place}: byte {text.byte} of {source.text!r} is not UTF-8; needed: UTF-8 text. "
                                          f"Repair it, or {SKIP}.")
        elif text is ABSENT:
            keys = nearest(source.text, sorted(row)) if row else "The object is empty."
            result.leave_out("no text", f"{place} has no {source.text!r}. {keys} Set the source's text, or on_error: skip.")
        else:
            result.leave_out("no text", f"{place}: {source.text!r} is {named(text)}; needed: text. Repair it, or {SKIP}.")
    return result


def _take(place: str, text: str, result: Parsed) -> None:
    """One text into the result, or the reason why not."""
    if not text or text.isspace():
        result.left_out["empty"] += 1
    elif "\0" in text:
        result.leave_out("nul character", f"{place}: the text holds a NUL character, as files that are no text do; "
                                          f"needed: text. Remove it, or {SKIP}.")
    else:
        try:
            text.encode("utf-8")
            result.texts.append(text)
        except UnicodeEncodeError:
            result.leave_out("not unicode", f"{place}: the text holds half a surrogate pair, which is no character; "
                                            f"needed: whole characters. Repair it, or {SKIP}.")


def _json_rows(block: Block, result: Parsed) -> Iterator[tuple[str, dict[str, Any]]]:
    repair = f"Repair the line, or {SKIP}."
    lines = block.lines.split(b"\n")
    if not lines[-1]:
        lines.pop()                              # the nothing after the last line end
    for number, line in enumerate(lines, start=block.first):
        place = f"{block.file} line {number}"
        if number == 1 and not block.counted_from and line.startswith(BYTE_ORDER_MARK):
            line = line[3:]
        if not line.strip():
            result.left_out["empty"] += 1
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            result.leave_out("not utf-8", f"{place}: byte {error.start + 1} is not UTF-8; needed: UTF-8 text. {repair}")
            continue
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            why = "nested too deeply" if deep else getattr(error, "msg", None) or str(error)
            result.leave_out("not json", f"{place} is not JSON ({why}); needed: one JSON object a line. {repair}")
            continue
        if isinstance(value, dict):
            yield place, value
        else:
            result.leave_out("not json", f"{place} is {named(value)}; needed: a JSON object with "
                                         f"{block.source.text!r}. {repair}")


def _table_rows(block: Block) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, values in enumerate(zip(*block.columns.values(), strict=True), start=block.first):
        yield f"{block.file} row {number}", dict(zip(block.columns, values, strict=True))


def _plain_texts(block: Block, result: Parsed) -> Iterator[tuple[str, str]]:
    """Lines, paragraphs (between empty lines) or the whole file; a paragraph's place is the line it begins at."""
    document, number = block.source.document, block.first
    separator = {"line": rb"(\r?\n)", "paragraph": rb"(\r?\n(?:\r?\n)+)"}.get(document)
    parts = re.split(separator, block.lines) if separator else [block.lines]
    for raw, end in zip(parts[::2], [*parts[1::2], b""], strict=True):
        if separator and not raw and not end:
            continue                             # the nothing after the last line end
        if number == 1 and not block.counted_from and raw.startswith(BYTE_ORDER_MARK):
            raw = raw[3:]
        if document == "paragraph":              # more empty lines, at the beginning of a block
            raw, before = raw.lstrip(b"\r\n"), raw
            number += before.count(b"\n") - raw.count(b"\n")
            if not raw:
                number += end.count(b"\n")
                continue
        try:
            yield block.file if document == "file" else f"{block.file} line {number}", raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = number + raw.count(b"\n", 0, error.start)
            byte = error.start - raw.rfind(b"\n", 0, error.start)
            result.leave_out("not utf-8", f"{block.file} line {line}: byte {byte} is not UTF-8; needed: UTF-8 text. "
                                          f"Convert the file, or {SKIP}.")
        number += raw.count(b"\n") + end.count(b"\n")


def _lines(source: Source, file: InputFile, begin: int, end: int | None) -> Iterator[Block]:
    """Blocks of the whole lines that begin in [begin, end); of whole paragraphs where these are the documents."""
    by_paragraph = isinstance(source, TextSource) and source.document == "paragraph"
    ends = (b"\n\n", b"\n\r\n") if by_paragraph else (b"\n",)
    rest: list[bytes] = []                   # what has not ended yet: joined once, a line may have gigabytes
    at = 0                                   # where it begins

    def place() -> str:
        before = _line_ends(file.path, at) + sum(piece.count(b"\n") for piece in rest)
        return f"{file.place} cannot be read beyond line {before:,}"

    with _readable(place), _opened(file.path) as (stream, raw):
        left = None
        if begin or end is not None:
            at, stop = (_next_document(raw, x, ends) for x in (begin, file.bytes if end is None else end))
            left = stop - at
            raw.seek(at)
        seen = raw.tell()
        for piece in _pieces(stream, left, compressed=stream is not raw):
            if by_paragraph:                     # the two line ends between paragraphs may lie in two pieces
                piece, rest = b"".join([*rest, piece]), []
            cut = max(i + len(mark) if (i := piece.rfind(mark)) >= 0 else 0 for mark in ends)
            if not cut:
                rest.append(piece)
                continue
            lines, rest, now = b"".join([*rest, piece[:cut]]), [piece[cut:]], raw.tell()
            yield Block(source=source, file=file.place, first=1, lines=lines, file_bytes=now - seen, counted_from=at)
            at, seen = at + len(lines), now
        if lines := b"".join(rest):
            yield Block(source=source, file=file.place, first=1, lines=lines, file_bytes=raw.tell() - seen, counted_from=at)


def _pieces(stream: IO[bytes], left: int | None, *, compressed: bool) -> Iterator[bytes]:
    """The next `left` bytes (None: all) by BLOCK_BYTES; where reading breaks, first what was read until there."""
    step = COMPRESSED_STEP_BYTES if compressed else BLOCK_BYTES
    while True:
        parts, missing, error = [], BLOCK_BYTES if left is None else min(left, BLOCK_BYTES), None
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
    base = f.seek(max(0, at - longest))
    data = b""
    while piece := f.read(2**16):
        data += piece
        found = [i + len(e) for e in ends if (i := data.find(e, max(0, at - base - len(e)))) >= 0]
        if found:
            return base + min(found)
        base, data = base + len(data[:-longest]), data[-longest:]
    return base + len(data)


def _line_ends(path: Path, before: int) -> int:
    """Line ends in the first `before` bytes of a file, decompressed, as far as it can be read."""
    count = 0
    with contextlib.suppress(*READ_ERRORS), _opened(path) as (stream, raw):
        for piece in _pieces(stream, before, compressed=stream is not raw):
            count += piece.count(b"\n")
    return count


def _whole_text(source: TextSource, file: InputFile) -> Iterator[Block]:
    with _readable(lambda: f"{file.place} cannot be read to its end"), _opened(file.path) as (stream, raw):
        yield Block(source=source, file=file.place, first=1, lines=stream.read(), file_bytes=raw.tell())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the decompressed stream, the file below it)."""
    with open(path, "rb") as raw:
        if path.suffix in (".gz", ".zst") and not os.fstat(raw.fileno()).st_size:
            raise EOFError("it is cut short to 0 bytes, and compressed nothing has some")
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw), raw
        elif path.suffix == ".zst":
            import pyarrow

            yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), raw
        else:
            yield raw, raw


@contextlib.contextmanager
def _readable(place: Callable[[], str], errors: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """What goes wrong with the file inside is a ReadError that begins with `place()`."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200].rstrip(".")
        raise ReadError(f"{place()}: {why}. Fetch the file again, or {SKIP}.") from error


def _tables(source: ParquetSource | ArrowSource | HubSource, file: InputFile) -> Iterator[Block]:
    """The rows of one file; of a Parquet file only the columns in use are read."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)       # it prints errors that are raised, too
    # a remote file fails in as many ways as there are libraries below fsspec
    errors = (Exception,) if file.path is None else (OSError, ValueError, pyarrow.ArrowException,
                                                     datasets.exceptions.DatasetsError)
    first, left = 1, file.bytes
    with _readable(lambda: f"{file.place} cannot be read beyond row {first - 1:,}", errors):
        for table in (_parquet_tables(source, file) if isinstance(source, ParquetSource) else
                      _rows(source, file).with_format("arrow").iter(batch_size=TABLE_ROWS)):
            step = max(1, table.num_rows * BLOCK_BYTES // max(1, table.nbytes))
            for at in range(0, table.num_rows, step):
                part = table.slice(at, step)
                columns = {name: _values(_column(part, name, source, file)) for name in source.columns}
                here = min(left, part.nbytes)
                yield Block(source=source, file=file.place, first=first, columns=columns, file_bytes=here)
                first, left = first + part.num_rows, left - here


def _parquet_tables(source: ParquetSource, file: InputFile) -> Iterator[Any]:
    """A row group after the other, so that those before a broken one are read."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as f:
        columns = list(dict.fromkeys(_top(name, f.schema_arrow.names, file) for name in source.columns))
        for group in range(f.num_row_groups):
            for batch in f.iter_batches(TABLE_ROWS, row_groups=[group], columns=columns):
                yield pyarrow.Table.from_batches([batch])


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


def _rows(source: ArrowSource | HubSource, file: InputFile) -> Any:
    """An IterableDataset over one file."""
    import datasets

    if isinstance(source, HubSource):
        rows = _hub_rows(source)
        return rows.shard(num_shards=rows.num_shards, index=file.number) if rows.num_shards > 1 else rows
    _check_arrow_end(file)
    return datasets.load_dataset("arrow", data_files=str(file.path), split="train", streaming=True)


def _check_arrow_end(file: InputFile) -> None:
    """A stream that was cut between two of its batches reads as if it were whole, but for the mark at its end. The mark
    is looked for where the last batch ends: zeros that fill up a batch look like one of before Arrow 0.15."""
    import pyarrow.ipc

    whole = False
    if file.bytes:
        with pyarrow.memory_map(str(file.path)) as f:
            if f.read(6) == ARROW_FILE:
                f.seek(file.bytes - 6)
                whole = f.read() == ARROW_FILE
            else:
                with contextlib.suppress(EOFError, OSError, pyarrow.ArrowException):
                    end = 0
                    f.seek(0)
                    while end < file.bytes:
                        whole = f.read(8).startswith(ARROW_STREAM_ENDS)
                        f.seek(end)
                        pyarrow.ipc.read_message(f)            # its content is not touched
                        end = f.tell()
                        whole = False
    if not whole:
        raise ReadError(f"{file.place} is cut short: it does not end as an Arrow file or stream does. "
                        f"Fetch the file again, or {SKIP}.")


def _column(table: Any, column: str, source: Source, file: InputFile) -> Any:
    """A column of a table, or a field inside a structure (a.b.c). Raises ReadError."""
    import pyarrow
    import pyarrow.compute

    top = _top(column, table.column_names, file)
    array = table.column(top)
    for name in column.split(".")[1:] if top != column else ():
        fields = [f.name for f in array.type] if pyarrow.types.is_struct(array.type) else []
        if name not in fields:
            raise ReadError(f"{file.place} has no column {column!r}: nothing in {top!r} is named {name!r}. "
                            f"Set the source's text or filters, or {SKIP}.")
        array = pyarrow.compute.struct_field(array, name)
    kind = array.type.value_type if pyarrow.types.is_dictionary(array.type) else array.type
    words = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view, pyarrow.types.is_null)
    if column == source.text and not any(is_kind(kind) for is_kind in words):
        raise ReadError(f"{file.place}: column {column!r} is {kind}; needed: text. Set the source's text, or {SKIP}.")
    return array


def _top(column: str, names: list[str], file: InputFile) -> str:
    """The column of a table that holds `column`: itself, or the a of a.b.c. Raises ReadError."""
    top = column if column in names else column.partition(".")[0]
    if top not in names:
        raise ReadError(f"{file.place} has no column {column!r}. {nearest(column, sorted(names))} "
                        f"Set the source's text or filters, or {SKIP}.")
    return top


def _hub_files(source: HubSource) -> list[InputFile]:
    """The files of a dataset's split, the commit in their names. Raises ConfigError."""
    builder, rows = _hub_builder(source), _hub_rows(source)
    given = (getattr(builder.config, "data_files", None) or {}).get(source.split) or []
    names = [str(url).removeprefix("hf://datasets/") for url in given]
    if len(names) != rows.num_shards:
        names = [f"{source.dataset} {source.split} {i + 1} of {rows.num_shards}" for i in range(rows.num_shards)]
    splits = builder.info.splits or {}
    known = splits[source.split].num_bytes if source.split in splits else None
    size = known // len(names) if known else HUB_FILE_BYTES
    local = Path(source.dataset)
    return [InputFile(name=_name_below(local, Path(name)) if local.is_dir() else name, place=name, bytes=size, number=i)
            for i, name in enumerate(names)]


@functools.lru_cache(maxsize=8)
def _hub_builder(source: HubSource) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)     # five tries in 23 s, each told of in 500 characters
    local = os.path.isdir(source.dataset)
    try:
        return datasets.load_dataset_builder(source.dataset, source.config, data_files=list(source.files) or None,
                                             revision=None if local else source.revision)
    except Exception as error:      # as many kinds as there are libraries between here and the hub
        raise ConfigError(f"source {source.name}: dataset {source.dataset} cannot be opened: "
                          f"{' '.join(str(error).split())[:200].rstrip('.')}. On a machine without a way to the hub, fetch it "
                          f"elsewhere (hf download {source.dataset} --repo-type dataset --local-dir FOLDER) and set "
                          "dataset: FOLDER.") from error


@functools.lru_cache(maxsize=8)
def _hub_rows(source: HubSource) -> Any:
    try:
        return _hub_builder(source).as_streaming_dataset(source.split)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"source {source.name}: split {source.split} of dataset {source.dataset} cannot be opened: "
                          f"{' '.join(str(error).split())[:200].rstrip('.')}.") from error


def _file_number(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.") from error


def _name_below(root: Path, path: Path) -> str:
    """The path below root, so that the card does not depend on where root lies."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name


def fingerprint(path: Path, *, stretch_bytes: int = 2**16, stretches: int = 16) -> str:
    """BLAKE2b of a file up to 1 MiB; of 16 even stretches of 64 KiB of a longer one: every part of a job array looks at
    all files. A change between the stretches that leaves the size alone is not seen."""
    digest = hashlib.blake2b(digest_size=16)
    size = _size_of(path)
    try:
        with open(path, "rb") as f:
            if size <= stretch_bytes * stretches:
                digest.update(f.read())
            else:
                for i in range(stretches):
                    f.seek(i * (size - stretch_bytes) // (stretches - 1))
                    digest.update(f.read(stretch_bytes))
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
