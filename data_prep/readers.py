"""Files to blocks of documents: the only importer of `datasets`.

A block is a few MiB of one file. JSON lines stay raw bytes in it, so that the process that encodes also parses;
the process that reads only looks for line ends.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data_prep.config import JsonlSource, ParquetSource, Source, TextSource
from encoder.base.errors import ConfigError, UserError, nearest

BLOCK_BYTES = 2**22


class ReadError(UserError):
    """A file that cannot be read to its end; under on_error: skip, the rest of it is left out."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some neighbouring documents of one file; either raw JSON lines or texts."""

    file: str
    column: str                           # the key or column that holds the text
    first: int                            # number of the first line (record) in the file, from 1
    lines: bytes | None = None
    texts: list[object] | None = None
    file_bytes: int = 0                   # bytes of the file that were read for this block, for the progress bar


@dataclass(kw_only=True)
class Parsed:
    """The texts of a block, and what was left out of it by reason. `problem` is the first bad line, as a sentence."""

    texts: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    problem: str | None = None

    def leave_out(self, reason: str, problem: str) -> None:
        """Count one bad document and keep the first one's sentence."""
        self.left_out[reason] += 1
        self.problem = self.problem or problem


def find_files(source: Source, root: Path) -> list[Path]:
    """The files of a source: its patterns in order, each pattern's matches sorted. Raises ConfigError for no match."""
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
    return list(found)


def read_blocks(source: Source, path: Path) -> Iterator[Block]:
    """The blocks of one file in order; memory is bounded by one block or the longest document. Raises ReadError."""
    if isinstance(source, JsonlSource):
        return _json_lines(path, source.text)
    if isinstance(source, ParquetSource):
        return _dataset(path, "parquet", column=source.text)
    return _plain_text(source, path)


def parse(block: Block) -> Parsed:
    """Texts of a block in order. Documents without any character but white space are left out as `empty`."""
    result = Parsed()
    documents = _json_texts(block, result) if block.lines is not None else _checked(block, result)
    for place, text in documents:
        if not text or text.isspace():
            result.left_out["empty"] += 1
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            result.leave_out("not unicode", f"{place}: the text holds half a surrogate pair, which is no character; "
                                            "needed: whole characters. Repair it, or set on_error: skip.")
            continue
        result.texts.append(text)
    return result


def _json_texts(block: Block, result: Parsed) -> Iterator[tuple[str, str]]:
    column, repair = block.column, "Repair the line, or set on_error: skip."
    lines = block.lines.split(b"\n")
    if not lines[-1]:
        lines.pop()                              # the nothing after the last line end
    for number, line in enumerate(lines, start=block.first):
        place = f"{block.file} line {number}"
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
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
        if not isinstance(value, dict):
            result.leave_out("not json", f"{place} is {_named(value)}; needed: a JSON object with {column!r}. {repair}")
        elif column not in value:
            keys = nearest(column, sorted(value)) if value else "The object is empty."
            result.leave_out("no text", f"{place} has no {column!r}. {keys} Set the source's text, or on_error: skip.")
        elif not isinstance(value[column], str):
            result.leave_out("no text", f"{place}: {column!r} is {_named(value[column])}; needed: text. {repair}")
        else:
            yield place, value[column]


def _checked(block: Block, result: Parsed) -> Iterator[tuple[str, str]]:
    for number, value in enumerate(block.texts, start=block.first):
        place = f"{block.file} record {number}"
        if isinstance(value, str):
            yield place, value
        else:
            result.leave_out("no text", f"{place}: {block.column!r} is {_named(value)}; needed: text. "
                                        "Repair it, or set on_error: skip.")


def _named(value: object) -> str:
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number",
             float: "a number", bytes: "bytes without an encoding"}
    return "null" if value is None else words.get(type(value), f"a {type(value).__name__}")


def _json_lines(path: Path, column: str) -> Iterator[Block]:
    rest, first, seen = b"", 1, 0
    with _opened(path) as (stream, raw):
        while piece := stream.read(BLOCK_BYTES):
            cut = piece.rfind(b"\n") + 1
            if not cut:
                rest += piece
                continue
            lines, rest = rest + piece[:cut], piece[cut:]
            now = raw.tell()
            yield Block(file=str(path), column=column, first=first, lines=lines, file_bytes=now - seen)
            first, seen = first + lines.count(b"\n"), now
        if rest:
            yield Block(file=str(path), column=column, first=first, lines=rest, file_bytes=raw.tell() - seen)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the decompressed stream, the file below it); what goes wrong inside is a ReadError with the file's name."""
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                yield gzip.GzipFile(fileobj=raw), raw
            elif path.suffix == ".zst":
                import pyarrow

                yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ReadError(f"{path} cannot be read to its end: {why}. "
                        "Fetch the file again, or set on_error: skip.") from error


def _plain_text(source: TextSource, path: Path) -> Iterator[Block]:
    if source.document == "file":
        with _opened(path) as (stream, raw):
            content = stream.read()
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ReadError(f"{path}: byte {error.start + 1:,} is not UTF-8; needed: UTF-8 text. "
                                "Convert the file, or set on_error: skip.") from error
            yield Block(file=str(path), column="text", first=1, texts=[text], file_bytes=raw.tell())
        return
    yield from _dataset(path, "text", column="text", sample_by=source.document)


def _dataset(path: Path, builder: str, *, column: str, **options: object) -> Iterator[Block]:
    """The records of one file through a builder of `datasets`, streamed; of a Parquet file only the column is read."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)       # it prints errors that are raised, too
    try:
        if builder == "parquet":
            names = pyarrow.parquet.read_schema(path).names
            if column not in names:
                raise ConfigError(f"{path} has no column {column!r}. {nearest(column, sorted(names))} "
                                  "Set the source's text.")
            options["columns"] = [column]
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        first, left = 1, path.stat().st_size
        for table in rows.with_format("arrow").iter(batch_size=256):
            texts = table.column(column).to_pylist()
            here = min(left, table.nbytes)
            yield Block(file=str(path), column=column, first=first, texts=texts, file_bytes=here)
            first, left = first + len(texts), left - here
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200].rstrip(".")
        raise ReadError(f"{path} cannot be read as {builder}: {why}. "
                        "Fetch the file again, or set on_error: skip.") from error


def file_bytes(path: Path) -> int:
    """Size of a file; raises ReadError when it cannot be looked at."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.") from error
