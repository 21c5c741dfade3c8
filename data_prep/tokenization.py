"""Text to pieces of ids in their frame, [CLS] ... [SEP] each, by the fastest way that proves equal to tokenizers.

fastokens    byte-level BPE
words        WordPiece, Unigram and others whose texts fall into words (words.py)
tokenizers   everything else

Spellings of special tokens in raw text ("[MASK]", "<|endoftext|>") stay text: no document can write a special id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.long_texts import TooLong, batches, cuts_of, parts_of
from data_prep.words import WordEncoder
from encoder.base.errors import ConfigError, ShardError
from encoder.base.files import meant_beside, native_path
from encoder.base.hub import fetch_tokenizer, parse_hub_name
from encoder.base.log import warn_once
from encoder.base.tokenizer_json import SpecialIds
from encoder.base.untrusted import native_code

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EncoderName = Literal["fastokens", "words", "tokenizers"]
FASTER: tuple[EncoderName, ...] = ("fastokens", "words")  # in this order
HASH_CHARS = 2**20  # of a text at a time, as bytes
# 30, 30 and 250 bytes of memory each
BATCH_CHARS: dict[EncoderName, int] = {
    "fastokens": 2**21,
    "words": 2**21,
    "tokenizers": 2**18,
}

# What encoders disagree on: spellings of specials, white space around them, composed and decomposed letters,
# runs of spaces, controls, scripts without spaces, joined emoji, digits, contractions.
HOSTILE = (
    "[MASK]",
    " [MASK]",
    "  [MASK] x",
    "a[MASK]b [CLS][SEP] [PAD]\n[UNK]",
    "<|endoftext|>",
    "<|padding|> <|endoftext|>\n\n",
    "[unused0] [unused82]",
    "|||IP_ADDRESS||| |||EMAIL_ADDRESS|||",
    "[mask] [MASK",
    "[[MASK]]",
    " ",
    "    ",
    "\n",
    "\n \n  \n\t\t x",
    "a" + " " * 24 + "b" + " " * 25 + "c",
    " leading",
    "trailing ",
    "tabs\t\tand\r\nreturns\r",
    "e\u0301 \u00e9 \u212b A\u030a \ufb01 \u1e9b\u0323",
    "\u0000\u0001\u007f\u0085\u00a0\u2028\u2029\u200b\ufeff\ufffd",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    (
        "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea"
        " \u0939\u093f\u0928\u094d\u0926\u0940"
    ),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f600\U0001f600",
    "1234567890 3.14159 1,000,000 0x1F 1e-9 \u00b2\u00bd\u0664",
    "don't I'll we've they're he'd it's 'S 'LL",
    "snake_case camelCase ALLCAPS kebab-case",
    "a" * 300,
    "ab" * 200,
    "!?!?...---___===",
    "https://a.b/c?d=e&f#g",
    "def f(x):\n    return x[0]  # done\n",
    "\u0130\u0131\u017f\u212a",
    "\U000e0001\U0010fffd",
)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a batch of documents becomes: pieces laid end to end, each in its frame."""

    ids_T: np.ndarray  # uint16 or uint32
    lengths_P: np.ndarray  # int64, tokens per piece with [CLS] and [SEP]
    held_out_P: np.ndarray  # bool
    held_out_documents: int
    content_tokens: int  # before [CLS] and [SEP]


class TextEncoder:
    """Texts to ids without special tokens, by one of three ways; the ids are the same."""

    def __init__(self, tokenizer_json: Path, name: EncoderName) -> None:
        self.name = name
        self._words: WordEncoder | None = None
        self._cuts = cuts_of(tokenizer_json)
        self._what = f"{tokenizer_json} is not a tokenizer that {name} can read"
        with native_path(tokenizer_json) as path, native_code(self._what, error=ShardError):
            if name == "fastokens":
                import fastokens

                self._tokenizer = fastokens.Tokenizer.from_file(path)
            else:
                self._tokenizer = _of_text_alone(tokenizer_json, path)
            # a tokenizer.json may ask for both, and documents are cut here alone
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if name == "words":
                self._words = WordEncoder(self._tokenizer)

    def encode(
        self, texts: Sequence[str], dtype: np.dtype | type = np.uint32
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end [T], tokens per text [D] int64), by as much text at a time as bounds memory.

        A long text is encoded in parts, which end where no token can go on (long_texts.py). Raises TooLong for one that has
        no such place for too long."""
        ids: list[np.ndarray] = []
        lengths_D = np.zeros(len(texts), np.int64)
        for documents, parts in batches(texts, self._cuts, most_chars=BATCH_CHARS[self.name]):
            ids_T, lengths_P = self._encode(parts)
            ids.append(ids_T.astype(dtype, copy=False))
            # parts of one text add up; lengths_D[documents] += would count a text once
            np.add.at(lengths_D, documents, lengths_P)
        # the empty array holds the type where there is no text
        return ids[0] if len(ids) == 1 else np.concatenate([np.zeros(0, dtype), *ids]), lengths_D

    def fits(self, text: str) -> bool:
        """Whether the text can be encoded: not where a part without a cut would be too long."""
        try:
            for _ in parts_of(text, self._cuts, most_chars=BATCH_CHARS[self.name]):
                pass
        except TooLong:
            return False
        return True

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        with native_code(self._what, error=ShardError):
            return self._encoded(texts)

    def _encoded(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.name == "fastokens":
            ids, offsets = self._tokenizer.encode_batch_flat(list(texts), False, True)
            ends = np.frombuffer(offsets, "<u8").astype(np.int64)
            return np.frombuffer(ids, "<u4"), np.diff(ends)

        if self._words:
            return self._words.encode(texts)
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        found = [e.ids for e in encoded]
        lengths = np.array([len(f) for f in found], np.int64)
        ids = np.fromiter(chain.from_iterable(found), np.uint32, count=int(lengths.sum()))
        return ids, lengths


def _of_text_alone(tokenizer_json: Path, native: str) -> Tokenizer:
    """The tokenizer for which spellings of special tokens are text.

    A Unigram model has them among its pieces, and would find them in a text all the same: there they get names that no text
    has. Their ids and the scores stay. `native` is the file's name for native code.
    """
    import tokenizers

    content = json.loads(tokenizer_json.read_bytes())
    if content["model"].get("type") != "Unigram":
        tokenizer = tokenizers.Tokenizer.from_file(native)
        tokenizer.encode_special_tokens = True
        return tokenizer

    # Unigram: tokens named U+FFFF number U+FFFF, which no text holds, with the same ids and scores
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["special"]]
    content["post_processor"] = None
    content["model"]["vocab"] = [
        [f"\uffff{number}\uffff" if piece in special else piece, score]
        for number, (piece, score) in enumerate(content["model"]["vocab"])
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def choose_encoder(
    tokenizer_json: Path, real_texts: Callable[[], Sequence[str]] = tuple
) -> EncoderName:
    """The first of the faster ways that gives the ids of Hugging Face tokenizers on hostile and on real text; a warning if none
    does. The real text is asked for when the judge is loaded: meanwhile the processes that read it start."""
    judge = TextEncoder(tokenizer_json, "tokenizers")
    wanted = _each(judge, HOSTILE)
    real = real_texts()
    texts = [*HOSTILE, *real]
    wanted += _each(judge, real)
    reasons = []
    for name in FASTER:
        try:
            found = _each(TextEncoder(tokenizer_json, name), texts)
        except (ImportError, ShardError) as error:
            # the library's own reason, without the advice to make another tokenizer
            why = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            reasons.append(f"{name} cannot be used ({why})")
            continue
        differs = [
            text
            for text, a, b in zip(texts, found, wanted, strict=True)
            if not np.array_equal(a, b)
        ]
        if not differs:
            return name
        reasons.append(
            f"{name} gives other ids than Hugging Face tokenizers for {differs[0][:40]!r}"
        )
    warn_once(
        f"{'; '.join(reasons)}. Hugging Face tokenizers encodes instead: the same ids, about 20 times"
        " slower."
    )
    return "tokenizers"


def encode_pieces(
    encoder: TextEncoder,
    texts: Sequence[str],
    *,
    specials: SpecialIds,
    dtype: np.dtype,
    max_tokens_per_document: int,
    held_out_share: float,
) -> Pieces:
    """Encode documents, cut the long ones, frame every piece; a document's pieces all go to the same split.

    encoder: gives their ids without special tokens
    texts: the documents
    specials: put around each piece, as their frame says
    dtype: of the ids
    max_tokens_per_document: of a piece with its frame
    held_out_share: of the documents
    """
    ids_T, lengths_D = encoder.encode(texts, dtype)
    content_tokens = int(lengths_D.sum())
    assert len(ids_T) == content_tokens, "offsets and ids must end together"

    # room for the frame is kept free in every piece
    frame_tokens = len(specials.before) + len(specials.behind)
    pieces_P, document_P = cut_lengths(lengths_D, max_tokens_per_document - frame_tokens)
    held_out_D = np.array([is_held_out(text, held_out_share) for text in texts], bool)
    lengths_P = pieces_P + frame_tokens

    # the frame is put at both ends of each piece; what it leaves free takes the ids in order
    ends_P = np.cumsum(lengths_P)
    wrapped_T = np.empty(int(ends_P[-1]) if len(ends_P) else 0, dtype)
    content = np.ones(len(wrapped_T), bool)
    for place, special in enumerate(specials.before):
        wrapped_T[ends_P - lengths_P + place] = special
        content[ends_P - lengths_P + place] = False
    for place, special in enumerate(reversed(specials.behind), start=1):
        wrapped_T[ends_P - place] = special
        content[ends_P - place] = False
    wrapped_T[content] = ids_T
    return Pieces(
        ids_T=wrapped_T,
        lengths_P=lengths_P,
        held_out_P=held_out_D[document_P],
        held_out_documents=int(held_out_D.sum()),
        content_tokens=content_tokens,
    )


def cut_lengths(lengths_D: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Near-equal pieces of documents: (tokens per piece [P], document of each piece [P]). Nothing is dropped.

    10 tokens, capacity 4   ->   4 3 3
    """
    # a document without tokens is one piece, its frame alone
    pieces_D = np.maximum(1, -(-lengths_D // capacity))
    document_P = np.repeat(np.arange(len(lengths_D)), pieces_D)
    # a piece's number in its document; the first (length mod pieces) have one token more
    index_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    base_D, longer_D = np.divmod(lengths_D, pieces_D)
    tokens_P = base_D[document_P] + (index_P < longer_D[document_P])
    return tokens_P, document_P


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: a function of its text alone, so equal texts never part."""
    # the hash is even over 0 ... 2^64 - 1; 8 % of the time of byte-level BPE, spared where nothing is held out
    return share > 0 and text_hash(text) < share * 2.0**64


def text_hash(text: str) -> int:
    """64 bits of the text's BLAKE2b."""
    digest = hashlib.blake2b(digest_size=8)
    # by parts, since the bytes of the whole would be in memory twice
    for at in range(0, len(text), HASH_CHARS):
        digest.update(text[at : at + HASH_CHARS].encode("utf-8"))
    return int.from_bytes(digest.digest(), "little")


def one_thread_a_process() -> None:
    """The encoders and numpy start a thread per core; with a process per core they must not. Before the first encoding.

    It stays in this process's environment. numpy hears it in processes that start afterwards.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def check_tokenizer_path(path: Path) -> Path:
    """The path, if a file is there; of ORG/NAME on the Hugging Face hub the file that was fetched. Raises ConfigError."""
    if name := parse_hub_name(path):
        return fetch_tokenizer(name, error=ConfigError)
    if path.is_dir():
        raise ConfigError(
            f"tokenizer {path} is a folder; needed: a tokenizer.json, such as"
            f" {path / 'tokenizer.json'}."
        )
    if not path.is_file():
        raise ConfigError(
            f"tokenizer {path} does not exist. Make it: data-prep tokenizer modernbert --out"
            f" {path}, or data-prep tokenizer train --files YOUR_FILES --out {path}."
            f"{meant_beside(path, endings=('.json',))}"
        )
    return path


def _each(encoder: TextEncoder, texts: Sequence[str]) -> list[np.ndarray]:
    ids_T, lengths_D = encoder.encode(texts)
    return np.split(ids_T, np.cumsum(lengths_D))[:-1]
