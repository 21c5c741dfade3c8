"""A shard folder as a list of documents: random access by memory map.

    shard.00000.mds    uint32 n | uint32 offset x (n+1) | settings as JSON | sample | sample | ...
    sample             uint32 size of each column of no fixed size | the columns in the order of their names
    input_ids          (dimensions << 2 | log2 bytes of a size) | size x dimensions | values; others: shard_format.IdColumn

Shards that lie in the folder as plain .mds need nothing but this file. Compressed shards, and those of a folder that is
read through a cache, go through encoder.data.cache.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from encoder.base.errors import DamagedShard, ShardError
from encoder.base.untrusted import inside, regular_file
from encoder.data.cache import ShardCache, StoredShard, fetch_side_files
from encoder.data.sentences import SentenceLists, Sentences, read_sentences
from encoder.data.shard_format import (
    INDEX,
    LENGTHS,
    SHARD_HASH,
    Card,
    IdColumn,
    as_read,
    check_index,
    ids_in,
    read_card,
    read_hashes,
    read_index,
    read_lengths,
    stored_info,
)

# Each open shard holds one file handle, of 1,024 that a process usually has; reading touches the
# 8 shards of one group of encoder.data.order, or of two at a border
OPEN_SHARDS = 32


@dataclass(frozen=True)
class _ShardFile(StoredShard):
    """One line of index.json: also how to find the ids in the samples of a shard."""

    samples: int
    column: IdColumn
    size: int | None  # of the ids' column in bytes, None where the head tells
    variable_columns: int  # columns with a size in the sample's head
    before: tuple[int | None, ...]  # sizes of the columns before it, None where the head tells


@dataclass(frozen=True)
class _OpenShard:
    buffer: mmap.mmap
    offsets: np.ndarray  # uint32 [samples + 1], a view of the map


def open_source(
    origin: Path | str, *, name: str, cache: Path | None = None, cache_bytes: int | None = None
) -> Source:
    """Open a shard folder that has a card; with `cache`, a folder or URL whose files are fetched to that folder first.

    Reads card.json and index.json, no shard and no length; all side files are fetched. `cache_bytes` is what its shards
    may take in the cache. Raises ShardError, also for an index that is not the card's.
    """
    return Source(str(origin), name=name, cache=cache, cache_bytes=cache_bytes)


class Source:
    """The documents of one shard folder, numbered through its shards in stored order. Holds memory maps; picklable."""

    def __init__(
        self, origin: str, *, name: str, cache: Path | None = None, cache_bytes: int | None = None
    ) -> None:
        self.name, self.cache = name, cache
        self._again = (origin, name, cache, cache_bytes)
        # with a cache all side files are read from there
        if cache is not None:
            fetch_side_files(origin, cache)
        path = self.path = cache or Path(origin)  # where the side files are
        self._cache = ShardCache(origin=origin, folder=path, limit_bytes=cache_bytes)

        self.card = read_card(path)
        self.lengths = read_lengths(path, self.card)

        # the card's hash holds the index, and the index holds the hash of each shard
        check_index(path, self.card)
        hashes = read_hashes(path, self.card)
        self._shards = [
            _shard_file(entry, path / INDEX, self.card, hashes) for entry in read_index(path)
        ]

        self.samples_per_shard = np.array([s.samples for s in self._shards], dtype=np.int64)
        self._first_document = np.concatenate([[0], np.cumsum(self.samples_per_shard)]).tolist()
        if self._first_document[-1] != self.card.documents:
            raise ShardError(
                f"{path / INDEX} lists {self._first_document[-1]:,} samples, the card of"
                f" {self.card.documents:,}. Make the shards again with data-prep prepare CONFIG"
                " --again."
            )

        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self.open_shards = OPEN_SHARDS
        self._sentences: Sentences | None = None

    def __reduce__(self) -> tuple:
        return _reopen, (*self._again, self.open_shards)

    @property
    def documents(self) -> int:
        """How many documents the folder holds."""
        return self.card.documents

    @property
    def mean_tokens(self) -> float:
        """Mean length of a document."""
        return self.card.tokens / self.card.documents

    def sentences_of(self, documents: np.ndarray) -> SentenceLists:
        """The sentences of some documents, in their order. Raises ShardError where the folder does not tell them."""
        if self._sentences is None:
            self._sentences = read_sentences(self.path, self.card)
        return self._sentences.of(documents)

    def read(self, document: int) -> np.ndarray:
        """The ids of a document as it is trained, in their stored type, where possible a read-only view of the file. Raises
        ShardError naming the file, DamagedShard where it is there and wrong."""
        number = bisect_right(self._first_document, document) - 1
        sample = document - self._first_document[number]
        ids = as_read(self._ids_at(self._opened(number), number, sample), self.card)
        # rows were planned by lengths.bin: another length would shift all behind it
        if len(ids) != self.lengths[document]:
            raise self._damaged(
                number,
                f"{self.file_of(document)} sample {sample} has {len(ids)} tokens, {LENGTHS} says"
                f" {self.lengths[document]}. Make the shards again with data-prep prepare CONFIG"
                " --again.",
            )
        return ids

    def hold(self, shard: int, *, wait: bool) -> IO[bytes] | None:
        """The file of a shard in the cache, fetched if it is not there, and kept from eviction while it is open.

        None where there is no room, or another process is fetching it and `wait` is false. Raises ShardError.
        """
        return self._cache.open(self._shards[shard], may_exceed=False, wait=wait)

    def check_files(self, *, sizes: bool = True) -> None:
        """Every shard read in place is there, with its size: a look at each name, no read. Raises ShardError."""
        # a cache looks at what it fetches
        if self.cache is not None:
            return
        for shard in self._shards:
            path = self.path / shard.name
            try:
                size = path.stat().st_size
            except FileNotFoundError as error:
                # it is unpacked when it is first read
                if shard.compression:
                    continue
                raise _missing(path) from error
            if sizes and size != shard.size_bytes:
                raise ShardError(_wrong_size(path, size, shard))

    def shard_of(self, document: int) -> int:
        """The number of the shard that holds a document."""
        return bisect_right(self._first_document, document) - 1

    def documents_of(self, shard: int) -> tuple[int, int]:
        """The first document of a shard, and the one after its last."""
        return self._first_document[shard], self._first_document[shard + 1]

    def file_of(self, document: int) -> Path:
        """The shard file that holds a document, for messages."""
        return self._cache.place(self._shards[self.shard_of(document)])

    def _ids_at(self, opened: _OpenShard, number: int, sample: int) -> np.ndarray:
        shard = self._shards[number]
        begin, end = int(opened.offsets[sample]), int(opened.offsets[sample + 1])
        try:
            # a sample's head: a uint32 for each column of variable
            # size, in the order of the columns
            head = np.frombuffer(opened.buffer, "<u4", shard.variable_columns, begin).tolist()

            # over the columns before the ids, by their fixed size or the next one of the head
            at = begin + 4 * shard.variable_columns
            for size in shard.before:
                at += _next_size(size, head)
            # what is left of the head begins with the ids' own size
            size = _next_size(shard.size, head)
            if at + size > end:
                raise ValueError("its columns do not fit its size")
            return ids_in(shard.column, opened.buffer, at, size)
        except (ValueError, IndexError) as error:
            raise self._damaged(
                number,
                f"{self._cache.place(shard)} sample {sample} is damaged ({error}). "
                "Copy or prepare the shard again.",
            ) from error

    def _opened(self, number: int) -> _OpenShard:
        opened = self._open.get(number)
        if opened is None:
            opened = self._open[number] = self._open_shard(number)
            if len(self._open) > self.open_shards:
                # the least recently used one; views of its map keep it alive
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return opened

    def _open_shard(self, number: int) -> _OpenShard:
        shard = self._shards[number]
        path = self._cache.place(shard)
        try:
            with self._open_file(shard, path) as f:
                buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise _missing(path) from error
        except ValueError as error:
            raise self._damaged(
                number, f"{path} cannot be read: {error}. Copy or prepare the shard again."
            ) from error
        except OSError as error:
            raise ShardError(
                f"{path} cannot be read: {error}. Copy or prepare the shard again."
            ) from error
        except DamagedShard as error:
            raise self._damaged(number, str(error)) from error

        # the head is held against the index before an offset of it is used
        if len(buffer) != shard.size_bytes:
            raise self._damaged(number, _wrong_size(path, len(buffer), shard))
        samples = int.from_bytes(buffer[:4], "little")
        if samples != shard.samples:
            raise self._damaged(
                number,
                f"{path} holds {samples:,} samples, {INDEX} says {shard.samples:,}. "
                "Copy or prepare the shard again.",
            )
        if len(buffer) < 4 * (samples + 2):
            raise self._damaged(
                number,
                f"{path} is too short for {samples:,} samples. Copy or prepare the shard again.",
            )
        return _OpenShard(buffer, np.frombuffer(buffer, "<u4", samples + 1, 4))

    def _open_file(self, shard: _ShardFile, path: Path) -> IO[bytes]:
        if self.cache is not None or shard.compression:
            file = self._cache.open(shard)
            assert file is not None, "it waits, and may exceed the cache's size"
            return file

        # a symbolic link may have come since the index was read
        inside(self.path, shard.name, where=self.path / INDEX, error=ShardError)
        return regular_file(path)

    def _damaged(self, number: int, text: str) -> DamagedShard:
        return DamagedShard(text, source=self.name, shard=number)


def _missing(path: Path) -> ShardError:
    return ShardError(f"{path} is missing, but {INDEX} lists it. Copy or prepare the shard again.")


def _wrong_size(path: Path, size: int, shard: _ShardFile) -> str:
    return (
        f"{path} has {size:,} bytes, {INDEX} says {shard.size_bytes:,}. Copy or prepare the shard"
        " again."
    )


def _reopen(
    origin: str, name: str, cache: Path | None, cache_bytes: int | None, open_shards: int
) -> Source:
    source = Source(origin, name=name, cache=cache, cache_bytes=cache_bytes)
    source.open_shards = open_shards
    return source


def read_samples_per_shard(folder: Path) -> np.ndarray:
    """Documents of each shard of a folder, int64 [shards], by its index alone. Raises ShardError."""
    return np.array([entry["samples"] for entry in read_index(folder)], dtype=np.int64)


def _next_size(fixed: int | None, head: list[int]) -> int:
    """A column's bytes in a sample: the same in each, or the next number of the sample's head, which is taken from it."""
    if fixed is not None:
        return fixed
    return head.pop(0)


def _shard_file(
    info: dict[str, Any], index: Path, card: Card, hashes: dict[str, str]
) -> _ShardFile:
    names: list[str] = info["column_names"]
    if card.column not in names:
        raise ShardError(
            f"{index} has columns {', '.join(names)}; needed: {card.column}. "
            "Tokenize with data-prep prepare."
        )
    at = names.index(card.column)
    encoding = info["column_encodings"][at]
    if encoding != card.stored_as:
        raise ShardError(
            f"{index}: column {card.column} is {encoding}, the card says {card.stored_as}. "
            "Make the shards again with data-prep prepare CONFIG --again."
        )

    # the hash of the file as it lies in the folder, packed or not
    stored = stored_info(info)
    sha256 = stored["hashes"].get(SHARD_HASH) or hashes.get(stored["basename"])
    if not sha256:
        raise ShardError(
            f"{index} has no {SHARD_HASH} of {stored['basename']}; needed: that of every shard. "
            "Write it with data-prep index FOLDER --tokenizer FILE --again."
        )

    # the columns of a sample lie in the order in which the index lists them
    sizes = info["column_sizes"]
    compression = None
    if info["zip_data"]:
        compression = info["compression"]
    return _ShardFile(
        name=info["raw_data"]["basename"],
        size_bytes=info["raw_data"]["bytes"],
        compression=compression,
        stored=stored["basename"],
        stored_bytes=stored["bytes"],
        sha256=sha256,
        raw_sha256=info["raw_data"]["hashes"].get(SHARD_HASH, ""),
        samples=info["samples"],
        column=card.id_column,
        size=sizes[at],
        variable_columns=sum(s is None for s in sizes),
        before=tuple(sizes[:at]),
    )
