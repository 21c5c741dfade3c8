"""`data-prep index`: card, lengths and hashes beside MDS shards made elsewhere, so that they train here.

What other programs write is left as it is: index.json and the shards are read, never written. Known layouts:

    ModernBERT     input_ids ndarray:uint16, id str, len int
    Ettin          input_ids ndarray:uint32, id str
    any other      one column of ids: ndarray of whole numbers of 8 to 64 bits, of one axis (or others of size 1), or bytes

Padding at the ends of samples is cut when they are read, where that is asked for; other special ids inside are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.meter import Meter
from data_prep.output import output
from data_prep.sentences import FoundSentences, SentenceSplitter
from data_prep.shards import (
    ShardSamples,
    column_encodings,
    columns_text,
    frame_words,
    lacking_specials,
    padding_of,
    read_shard,
    samples_of,
    specials_inside,
    stored_bytes,
    text_stretches,
    without_padding,
)
from encoder.base.errors import ShardError
from encoder.base.files import is_hidden, sha256_of, write_atomic, write_json
from encoder.base.log import say
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.units import short_count
from encoder.data.sentences import Sentences, check_sentences, sentence_bytes
from encoder.data.shard_format import (
    CARD,
    HASHES,
    INDEX,
    INPUT_IDS,
    LENGTHS,
    SENTENCES,
    SHARD_HASH,
    TOKENIZER,
    WIDTHS,
    Card,
    IdColumn,
    SpecialIds,
    Width,
    check_index,
    id_column,
    lengths_dtype,
    read_card,
    read_hashes,
    read_index,
    read_lengths,
    stored_info,
    width_of,
    with_content,
    write_card,
    write_lengths,
)

MANY_JUST_ABOVE = 0.1  # of the samples, from which on it is said


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the samples of shards made elsewhere are to be read.

    column, dtype: where the ids are, and of what type where the shards do not say it (bytes).
    add_specials: samples without [CLS] before and [SEP] behind are let in, and get them when they are read.
    strip_padding: samples with [PAD] at their ends are let in, and lose it when they are read.
    keep_specials: samples with other special ids inside are let in, and keep them.
    """

    column: str = INPUT_IDS
    dtype: str | None = None
    add_specials: bool = False
    strip_padding: bool = False
    keep_specials: bool = False


def index(
    folders: Sequence[Path],
    *,
    tokenizer_json: Path,
    source: str | None = None,
    split: str = "train",
    reading: Reading | None = None,
    sentence_language: str | None = None,
    again: bool = False,
) -> None:
    """Write the side files of every folder with an index.json, at or below those given. Raises ShardError.

    folders, tokenizer_json: the shards, and the tokenizer that made their ids.
    source, split: of the card; by default the folder's name, and train.
    sentence_language: also find where sentences end, in this language; for shards of data-prep prepare this alone is added.
    again: side files that an earlier index wrote are written anew.
    """
    splitter = None
    if sentence_language is not None:
        splitter = SentenceSplitter(tokenizer_json, language=sentence_language)
    vocabulary = special_ids_of(tokenizer_json)
    for folder in _with_index(folders):
        # shards of `prepare` have everything else already
        if splitter and _is_prepared(folder):
            _add_sentences(folder, tokenizer_json, splitter)
            continue
        _check_free(folder, tokenizer_json, again)
        read, card = _write_side_files(
            folder,
            tokenizer_json,
            vocabulary=vocabulary,
            source=source or _name_of(folder),
            split=split,
            reading=reading or Reading(),
            splitter=splitter,
        )
        say(
            f"{folder}: {card.documents:,} samples of up to {card.max_tokens_per_document:,}"
            f" tokens, {short_count(card.tokens)} tokens, {card.stored_as}{_remarks(read)}."
        )
        if splitter:
            say(f"{folder}: {_sentences_text(read.sentences, splitter)}")
        if above := just_above_text(read.lengths):
            say(f"{folder}: {above}")


def _write_side_files(
    folder: Path,
    tokenizer_json: Path,
    *,
    vocabulary: tuple[int, SpecialIds],
    source: str,
    split: str,
    reading: Reading,
    splitter: SentenceSplitter | None,
) -> tuple[_Read, Card]:
    """All that stands beside an index; what was read, and the card.

    vocabulary: of the tokenizer: its size, and the special ids
    source, split: of the card
    reading: how the ids lie in the samples
    splitter: finds where sentences end; None: that is not written
    """
    vocab_size, specials = vocabulary
    entries = read_index(folder)
    # ndarrays that name their own type may differ; they are read as int64
    column, encoding = _column_of(folder, entries, reading)
    dtype: Width = "int64" if column.dtype is None else width_of(column.dtype)
    with output(folder, [LENGTHS, TOKENIZER, HASHES, SENTENCES, CARD]):
        read = _Read(
            folder,
            entries,
            vocab_size=vocab_size,
            specials=specials,
            column=column,
            reading=reading,
            splitter=splitter,
        )
        longest = int(read.lengths.max())
        # all is checked; an old card goes first, since it would be wrong beside new lengths
        (folder / CARD).unlink(missing_ok=True)
        write_lengths(folder, read.lengths, max_tokens_per_document=longest)
        write_atomic(folder / TOKENIZER, tokenizer_json.read_bytes())
        hashes_sha256 = sentences_sha256 = sentence_splitter = ""
        if read.hashes:
            write_json(folder / HASHES, read.hashes)
            hashes_sha256 = sha256_of(folder / HASHES)
        if splitter:
            _write_sentences(folder, read.sentences, max_tokens_per_document=longest)
            sentences_sha256 = sha256_of(folder / SENTENCES)
            sentence_splitter = splitter.name
        card = Card(
            source=source,
            split=split,
            tokenizer_sha256=sha256_of(folder / TOKENIZER),
            vocab_size=vocab_size,
            specials=specials,
            dtype=dtype,
            documents=0,
            tokens=0,
            max_tokens_per_document=longest,
            index_sha256="",
            lengths_sha256="",
            hashes_sha256=hashes_sha256,
            sentences_sha256=sentences_sha256,
            sentence_splitter=sentence_splitter,
            adds_specials=read.lacking > 0,
            strips_padding=read.padded > 0,
            holds_specials=read.special > 0,
            column=column.name,
            # on the card only where it is not what `prepare` writes
            encoding="" if encoding == f"ndarray:{dtype}" else encoding,
            recipe={
                "index": 1,
                "columns": column_encodings(folder, entries[0], column=column.name),
            },
        )
        card = with_content(card, folder, read.lengths)
        write_card(folder, card)
    return read, card


def _remarks(read: _Read) -> str:
    """What is special about some of the samples, for the line that is printed."""
    text = ""
    if read.lacking:
        text += f", {read.lacking:,} of them without [CLS] or [SEP], which are added when read"
    if read.padded:
        text += (
            f", {read.padded:,} of them with [PAD] at their ends"
            f" ({read.padding / read.stored:.0%} of the stored ids), which is cut off when read"
        )
    if read.special:
        text += f", {read.special:,} of them with special ids inside, which are kept"
    return text


def _is_prepared(folder: Path) -> bool:
    return (folder / CARD).is_file() and "index" not in read_card(folder).recipe


def _add_sentences(folder: Path, tokenizer_json: Path, splitter: SentenceSplitter) -> None:
    """sentences.bin of shards of data-prep prepare, and its hash on their card. Raises ShardError."""
    card = read_card(folder)
    if card.sentences_sha256:
        raise ShardError(
            f"{folder} has {SENTENCES} already, by {card.sentence_splitter}. Check it with"
            " data-prep verify."
        )
    if sha256_of(tokenizer_json) != card.tokenizer_sha256:
        raise ShardError(
            f"{tokenizer_json} is not the tokenizer of {folder}. Give {folder / TOKENIZER}."
        )
    check_index(folder, card)

    # each shard is read back and checked before its ids are split in sentences
    hashes = read_hashes(folder, card)
    found = []
    for entry in read_index(folder):
        samples = read_shard(folder, entry, card=card, hashes=hashes)
        begins_P, ends_P = text_stretches(samples.lengths_P, card.specials)
        found.append(splitter(samples.ids_T, begins_P, ends_P))
    with output(folder, [SENTENCES]):
        # the card, which names the file, is written last
        _write_sentences(folder, found, max_tokens_per_document=card.max_tokens_per_document)
        sentences = Sentences(folder / SENTENCES, card)
        check_sentences(sentences, read_lengths(folder, card), where=folder / SENTENCES)
        write_card(
            folder,
            dataclasses.replace(
                card,
                sentences_sha256=sha256_of(folder / SENTENCES),
                sentence_splitter=splitter.name,
            ),
        )
    say(f"{folder}: {_sentences_text(found, splitter)}")


def _write_sentences(
    folder: Path, found: Sequence[FoundSentences], *, max_tokens_per_document: int
) -> None:
    kind = lengths_dtype(max_tokens_per_document)
    tokens = (part.tokens_N.astype(kind).tobytes() for part in found)
    parts = sentence_bytes((part.counts_P for part in found), tokens)
    write_atomic(folder / SENTENCES, b"".join(parts))


def _sentences_text(found: Sequence[FoundSentences], splitter: SentenceSplitter) -> str:
    count = sum(len(part.tokens_N) for part in found)
    tokens = sum(int(part.tokens_N.sum()) for part in found)
    return f"{count:,} sentences of {tokens / max(1, count):.1f} tokens, by {splitter.name}."


def just_above_text(lengths: np.ndarray) -> str | None:
    """One line where many samples are a token or two longer than a power of two: chunks to which [CLS] and [SEP] were added."""
    # share of samples with 2^n + 1 or 2^n + 2 tokens, for 32 to 65,536
    shares = {2**n: float(np.mean((lengths > 2**n) & (lengths <= 2**n + 2))) for n in range(5, 17)}
    length, share = max(shares.items(), key=lambda item: item[1])
    if share < MANY_JUST_ABOVE:
        return None
    return (
        f"{share:.0%} of the samples are just above {length:,}, with {length + 1:,} or"
        f" {length + 2:,} tokens: a phase of max_tokens_per_document {length:,} would cut each in"
        f" two halves, of {length + 2:,} takes them whole."
    )


class _Read:
    """Lengths of all samples of a folder, the hashes that its index lacks, and how many samples lack a special token."""

    def __init__(
        self,
        folder: Path,
        entries: Sequence[dict],
        *,
        vocab_size: int,
        specials: SpecialIds,
        column: IdColumn,
        reading: Reading,
        splitter: SentenceSplitter | None,
    ) -> None:
        self.hashes: dict[str, str] = {}
        self.sentences: list[FoundSentences] = []  # of each shard
        self._splitter = splitter
        self.lacking = self.padded = self.special = 0  # samples
        self.stored = self.padding = 0  # ids
        self._vocab_size, self._specials, self._reading = vocab_size, specials, reading
        lengths = []
        with Meter(folder.name, sum(stored_info(entry)["bytes"] for entry in entries)) as meter:
            for entry in entries:
                data = stored_bytes(folder, entry)
                self._hash(folder, entry, data)
                path = folder / stored_info(entry)["basename"]
                lengths.append(
                    self._lengths(path, samples_of(folder, entry, data, column=column), column)
                )
                meter.add(
                    file_bytes=len(data), documents=len(lengths[-1]), tokens=int(lengths[-1].sum())
                )
        self.lengths = np.concatenate(lengths)

    def _lengths(self, path: Path, stored: ShardSamples, column: IdColumn) -> np.ndarray:
        """Of the samples of a shard as they are read, int64 [P]. Raises ShardError for ids that are no document's."""
        self._check_ids(path, stored, column)

        # padding: refused, or cut off when the samples are read
        padded = padding_of(stored, self._specials)
        some_P = (padded.before_P > 0) | (padded.behind_P > 0)
        padding = int(padded.before_P.sum() + padded.behind_P.sum())
        if padding and not self._reading.strip_padding:
            raise ShardError(
                f"{path} has [PAD] at the ends of {int(some_P.sum()):,} of {len(some_P):,} samples,"
                f" {padding:,} of its {len(stored.ids_T):,} ids: they would be trained as text. Cut"
                " them off when they are read: --strip-padding; or prepare the text anew with"
                " data-prep prepare."
            )
        self.padded, self.padding, self.stored = (
            self.padded + int(some_P.sum()),
            self.padding + padding,
            self.stored + len(stored.ids_T),
        )
        samples = without_padding(stored, padded) if padding else stored

        # [CLS] and [SEP], looked at without the padding: needed, or added when the samples are read
        lacks = lacking_specials(samples, self._specials)
        words = frame_words(self._specials)
        for word, lacks_P in zip(words, (lacks.cls_P, lacks.sep_P), strict=True):
            if np.any(lacks_P) and not self._reading.add_specials:
                raise ShardError(
                    f"{path} sample {int(np.argmax(lacks_P))} does not {word} of the tokenizer."
                    " Give the tokenizer that made the shards, or --add-specials where they were"
                    " made without."
                )

        # other special ids: refused, or trained on as they are
        inside = specials_inside(samples, self._specials)
        if inside and not self._reading.keep_specials:
            word, found_P = next(iter(inside.items()))
            raise ShardError(
                f"{path} has {word} in {int(found_P.sum()):,} of {len(found_P):,} samples (the"
                f" first: {int(np.argmax(found_P))}), which would be trained as text."
                f" {_INSIDE.get(word, _INSIDE_TEXT)} Where that is meant: --keep-specials."
            )
        # a sample counts once, however many kinds of them it holds
        if inside:
            self.special += int(np.sum(np.any([*inside.values()], axis=0)))
        self.lacking += int(np.sum(lacks.cls_P | lacks.sep_P))
        if self._splitter:
            begins_P, ends_P = text_stretches(samples.lengths_P, self._specials, lacks)
            self.sentences.append(self._splitter(samples.ids_T, begins_P, ends_P))
        # lengths as read: what is stored, without padding, and what is added
        return samples.lengths_P + lacks.cls_P + lacks.sep_P

    def _check_ids(self, path: Path, stored: ShardSamples, column: IdColumn) -> None:
        top = int(stored.ids_T.max(initial=0))
        least = int(stored.ids_T.min(initial=0))
        if top >= self._vocab_size or least < 0:
            wrong = top if top >= self._vocab_size else least
            other = ", or another --dtype" if self._reading.dtype else ""
            raise ShardError(
                f"{path} holds the id {wrong:,}, the tokenizer has {self._vocab_size:,} entries."
                f" Give the tokenizer that made the shards{other}."
            )
        # bytes read as too narrow a type give a 0 behind every id; a few ids prove nothing
        if (
            self._reading.dtype
            and column.dtype is not None
            and column.dtype.itemsize < 8
            and len(stored.ids_T) >= 64
        ):
            wide = _wider(stored, column.dtype, self._vocab_size)
            if wide:
                raise ShardError(
                    f"{path}: read as {column.dtype.name} its ids are 0 wherever {wide} has its"
                    f" upper bytes. Needed: --dtype {wide}."
                )

    def _hash(self, folder: Path, entry: dict, data: bytes) -> None:
        # the index's own hash is held against; where it has none, ours goes to hashes.json
        info, found = stored_info(entry), hashlib.sha256(data).hexdigest()
        if known := info["hashes"].get(SHARD_HASH):
            if known != found:
                raise ShardError(
                    f"{folder / info['basename']} is damaged: its {SHARD_HASH} is not the one in"
                    f" {INDEX}. Copy it again."
                )
        else:
            self.hashes[info["basename"]] = found


def _with_index(folders: Sequence[Path]) -> list[Path]:
    """Folders with an index.json: those given, or where these have none, those below. An index that only merges those of
    folders below it counts as the folder's own."""
    found: dict[Path, None] = {}
    for folder in folders:
        if (folder / INDEX).is_file():
            below = [folder]
        else:
            below = sorted(
                path.parent
                for path in folder.glob(f"**/{INDEX}")
                if not is_hidden(path, below=folder)
            )
        if not below:
            raise ShardError(
                f"{folder} holds no {INDEX}; needed: a folder of MDS shards, or one above such"
                " folders."
            )
        # once each, in the order given
        found.update(dict.fromkeys(below))
    return list(found)


def _check_free(folder: Path, tokenizer_json: Path, again: bool) -> None:
    """No file of anybody else is written over. Raises ShardError."""
    if (folder / CARD).is_file():
        if "index" not in read_card(folder).recipe:
            raise ShardError(
                f"{folder} has a {CARD} of data-prep prepare; nothing is to be done. Check it with"
                " data-prep verify."
            )
        if not again:
            raise ShardError(
                f"{folder} has a {CARD} already. Check it with data-prep verify, or add --again."
            )
    elif (folder / TOKENIZER).is_file() and (
        folder / TOKENIZER
    ).read_bytes() != tokenizer_json.read_bytes():
        raise ShardError(
            f"{folder} holds another {TOKENIZER} than {tokenizer_json}. "
            "Give that one with --tokenizer, if it made the shards, or move it away."
        )


_INSIDE_TEXT = (
    "A sample is one document, whose tokens all see each other: write a document a sample."
)
_INSIDE = {
    "[MASK]": (
        "Shards that are masked already cannot be masked anew: prepare the text with data-prep"
        " prepare."
    ),
    "[PAD]": "Padding in the middle cannot be cut off: write a document a sample.",
}


def _column_of(folder: Path, entries: Sequence[dict], reading: Reading) -> tuple[IdColumn, str]:
    """The ids' column and its encoding, the same in all shards. Raises ShardError, saying which columns there are."""
    if not any(entry["samples"] for entry in entries):
        raise ShardError(f"{folder / INDEX} lists no samples. Leave the folder out.")
    name = reading.column
    columns = column_encodings(folder, entries[0], column=name)
    found = {column_encodings(folder, entry, column=name)[name] for entry in entries}
    if len(found) > 1:
        raise ShardError(
            f"{folder / INDEX} has the column {name} as {' and '.join(sorted(found))}; needed: one"
            " type in all shards. Write them again, or index them as folders of their own."
        )
    encoding = found.pop()
    if encoding.partition(":")[0] == "bytes" and reading.dtype is None:
        raise ShardError(
            f"{folder / INDEX} has the column {name} as bytes, which does not say what numbers they"
            f" are; needed: --dtype, one of {', '.join(WIDTHS)} (int64 where they were made by an"
            " array's tobytes())."
        )
    try:
        column = id_column(name, encoding, dtype=reading.dtype)
    except ShardError as error:
        raise ShardError(
            f"{folder / INDEX} has the columns {columns_text(columns)}; {error}"
        ) from error
    # an ndarray names its type itself
    if (
        reading.dtype is not None
        and encoding.partition(":")[0] != "bytes"
        and column.dtype != np.dtype(reading.dtype)
    ):
        raise ShardError(
            f"{folder / INDEX} has the column {name} as {encoding}: --dtype {reading.dtype} has no"
            " effect on it. Leave it out."
        )
    return column, encoding


def _wider(stored: ShardSamples, narrow: np.dtype, vocab_size: int) -> str | None:
    """The type that the bytes are of where the one named is too narrow: its upper halves are all 0."""
    raw = stored.ids_T.view(np.uint8)
    for width in ("int64", "int32", "int16"):
        size = np.dtype(width).itemsize
        # every sample must be a whole number of the wider type, and every id one of the vocabulary
        if size > narrow.itemsize and not np.any(stored.lengths_P * narrow.itemsize % size):
            ids = raw.view(np.dtype(width).newbyteorder("<"))
            if ids.min() >= 0 and ids.max() < vocab_size:
                return width
    return None


def _name_of(folder: Path) -> str:
    """The folder's name, or its parent's where it is named after a split."""
    folder = Path(os.path.realpath(folder))
    if folder.name in ("train", "val", "validation", "valid", "test", "held_out"):
        return folder.parent.name
    return folder.name
