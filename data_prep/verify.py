"""`data-prep verify`: hold every byte of shard folders against index, card and lengths."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.shards import (
    Padded,
    ShardSamples,
    frame_words,
    lacking_specials,
    padding_of,
    read_shard,
    specials_inside,
    without_padding,
)
from encoder.base.errors import ShardError
from encoder.base.files import is_hidden
from encoder.base.log import say
from encoder.data.sentences import check_sentences, read_sentences
from encoder.data.shard_format import (
    CARD,
    SENTENCES,
    TOKENIZER,
    Card,
    check_index,
    check_lengths,
    check_sentence_file,
    lengths_dtype,
    read_card,
    read_hashes,
    read_index,
    read_lengths,
    tokenizer_fingerprint,
)


def verify(folders: Sequence[Path]) -> int:
    """Check all folders, a line each; returns 0, or 2 when one is damaged. Raises ShardError when there is none."""
    damaged = 0
    for folder in find_shard_folders(folders):
        try:
            card, shards = verify_folder(folder)
            say(
                f"{folder}: good, {shards:,} shards, {card.documents:,} samples, {card.tokens:,}"
                " tokens"
            )
        except ShardError as error:
            damaged += 1
            print(f"error: {error}", file=sys.stderr)
    return 2 if damaged else 0


def find_shard_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold a card, at or below those given (hidden ones left out). Raises ShardError."""
    found: dict[Path, None] = {}
    for folder in folders:
        cards = [path for path in sorted(folder.rglob(CARD)) if not is_hidden(path, below=folder)]
        # no card at all
        if not cards:
            read_card(folder)  # says what is missing
        found.update({p.parent: None for p in cards})
    return list(found)


def verify_folder(folder: Path) -> tuple[Card, int]:
    """(card, number of shards) of a folder without damage. Raises ShardError naming the first damaged file."""
    card = read_card(folder)
    if tokenizer_fingerprint(folder / TOKENIZER) != card.tokenizer_sha256:
        raise ShardError(
            f"{folder / TOKENIZER} is not the tokenizer of {CARD} (its SHA-256 differs). "
            "Make the shards again."
        )
    check_index(folder, card)
    lengths, at, shards, hashes = (
        read_lengths(folder, card),
        0,
        read_index(folder),
        read_hashes(folder, card),
    )
    # files as a whole first, then shard by shard; `at` counts the samples before a shard
    check_lengths(folder, card)
    check_sentence_file(folder, card)
    if card.sentences_sha256:
        check_sentences(read_sentences(folder, card), lengths, where=folder / SENTENCES)
    for entry in shards:
        samples = read_shard(folder, entry, card=card, hashes=hashes)
        _check_samples(folder, samples, lengths[at : at + len(samples.lengths_P)], card)
        at += len(samples.lengths_P)
    tokens = int(np.sum(lengths, dtype=np.int64))
    if at != card.documents or tokens != card.tokens:
        raise ShardError(
            f"{folder} has {at:,} samples and {tokens:,} tokens, {CARD} says {card.documents:,}"
            f" and {card.tokens:,}. Make the shards again."
        )
    return card, len(shards)


def _check_samples(folder: Path, stored: ShardSamples, expected_P: np.ndarray, card: Card) -> None:
    path, padded = folder / stored.name, padding_of(stored, card.specials)
    samples = without_padding(stored, padded) if card.strips_padding else stored
    # lengths as training sees them: without padding, and with what the frame lacks
    lacks = lacking_specials(samples, card.specials)
    no_cls, no_sep = frame_words(card.specials)
    lengths_P = (
        samples.lengths_P + (lacks.cls_P.astype(np.int64) + lacks.sep_P) * card.adds_specials
    )
    if not np.array_equal(
        lengths_P.astype(lengths_dtype(card.max_tokens_per_document)), expected_P
    ):
        raise ShardError(
            f"{path} has other sample lengths than lengths.bin. Make the shards again."
        )
    inside = {} if card.holds_specials else specials_inside(samples, card.specials)
    # [PAD] first: at the ends it stands where [CLS] and [SEP] would
    padding = {word: found_P for word, found_P in inside.items() if word == "[PAD]"}
    _refuse(
        path,
        {
            f"an id beyond the vocabulary of {card.vocab_size:,}": (
                samples.ids_T.max(initial=0) >= card.vocab_size
            ),
            "an id below 0": samples.ids_T.min(initial=0) < 0,
        },
    )
    _refuse_specials(path, padding, padded, card)
    _refuse(
        path,
        {
            f"a sample that does not {no_cls}": (
                not card.adds_specials and bool(np.any(lacks.cls_P))
            ),
            f"a sample that does not {no_sep}": (
                not card.adds_specials and bool(np.any(lacks.sep_P))
            ),
            f"a sample longer than {card.max_tokens_per_document:,} tokens": (
                lengths_P.max(initial=0) > card.max_tokens_per_document
            ),
        },
    )
    _refuse_specials(path, inside, padded, card)


def _refuse(path: Path, faults: dict[str, bool]) -> None:
    for fault, found in faults.items():
        if found:
            raise ShardError(f"{path} has {fault}. Make the shards again.")


def _refuse_specials(path: Path, inside: dict[str, np.ndarray], padded: Padded, card: Card) -> None:
    for word, found_P in inside.items():
        way = "Make the shards again."
        if "index" in card.recipe:
            # shards of another program can be read in another way
            at_ends = word == "[PAD]" and (padded.before_P.any() or padded.behind_P.any())
            option = (
                "--strip-padding, which cuts it off when they are read"
                if at_ends
                else "--keep-specials, if that is meant"
            )
            way = f"Index them again: data-prep index FOLDER --tokenizer FILE --again {option}."
        raise ShardError(
            f"{path} has {word} in {int(found_P.sum()):,} of {len(found_P):,} samples, which would"
            f" be trained as text. {way}"
        )
