"""MDS shards of text, as MosaicML's streaming writes them: columns of str and of numbers, compressed or not.

    shard.00000.mds    uint32 n | uint32 offset x (n+1) | settings as JSON | sample | sample | ...
    sample             uint32 size of each column of no fixed size | the columns in the order of their names

The names in index.json are another's: each must lie below the index's folder. A pickled column is passed over unread.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import MdsSource
from data_prep.readers.blocks import (
    SET_TEXT,
    Block,
    Limits,
    NotUtf8,
    ReadError,
    TooLarge,
    UntilBroken,
    readable,
)
from data_prep.readers.cures import nearest_column
from data_prep.readers.files import InputFile, matches, name_below, size_of
from data_prep.readers.packed import ByteStream, opened, packing_of
from encoder.base.errors import ConfigError
from encoder.base.unpack import unpack
from encoder.base.untrusted import INDEX_BYTES, inside, read_json
from encoder.data.shard_format import INDEX

# of a shard in br or snappy, which are unpacked as a whole; streaming's have 64 MiB
MOST_UNPACKED_BYTES = 2**30
MOST_SAMPLES = 2**28
SKIP_BYTES = 2**20
WHOLE = ("br", "snappy")
_KNOWN = (
    "str",
    "json",
    "int",
    "str_int",
    "str_float",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
)


@dataclass(frozen=True, kw_only=True)
class TextShard:
    """What index.json says of a shard file."""

    samples: int
    names: tuple[str, ...]  # of the columns, in their order
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]  # bytes, None: in each sample's head
    compression: str | None
    bytes: int  # of the unpacked shard


def mds_files(source: MdsSource, root: Path) -> list[InputFile]:
    """The shard files of all indexes that the source names, in order. Raises ConfigError, also for names outside."""
    found = []
    for index in matches(source, root, folders=INDEX):
        content = read_json(index, error=ConfigError, most_bytes=INDEX_BYTES, root=dict)
        try:
            entries = [
                (entry, entry["zip_data"], entry["raw_data"], _shard_of(entry))
                for entry in content["shards"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else f"{error}"
            raise ConfigError(
                f"{index} is no index of MDS shards ({why}). "
                f"Name the {INDEX} that streaming's MDSWriter wrote."
            ) from error
        for entry, packed, raw, shard in entries:
            if entry.get("format") != "mds" or entry.get("version") != 2:
                raise ConfigError(
                    f"{index} holds {entry.get('format')} version {entry.get('version')};"
                    " needed: mds version 2."
                )
            found.append(_file_of(source, root, index, packed, raw, shard))
    return found


def _file_of(
    source: MdsSource, root: Path, index: Path, packed: Any, raw: Any, shard: TextShard
) -> InputFile:
    """The file of a shard as it lies there: compressed, or unpacked beside it."""
    for column in source.used_columns:
        name = _top(column, shard)
        if name is None:
            raise ConfigError(
                f"{index} has no column {column!r}. {nearest_column(column, sorted(shard.names))}"
                f" {SET_TEXT} or filters."
            )
        encoding = shard.encodings[shard.names.index(name)]
        if encoding not in _KNOWN or column == source.text and encoding not in ("str", "json"):
            hint = (
                " These are shards of ids: train on them, after data-prep index."
                if encoding.startswith("ndarray")
                else ""
            )
            needed = "str" if column == source.text else "text or a number"
            raise ConfigError(
                f"{index} has the column {name!r} as {encoding}; needed: {needed}.{hint}"
            )
    # the packed file where it is there, else the one unpacked beside it
    places = [
        (info, inside(index.parent, info.get("basename"), where=index, error=ConfigError))
        for info in (packed, raw)
        if isinstance(info, dict)
    ]
    if not places:
        raise ConfigError(f"{index} names no file for one of its shards. Write the shards again.")
    info, path = next(((info, path) for info, path in places if path.is_file()), places[0])
    size = size_of(path)
    if size != info.get("bytes"):
        raise ReadError(
            f"{path} has {size:,} bytes, {INDEX} says {info.get('bytes')}. Copy it again."
        )
    if packed is not info:
        shard = TextShard(**{**shard.__dict__, "compression": None})
    return InputFile(
        name=name_below(root, path),
        place=str(path),
        bytes=size,
        path=path,
        shard=shard,
        packing=packing_of(path) if shard.compression else None,
    )


def _shard_of(entry: dict[str, Any]) -> TextShard:
    names, encodings, sizes = (
        tuple(entry[key]) for key in ("column_names", "column_encodings", "column_sizes")
    )
    samples, compression, unpacked = (
        entry["samples"],
        entry.get("compression"),
        entry["raw_data"]["bytes"],
    )
    if not len(names) == len(encodings) == len(sizes) or not all(
        isinstance(word, str) for word in names + encodings
    ):
        raise ValueError("its columns do not fit one another")
    if not all(size is None or type(size) is int and 0 <= size < 2**32 for size in sizes):
        raise ValueError("a column has no size")
    if (
        type(samples) is not int
        or not 0 <= samples <= MOST_SAMPLES
        or not isinstance(compression, str | None)
    ):
        raise ValueError("samples is no number of samples")
    # zstd is read as a stream, so such a shard may be larger than those unpacked as a whole
    if type(unpacked) is not int or not 0 <= unpacked <= MOST_UNPACKED_BYTES * 4:
        raise ValueError("a shard has no size")
    return TextShard(
        samples=samples,
        bytes=unpacked,
        names=names,
        encodings=encodings,
        sizes=sizes,
        compression=compression,
    )


def _top(column: str, shard: TextShard) -> str | None:
    for name in (column, column.partition(".")[0]):
        if name in shard.names:
            return name
    return None


def mds_blocks(source: MdsSource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """The samples of one shard in order, as columns. Raises ReadError."""
    shard, first, size, seen = file.shard, 1, 0, 0
    found = dict.fromkeys(_top(column, shard) for column in source.used_columns)
    # the index was checked to have them all
    tops = [top for top in found if top is not None]
    rows: list[list[Any]] = []

    def block(**content: Any) -> Block:
        return Block(
            source=source,
            file=file.place,
            unit="sample",
            most_bytes=limits.document_bytes,
            **content,
        )

    def place() -> str:
        return f"{file.place} cannot be read beyond sample {first + len(rows) - 1:,}"

    with (
        readable(place, (OSError, EOFError, ValueError, struct.error)),
        opened(file.at, file.packing, zstd_window_bytes=source.zstd_window_bytes) as (stream, raw),
    ):
        # br and snappy are unpacked as a whole
        if shard.compression and shard.compression.partition(":")[0] in WHOLE:
            stream = _unpacked_whole(stream, shard)
        for sample, sample_bytes in (
            rest := UntilBroken(_samples(stream, shard, limits.document_bytes))
        ):
            if sample is not None:
                columns = _columns_of(sample, shard)
                rows.append([_decoder(shard, top)(columns[top]) for top in tops])
                size += sample_bytes
            # a block ends when it is full, and before a sample that is too large
            if rows and (size >= limits.block_bytes or sample is None):
                yield block(first=first, columns=_by_name(tops, rows), file_bytes=raw.tell() - seen)
                first, rows, size, seen = first + len(rows), [], 0, raw.tell()
            if sample is None:
                yield block(first=first, too_large=TooLarge(bytes=sample_bytes))
                first += 1
        if rows:
            yield block(first=first, columns=_by_name(tops, rows), file_bytes=raw.tell() - seen)
        rest.raise_error()


def _by_name(tops: list[str], rows: list[list[Any]]) -> dict[str, list[Any]]:
    return {top: [row[k] for row in rows] for k, top in enumerate(tops)}


def _unpacked_whole(stream: ByteStream, shard: TextShard) -> ByteStream:
    packed = stream.read(MOST_UNPACKED_BYTES + 1)
    if max(len(packed), shard.bytes) > MOST_UNPACKED_BYTES:
        raise ReadError(
            f"a shard in {shard.compression} has more than {MOST_UNPACKED_BYTES:,} bytes. Write it"
            " with zstd."
        )
    try:
        assert shard.compression, "only what was compressed is unpacked"
        return io.BytesIO(unpack(shard.compression, packed, size=shard.bytes))
    except ValueError as error:
        raise OSError(f"it cannot be unpacked: {error}") from error


def _samples(
    stream: ByteStream, shard: TextShard, most_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    """Each sample (None where it is too large) and its bytes."""
    count = int.from_bytes(_exactly(stream, 4), "little")
    if count != shard.samples:
        raise ValueError(f"it holds {count:,} samples, {INDEX} says {shard.samples:,}")
    offsets = np.frombuffer(_exactly(stream, 4 * (count + 1)), "<u4").astype(np.int64)

    # offsets count from the file's beginning; the settings lie between them and the first sample
    sizes = np.diff(offsets)
    at = 4 + 4 * (count + 1)
    if offsets[0] < at or np.any(sizes < 0):
        raise ValueError("its offsets do not fit its size")
    _pass_over(stream, int(offsets[0]) - at)
    for size in sizes.tolist():
        if size > most_bytes:
            _pass_over(stream, size)
            yield None, size
        else:
            yield _exactly(stream, size), size


def _exactly(stream: ByteStream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it is cut short")
    return data


def _pass_over(stream: ByteStream, size: int) -> None:
    while size:
        size -= len(_exactly(stream, min(size, SKIP_BYTES)))


def _columns_of(sample: bytes, shard: TextShard) -> dict[str, bytes]:
    """The bytes of each column of a sample. Raises ValueError."""
    # the head has the size of each column that has no fixed one
    variable = sum(size is None for size in shard.sizes)
    head = list(struct.unpack_from(f"<{variable}I", sample))
    at, found = 4 * variable, {}
    for name, size in zip(shard.names, shard.sizes, strict=True):
        size = head.pop(0) if size is None else size
        found[name] = sample[at : at + size]
        at += size
    if at != len(sample):
        raise ValueError("a sample's columns do not fit its size")
    return found


def _decoder(shard: TextShard, name: str) -> Callable[[bytes], Any]:
    """Bytes of a column to a value."""
    encoding = shard.encodings[shard.names.index(name)]
    if encoding == "str":
        return _text
    if encoding == "json":
        return _json
    if encoding in ("str_int", "str_float"):
        return lambda data: (int if encoding == "str_int" else float)(data.decode("ascii"))
    # numbers are stored with the fewest bytes first; `int` has 64 bits
    return lambda data: np.frombuffer(
        data, "<i8" if encoding == "int" else np.dtype(encoding).newbyteorder("<"), 1
    )[0].item()


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _text(data: bytes) -> str | NotUtf8:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return NotUtf8(byte=error.start + 1)
