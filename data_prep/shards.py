"""MDS shards: written as streaming's MDSWriter writes them, read back by a small reader of our own for the checks.

One sample of the column input_ids (ndarray, dtype fixed, length free) lies in a shard as

    uint32 bytes below | uint8 kind of the shape | shape: one uint8, uint16 or uint32 | ids
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.errors import ShardError
from encoder.base.unpack import unpack
from encoder.base.untrusted import inside, open_regular
from encoder.data.shard_format import (
    INDEX,
    INPUT_IDS,
    SHARD_HASH,
    Card,
    IdColumn,
    SpecialIds,
    ids_in,
    stored_info,
)

ZSTD_LEVEL = 3  # streaming's own


class ShardWriter:
    """Shards of one split of one segment, FOLDER/SPLIT.00000.mds and on: byte for byte what streaming's MDSWriter writes,
    at 5 ns a token against 18, and without importing streaming (and torch) in every process."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        dtype: np.dtype,
        shard_bytes: int,
        compression: str | None,
    ) -> None:
        self.entries: list[dict] = []  # of index.json, but for the name
        self.tokens = 0
        self._folder, self._split, self._dtype = folder, split, dtype
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": [SHARD_HASH],
            "size_limit": shard_bytes,
            "column_names": [INPUT_IDS],
            "column_encodings": [f"ndarray:{dtype.name}"],
            "column_sizes": [None],
        }
        # the settings stand in every shard, too, between offsets and samples
        self._head = json.dumps(self._config, sort_keys=True).encode("utf-8")
        self._samples: list[bytes | memoryview] = []
        self._sizes: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self._samples = []
        self._sizes = []
        # 8 bytes: the count, and one offset more than there are samples
        self._room = self._config["size_limit"] - 8 - len(self._head)

    def add(self, ids_T: np.ndarray, lengths_P: np.ndarray, chosen_P: np.ndarray) -> None:
        """Append the chosen pieces of a batch, ids in `dtype`."""
        ids, width = (
            np.ascontiguousarray(ids_T, self._dtype).data.cast("B"),
            self._dtype.itemsize,
        )
        # first and last place of every chosen piece, then in bytes
        ends_P = np.cumsum(lengths_P)[chosen_P]
        lengths_P = lengths_P[chosen_P]
        for begin, end, length in zip(
            ((ends_P - lengths_P) * width).tolist(),
            (ends_P * width).tolist(),
            lengths_P.tolist(),
            strict=True,
        ):
            head = sample_head(length, width)
            size = len(head) + end - begin
            # a sample larger than the limit gets a shard of its own
            if self._room < size + 4 and self._sizes:
                self._write()
            self._samples += (head, ids[begin:end])
            self._sizes.append(size)
            self._room -= size + 4  # 4 for its offset
        self.tokens += int(lengths_P.sum())

    def finish(self) -> list[dict]:
        """Write what is left; the shards' entries for index.json."""
        if self._sizes:
            self._write()
        return self.entries

    def _write(self) -> None:
        """One shard: count, offsets, settings, samples."""
        # offsets count from the file's beginning: count (4), count + 1 offsets (4 each), settings
        count = len(self._sizes)
        offsets = (
            np.concatenate([[0], np.cumsum(self._sizes)]) + 4 + 4 * (count + 1) + len(self._head)
        )
        data = b"".join(
            [struct.pack("<I", count), offsets.astype("<u4").tobytes(), self._head, *self._samples]
        )
        self._begin()

        # index.json lists both forms; the packed one is stored
        name = f"{self._split}.{len(self.entries):05}.mds"
        entry = {**self._config, "samples": count, "raw_data": _info(name, data), "zip_data": None}
        if self._config["compression"]:
            import zstd

            data = zstd.compress(data, ZSTD_LEVEL)
            name = f"{name}.zstd"
            entry["zip_data"] = _info(name, data)
        with open(self._folder / name, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        self.entries.append(entry)


def _info(name: str, data: bytes) -> dict:
    return {
        "basename": name,
        "bytes": len(data),
        "hashes": {SHARD_HASH: hashlib.sha256(data).hexdigest()},
    }


@functools.lru_cache(maxsize=2**14)
def sample_head(length: int, width: int) -> bytes:
    """What stands before a sample's ids (streaming's encodings.NDArray): the bytes below, kind and shape. The kind is
    4 x axes + width of the shape."""
    # one axis (4), its size in 1, 2 or 4 bytes (+ 0, 1, 2)
    if length < 2**8:
        shape = struct.pack("<BB", 4, length)
    elif length < 2**16:
        shape = struct.pack("<BH", 5, length)
    else:
        shape = struct.pack("<BI", 6, length)
    return struct.pack("<I", len(shape) + length * width) + shape


@dataclass(frozen=True, kw_only=True)
class ShardSamples:
    """The samples of one shard, end to end."""

    name: str
    ids_T: np.ndarray
    lengths_P: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.ids_T, np.cumsum(self.lengths_P)[:-1]))


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """Which samples lack [CLS], and which [SEP], at the end where the frame has it."""

    cls_P: np.ndarray
    sep_P: np.ndarray


def lacking_specials(samples: ShardSamples, specials: SpecialIds) -> Lacking:
    """Look at the ends of every sample; one without ids lacks both.

    Behind a text [SEP] may stand without [CLS], but not [CLS] without [SEP].
    """
    ends_P = np.cumsum(samples.lengths_P)
    begins_P = ends_P - samples.lengths_P
    if specials.frame == "both_ends":
        return Lacking(
            cls_P=_ids_at(samples, begins_P) != specials.cls_id,
            sep_P=_ids_at(samples, ends_P - 1) != specials.sep_id,
        )

    # the frame at the end alone: text [SEP] [CLS]
    last_P = _ids_at(samples, ends_P - 1)
    framed_P = (last_P == specials.cls_id) & (_ids_at(samples, ends_P - 2) == specials.sep_id)
    return Lacking(cls_P=~framed_P, sep_P=~framed_P & (last_P != specials.sep_id))


@dataclass(frozen=True, kw_only=True)
class Padded:
    """How many [PAD] each sample has before and behind its other ids; one of padding alone has all of it before."""

    before_P: np.ndarray
    behind_P: np.ndarray


def padding_of(samples: ShardSamples, specials: SpecialIds) -> Padded:
    """Look at both ends of every sample."""
    is_pad_T = samples.ids_T == specials.pad_id
    if not is_pad_T.any():
        return Padded(
            before_P=np.zeros(len(samples.lengths_P), np.int64),
            behind_P=np.zeros(len(samples.lengths_P), np.int64),
        )

    # places of all ids that are kept; of each sample the first, and the one behind its last
    kept = np.flatnonzero(~is_pad_T)
    ends_P = np.cumsum(samples.lengths_P)
    begins_P = ends_P - samples.lengths_P
    place_P, behind_P = np.searchsorted(kept, begins_P), np.searchsorted(kept, ends_P)
    some_P = place_P < behind_P  # not padding alone
    # so that `place_P` of a last sample of padding alone points at something
    kept = np.append(kept, 0)
    first_P = np.where(some_P, kept[place_P], ends_P)
    last_P = np.where(some_P, kept[behind_P - 1], ends_P - 1)
    return Padded(before_P=first_P - begins_P, behind_P=ends_P - 1 - last_P)


def without_padding(samples: ShardSamples, padded: Padded) -> ShardSamples:
    """The samples as they are read where the card strips padding."""
    if not (padded.before_P.any() or padded.behind_P.any()):
        return samples

    # +1 where the kept ids of a sample begin, -1 behind them: the running sum is 1 on what is kept.
    # Empty samples stay out, since += counts a repeated place once
    ends_P = np.cumsum(samples.lengths_P)
    lengths_P = samples.lengths_P - padded.before_P - padded.behind_P
    some_P = lengths_P > 0
    edges = np.zeros(len(samples.ids_T) + 1, np.int8)
    edges[(ends_P - samples.lengths_P + padded.before_P)[some_P]] += 1
    edges[(ends_P - padded.behind_P)[some_P]] -= 1
    return ShardSamples(
        name=samples.name,
        ids_T=samples.ids_T[np.cumsum(edges[:-1], dtype=np.int8) > 0],
        lengths_P=lengths_P,
    )


def text_stretches(
    lengths_P: np.ndarray, specials: SpecialIds, lacks: Lacking | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where the text of each sample begins and ends among ids laid end to end, without the frame; int64 [P] each.

    lengths_P: of the samples as they are stored
    specials: whose frame they have
    lacks: what of the frame is not stored; None: nothing
    """
    ends_P = np.cumsum(lengths_P)
    begins_P = ends_P - lengths_P
    lacks_cls_P = np.zeros(len(ends_P), bool) if lacks is None else lacks.cls_P
    lacks_sep_P = np.zeros(len(ends_P), bool) if lacks is None else lacks.sep_P
    # ~lacks is 1 where the token is stored
    if specials.frame == "end":
        ends_P = ends_P - ~lacks_cls_P
    else:
        begins_P = begins_P + ~lacks_cls_P
    return begins_P, np.maximum(ends_P - ~lacks_sep_P, begins_P)


def frame_words(specials: SpecialIds) -> tuple[str, str]:
    """What a sample that lacks [CLS], and one that lacks [SEP], does not do."""
    if specials.frame == "end":
        return "end with [SEP] [CLS]", "have [SEP] behind its text"
    return "begin with [CLS]", "end with [SEP]"


def specials_inside(samples: ShardSamples, specials: SpecialIds) -> dict[str, np.ndarray]:
    """Which samples hold a special id where no text has one, bool [P] by what it is: [MASK] or [PAD] anywhere, [CLS] and
    [SEP] elsewhere than in the frame."""
    ids_T, some_P, ends_P = samples.ids_T, samples.lengths_P > 0, np.cumsum(samples.lengths_P)

    # the places where the frame has them, which are allowed
    cls_word, cls_P = "[CLS] behind its first place", (ends_P - samples.lengths_P)[some_P]
    sep_word, sep_P = "[SEP] before its last place", ends_P[some_P] - 1
    if specials.frame == "end":
        cls_word, cls_P = "[CLS] before its last place", sep_P
        # it is the last of a sample that lacks [CLS]
        sep_word, sep_P = "[SEP] inside its text", sep_P - (ids_T[sep_P] == specials.cls_id)
    found = {}
    for word, special, allowed in (
        ("[MASK]", specials.mask_id, None),
        ("[PAD]", specials.pad_id, None),
        (cls_word, specials.cls_id, cls_P),
        (sep_word, specials.sep_id, sep_P),
    ):
        at = np.flatnonzero(ids_T == special)
        at = at if allowed is None else at[~np.isin(at, allowed)]
        if len(at):
            found[word] = np.zeros(len(ends_P), bool)
            # the sample of each place: the first that ends behind it
            found[word][np.searchsorted(ends_P, at, side="right")] = True
    return found


def _ids_at(samples: ShardSamples, place_P: np.ndarray) -> np.ndarray:
    """The id at a place of each sample, int64 [P]; -1 where that is outside of it."""
    ends_P = np.cumsum(samples.lengths_P)
    inside_P = (place_P >= ends_P - samples.lengths_P) & (place_P < ends_P)
    found_P = np.full(len(ends_P), -1, np.int64)
    found_P[inside_P] = samples.ids_T[place_P[inside_P]]
    return found_P


def read_shard(
    folder: Path, entry: dict, *, card: Card, hashes: Mapping[str, str] | None = None
) -> ShardSamples:
    """One shard as it is stored, its size and hash checked, compressed or not; `hashes` of hashes.json where index.json has
    none. Raises ShardError with the file's name."""
    found = column_encodings(folder, entry, column=card.column)[card.column]
    if found != card.stored_as:
        raise ShardError(
            f"{folder / INDEX} has the column {card.column} as {found}; needed: {card.column} as"
            f" {card.stored_as}."
        )
    data = stored_bytes(folder, entry)
    info = stored_info(entry)
    if hashlib.sha256(data).hexdigest() != (
        info["hashes"].get(SHARD_HASH) or (hashes or {}).get(info["basename"])
    ):
        raise ShardError(
            f"{folder / info['basename']} is damaged: its {SHARD_HASH} is not the one in {INDEX}. "
            "Make the shards again."
        )
    _check_unpacked_beside(folder, entry, data)
    return samples_of(folder, entry, data, column=card.id_column)


def column_encodings(folder: Path, entry: dict, *, column: str = INPUT_IDS) -> dict[str, str]:
    """MDS's encoding of each column of a shard. Raises ShardError for another format, for pickles and without `column`."""
    try:
        word, columns = (
            entry["format"],
            dict(zip(entry["column_names"], entry["column_encodings"], strict=True)),
        )
        # looked up for the KeyError alone
        (
            stored_info(entry)["basename"],
            stored_info(entry)["hashes"],
            entry["samples"],
            entry["column_sizes"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{folder / INDEX} is no index of MDS shards ({error} is missing). "
            "Make the shards again."
        ) from error
    if word != "mds" or entry.get("version") != 2:
        raise ShardError(
            f"{folder / INDEX} holds {word} version {entry.get('version')}; needed: mds version 2."
        )
    for name, encoding in columns.items():
        if encoding.partition(":")[0] == "pkl":
            raise ShardError(
                f"{folder / INDEX} has the column {name} as pkl: to read a pickle is to run its"
                " code. Write the shards again without that column."
            )
    if column not in columns:
        # perhaps another column holds the ids
        hold = [
            name
            for name, encoding in columns.items()
            if encoding.partition(":")[0] in ("ndarray", "bytes")
        ]
        way = (
            "Where another column holds the ids: data-prep index FOLDER --tokenizer FILE --column"
            f" {hold[0]}."
            if hold
            else ("Tokenize the text with data-prep prepare.")
        )
        raise ShardError(
            f"{folder / INDEX} has the columns {columns_text(columns)}; needed: {column}. {way}"
        )
    return columns


def columns_text(columns: Mapping[str, str]) -> str:
    """'tokens (ndarray:int32), id (str)', for people."""
    return ", ".join(f"{name} ({encoding})" for name, encoding in columns.items())


def stored_bytes(folder: Path, entry: dict) -> bytes:
    """A shard's file as it lies in the folder, its size checked. Raises ShardError."""
    info = stored_info(entry)
    path = inside(folder, info["basename"], where=folder / INDEX, error=ShardError)
    with open_regular(path, error=ShardError) as file:
        size = os.fstat(file.fileno()).st_size
        if size != info["bytes"]:
            raise ShardError(
                f"{path} has {size:,} bytes, {INDEX} says {info['bytes']:,}. Make the shards again."
            )
        try:
            return file.read()
        except OSError as error:
            raise ShardError(
                f"{path} cannot be read: {error.strerror}. Make the shards again."
            ) from error


def _unpacked(folder: Path, entry: dict, data: bytes) -> bytes:
    """A shard as MDS has it, from its file. Raises ShardError with the file's name."""
    if not entry["zip_data"]:
        return data
    try:
        return unpack(str(entry["compression"]), data, size=entry["raw_data"]["bytes"])
    except ValueError as error:
        raise ShardError(
            f"{folder / stored_info(entry)['basename']} cannot be unpacked to the"
            f" {entry['raw_data']['bytes']:,} bytes that {INDEX} lists: {error}. Make the shards"
            " again."
        ) from error


def _check_unpacked_beside(folder: Path, entry: dict, data: bytes) -> None:
    """Training unpacks a compressed shard beside itself and reads that copy from then on. Raises ShardError."""
    if not entry["zip_data"]:
        return
    copy = inside(folder, entry["raw_data"]["basename"], where=folder / INDEX, error=ShardError)
    if not copy.is_file():
        return
    same_size = copy.stat().st_size == entry["raw_data"]["bytes"]
    if not same_size or copy.read_bytes() != _unpacked(folder, entry, data):
        raise ShardError(
            f"{copy} is damaged: it is not what {stored_info(entry)['basename']} unpacks to. Remove"
            " it: training unpacks it again."
        )


def samples_of(folder: Path, entry: dict, data: bytes, *, column: IdColumn) -> ShardSamples:
    """The ids of a shard's file, in their stored type. Raises ShardError with the file's name."""
    path = folder / stored_info(entry)["basename"]
    data = _unpacked(folder, entry, data)
    at = entry["column_names"].index(column.name)
    try:
        return _samples(
            path.name,
            data,
            column,
            samples=int(entry["samples"]),
            sizes=entry["column_sizes"],
            at=at,
        )
    except (ValueError, IndexError) as error:
        raise ShardError(
            f"{path} is no MDS shard of {entry['samples']:,} samples: {error}. "
            "Make the shards again."
        ) from error


def _samples(
    name: str, data: bytes, column: IdColumn, *, samples: int, sizes: Sequence[int | None], at: int
) -> ShardSamples:
    """All samples of a shard at once; `sizes` in bytes of the columns (None: in each sample's head), `at` that of ids."""
    count = int(np.frombuffer(data, "<u4", 1)[0])
    if count != samples:
        raise ValueError(f"it holds {count:,} samples")
    # layout: count, count + 1 offsets, settings, samples; all little-endian
    offsets = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
    raw = np.frombuffer(data, np.uint8)
    begins, limits = offsets[:-1], offsets[1:]
    # a column without a fixed size has its bytes, a uint32, at the head of each sample
    variable = [i for i, size in enumerate(sizes) if size is None]
    if offsets[-1] != len(raw) or np.any(limits - begins < 4 * len(variable)):
        raise ValueError("its offsets do not fit its size")
    # one number of the head of every sample, byte by byte: they are not aligned
    head = {
        i: sum(raw[begins + 4 * k + byte].astype(np.int64) << 8 * byte for byte in range(4))
        for k, i in enumerate(variable)
    }
    # of each column its bytes: a number for all, or one of every sample
    widths: list[Any] = [head.get(i, size) for i, size in enumerate(sizes)]
    columns = begins + 4 * len(variable) + sum(widths[:at], start=0)
    ends = columns + widths[at]
    # numbers of a damaged shard may point anywhere; needed: begins <= columns <= ends <= limits
    if (
        np.any(columns < begins)
        or np.any(columns > limits)
        or np.any(ends > limits)
        or np.any(ends < columns)
    ):
        raise ValueError("a sample's columns do not fit its size")
    # the kind byte is 4 x axes + width of the shape: one axis each
    plain = bool(
        column.dtype is not None
        and column.has_shape
        and np.all(columns < ends)
        and np.all(raw[columns] >> 2 == 1)
    )
    if column.dtype is not None and (plain or not column.has_shape):
        return _together(name, raw, columns, ends, dtype=column.dtype, has_shape=column.has_shape)
    # arrays that name their own type, or have axes of size 1: one by one
    parts = [
        ids_in(column, data, begin, end - begin)
        for begin, end in zip(columns.tolist(), ends.tolist(), strict=True)
    ]
    return ShardSamples(
        name=name,
        ids_T=np.concatenate(parts) if parts else np.empty(0, np.int64),
        lengths_P=np.array([len(part) for part in parts], dtype=np.int64),
    )


def _together(
    name: str,
    raw: np.ndarray,
    columns: np.ndarray,
    ends: np.ndarray,
    *,
    dtype: np.dtype,
    has_shape: bool,
) -> ShardSamples:
    """Arrays of one axis, or bare ids, of one type: cut out of the shard all at once."""
    first_byte = columns
    if has_shape:  # one byte that tells the width of the size, and the size
        first_byte = columns + 1 + (1 << (raw[columns] & 3).astype(np.int64))
    id_bytes = ends - first_byte
    if np.any(id_bytes < has_shape) or np.any(id_bytes % dtype.itemsize):
        raise ValueError(f"a sample's size is no whole number of {dtype.name}")

    # +1 where ids begin, -1 behind them: the running sum is 1 on the bytes of ids
    edges = np.zeros(len(raw) + 1, np.int8)
    edges[first_byte[id_bytes > 0]] += 1
    edges[ends[id_bytes > 0]] -= 1
    ids_T = raw[np.cumsum(edges[:-1], dtype=np.int8).astype(bool)].view(dtype)
    # int64, since numpy has no exact common type of uint64 and int64
    return ShardSamples(
        name=name,
        ids_T=ids_T.view(np.int64) if dtype == np.uint64 else ids_T,
        lengths_P=id_bytes // dtype.itemsize,
    )
