"""A source that lives in memory: what planning and reading know of a shard folder, without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder.data.sentences import SentenceLists
from encoder.data.shard_format import Card, SpecialIds

SPECIALS = SpecialIds(
    cls_id=60, sep_id=61, pad_id=62, mask_id=63, unk_id=59, all_special=(59, 60, 61, 62, 63)
)


@dataclass
class MemorySource:
    """Documents in shards; picklable, as a Source is."""

    name: str
    card: Card
    lengths: np.ndarray
    samples_per_shard: np.ndarray
    documents: Sequence[np.ndarray] = ()
    open_shards: int = 0
    sentences: Sequence[Sequence[int]] = ()  # tokens of each, of every document

    def sentences_of(self, documents: np.ndarray) -> SentenceLists:
        some = [self.sentences[d] for d in documents.tolist()]
        starts = np.cumsum([0, *(len(lengths) for lengths in some)])
        return SentenceLists(starts, np.array([n for lengths in some for n in lengths], np.int64))

    def read(self, document: int) -> np.ndarray:
        return self.documents[document]

    def file_of(self, document: int) -> Path:
        return Path(self.name)


def in_memory(name: str, documents: Sequence[np.ndarray], *, shards: int) -> MemorySource:
    """A source of these documents, in shards of as equal numbers as can be."""
    ids = [np.asarray(d, dtype=np.uint16) for d in documents]
    return planned(name, [len(d) for d in ids], shards=shards, documents=ids)


def of_sentences(name: str, sentences: Sequence[Sequence[int]], *, shards: int) -> MemorySource:
    """A source of documents with these sentences, whose ids count up from 0 in each document."""
    documents = [
        np.array([SPECIALS.cls_id, *(i % 50 for i in range(sum(lengths))), SPECIALS.sep_id])
        for lengths in sentences
    ]
    source = in_memory(name, documents, shards=shards)
    source.sentences = sentences
    return source


def sentences_of(lengths: Sequence[int], *, longest: int = 9) -> list[list[int]]:
    """Sentences of 1 to `longest` tokens for documents of these lengths, always the same."""
    rng = np.random.default_rng(0)
    every: list[list[int]] = []
    for length in lengths:
        left = int(length) - 2
        found: list[int] = []
        while left:
            found.append(min(left, int(rng.integers(1, longest + 1))))
            left -= found[-1]
        every.append(found)
    return every


def planned(
    name: str, lengths: Sequence[int], *, shards: int, documents: Sequence[np.ndarray] = ()
) -> MemorySource:
    """A source of which only the lengths are known, unless its documents are given."""
    lengths = np.array(lengths, dtype=np.uint16)
    card = Card(
        source=name,
        split="train",
        tokenizer_sha256="0",
        vocab_size=64,
        specials=SPECIALS,
        dtype="uint16",
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        max_tokens_per_document=8192,
        index_sha256="",
        lengths_sha256="",
    )
    samples = [len(part) for part in np.array_split(lengths, shards)]
    return MemorySource(name, card, lengths, np.array(samples), documents)
