"""The files of a source on this machine: found by names and globs, known by their first bytes, checked to be unchanged."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import (
    ArrowSource,
    CsvSource,
    HubSource,
    JsonArraySource,
    JsonlSource,
    MdsSource,
    ParquetSource,
    Source,
    TextSource,
    word_of,
)
from data_prep.readers.blocks import SKIP, ReadError
from data_prep.readers.kinds import Kind, Packing, kind_of, shape_of
from data_prep.readers.packed import head_of, inner_head, packing_of
from encoder.base.errors import ConfigError, nearest, why_unreadable


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a source: the unit that is read from beginning to end."""

    name: str  # on the card: the path below root, or repository@commit/path on the hub
    place: str  # in messages
    bytes: int  # a guess on the hub
    path: Path | None = None  # None: of a dataset
    url: str = ""  # of a dataset's file, where it is read here: a path or an address
    number: int = 0  # this one of the split's files
    packing: Packing | None = None  # how it is compressed
    fingerprint: str | None = None  # when the work was planned
    shard: Any = None  # of MDS: its entry of index.json

    @property
    def at(self) -> Path | str:
        """Where it is opened."""
        return self.path or self.url

    def described(self) -> dict[str, Any]:
        """For the card: what a change of the file would change. Raises ReadError."""
        if self.path is None:
            return {"name": self.name}
        return {"name": self.name, "bytes": self.bytes, "fingerprint": fingerprint(self.path)}

    def check_unchanged(self) -> None:
        """Raises ConfigError when the file is not what it was when the work was planned."""
        if self.path is None or not self.fingerprint:
            return
        if (size_of(self.path), fingerprint(self.path)) != (self.bytes, self.fingerprint):
            raise ConfigError(
                f"{self.place} was changed while the source was being made (it had {self.bytes:,}"
                f" bytes and has {size_of(self.path):,}). Run the command again when nothing writes"
                " to it."
            )


def local_files(source: Source, root: Path) -> list[InputFile]:
    """The files that the patterns of a source match, in order, each pattern's sorted. Raises ConfigError for no match."""
    return [
        InputFile(
            name=name_below(root, path),
            place=str(path),
            bytes=size_of(path),
            path=path,
            packing=packing_of(path),
        )
        for path in matches(source, root)
    ]


def matches(source: Source, root: Path, *, folders: str = "") -> list[Path]:
    """Paths of files. A folder stands for its file `folders`, where there is such a name. Raises ConfigError."""
    found: dict[Path, None] = {}
    for pattern in source.files:
        paths = [Path(p) for p in sorted(glob.glob(os.path.join(root, pattern), recursive=True))]
        paths = [p / folders if folders and (p / folders).is_file() else p for p in paths]
        files = [p for p in paths if os.path.isfile(p)]
        if not files:
            raise ConfigError(f"source {source.name}: {_no_match(root, pattern, folders)}")
        found.update(dict.fromkeys(files))

    # two names of one file, as links make them
    once: dict[tuple[int, int], Path] = {}
    for path in found:
        first = once.setdefault(_file_number(path), path)
        if first is not path:
            raise ConfigError(
                f"source {source.name}: {first} and {path} are the same file; needed: each file"
                " once. Name it in one way."
            )
    return list(found)


def _no_match(root: Path, pattern: str, folders: str) -> str:
    place = root / pattern
    if place.is_dir():
        needed = f"one with an {folders}" if folders else f"files, such as {place / '*.jsonl'}"
        return f"{place} is a folder; needed: {needed}."
    beside = []
    if place.parent.is_dir():
        beside = sorted(p.name for p in place.parent.glob("[!.]*") if p.is_file())[:50]
    what = "does not exist"
    if glob.has_magic(pattern):
        what = "matches no file"
    hint = (
        # perhaps a name is misspelled: the nearest of those beside it is named
        nearest(place.name, beside)
        if beside
        else f"No file is in {place.parent}. Set root or the files."
    )
    return f"{place} {what}. {hint}"


def check_kind(source: Source, file: InputFile) -> None:
    """The file is, by its first bytes, what the source's format says. Raises ReadError."""
    if file.path is None or isinstance(source, HubSource):
        return
    try:
        # of the file as it lies there, then of what is packed in it
        kind = kind_of(head_of(file.path))
        head = head_of(file.path)
        if kind.packing:
            head = inner_head(file.path, kind.packing, zstd_window_bytes=source.zstd_window_bytes)
    except OSError as error:
        raise ReadError(f"{file.place} cannot be read: {why_unreadable(error)}") from error
    except EOFError:
        return  # reported where it is read
    if not head:
        return

    # tables and shards tell by themselves what they are; all else is text
    word, inside = word_of(source), kind_of(head)
    if isinstance(source, ParquetSource | ArrowSource):
        _check_table(source, file, kind, inside, head_of(file.path))
        return
    if isinstance(source, MdsSource):
        return  # its index tells what it is
    if inside.word != "text":
        where = f"holds {inside.what} inside {kind.what}" if kind.packing else f"is {inside.what}"
        if inside.word in ("parquet", "arrow") and kind.packing:
            raise ReadError(
                _mismatch(file, where, word, "Unpack it, and set format: " + inside.word)
            )
        raise ReadError(_mismatch(file, where, word, inside.to_do))
    _check_shape(source, file, head)


def _check_table(
    source: ParquetSource | ArrowSource, file: InputFile, kind: Kind, inside: Kind, head: bytes
) -> None:
    """Raises ReadError for what is surely no table; bytes of no known kind are left to the reader of tables."""
    word = word_of(source)
    if kind.packing:
        to_do = (
            "Unpack it"
            if inside.word in (word, "other")
            else f"Unpack it, and set format: {inside.word}"
        )
        raise ReadError(
            _mismatch(file, f"holds {inside.what or 'text'} inside {kind.what}", word, to_do)
        )
    if kind.word == word or kind.is_unknown or kind.word == "text" and b"\0" in head:
        return
    known = {
        "array": "a JSON array; set format: json_array",
        "objects": "JSON lines; set format: jsonl",
        "markup": "HTML or XML, such as a server answers in place of a file",
    }
    shape = shape_of(head) if kind.word == "text" else ""
    what = kind.what or "text"
    if shape in known:
        what += f" ({known[shape]})"
    raise ReadError(
        _mismatch(file, f"is {what}", word, kind.to_do or "Set the format to what it is")
    )


def _check_shape(source: Source, file: InputFile, head: bytes) -> None:
    """Text of another format than the source's."""
    word, shape = word_of(source), shape_of(head)
    if isinstance(source, TextSource):
        return
    if shape == "markup":
        raise ReadError(
            _mismatch(
                file,
                "is HTML or XML, such as a server answers in place of a file",
                word,
                "Fetch it again",
            )
        )
    if isinstance(source, JsonlSource) and shape == "array":
        raise ReadError(_mismatch(file, "is one JSON array", word, "Set format: json_array"))
    if isinstance(source, JsonlSource) and shape == "pretty object":
        raise ReadError(
            _mismatch(
                file,
                "holds a JSON object over several lines",
                word,
                "Write one object a line (jq -c .)",
            )
        )
    if isinstance(source, JsonArraySource) and shape in ("objects", "pretty object"):
        raise ReadError(
            _mismatch(
                file, "begins with a JSON object, as JSON lines do", word, "Set format: jsonl"
            )
        )
    if isinstance(source, CsvSource) and not source.columns and shape in ("objects", "array"):
        fits = "jsonl" if shape == "objects" else "json_array"
        raise ReadError(_mismatch(file, "is JSON", word, f"Set format: {fits}"))


def _mismatch(file: InputFile, found: str, word: str, to_do: str) -> str:
    return f"{file.place} {found}; the source says format: {word}. {to_do}, or {SKIP}."


def _file_number(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def size_of(path: Path) -> int:
    """Bytes of a file. Raises ReadError."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {why_unreadable(error)}") from error


def name_below(root: Path, path: Path) -> str:
    """The path below root, so that the card does not depend on where root lies."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name


def fingerprint(path: Path, *, stretch_bytes: int = 2**16, stretches: int = 16) -> str:
    """BLAKE2b of a file up to 1 MiB; of 16 even stretches of 64 KiB of a longer one: every part of a job array looks at
    all files. A change between the stretches that leaves the size alone is not seen."""
    digest = hashlib.blake2b(digest_size=16)
    size = size_of(path)
    try:
        with open(path, "rb") as f:
            if size <= stretch_bytes * stretches:
                digest.update(f.read())
            else:
                for i in range(stretches):
                    # the first stretch at the beginning, the last at the end
                    f.seek(i * (size - stretch_bytes) // (stretches - 1))
                    digest.update(f.read(stretch_bytes))
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {why_unreadable(error)}") from error
    return digest.hexdigest()
