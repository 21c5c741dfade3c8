"""`data-prep index`: card, lengths and hashes beside MDS shards made elsewhere, so that they train here.

What other programs write is left as it is: index.json and the shards are read, never written. Known layouts:

    ModernBERT     input_ids ndarray:uint16, id str, len int
    Ettin          input_ids ndarray:uint32, id str
    any other      with input_ids as ndarray:uint16 or ndarray:uint32, and no pickled column
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.meter import Meter
from data_prep.output import output
from data_prep.shards import column_encodings, lacking_specials, read_index, samples_of, stored_bytes, stored_info
from encoder.base.errors import ShardError
from encoder.base.files import is_hidden, sha256_of, write_atomic, write_json
from encoder.base.log import say
from encoder.base.units import short_count
from encoder.data.shard_format import (
    CARD,
    HASHES,
    INDEX,
    INPUT_IDS,
    LENGTHS,
    SHARD_HASH,
    TOKENIZER,
    Card,
    SpecialIds,
    read_card,
    special_ids_of,
    with_content,
    write_card,
    write_lengths,
)

READABLE = {"ndarray:uint16": "uint16", "ndarray:uint32": "uint32"}


def index(folders: Sequence[Path], *, tokenizer_json: Path, source: str | None = None, split: str = "train",
          add_specials: bool = False, again: bool = False) -> None:
    """Write the side files of every folder with an index.json, at or below those given. Raises ShardError.

    add_specials: samples without [CLS] before and [SEP] behind are let in, and get them when they are read.
    """
    vocab_size, specials = special_ids_of(tokenizer_json)
    for folder in _with_index(folders):
        _check_free(folder, tokenizer_json, again)
        entries = read_index(folder)
        dtype = _dtype_of(folder, entries)
        with output(folder, [LENGTHS, TOKENIZER, HASHES, CARD]):
            read = _Read(folder, entries, vocab_size=vocab_size, specials=specials, add_specials=add_specials)
            longest = int(read.lengths.max())
            # all is checked; an old card goes before what it names: beside new lengths it would be a wrong one
            (folder / CARD).unlink(missing_ok=True)
            write_lengths(folder, read.lengths, max_tokens_per_document=longest)
            write_atomic(folder / TOKENIZER, tokenizer_json.read_bytes())
            if read.hashes:
                write_json(folder / HASHES, read.hashes)
            card = Card(source=source or _name_of(folder), split=split, tokenizer_sha256=sha256_of(folder / TOKENIZER),
                        vocab_size=vocab_size, specials=specials, dtype=dtype, documents=0, tokens=0,
                        max_tokens_per_document=longest, index_sha256="", lengths_sha256="",
                        hashes_sha256=sha256_of(folder / HASHES) if read.hashes else "", adds_specials=read.lacking > 0,
                        recipe={"index": 1, "columns": column_encodings(folder, entries[0])})
            card = with_content(card, folder, read.lengths)
            write_card(folder, card)
        added = f", {read.lacking:,} of them without [CLS] or [SEP], which are added when read" if read.lacking else ""
        say(f"{folder}: {card.documents:,} samples of up to {longest:,} tokens, {short_count(card.tokens)} tokens, "
            f"{card.dtype}{added}.")


class _Read:
    """Lengths of all samples of a folder, the hashes that its index lacks, and how many samples lack a special token."""

    def __init__(self, folder: Path, entries: Sequence[dict], *, vocab_size: int, specials: SpecialIds,
                 add_specials: bool) -> None:
        self.hashes: dict[str, str] = {}
        self.lacking = 0
        lengths = []
        with Meter(folder.name, sum(stored_info(entry)["bytes"] for entry in entries)) as meter:
            for entry in entries:
                data = stored_bytes(folder, entry)
                self._hash(folder, entry, data)
                samples = samples_of(folder, entry, data)
                path = folder / stored_info(entry)["basename"]
                if (top := int(samples.ids_T.max(initial=0))) >= vocab_size:
                    raise ShardError(f"{path} holds the id {top:,}, the tokenizer has {vocab_size:,} entries. "
                                     "Give the tokenizer that made the shards.")
                lacks = lacking_specials(samples, specials)
                for word, lacks_P in (("begin with [CLS]", lacks.cls_P), ("end with [SEP]", lacks.sep_P)):
                    if np.any(lacks_P) and not add_specials:
                        raise ShardError(f"{path} sample {int(np.argmax(lacks_P))} does not {word} of the tokenizer. Give the "
                                         "tokenizer that made the shards, or --add-specials where they were made without.")
                self.lacking += int(np.sum(lacks.cls_P | lacks.sep_P))
                lengths.append(samples.lengths_P + lacks.cls_P + lacks.sep_P)
                meter.add(file_bytes=len(data), documents=len(lengths[-1]), tokens=int(lengths[-1].sum()))
        self.lengths = np.concatenate(lengths)

    def _hash(self, folder: Path, entry: dict, data: bytes) -> None:
        info, found = stored_info(entry), hashlib.sha256(data).hexdigest()
        if known := info["hashes"].get(SHARD_HASH):
            if known != found:
                raise ShardError(f"{folder / info['basename']} is damaged: its {SHARD_HASH} is not the one in {INDEX}. "
                                 "Copy it again.")
        else:
            self.hashes[info["basename"]] = found


def _with_index(folders: Sequence[Path]) -> list[Path]:
    """Folders with an index.json: those given, or where these have none, those below. An index that only merges those of
    folders below it counts as the folder's own."""
    found: dict[Path, None] = {}
    for folder in folders:
        below = [folder] if (folder / INDEX).is_file() else sorted(
            path.parent for path in folder.glob(f"**/{INDEX}") if not is_hidden(path, below=folder))
        if not below:
            raise ShardError(f"{folder} holds no {INDEX}; needed: a folder of MDS shards, or one above such folders.")
        found.update(dict.fromkeys(below))
    return list(found)


def _check_free(folder: Path, tokenizer_json: Path, again: bool) -> None:
    """No file of anybody else is written over. Raises ShardError."""
    if (folder / CARD).is_file():
        if "index" not in read_card(folder).recipe:
            raise ShardError(f"{folder} has a {CARD} of data-prep prepare; nothing is to be done. Check it with data-prep verify.")
        if not again:
            raise ShardError(f"{folder} has a {CARD} already. Check it with data-prep verify, or add --again.")
    elif (folder / TOKENIZER).is_file() and (folder / TOKENIZER).read_bytes() != tokenizer_json.read_bytes():
        raise ShardError(f"{folder} holds another {TOKENIZER} than {tokenizer_json}. "
                         "Give that one with --tokenizer, if it made the shards, or move it away.")


def _dtype_of(folder: Path, entries: Sequence[dict]) -> str:
    """uint16 or uint32, the same in all shards. Raises ShardError."""
    found = {column_encodings(folder, entry)[INPUT_IDS] for entry in entries}
    if not any(entry["samples"] for entry in entries):
        raise ShardError(f"{folder / INDEX} tells of no samples. Leave the folder out.")
    if len(found) > 1 or not found <= set(READABLE):
        raise ShardError(f"{folder / INDEX} has the column {INPUT_IDS} as {' and '.join(sorted(found))}; needed: "
                         f"{' or '.join(READABLE)}. Write the shards again with that column.")
    return READABLE[found.pop()]


def _name_of(folder: Path) -> str:
    """The folder's name, or its parent's where it is named after a split."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("train", "val", "validation", "valid", "test", "held_out") else folder.name
