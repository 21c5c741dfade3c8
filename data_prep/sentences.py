"""The sentences of documents, measured in their tokens: the stored ids are read back as text, and sentencex splits it.

    ids         It  rains  .  We  stay          text   It rains. We stay
    sentences   |-- 3 --|     |- 2 -|           the space before `We` belongs to the token of `We`

They are a function of the stored ids and the tokenizer alone. So `prepare` and `index` find the same ones.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.byte_level import byte_of_character
from encoder.base.errors import ConfigError, ShardError, UserError, nearest
from encoder.base.log import warn_once
from encoder.base.untrusted import native_code

# whose abbreviations and marks the library knows; for others it takes those of a related one
LANGUAGES = tuple(
    "am ar bg bn ca da de el en es fi fr gu hi hy it ja kk kn ml mr my nl pa pl pt ru sk ta te uk".split()
)
ENGLISH = "en"  # the default; English lists end sentences at the marks of other scripts, too
TOKENS_AT_ONCE = 2**16  # read back: 3 MB of places
# a token of these alone stands behind a word without a space (WordPiece and WordLevel do not keep spaces)
_CLOSING = re.compile(r"[.,;:!?%)\]}'\u2019\u201d\u2026\u3002\uff0c\uff01\uff1f\u0964\u061f]+")
_SURROGATE = re.compile("[\udc80-\udcff]")
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def check_language(language: str, *, where: str) -> str:
    """The language, which the library has lists of. Raises ConfigError; `where`: the setting or option."""
    if language not in LANGUAGES:
        raise ConfigError(
            f"{where} is {language!r}, of which sentencex has no list of its own."
            f" {nearest(language, list(LANGUAGES))}"
        )
    return language


def splitter_name(language: str) -> str:
    """The library and its version, and the language unless it is English, for the card. Raises UserError where the library
    is not installed."""
    # cards of English text are those of before there was a choice
    chosen = "" if language == ENGLISH else f", {language}"
    try:
        return f"sentencex {importlib.metadata.version('sentencex')}{chosen}"
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "sentences are found by sentencex, which is not installed. Install it: pip install"
            " sentencex; or set sentences: false."
        ) from error


@dataclass(frozen=True)
class FoundSentences:
    """The sentences of some pieces, one after another. P pieces, N sentences."""

    counts_P: np.ndarray  # int64, of each piece
    tokens_N: np.ndarray  # int64, at least 1


class SentenceSplitter:
    """Finds the sentences of stored ids."""

    def __init__(self, tokenizer_json: Path, *, language: str = ENGLISH) -> None:
        """Raises ShardError for a tokenizer whose tokens cannot be read, UserError without the library."""
        # for the card, and so that a missing library is one sentence
        self.name = splitter_name(language)
        from sentencex import segment

        self._segment = segment
        self._language = language
        texts = _TokenTexts(tokenizer_json)
        self._keeps_spaces = texts.keeps_spaces
        self._kinds_V = texts.kinds_V
        self._bytes = np.frombuffer(b"".join(texts.shown), np.uint8)
        self._lengths_V = np.array([len(text) for text in texts.shown])
        self._starts_V = np.cumsum(self._lengths_V) - self._lengths_V

    def __call__(
        self, ids_T: np.ndarray, begins_P: np.ndarray, ends_P: np.ndarray
    ) -> FoundSentences:
        """The sentences of pieces of ids.

        ids_T: ids end to end
        begins_P, ends_P: the stretch of each piece's text, without [CLS] and [SEP]
        """
        shown_T = ids_T.astype(np.int64)
        # entry V + i shows token i with a space before it
        if not self._keeps_spaces:
            shown_T += len(self._kinds_V) * self._spaces(shown_T)
        data = b"".join(
            self._bytes_of(shown_T[at : at + TOKENS_AT_ONCE])
            for at in range(0, len(shown_T), TOKENS_AT_ONCE)
        )
        # where each token begins in the joined text, in bytes; at last its end
        byte_starts_T1 = np.concatenate([[0], np.cumsum(self._lengths_V[shown_T])])
        byte_ends: list[int] = []

        # each piece is split alone, its ends moved to places of the joined text
        for begin, end in zip(
            byte_starts_T1[begins_P].tolist(), byte_starts_T1[ends_P].tolist(), strict=True
        ):
            if begin == end:
                continue
            byte_ends += [begin + place for place in self._byte_ends(data[begin:end])]

        # back from bytes to tokens
        is_last_T = np.zeros(len(ids_T), bool)
        # a token that reaches over the end of a sentence belongs to it
        is_last_T[np.searchsorted(byte_starts_T1[1:], byte_ends)] = True
        is_last_T[ends_P[ends_P > begins_P] - 1] = True
        return _between(is_last_T, begins_P, ends_P)

    def _bytes_of(self, shown_T: np.ndarray) -> bytes:
        """The texts of tokens, joined: half the time of joining Python's bytes, 75 ns a token."""
        # byte j of token t, which begins at b here and at s in the vocabulary, is byte s + j there
        lengths_T = self._lengths_V[shown_T]
        ends_T = np.cumsum(lengths_T)
        offset_T = self._starts_V[shown_T] - ends_T + lengths_T
        return self._bytes[np.arange(lengths_T.sum()) + np.repeat(offset_T, lengths_T)].tobytes()

    def _byte_ends(self, data: bytes) -> list[int]:
        """Where the sentences of a text end, the white space behind them left out."""
        text = data.decode("utf-8", errors="surrogateescape")
        # then places in characters are places in bytes
        is_ascii = len(text) == len(data)
        ends: list[int] = []
        at = byte = 0
        # a byte that is not UTF-8 is a surrogate, which the library does not take: it sees U+FFFD
        for part in self._parts(text if is_ascii else _SURROGATE.sub("\ufffd", text)):
            # white space between two parts may be missing in both
            begin = text.find(part, at) if is_ascii else _found(text, part, at)
            if begin < 0:
                continue
            end = begin + len(part)
            # bytes from the last part's end to this one's
            byte = end if is_ascii else byte + len(_raw(text[at:end]))
            at = end
            ends.append(byte)
        # white space at the end of a text is of its last sentence
        return [*ends[:-1], len(data)]

    def _parts(self, text: str) -> list[str]:
        try:
            with native_code("a text cannot be split in sentences", remedy=""):
                parts = self._segment(self._language, text)
        except UserError as error:
            warn_once(f"{error} It counts as one sentence.")
            return []
        return [kept for part in parts if (kept := part.strip())]

    def _spaces(self, ids_T: np.ndarray) -> np.ndarray:
        """Which tokens have a space before them, int64: those that begin a word, but not inside 3.5 and U.S."""
        kinds_T = self._kinds_V[ids_T]
        begins_T = (kinds_T & _BEGINS) > 0
        short_T = (kinds_T & _SHORT) > 0
        # letter or number, point, letter or number: no space inside
        inside = short_T[2:] & short_T[:-2] & ((kinds_T[1:-1] & _POINT) > 0)
        begins_T[2:] &= ~inside
        return begins_T.astype(np.int64)


# kinds of tokens, as bits
_BEGINS = 1  # a word
_SHORT = 2  # one letter, or a number
_POINT = 4


class _TokenTexts:
    """What each token of a tokenizer.json shows. V entries; where spaces are not kept, V more with a space before them."""

    def __init__(self, tokenizer_json: Path) -> None:
        try:
            content = json.loads(tokenizer_json.read_bytes())
            self._read(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ShardError(
                f"{tokenizer_json}: what its tokens mean cannot be told ({error}), so sentences"
                " cannot be found. Prepare without sentences."
            ) from error

    def _read(self, content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        # of BPE and WordPiece a dictionary, of Unigram a list of (piece, score)
        if isinstance(vocab, dict):
            ids = vocab
        else:
            ids = {t[0]: i for i, t in enumerate(vocab)}
        added = {a["content"]: a for a in content.get("added_tokens", [])}
        size = max([*ids.values(), *(a["id"] for a in added.values())]) + 1
        text_of = _text_of(content)
        self.keeps_spaces = text_of is not None
        self.kinds_V = np.zeros(size, np.uint8)
        plain = [b""] * size
        # "\0" begins no token: without a prefix each begins a word
        prefix = content["model"].get("continuing_subword_prefix") or "\0"
        for token, number in ids.items():
            if token in added:
                continue
            if text_of is not None:
                plain[number] = text_of(token)
                continue
            begins = not token.startswith(prefix)
            text = token if begins else token.removeprefix(prefix)
            plain[number] = text.encode("utf-8", errors="surrogateescape")
            self.kinds_V[number] = _kind(text, begins)
        # special tokens show nothing
        for token, about in added.items():
            if not about["special"]:
                plain[about["id"]] = token.encode("utf-8")
        if self.keeps_spaces:
            self.shown = plain
        else:
            self.shown = plain + [b" " + text for text in plain]


def _between(is_last_T: np.ndarray, begins_P: np.ndarray, ends_P: np.ndarray) -> FoundSentences:
    """The sentences of pieces whose every last token is marked."""
    # sentence ends before each token, so a difference counts those of a piece
    before_T1 = np.concatenate([[0], np.cumsum(is_last_T)])
    counts_P = before_T1[ends_P] - before_T1[begins_P]
    last_N = np.flatnonzero(is_last_T)
    first_P = np.cumsum(counts_P) - counts_P

    # the token before each sentence; a piece's first sentence begins where the piece does
    before_N = np.concatenate([[-1], last_N[:-1]])
    some_P = counts_P > 0
    before_N[first_P[some_P]] = begins_P[some_P] - 1
    return FoundSentences(counts_P, last_N - before_N)


def _kind(text: str, begins: bool) -> int:
    closes = _CLOSING.fullmatch(text) is not None
    is_short = text.isdecimal() or len(text) == 1 and text.isalpha()
    kind = _BEGINS * (begins and not closes)
    kind += _SHORT * (begins and is_short)
    return kind + _POINT * (text == ".")


def _text_of(content: dict[str, Any]) -> Callable[[str], bytes] | None:
    """The bytes of a token for tokenizers that keep spaces; None for those that do not."""
    if content["model"].get("type") in ("WordPiece", "WordLevel"):
        return None
    # it may be one step of a sequence
    if '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
        byte_of = byte_of_character()
        return lambda token: bytes(byte_of[c] for c in token)

    # SentencePiece: <0x41> is a byte, U+2581 a space
    def text_of(token: str) -> bytes:
        byte = _BYTE.fullmatch(token)
        if byte:
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode("utf-8", errors="surrogateescape")

    return text_of


def _found(text: str, part: str, at: int) -> int:
    """Where a part begins in a text whose undecodable bytes the part shows as U+FFFD; -1: nowhere."""
    if "\ufffd" not in part:
        return text.find(part, at)
    begin = at
    while begin < len(text) and text[begin].isspace():
        begin += 1
    shown = _SURROGATE.sub("\ufffd", text[begin : begin + len(part)])
    return begin if shown == part else -1


def _raw(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")
