"""Shard folders: written through streaming's MDSWriter, read back by a small reader of our own for the checks.

One sample of the column input_ids (ndarray, dtype fixed, length free) lies in a shard as

    uint32 bytes below | uint8 kind of the shape | shape: one uint8, uint16 or uint32 | ids
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder.base.errors import ShardError
from encoder.base.files import fsync_path, write_atomic
from encoder.data.shard_format import (
    INDEX,
    INPUT_IDS,
    SHARD_HASH,
    TOKENIZER,
    Card,
    with_content,
    write_card,
    write_lengths,
)


class ShardFolder:
    """One split being written: shards as they fill, then lengths, tokenizer and, last, the card."""

    def __init__(self, folder: Path, *, dtype: np.dtype, shard_bytes: int, compression: str | None) -> None:
        from streaming import MDSWriter

        class Writer(MDSWriter):
            """MDSWriter, its 40 us of general encoding a sample replaced by 2 us for our one column; the same bytes."""

            def encode_sample(self, sample: dict[str, np.ndarray]) -> bytes:
                return sample_bytes(sample[INPUT_IDS])

        self.folder = folder
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        self._writer = Writer(columns={INPUT_IDS: f"ndarray:{dtype.name}"}, out=str(folder), size_limit=shard_bytes,
                                 compression=compression, hashes=[SHARD_HASH])

    def add(self, ids_T: np.ndarray, lengths_P: np.ndarray, chosen_P: np.ndarray) -> None:
        """Append the chosen pieces of a batch."""
        ends_P = np.cumsum(lengths_P)
        for end, length in zip(ends_P[chosen_P].tolist(), lengths_P[chosen_P].tolist(), strict=True):
            self._writer.write({INPUT_IDS: ids_T[end - length:end]})
        self._lengths.append(lengths_P[chosen_P].astype(np.uint32))
        self.tokens += int(lengths_P[chosen_P].sum())

    def finish(self, card: Card, tokenizer_json: bytes) -> Card:
        """Close the shards and write the side files; returns the card with its totals and hashes."""
        self._writer.finish()
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.uint32)
        write_lengths(self.folder, lengths, max_tokens_per_document=card.max_tokens_per_document)
        write_atomic(self.folder / TOKENIZER, tokenizer_json)
        for path in sorted(self.folder.glob("shard.*")) + [self.folder / INDEX]:
            fsync_path(path)
        card = with_content(card, self.folder, lengths)
        write_card(self.folder, card)
        fsync_path(self.folder)
        return card

    def abandon(self) -> None:
        """Let go of the writer's threads after an error."""
        self._writer.cancel_future_jobs()


def sample_bytes(ids_T: np.ndarray) -> bytes:
    """One sample as it lies in a shard (streaming's encodings.NDArray): the kind is 4 x axes + width of the shape."""
    length = len(ids_T)
    shape = struct.pack("<BB", 4, length) if length < 2**8 else (
        struct.pack("<BH", 5, length) if length < 2**16 else struct.pack("<BI", 6, length))
    return struct.pack("<I", len(shape) + ids_T.nbytes) + shape + ids_T.tobytes()


@dataclass(frozen=True, kw_only=True)
class ShardSamples:
    """The samples of one shard, end to end."""

    name: str
    ids_T: np.ndarray
    lengths_P: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.ids_T, np.cumsum(self.lengths_P)[:-1]))


def read_index(folder: Path) -> list[dict]:
    """The shard entries of index.json. Raises ShardError."""
    path = folder / INDEX
    try:
        return json.loads(path.read_text(encoding="utf-8"))["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise ShardError(f"{path} cannot be read: {error}. Make the shards again.") from error


def read_shard(folder: Path, entry: dict, *, dtype: str) -> ShardSamples:
    """One shard, its sizes and hashes checked, compressed or not. Raises ShardError with the file's name."""
    encoding = f"ndarray:{dtype}"
    if entry.get("column_names") != [INPUT_IDS] or entry.get("column_encodings") != [encoding]:
        raise ShardError(f"{folder / INDEX} has the columns {entry.get('column_names')} as "
                         f"{entry.get('column_encodings')}; needed: {INPUT_IDS} as {encoding}.")
    packed, plain = entry["zip_data"], entry["raw_data"]
    stored = packed or plain
    path = folder / stored["basename"]
    data = _checked(path, stored)
    if packed:
        from streaming.base.compression import decompress

        try:
            data = decompress(entry["compression"], data)
        except Exception as error:    # each compressor has an error of its own
            raise ShardError(f"{path} cannot be decompressed: {error}. Make the shards again.") from error
    try:
        return _samples(path.name, data, np.dtype(dtype), int(entry["samples"]))
    except (ValueError, IndexError) as error:
        raise ShardError(f"{path} is no MDS shard of {entry['samples']:,} samples: {error}. "
                         "Make the shards again.") from error


def _checked(path: Path, info: dict) -> bytes:
    """The bytes of a file, held against the size and the hash of the index."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}. Make the shards again.") from error
    if len(data) != info["bytes"]:
        raise ShardError(f"{path} has {len(data):,} bytes, {INDEX} tells of {info['bytes']:,}. "
                         "Make the shards again.")
    if hashlib.sha256(data).hexdigest() != info["hashes"].get(SHARD_HASH):
        raise ShardError(f"{path} is damaged: its {SHARD_HASH} is not the one in {INDEX}. Make the shards again.")
    return data


def _samples(name: str, data: bytes, dtype: np.dtype, samples: int) -> ShardSamples:
    count = int(np.frombuffer(data, "<u4", 1)[0])
    if count != samples:
        raise ValueError(f"it holds {count:,} samples")
    offsets = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
    raw = np.frombuffer(data, np.uint8)
    begins, ends = offsets[:-1], offsets[1:]
    if offsets[-1] != len(raw) or np.any(ends - begins < 6):
        raise ValueError("its offsets do not fit its size")
    # kind of the shape: the number of axes, above two bits that tell the width of the shape's numbers
    kind = raw[begins + 4]
    widths = 1 << (kind & 3).astype(np.int64)
    if np.any(kind >> 2 != 1):
        raise ValueError("a sample has more than one axis")
    first_byte = begins + 5 + widths
    sizes = ends - first_byte
    if np.any(sizes <= 0) or np.any(sizes % dtype.itemsize):
        raise ValueError("a sample's size is no whole number of ids")
    keep = np.zeros(len(raw) + 1, np.int8)
    keep[first_byte] += 1
    keep[ends] -= 1
    ids_T = raw[np.cumsum(keep[:-1], dtype=np.int8).astype(bool)].view(dtype)
    return ShardSamples(name=name, ids_T=ids_T, lengths_P=sizes // dtype.itemsize)
