"""Finished segments to OUT/NAME: shards are renamed, not copied; index, lengths and card are made from the segments' own."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.ledger import COUNT_DTYPE, SPLITS, Counts, Ledger, Record, side_file
from data_prep.segments import Segment
from encoder.base.errors import ConfigError, ShardError
from encoder.base.files import fsync_path, sha256_of, write_atomic
from encoder.data.sentences import START_BYTES, sentence_bytes
from encoder.data.shard_format import (
    INDEX,
    LENGTHS,
    SENTENCES,
    TOKENIZER,
    Card,
    lengths_dtype,
    read_card,
    write_card,
)

COPY_BYTES = 2**22


def assemble(
    ledger: Ledger,
    segments: Sequence[Segment],
    card: Card,
    *,
    made_from_sha256: str,
    tokenizer_json: bytes,
) -> Counts:
    """Make OUT/NAME of all its segments; returns the totals. Raises ShardError when a segment is missing or does not fit,
    ConfigError for a source without a document for training.

    card: what the cards will be, without totals and hashes of content. A run that was killed in here is gone on with.
    """
    if not ledger.assembled:
        records = _checked(ledger, segments, made_from_sha256)
        counts = Counts()
        for record in records:
            counts.add(record.counts)
        counts.check()
        # segments without training text are of no use to a next run: it begins anew
        if not counts.documents_train:
            ledger.discard()
            bad = "".join(
                f" {name} cannot be read: {why}" for name, why in list(counts.bad_files.items())[:1]
            )
            raise ConfigError(
                f"source {card.source} has no document for training ({counts.documents_read:,}"
                f" read, {sum(counts.left_out.values()):,} left out{_reasons(counts)},"
                f" {counts.documents_held_out:,} held out).{bad} Give it more text or a smaller"
                " held_out_share."
            )
        card = dataclasses.replace(card, recipe={**card.recipe, "counts": counts.plain()})
        for split in reversed(SPLITS):  # train last: its card says that all is there
            _assemble_split(
                ledger, segments, records, dataclasses.replace(card, split=split), tokenizer_json
            )
    # killed before the last rename: the card has the counts
    else:
        counts = Counts(**read_card(ledger.part / "train").recipe["counts"])
    ledger.put_in_place()
    return counts


def _reasons(counts: Counts) -> str:
    """Why documents were left out, the most frequent reasons first."""
    first = sorted(counts.left_out.items(), key=lambda item: -item[1])[:4]
    if first:
        return f": {', '.join(f'{n:,} {reason}' for reason, n in first)}"
    return ""


def _checked(ledger: Ledger, segments: Sequence[Segment], made_from_sha256: str) -> list[Record]:
    """The record of every segment. Raises ShardError."""
    finished = ledger.finished()
    if absent := [s for s in segments if s.number not in finished]:
        first = absent[0].stretches[0]
        raise ShardError(
            f"{ledger.out.name} has {len(segments) - len(absent):,} of {len(segments):,} segments;"
            f" the first missing one begins in {first.file.place} at byte {first.begin:,}. Run"
            " data-prep prepare with the parts that are not done, or without --part for all that"
            " is missing."
        )
    if extra := finished - {s.number for s in segments}:
        raise ShardError(
            f"{ledger.segments} holds a segment {max(extra)}, the source has {len(segments):,}. "
            "Prepare it with --again."
        )
    records = [ledger.record(segment) for segment in segments]

    # every segment is from the same files, settings and tokenizer, and lost nothing
    for segment, record in zip(segments, records, strict=True):
        folder = ledger.folder_of(segment)
        if record.made_from_sha256 != made_from_sha256:
            raise ShardError(
                f"{folder} was made with other settings, another tokenizer or other files than the"
                " rest. Remove it, and run prepare again."
            )
        record.counts.check()
        samples = sum(entry["samples"] for entry in record.entries)
        if samples != record.counts.pieces:
            raise ShardError(
                f"{folder} has {samples:,} samples, its counts tell of {record.counts.pieces:,}. "
                "Remove it, and run prepare again."
            )
    return records


def _assemble_split(
    ledger: Ledger,
    segments: Sequence[Segment],
    records: Sequence[Record],
    card: Card,
    tokenizer_json: bytes,
) -> None:
    documents = card.recipe["counts"][f"documents_{card.split}"]
    folder = ledger.part / card.split
    if not documents:
        return
    folder.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    samples = 0
    # shards keep the order of segments, and are numbered through
    for segment, record in zip(segments, records, strict=True):
        for entry in record.shards[card.split]:
            moved = _named(entry, f"shard.{len(entries):05}.mds")
            _move(
                ledger.folder_of(segment) / _stored(entry)["basename"],
                folder / _stored(moved)["basename"],
                _stored(entry)["bytes"],
            )
            entries.append(moved)
            samples += entry["samples"]
    write_atomic(folder / INDEX, json.dumps({"version": 2, "shards": entries}, sort_keys=True))

    # side files of all segments end to end, each held against the size it must have
    itemsize = lengths_dtype(card.max_tokens_per_document).itemsize
    _write_whole(
        _bytes_of(_side_files(ledger, segments, card.split, "lengths")),
        folder / LENGTHS,
        samples * itemsize,
    )
    sentences_sha256 = ""
    if card.sentence_splitter:
        counts = _side_files(ledger, segments, card.split, "sentence_counts")
        tokens_files = _side_files(ledger, segments, card.split, "sentences")
        stored_bytes = sum(path.stat().st_size for path in tokens_files)
        _write_whole(
            sentence_bytes((np.fromfile(p, COUNT_DTYPE) for p in counts), _bytes_of(tokens_files)),
            folder / SENTENCES,
            # a start of each sample and one more, then the tokens of sentences
            START_BYTES * (samples + 1) + stored_bytes,
        )
        sentences_sha256 = sha256_of(folder / SENTENCES)
    write_atomic(folder / TOKENIZER, tokenizer_json)
    fsync_path(folder)
    # the card comes last: with it the split counts as whole
    tokens = sum(record.tokens[card.split] for record in records)
    write_card(
        folder,
        dataclasses.replace(
            card,
            documents=samples,
            tokens=tokens,
            index_sha256=sha256_of(folder / INDEX),
            lengths_sha256=sha256_of(folder / LENGTHS),
            sentences_sha256=sentences_sha256,
        ),
    )


def _stored(entry: dict) -> dict:
    return entry["zip_data"] or entry["raw_data"]


def _named(entry: dict, name: str) -> dict:
    """The entry under its name in OUT/NAME; compression adds its own ending."""
    raw, packed = entry["raw_data"], entry["zip_data"]
    if packed:
        packed = {**packed, "basename": name + Path(packed["basename"]).suffix}
    return {**entry, "raw_data": {**raw, "basename": name}, "zip_data": packed}


def _move(here: Path, there: Path, size: int) -> None:
    """Rename, or find it renamed by a run that was killed. Raises ShardError."""
    if here.exists():
        os.rename(here, there)
    if not there.is_file() or there.stat().st_size != size:
        raise ShardError(
            f"{here} is missing or has another size than {size:,} bytes. "
            f"Remove {here.parent}, and run prepare again."
        )


def _side_files(ledger: Ledger, segments: Sequence[Segment], split: str, kind: str) -> list[Path]:
    """A side file of every segment, in their order."""
    return [ledger.folder_of(segment) / side_file(split, kind) for segment in segments]


def _bytes_of(parts: Sequence[Path]) -> Iterator[bytes]:
    """What the files hold, one after another."""
    for part in parts:
        with open(part, "rb") as f:
            while data := f.read(COPY_BYTES):
                yield data


def _write_whole(parts: Iterable[bytes], whole: Path, size: int) -> None:
    beside = whole.with_name(f".{whole.name}.part")
    with open(beside, "wb") as out:
        for part in parts:
            out.write(part)
        out.flush()
        # a side file cut short gives a wrong size, and no file
        os.fsync(out.fileno())
        found = out.tell()
    if found != size:
        beside.unlink()
        raise ShardError(
            f"{whole.name} of {whole.parent} has {found:,} bytes; needed: {size:,}. Prepare it with"
            " --again."
        )
    os.replace(beside, whole)
