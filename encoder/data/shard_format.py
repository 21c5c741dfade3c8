"""What a shard folder holds: MDS shards, and beside them a card, the lengths and the tokenizer.

    SOURCE/train/
        index.json          MosaicML MDS: column input_ids, ndarray:uint16 or ndarray:uint32, one sample a document (shards
                            made elsewhere: a column of another name and type, see Card.column);
                            with the SHA-256 of every shard file (MDSWriter's hashes=["sha256"])
        shard.00000.mds     [CLS] ... [SEP] stored, at most `max_tokens_per_document` tokens a sample
        lengths.bin         uint16 (uint32 when a length does not fit) tokens per sample, in the order of the shards
        tokenizer.json      the tokenizer that made the ids
        card.json           written last: a folder without it is not finished
        hashes.json         only beside shards made elsewhere whose index.json has no SHA-256: that of every shard file
        sentences.bin       only where asked for: where the sentences of each document end (encoder/data/sentences.py)

The card names its content: index_sha256 (bytes of index.json, hence of every shard) is held at each opening,
lengths_sha256 (bytes of lengths.bin) by data-prep verify alone, since 2 billion samples have 4 GB of lengths. A run that
goes on over a card of the same SHA-256 goes on over the same content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from encoder.base.errors import ConfigError, ShardError
from encoder.base.files import is_hidden, meant_beside, sha256_of, write_atomic, write_json
from encoder.base.schema import from_mapping, to_plain
from encoder.base.tokenizer_json import SpecialIds
from encoder.base.untrusted import INDEX_BYTES, plain_name, read_bytes, read_json

INPUT_IDS = "input_ids"
CARD, LENGTHS, INDEX, TOKENIZER = "card.json", "lengths.bin", "index.json", "tokenizer.json"
HASHES = "hashes.json"
SENTENCES = "sentences.bin"
FORMAT = 2  # 1 had no hashes of content
Width = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
WIDTHS: tuple[str, ...] = typing.get_args(Width)
# how an MDS column `ndarray` without a type names that of each sample
# (streaming's encodings.NDArray)
_WIDTH_OF_BYTE = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    32: "uint32",
    33: "int32",
    64: "uint64",
    65: "int64",
}
SHARD_HASH = "sha256"  # of each shard file, in index.json, under MDS's name for it
MOST_SHARD_BYTES = 2**32  # offsets in a shard have 32 bits
MOST_IDS = 2**32  # an id has at most 32 bits

_SHA256 = re.compile("[0-9a-f]{64}")
_SIDE_FILES = (CARD, LENGTHS, INDEX, TOKENIZER, HASHES, SENTENCES, "origin.txt")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts a run needs before it opens a shard."""

    source: str
    split: str  # train or held_out
    tokenizer_sha256: str  # of the bytes of tokenizer.json: the fingerprint
    vocab_size: int
    specials: SpecialIds
    dtype: Width  # of the ids as they are stored; int64 where each sample names its own
    documents: int  # samples
    tokens: int  # sum of the lengths
    max_tokens_per_document: int  # longest sample allowed
    index_sha256: str  # hex, of the bytes of index.json
    lengths_sha256: str  # hex, of the bytes of lengths.bin
    hashes_sha256: str = ""  # hex, of the bytes of hashes.json; empty: index.json has the hashes
    sentences_sha256: str = ""  # hex, of the bytes of sentences.bin; empty: there is none
    sentence_splitter: str = ""  # name and version of what found the sentences
    adds_specials: bool = False  # samples that lack [CLS] or [SEP] at their ends get them when read
    strips_padding: bool = False  # samples with [PAD] at their ends lose it when read
    # samples have [CLS], [SEP], [MASK] or [PAD] inside, and are meant to
    holds_specials: bool = False
    column: str = INPUT_IDS  # of the shards: where the ids are
    encoding: str = ""  # of that column, as index.json has it; empty: ndarray:DTYPE
    format: int = FORMAT
    # the settings and versions that made the folder
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_numbers()
        ids = self.specials
        named = (ids.cls_id, ids.sep_id, ids.pad_id, ids.mask_id, ids.unk_id)
        if outside := [i for i in (*named, *ids.all_special) if not 0 <= i < self.vocab_size]:
            raise ConfigError(
                f"special id {outside[0]} is outside the vocabulary of {self.vocab_size}."
            )
        if plain := [i for i in named if i not in ids.all_special]:
            raise ConfigError(
                f"all_special lacks the id {plain[0]}, which would be masked as text."
            )

    def _check_numbers(self) -> None:
        """Totals that shards can have, which all arithmetic on a card relies on. Raises ConfigError."""
        if (
            not 1 <= self.vocab_size <= MOST_IDS
            or not 1 <= self.max_tokens_per_document < MOST_SHARD_BYTES
        ):
            raise ConfigError(
                f"vocab_size {self.vocab_size:,} and max_tokens_per_document"
                f" {self.max_tokens_per_document:,} must be at least 1, and fit 32 bits."
            )
        most = self.documents * self.max_tokens_per_document
        if self.documents < 0 or not min(1, self.documents) <= self.tokens <= most:
            raise ConfigError(
                f"it lists {self.documents:,} samples of at most"
                f" {self.max_tokens_per_document:,} tokens, and of {self.tokens:,} tokens in all,"
                " which cannot be."
            )

    @property
    def stored_as(self) -> str:
        """The encoding of the ids' column, as index.json must have it."""
        return self.encoding or f"ndarray:{self.dtype}"

    @property
    def id_column(self) -> IdColumn:
        """How the ids lie in their column. Raises ShardError."""
        return id_column(self.column, self.stored_as, dtype=self.dtype)


# fields that a card has only where they say something: a card of data-prep
# prepare is the same bytes as ever
_SELDOM = (
    "strips_padding",
    "holds_specials",
    "column",
    "encoding",
    "sentences_sha256",
    "sentence_splitter",
)


@dataclass(frozen=True)
class IdColumn:
    """How the ids of a document lie in the bytes of an MDS column.

    ndarray:int32          shape | ids             ndarray           type | shape | ids
    ndarray:int32:1,512    ids                     bytes             ids, of a type that the card names
    """

    name: str
    dtype: np.dtype | None  # little-endian; None: a byte before each array names it
    # before each array: a byte of (axes << 2 | log2 bytes of a size), and the sizes
    has_shape: bool


def id_column(name: str, encoding: str, *, dtype: str | None) -> IdColumn:
    """The layout of a column by its MDS encoding; `dtype` is needed for bytes. Raises ShardError for what holds no ids."""
    kind, _, rest = encoding.partition(":")
    word, _, shape = rest.partition(":")
    if kind == "bytes":
        return IdColumn(name, np.dtype(dtype).newbyteorder("<"), has_shape=False)
    sizes = [int(size) for size in shape.split(",") if size.isdecimal()]

    # a shape in the encoding is fixed for all samples: one axis, or others of size 1
    if (
        kind != "ndarray"
        or word not in ("", *WIDTHS)
        or shape
        and (not sizes or sum(size > 1 for size in sizes) > 1)
    ):
        raise ShardError(
            f"the column {name} is {encoding}; needed: ndarray of whole numbers of one axis (or"
            " others of size 1), or bytes."
        )
    width = None
    if word:
        width = np.dtype(word).newbyteorder("<")
    return IdColumn(name, width, has_shape=not shape)


def ids_in(column: IdColumn, data: Any, begin: int, size: int) -> np.ndarray:
    """The ids [T] in `size` bytes of a column from `begin` on, a view. Raises ValueError, IndexError."""
    at, end, dtype = begin, begin + size, column.dtype

    # the array's type is its first byte
    if dtype is None:
        dtype, at = np.dtype(_width_named(data[at])).newbyteorder("<"), at + 1

    # then a byte with the number of axes and the width of a size, then the sizes, then the values
    if column.has_shape:
        axes, width = data[at] >> 2, 1 << (data[at] & 3)
        values = at + 1 + axes * width
        # one axis is usual, and is read without numpy
        if axes == 1:
            count = int.from_bytes(data[at + 1 : values], "little")
        else:
            count = _folded(np.frombuffer(data, f"<u{width}", axes, at + 1).tolist())
        if values + count * dtype.itemsize != end:
            raise ValueError("no one-dimensional array that fills its column")
        at = values

    count, rest = divmod(end - at, dtype.itemsize)
    if rest:
        raise ValueError(f"{end - at} bytes are no whole number of {dtype.name}")
    ids = np.frombuffer(data, dtype, count, at)

    # numpy mixes uint64 with int64 to floats. Beyond 2^63 an id turns negative, and is refused
    if dtype == np.uint64:
        return ids.view(np.int64)
    return ids


def _width_named(byte: int) -> str:
    if byte not in _WIDTH_OF_BYTE:
        raise ValueError(f"an array of type number {byte}, which is no whole number")
    return _WIDTH_OF_BYTE[byte]


def _folded(shape: list[int]) -> int:
    """The ids of an array with axes of size 1: (1, 512) -> 512."""
    if not shape or sum(size > 1 for size in shape) > 1:
        raise ValueError(f"an array of shape {tuple(shape)}; needed: one axis, or others of size 1")
    return max(shape)


def read_card(folder: Path) -> Card:
    """The card of a shard folder. Raises ShardError for a folder that is missing, empty, unfinished or damaged."""
    path = folder / CARD
    if folder.exists() and not folder.is_dir():
        raise ShardError(
            f"{folder} is a file; needed: a folder of shards. Make it with data-prep prepare."
        )
    if not folder.is_dir():
        raise ShardError(
            f"{folder} does not exist; needed: a folder of shards. Make it with data-prep prepare."
            f"{shards_meant(folder)}"
        )
    if not path.is_file():
        if (folder / INDEX).is_file():
            raise ShardError(
                f"{folder} has shards but no {CARD}. Make the shards with data-prep prepare, or,"
                " where they were made elsewhere, the card with data-prep index FOLDER --tokenizer"
                " FILE."
            )

        hint = shards_meant(folder) or " Make shards with data-prep prepare."
        raise ShardError(f"{folder} holds no shards ({CARD} is missing).{hint}")

    again = "Make the shards again with data-prep prepare CONFIG --again."
    try:
        content = read_json(path, error=ConfigError)
    except ConfigError as error:
        raise ShardError(f"{error} {again}") from error
    try:
        found = None
        if isinstance(content, dict):
            found = content.get("format")
        if found != FORMAT:
            raise ConfigError(f"it has format {found!r}, this version reads format {FORMAT}.")
        return from_mapping(Card, content)
    except ConfigError as error:
        raise ShardError(f"{path} cannot be read: {str(error).rstrip('.')}. {again}") from error


def shards_meant(folder: Path) -> str:
    """' Did you mean shards/web/train?' for a folder above shards, or one that is misspelt; else ""."""
    if not folder.is_dir():
        return meant_beside(folder, folders=True)
    below = [] if (folder / CARD).is_file() else _shard_folders_below(folder)
    return f" Did you mean {below[0]}?" if below else ""


def _shard_folders_below(folder: Path) -> list[Path]:
    """Folders one or two levels below that have a card, train first."""
    cards = [*folder.glob(f"*/{CARD}"), *folder.glob(f"*/*/{CARD}")]
    found = [card.parent for card in cards if not is_hidden(card, below=folder)]
    return sorted(found, key=lambda p: (p.name != "train", str(p)))


def write_card(folder: Path, card: Card) -> None:
    """Write card.json atomically: the last act of making a shard folder."""
    plain = to_plain(card)
    if card.specials.frame == "both_ends":
        del plain["specials"]["frame"]

    # what few shards have is written only where it differs from the default
    usual = {f.name: f.default for f in dataclasses.fields(Card)}
    for name in _SELDOM:
        if plain[name] == usual[name]:
            del plain[name]
    write_json(folder / CARD, plain)


def read_lengths(folder: Path, card: Card) -> np.ndarray:
    """Tokens per sample [documents], memory-mapped, in the order of the shards. Raises ShardError if it does not fit the card."""
    path = folder / LENGTHS
    if not path.is_file():
        raise ShardError(
            f"{path} is missing. Make the shards again with data-prep prepare CONFIG --again."
        )

    size = path.stat().st_size
    kind = lengths_dtype(card.max_tokens_per_document)
    if size != card.documents * kind.itemsize:
        raise ShardError(
            f"{path} has {size:,} bytes, but the card says {card.documents:,} documents of "
            f"{kind.itemsize} bytes. Make the shards again with data-prep prepare CONFIG --again."
        )
    if card.documents == 0:
        raise ShardError(
            f"{folder} holds no documents. Give it text, or leave it out of the mixture."
        )
    return np.memmap(path, dtype=kind, mode="r")


def check_index(folder: Path, card: Card) -> None:
    """index.json is the one the card was written for, hence the hashes of all shards are. Raises ShardError."""
    _check_sha256(folder / INDEX, card.index_sha256)


def read_hashes(folder: Path, card: Card) -> dict[str, str]:
    """SHA-256 by file name of the shards whose index.json has none. Raises ShardError if it is not the card's."""
    if not card.hashes_sha256:
        return {}
    path = folder / HASHES
    _check_sha256(path, card.hashes_sha256)
    found = read_json(path, root=dict, error=ShardError, most_bytes=INDEX_BYTES)
    for name, sha256 in found.items():
        plain_name(name, where=path, error=ShardError)
        if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise ShardError(
                f"{path} gives {ascii(sha256)[:80]} as the SHA-256 of {name}; needed: 64"
                " hexadecimal digits. Make it again with data-prep index FOLDER --tokenizer FILE"
                " --again."
            )
    return found


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shard entries of index.json, checked to be what MDSWriter writes: the one reader of other people's indexes.

    Every file is named once, below the folder, and a packed one as its shard with an ending more; sizes and counts are
    whole numbers that MDS can have. Nothing but index.json is opened. Raises ShardError.
    """
    path = folder / INDEX
    content = read_json(path, root=dict, error=ShardError, most_bytes=INDEX_BYTES)
    entries = content.get("shards")
    if not isinstance(entries, list):
        raise _no_index(path, "shards is no list of mappings")

    names: list[str] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _no_index(path, f"shards is no list of mappings: number {number}")
        try:
            names += _names_of(entry, path)
        except KeyError as error:
            raise _no_index(path, f"{error} is missing in shard {number}") from error
    # in a cache a shard lies under its name without folders
    count = Counter(name.replace("/", "--").lower() for name in names)
    if twice := next((name for name in names if count[name.replace("/", "--").lower()] > 1), None):
        raise ShardError(
            f"{path} lists {twice} more than once; needed: every file once. Make the index again."
        )
    return entries


def stored_info(entry: dict[str, Any]) -> dict[str, Any]:
    """Name, size and hashes of a shard as it lies in the folder, from its entry of the index."""
    return entry["zip_data"] or entry["raw_data"]


def _names_of(entry: dict[str, Any], path: Path) -> list[str]:
    """The names of one entry's files. Raises ShardError, and KeyError for a key that every entry has."""
    if entry["format"] != "mds" or entry["version"] != 2:
        raise ShardError(
            f"{path} holds {ascii(entry['format'])[:40].strip(chr(39))} version"
            f" {ascii(entry['version'])[:40]}; needed: mds version 2."
        )
    _check_columns(entry, path)
    _check_number("samples", entry["samples"], path)

    raw, packed = entry["raw_data"], entry["zip_data"]
    for key, info in (("raw_data", raw), ("zip_data", packed)):
        # a shard that is not packed has zip_data: null
        if info is None and key == "zip_data":
            continue
        if not isinstance(info, dict):
            raise _no_index(path, f"{key} is {ascii(info)[:60]}")
        _check_number(f"bytes of {key}", info["bytes"], path)
        if not isinstance(info["hashes"], dict) or not all(
            isinstance(digest, str) for digest in info["hashes"].values()
        ):
            raise _no_index(path, f"hashes is {ascii(info['hashes'])[:60]}")
        name = info["basename"]
        if not isinstance(name, str):
            raise _no_index(path, f"basename is {ascii(name)[:60]}")
        plain_name(name, where=path, error=ShardError)
        if any(part.startswith(".") for part in name.split("/")) or name.lower() in _SIDE_FILES:
            raise _no_index(path, f"{name} is the name of another kind of file")
    if packed is None:
        return [raw["basename"]]
    # MDSWriter's rule. A shard is unpacked beside its packed file: under another name it
    # could replace any file there
    if not re.fullmatch(re.escape(raw["basename"]) + r"\.[a-z0-9]{1,8}", packed["basename"]):
        raise _no_index(
            path,
            f"{packed['basename']} would be unpacked to {raw['basename']}; needed: the same name"
            " without its last ending",
        )
    return [raw["basename"], packed["basename"]]


def _check_columns(entry: dict[str, Any], path: Path) -> None:
    """Names, encodings and sizes of the columns, as many of each."""
    names, encodings, sizes = (
        entry[key] for key in ("column_names", "column_encodings", "column_sizes")
    )
    for key, values, kind in (
        ("column_names", names, str),
        ("column_encodings", encodings, str),
        ("column_sizes", sizes, int),
    ):
        if not isinstance(values, list) or len(values) != len(names):
            raise _no_index(path, f"{key} is {ascii(values)[:60]}")
        for value in values:
            if type(value) is not kind and not (kind is int and value is None):
                raise _no_index(path, f"{key} holds {ascii(value)[:60]}")
            if kind is int and value is not None:
                _check_number(key, value, path)
    if not isinstance(entry.get("compression"), (str, type(None))):
        raise _no_index(path, f"compression is {ascii(entry['compression'])[:60]}")


def _check_number(what: str, value: Any, path: Path) -> None:
    if type(value) is not int or not 0 <= value < MOST_SHARD_BYTES:
        raise _no_index(path, f"{what} is {ascii(value)[:60]}; needed: a whole number below 2^32")


def _no_index(path: Path, why: str) -> ShardError:
    return ShardError(f"{path} is no index of MDS shards ({why}). Copy or make the shards again.")


def as_read(ids_T: np.ndarray, card: Card) -> np.ndarray:
    """A stored sample as it is trained: without padding at its ends, then with [CLS] and [SEP], as the card says."""
    if card.strips_padding:
        ids_T = without_padding(ids_T, card.specials.pad_id)
    if card.adds_specials:
        ids_T = with_specials(ids_T, card.specials)
    return ids_T


def without_padding(ids_T: np.ndarray, pad_id: int) -> np.ndarray:
    """A sample without [PAD] at its ends."""
    if len(ids_T) and ids_T[0] != pad_id and ids_T[-1] != pad_id:
        return ids_T
    kept = np.flatnonzero(ids_T != pad_id)
    if len(kept) == 0:
        return ids_T[:0]
    return ids_T[kept[0] : kept[-1] + 1]


def with_specials(ids_T: np.ndarray, specials: SpecialIds) -> np.ndarray:
    """A sample in its frame, [CLS] before it and [SEP] behind it, each only where it is not there."""
    before = specials.before
    if before and ids_T[:1].tolist() == [*before]:
        before = ()

    # of two ids behind the text the sample may end with the first
    # alone: only the missing are added
    behind = specials.behind
    for there in range(len(behind), 0, -1):
        if ids_T[-there:].tolist() == [*behind[:there]]:
            behind = behind[there:]
            break

    # ids of 8 bits can be those of a large vocabulary's first tokens
    dtype = ids_T.dtype
    if np.iinfo(dtype).max < max(specials.cls_id, specials.sep_id):
        dtype = np.dtype(np.int64)
    return np.concatenate([np.array(before, dtype), ids_T, np.array(behind, dtype)])


def check_sentence_file(folder: Path, card: Card) -> None:
    """sentences.bin, if there is one, is the one the card was written for; reads all of it. Raises ShardError."""
    if card.sentences_sha256:
        _check_sha256(folder / SENTENCES, card.sentences_sha256)


def check_lengths(folder: Path, card: Card) -> None:
    """lengths.bin is the one the card was written for; reads all of it. Raises ShardError."""
    _check_sha256(folder / LENGTHS, card.lengths_sha256)


def _check_sha256(path: Path, needed: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise ShardError(
            f"{path} cannot be read: {error.strerror}. "
            "Copy the folder again, or make the shards again with data-prep prepare CONFIG --again."
        ) from error
    if found != needed:
        raise ShardError(
            f"{path} has SHA-256 {found[:12]}, {CARD} beside it says {needed[:12]}: the folder"
            " holds files of two different runs, or a damaged one. Copy the folder again, or make the"
            " shards again with data-prep prepare CONFIG --again."
        )


def write_lengths(folder: Path, lengths: np.ndarray, *, max_tokens_per_document: int) -> None:
    """Write lengths.bin atomically."""
    write_atomic(
        folder / LENGTHS,
        np.ascontiguousarray(lengths, dtype=lengths_dtype(max_tokens_per_document)).tobytes(),
    )


def lengths_dtype(max_tokens_per_document: int) -> np.dtype:
    """uint16 where every length fits, else uint32; little-endian."""
    return np.dtype("<u2") if max_tokens_per_document < 2**16 else np.dtype("<u4")


def width_of(dtype: np.dtype) -> Width:
    """The name of a type of ids."""
    return next(width for width in typing.get_args(Width) if width == dtype.name)


def ids_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.uint32)


def tokenizer_fingerprint(tokenizer_json: Path) -> str:
    """Hex SHA-256 of the bytes of a tokenizer.json."""
    return hashlib.sha256(read_bytes(tokenizer_json, error=ShardError)).hexdigest()


def check_same_tokenizer(cards: dict[str, Card]) -> Card:
    """All sources of a run must have been made with one tokenizer; returns the first card. Raises ShardError."""
    first_name, first = next(iter(cards.items()))
    for name, card in cards.items():
        if card.tokenizer_sha256 != first.tokenizer_sha256:
            raise ShardError(
                f"{name} was tokenized with {card.tokenizer_sha256[:12]}, {first_name} with "
                f"{first.tokenizer_sha256[:12]}. Prepare both with the same tokenizer.json."
            )
    return first


def with_content(card: Card, folder: Path, lengths: np.ndarray) -> Card:
    """The card with its totals, counted from the lengths, and the SHA-256 of index.json and lengths.bin as they lie in
    the folder."""
    return dataclasses.replace(
        card,
        documents=int(len(lengths)),
        tokens=int(np.sum(lengths, dtype=np.int64)),
        index_sha256=sha256_of(folder / INDEX),
        lengths_sha256=sha256_of(folder / LENGTHS),
    )
