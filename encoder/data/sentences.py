"""Where the sentences of stored documents end: sentences.bin, beside lengths.bin.

    uint64 x (documents + 1)     how many sentences stand before each document, and in all
    uint16 x sentences           tokens of each (uint32 where lengths.bin has them)

    stored     [CLS] It rains . We stay in . [SEP]        two sentences, of 3 and 4 tokens

[CLS] and [SEP] belong to none. So the sentences of a document sum to its length less 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder.base.errors import ShardError
from encoder.data.shard_format import SENTENCES, Card, lengths_dtype

START_BYTES = 8  # of the place of a document's sentences
FRAME_TOKENS = 2  # [CLS] and [SEP] of a stored document
CHECKED_DOCUMENTS = 2**20  # at a time: 20 MB


@dataclass(frozen=True)
class SentenceLists:
    """The sentences of some documents, one after another. D documents, N sentences."""

    starts_D1: np.ndarray  # int64: those of document d are starts[d] to starts[d + 1]
    tokens_N: np.ndarray  # int64, at least 1


class Sentences:
    """The sentences of a shard folder: a memory map, of which only what is asked for is read."""

    def __init__(self, path: Path, card: Card) -> None:
        """Raises ShardError where the file does not fit the card."""
        self._path = path
        kind = lengths_dtype(card.max_tokens_per_document)
        try:
            size = path.stat().st_size
            # the file's size must be exactly that of its starts, and of as
            # many sentences as they end with
            behind = START_BYTES * (card.documents + 1)
            if size < behind:
                raise ShardError(_other_size(path, size, card))

            self._starts_D1 = np.memmap(path, dtype="<u8", mode="r", shape=(card.documents + 1,))
            self.count = int(self._starts_D1[-1])
            if size != behind + self.count * kind.itemsize or self._starts_D1[0] != 0:
                raise ShardError(_other_size(path, size, card))

            # numpy maps no empty file part
            self._tokens_N = np.zeros(0, kind)
            if self.count:
                self._tokens_N = np.memmap(
                    path, dtype=kind, mode="r", offset=behind, shape=(self.count,)
                )
        except OSError as error:
            raise ShardError(
                f"{path} cannot be read: {error.strerror}. Copy the folder again, or make the"
                " shards again."
            ) from error

    def of(self, documents: np.ndarray) -> SentenceLists:
        """The sentences of these documents, in their order. Raises ShardError for a damaged file."""
        begin_D = self._starts_D1[documents].astype(np.int64)
        end_D = self._starts_D1[documents + 1].astype(np.int64)
        # a damaged start would read beyond the file, or backwards
        if np.any(begin_D > end_D) or np.any(end_D > self.count):
            raise ShardError(
                f"{self._path} is damaged: its documents have no order. Copy it again, or make it"
                " again with data-prep index."
            )

        # place of every sentence in the file: those of a document
        # follow each other from its begin
        starts_D1 = np.concatenate([[0], np.cumsum(end_D - begin_D)])
        place_N = np.arange(starts_D1[-1]) + np.repeat(begin_D - starts_D1[:-1], end_D - begin_D)
        return SentenceLists(starts_D1, self._tokens_N[place_N].astype(np.int64))

    def several_in_one(self) -> bool:
        """Whether any document has more than one sentence: reads until one is found."""
        documents = len(self._starts_D1) - 1
        for first in range(0, documents, CHECKED_DOCUMENTS):
            last = min(first + CHECKED_DOCUMENTS, documents)
            if np.any(np.diff(self._starts_D1[first : last + 1]) > 1):
                return True
        return False


def read_sentences(folder: Path, card: Card) -> Sentences:
    """The sentences of a shard folder. Raises ShardError where it has none, or others than its card."""
    if not card.sentences_sha256:
        raise ShardError(
            f"{folder} has no {SENTENCES}: where its sentences end is not known. Make it with"
            f" data-prep index {folder} --tokenizer {folder}/tokenizer.json --sentences, or prepare"
            " the text with sentences: true."
        )
    return Sentences(folder / SENTENCES, card)


def check_sentences(sentences: Sentences, lengths_D: np.ndarray, *, where: Path) -> None:
    """Every document's sentences have a token at least, and sum to its length. Raises ShardError."""
    for first in range(0, len(lengths_D), CHECKED_DOCUMENTS):
        some_D = np.arange(first, min(first + CHECKED_DOCUMENTS, len(lengths_D)))
        lists = sentences.of(some_D)
        # tokens of each document: differences of the cumulative sum at its first sentences
        before_N = np.concatenate([[0], np.cumsum(lists.tokens_N)])
        found_D = np.diff(before_N[lists.starts_D1])
        # a stored document without text has no sentence: 0, not below
        expected_D = np.maximum(lengths_D[some_D].astype(np.int64) - FRAME_TOKENS, 0)

        wrong = np.flatnonzero(found_D != expected_D)
        if len(wrong) or np.any(lists.tokens_N < 1):
            # an empty sentence is only known to lie in this stretch
            document = first
            if len(wrong):
                document = int(some_D[wrong[0]])
            raise ShardError(
                f"{where} does not fit lengths.bin at document {document:,}. Make it again with"
                " data-prep index."
            )


def sentence_bytes(counts_D: Iterable[np.ndarray], tokens_N: Iterable[bytes]) -> Iterable[bytes]:
    """What sentences.bin holds, in parts.

    counts_D: sentences of each document, in stretches of documents
    tokens_N: tokens of each sentence as they are stored, in stretches
    """
    # the first start is 0; then each document's end is the next one's start
    total = 0
    yield np.zeros(1, "<u8").tobytes()
    for part_D in counts_D:
        ends_D = total + np.cumsum(part_D, dtype=np.uint64)
        if len(ends_D):
            total = int(ends_D[-1])
        yield ends_D.astype("<u8").tobytes()
    yield from tokens_N


def _other_size(path: Path, size: int, card: Card) -> str:
    return (
        f"{path} has {size:,} bytes, which are not those of {card.documents:,} documents. Copy the"
        " folder again, or make it again with data-prep index."
    )
