"""A small shard folder for tests: MDS written by streaming, card, lengths and a tiny tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from encoder.base.files import sha256_of
from encoder.base.tokenizer_json import Frame, special_ids_of, template
from encoder.data.sentences import sentence_bytes
from encoder.data.shard_format import (
    CARD,
    INDEX,
    INPUT_IDS,
    LENGTHS,
    SENTENCES,
    SHARD_HASH,
    TOKENIZER,
    Card,
    ids_dtype,
    lengths_dtype,
    read_card,
    tokenizer_fingerprint,
    with_content,
    write_card,
    write_lengths,
)

if TYPE_CHECKING:
    from streaming import MDSWriter

SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")  # the last five ids of the vocabulary


def write_tokenizer(path: Path, *, vocab_size: int, frame: Frame | None = None) -> Path:
    """A tokenizer.json of `vocab_size` words: t0, t1, ... and the five special tokens at the end; with a frame, where given."""
    vocab = {f"t{i}": i for i in range(vocab_size - len(SPECIALS))}
    added = []
    for name in SPECIALS:
        vocab[name] = len(vocab)
        added.append(
            {
                "id": vocab[name],
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    framed = None
    if frame is not None:
        roles = {"cls": "[CLS]", "sep": "[SEP]"}
        framed = template(roles, vocab, frame=frame)
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": framed,
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
            }
        ),
        encoding="utf-8",
    )
    return path


def random_documents(
    count: int, *, seed: int = 0, vocab_size: int = 64, longest: int = 64
) -> list[np.ndarray]:
    """`count` documents [CLS] body [SEP] of 3 to `longest` tokens; bodies are made of ordinary words."""
    rng = np.random.default_rng(seed)
    words, cls_id, sep_id = vocab_size - 5, vocab_size - 4, vocab_size - 3
    return [
        np.concatenate([[cls_id], rng.integers(0, words, rng.integers(1, longest - 1)), [sep_id]])
        for _ in range(count)
    ]


def mds_writer(**settings: Any) -> MDSWriter:
    """streaming's own writer. It asks once a second whether its threads are done with a second shard: here, at once."""
    from streaming import MDSWriter
    from streaming.base.format.base import writer

    writer.sleep = lambda _seconds: time.sleep(0.002)
    return MDSWriter(**settings)


def write_source(
    folder: Path,
    documents: Sequence[np.ndarray],
    *,
    vocab_size: int = 64,
    shard_bytes: int = 1 << 14,
    split: str = "train",
    max_tokens_per_document: int = 8192,
    compression: str | None = None,
    columns: Mapping[str, str] | None = None,
    frame: Frame | None = None,
) -> Path:
    """Write a finished shard folder and return it; `columns` beside input_ids: {"id": "str", "len": "int"}. Documents have
    their frame already: `frame` is what the tokenizer says."""
    kind = ids_dtype(vocab_size)
    columns = {INPUT_IDS: f"ndarray:{kind.name}", **(columns or {})}
    with mds_writer(
        columns=columns,
        out=str(folder),
        size_limit=shard_bytes,
        compression=compression,
        hashes=[SHARD_HASH],
    ) as out:
        for number, ids in enumerate(documents):
            beside = {"str": f"document {number}", "int": len(ids)}
            out.write(
                {
                    INPUT_IDS: np.asarray(ids).astype(kind),
                    **{
                        name: beside[encoding]
                        for name, encoding in columns.items()
                        if name != INPUT_IDS
                    },
                }
            )
    tokenizer_json = write_tokenizer(folder / TOKENIZER, vocab_size=vocab_size, frame=frame)
    _, specials = special_ids_of(tokenizer_json)
    lengths = np.array([len(ids) for ids in documents])
    write_lengths(folder, lengths, max_tokens_per_document=max_tokens_per_document)
    card = Card(
        source=folder.parent.name or folder.name,
        split=split,
        vocab_size=vocab_size,
        specials=specials,
        tokenizer_sha256=tokenizer_fingerprint(folder / TOKENIZER),
        dtype=kind.name,
        documents=0,
        tokens=0,
        max_tokens_per_document=max_tokens_per_document,
        index_sha256="",
        lengths_sha256="",
    )
    write_card(folder, with_content(card, folder, lengths))
    return folder


def write_sentences(folder: Path, sentences: Sequence[Sequence[int]]) -> Path:
    """sentences.bin of a folder whose documents have sentences of these tokens, and its hash on the card."""
    card = read_card(folder)
    kind = lengths_dtype(card.max_tokens_per_document)
    counts = [np.array([len(lengths) for lengths in sentences])]
    tokens = [np.array(lengths, kind).tobytes() for lengths in sentences]
    (folder / SENTENCES).write_bytes(b"".join(sentence_bytes(counts, tokens)))
    found = sha256_of(folder / SENTENCES)
    write_card(folder, replace(card, sentences_sha256=found, sentence_splitter="a test's"))
    return folder


def seal_again(folder: Path) -> None:
    """Make the card's hashes those of index.json and lengths.bin as they are now; its totals stay."""
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    card.update(index_sha256=sha256_of(folder / INDEX), lengths_sha256=sha256_of(folder / LENGTHS))
    (folder / CARD).write_text(json.dumps(card), encoding="utf-8")
