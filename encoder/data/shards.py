"""A shard folder as a list of documents: random access by memory map; the only importer of streaming in this room.

    shard.00000.mds    uint32 n | uint32 offset x (n+1) | settings as JSON | sample | sample | ...
    sample             uint32 size of each column of no fixed size | the columns in the order of their names
    input_ids          (dimensions << 2 | log2 bytes of a size) | size x dimensions | values

Shards that lie in the folder as plain .mds need nothing but this file. Compressed shards, and shards that are to be
copied to a `cache` first, go through streaming.Stream: download, retry, hash, decompression.
"""

from __future__ import annotations

import fcntl
import json
import mmap
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.errors import ShardError
from encoder.base.files import sha256_of
from encoder.data.shard_format import (
    HASHES,
    INDEX,
    INPUT_IDS,
    LENGTHS,
    SHARD_HASH,
    check_index,
    read_card,
    read_hashes,
    read_lengths,
    with_specials,
)

# Each open shard holds one file handle, of 1,024 that a process usually has; reading touches the 16 shards of one
# group of encoder.data.order, or of two at a border
OPEN_SHARDS = 32


@dataclass(frozen=True)
class _ShardFile:
    """One line of index.json: how to find input_ids in the samples of a shard."""

    name: str
    size_bytes: int
    samples: int
    compressed: bool
    dtype: np.dtype
    variable_columns: int                      # columns with a size in the sample's head
    before: tuple[int | None, ...]             # sizes of the columns before input_ids, None where the head tells
    stored: str                                # name of the file as it lies in the folder, compressed or not
    sha256: str                                # hex, of that file


@dataclass(frozen=True)
class _OpenShard:
    buffer: mmap.mmap
    offsets: np.ndarray                        # uint32 [samples + 1], a view of the map


def open_source(path: Path, *, name: str, cache: Path | None = None) -> Source:
    """Open a shard folder that has a card; `cache`: a folder the shards are copied to when first read.

    Reads card.json and index.json, no shard and no length. Raises ShardError, also for an index that is not the card's.
    """
    return Source(Path(path), name=name, cache=cache)


class Source:
    """The documents of one shard folder, numbered through its shards in stored order. Holds memory maps; picklable."""

    def __init__(self, path: Path, *, name: str, cache: Path | None = None) -> None:
        self.path, self.name, self.cache = path, name, cache
        self.card = read_card(path)
        self.lengths = read_lengths(path, self.card)
        check_index(path, self.card)
        self._shards = _read_index(path / INDEX, dtype=np.dtype(self.card.dtype), hashes=read_hashes(path, self.card))
        self.samples_per_shard = np.array([s.samples for s in self._shards], dtype=np.int64)
        self._first_document = np.concatenate([[0], np.cumsum(self.samples_per_shard)]).tolist()
        if self._first_document[-1] != self.card.documents:
            raise ShardError(f"{path / INDEX} tells of {self._first_document[-1]:,} samples, the card of "
                             f"{self.card.documents:,}. Make the shards again with data-prep prepare --again.")
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._stream: Any = None

    def __reduce__(self) -> tuple:
        return _reopen, (self.path, self.name, self.cache)

    @property
    def documents(self) -> int:
        """How many documents the folder holds."""
        return self.card.documents

    @property
    def mean_tokens(self) -> float:
        """Mean length of a document."""
        return self.card.tokens / self.card.documents

    def read(self, document: int) -> np.ndarray:
        """The ids of a document, uint16 or uint32, a read-only view of the file. Raises ShardError naming the file."""
        number = bisect_right(self._first_document, document) - 1
        sample = document - self._first_document[number]
        ids = self._ids_at(self._opened(number), self._shards[number], sample)
        if self.card.adds_specials:
            ids = with_specials(ids, self.card.specials)
        if len(ids) != self.lengths[document]:
            raise ShardError(f"{self.file_of(document)} sample {sample} has {len(ids)} tokens, {LENGTHS} says "
                             f"{self.lengths[document]}. Make the shards again with data-prep prepare --again.")
        return ids

    def check_files(self) -> None:
        """Every shard read in place is there with its size: a look at each name, no read. Raises ShardError."""
        for shard in self._shards if self.cache is None else ():
            path = self.path / shard.name
            try:
                size = path.stat().st_size
            except FileNotFoundError as error:
                if shard.compressed:
                    continue
                raise _missing(path) from error
            if size != shard.size_bytes:
                raise _wrong_size(path, size, shard)

    def file_of(self, document: int) -> Path:
        """The shard file that holds a document, for messages."""
        return self._folder / self._shards[bisect_right(self._first_document, document) - 1].name

    @property
    def _folder(self) -> Path:
        return self.cache if self.cache is not None else self.path

    def _ids_at(self, opened: _OpenShard, shard: _ShardFile, sample: int) -> np.ndarray:
        begin, end = int(opened.offsets[sample]), int(opened.offsets[sample + 1])
        try:
            head = np.frombuffer(opened.buffer, "<u4", shard.variable_columns, begin).tolist()
            at = begin + 4 * shard.variable_columns
            for size in shard.before:
                at += head.pop(0) if size is None else size
            size, kind = head[0], opened.buffer[at]
            values = at + 1 + (1 << (kind & 3))
            tokens = int.from_bytes(opened.buffer[at + 1:values], "little")
            if kind >> 2 != 1 or values + tokens * shard.dtype.itemsize != at + size or at + size > end:
                raise ValueError("no one-dimensional array that fills its column")
            return np.frombuffer(opened.buffer, shard.dtype, tokens, values)
        except (ValueError, IndexError) as error:
            raise ShardError(f"{self._folder / shard.name} sample {sample} is damaged ({error}). "
                             "Copy or prepare the shard again.") from error

    def _opened(self, number: int) -> _OpenShard:
        opened = self._open.get(number)
        if opened is None:
            opened = self._open[number] = self._open_shard(number)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return opened

    def _open_shard(self, number: int) -> _OpenShard:
        shard = self._shards[number]
        path = self._folder / shard.name
        try:
            if not path.is_file() and (shard.compressed or self.cache is not None):
                self._fetch(number)
            with open(path, "rb") as f:
                buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise _missing(path) from error
        except (OSError, ValueError) as error:
            raise ShardError(f"{path} cannot be read: {error}. Copy or prepare the shard again.") from error
        if len(buffer) != shard.size_bytes:
            raise _wrong_size(path, len(buffer), shard)
        samples = int.from_bytes(buffer[:4], "little")
        if samples != shard.samples:
            raise ShardError(f"{path} holds {samples:,} samples, {INDEX} says {shard.samples:,}. "
                             "Copy or prepare the shard again.")
        return _OpenShard(buffer, np.frombuffer(buffer, "<u4", samples + 1, 4))

    def _fetch(self, number: int) -> None:
        """Let streaming copy, check and decompress a shard; one process at a time, the others find it there."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".fetch.lock", "w") as lock:
            # streaming writes NAME.tmp and renames it: two processes at once would truncate each other's file
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / self._shards[number].name).is_file():
                return
            stream, shards = self._streaming()
            try:
                if self.card.hashes_sha256:      # streaming knows only the hashes of index.json
                    self._check_hash(self._shards[number])
                stream.prepare_shard(shards[number])
            except ShardError:
                raise
            except Exception as error:      # streaming raises what its many back ends raise
                name = self._shards[number].name
                raise ShardError(f"{self.path} shard {name} could not be fetched: {error}") from error

    def _check_hash(self, shard: _ShardFile) -> None:
        path = self.path / shard.stored
        if (found := sha256_of(path)) != shard.sha256:
            raise ShardError(f"{path} has SHA-256 {found[:12]}, {HASHES} tells of {shard.sha256[:12]}. "
                             "Copy or prepare the shard again.")

    def _streaming(self) -> tuple[Any, list[Any]]:
        if self._stream is None:
            from streaming import Stream  # 3.8 s to import, so only where it is needed
            from streaming.base.world import World

            stream = Stream(remote=str(self.path) if self.cache is not None else None, local=str(self._folder),
                            download_retry=2, download_timeout=60, keep_zip=False,
                            validate_hash=None if self.card.hashes_sha256 else SHARD_HASH)
            self._stream = stream, stream.get_shards(World(1, 1, 1, 0), False)
        return self._stream


def _missing(path: Path) -> ShardError:
    return ShardError(f"{path} is missing, but {INDEX} tells of it. Copy or prepare the shard again.")


def _wrong_size(path: Path, size: int, shard: _ShardFile) -> ShardError:
    return ShardError(f"{path} has {size:,} bytes, {INDEX} says {shard.size_bytes:,}. Copy or prepare the shard again.")


def _reopen(path: Path, name: str, cache: Path | None) -> Source:
    return Source(path, name=name, cache=cache)


def _read_index(path: Path, *, dtype: np.dtype, hashes: dict[str, str]) -> list[_ShardFile]:
    try:
        return [_shard_file(info, path, dtype, hashes) for info in json.loads(path.read_text(encoding="utf-8"))["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} cannot be read: it is no index of MDS shards. Copy or prepare the shards again.") from error


def _shard_file(info: dict[str, Any], index: Path, dtype: np.dtype, hashes: dict[str, str]) -> _ShardFile:
    if info["format"] != "mds" or info["version"] != 2:
        raise ShardError(f"{index} tells of {info['format']} version {info['version']}; needed: mds version 2.")
    names: list[str] = info["column_names"]
    if INPUT_IDS not in names:
        raise ShardError(f"{index} has columns {', '.join(names)}; needed: {INPUT_IDS}. "
                         "Tokenize with data-prep prepare.")
    at = names.index(INPUT_IDS)
    encoding = info["column_encodings"][at]
    if encoding != f"ndarray:{dtype.name}":
        raise ShardError(f"{index}: column {INPUT_IDS} is {encoding}, the card says ndarray:{dtype.name}. "
                         "Make the shards again with data-prep prepare --again.")
    stored = info["zip_data"] or info["raw_data"]
    sha256 = stored["hashes"].get(SHARD_HASH) or hashes.get(stored["basename"])
    if not sha256:
        raise ShardError(f"{index} has no {SHARD_HASH} of {stored['basename']}; needed: that of every shard. "
                         "Write it with data-prep index --again.")
    sizes = info["column_sizes"]
    return _ShardFile(name=info["raw_data"]["basename"], size_bytes=info["raw_data"]["bytes"], samples=info["samples"],
                      compressed=info["zip_data"] is not None, dtype=dtype.newbyteorder("<"),
                      variable_columns=sum(s is None for s in sizes), before=tuple(sizes[:at]),
                      stored=stored["basename"], sha256=sha256)
