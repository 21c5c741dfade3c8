"""The words of a text as a byte-level BPE sees it, with their counts: GPT-2's split, and a letter for each byte.

    text      It's  naïve (again).
    parts     It's |  naïve | (again).             cut before white space
    words     It 's Ġ ĠnaÃ¯ve Ġ( again ).          parts of ASCII by numpy, others by the tokenizer

No word of GPT-2's split goes on from what is no white space to white space, so the words of the parts are those of the text.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_prep.words import counts_of, words_at

if TYPE_CHECKING:
    import pyarrow
    from tokenizers import Tokenizer

KNOWN_PARTS = 2**16  # of which it is remembered whether anything is left of them

# white space and what follows it, up to the next
_PART = re.compile(r"\s*\S+|\s+")
# white space for Python alone
_SEPARATORS = re.compile("[\x1c-\x1f]")

# kinds of bytes
_END = b"\xff"  # stands before and behind each text
_SPACE, _LETTER, _DIGIT, _MARK = 1, 2, 3, 4


def _kind(byte: int) -> int:
    if byte in b" \t\n\x0b\x0c\r":
        return _SPACE
    letter = chr(byte)
    if letter.isalpha():
        return _LETTER
    return _DIGIT if letter.isdigit() else _MARK


# of ASCII; the others, of which there is _END alone, are 0
_KINDS = bytes(map(_kind, range(128))) + bytes(128)
# the letters of a byte-level alphabet: those that cannot be seen stand from U+0100 on (GPT-2's bytes_to_unicode)
_UNSEEN = [*range(33), *range(127, 161), 173]
_SHOWN = {byte: chr(256 + number) for number, byte in enumerate(_UNSEEN) if byte < 128}


class ByteLevelCounter:
    """Counts the words of texts."""

    def __init__(self, tokenizer: Tokenizer, *, lowercase: bool) -> None:
        """
        tokenizer: its normalizer and pre-tokenizer are NFC and ByteLevel
        lowercase: its normalizer takes accents off and makes small letters, too
        """
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._lowercase = lowercase
        self._is_nothing = functools.lru_cache(KNOWN_PARTS)(self._becomes_nothing)

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Each different word and how often it is there; a word may come twice."""
        plain: list[bytes] = []
        others: Counter[str] = Counter()
        for text in texts:
            of_ascii, parts = self._parts(text)
            plain.append(of_ascii.encode("ascii"))
            others.update(parts)
        for part, count in others.items():
            normal = self._normalizer.normalize_str(part)
            for word, _ in self._pre_tokenizer.pre_tokenize_str(normal):
                yield word, count

        joined = _END + _END.join(plain) + 3 * _END
        for word, count in counts_of(_words(joined.lower() if self._lowercase else joined)):
            yield word.decode("ascii").translate(_SHOWN), count

    def _parts(self, text: str) -> tuple[str, list[str]]:
        """The parts of ASCII of a text, end to end, and its other parts."""
        if text.isascii():
            return text, []
        if _SEPARATORS.search(text):
            return "", [text]
        parts: list[str] = _PART.findall(text)
        others = [part for part in parts if not part.isascii()]
        # accents alone vanish, and what stands on both sides is one run of white space
        if self._lowercase and any(map(self._is_nothing, others)):
            return "", [text]
        # each begins with white space but the first, which nothing stands before
        return "".join(filter(str.isascii, parts)), others

    def _becomes_nothing(self, part: str) -> bool:
        normal: str = self._normalizer.normalize_str(part)
        return not normal.strip()


def _words(joined: bytes) -> pyarrow.BinaryArray:
    """The words of texts of ASCII, with _END around each and three at the end.

    ? I t ' s     a   1 ?        ? is _END
    1 1 0 1 0 1 1 0 1 0 1        begins
    """
    letters = np.frombuffer(joined, np.uint8)
    kinds = np.frombuffer(joined.translate(_KINDS), np.uint8)
    begins = np.ones(len(letters), bool)
    begins[1:] = kinds[1:] != kinds[:-1]

    # of white space before a word the last one stands alone; a blank belongs to the word
    first = np.flatnonzero((kinds[:-1] == _SPACE) & (kinds[1:] > _SPACE)) + 1
    begins[first - 1] = True
    begins[first[letters[first - 1] == ord(" ")]] = False

    # 's, 't, 'm, 'd and 're, 've, 'll, where an apostrophe begins a word
    quotes = np.flatnonzero((letters == ord("'")) & begins)
    second = letters[quotes + 1]
    both = np.stack([second, letters[quotes + 2]], axis=1)
    short = quotes[np.isin(second, np.frombuffer(b"stmd", np.uint8))]
    is_long = np.zeros(len(quotes), bool)
    for ending in (b"re", b"ve", b"ll"):
        is_long |= (both == np.frombuffer(ending, np.uint8)).all(axis=1)
    for places, length in ((short, 2), (quotes[is_long], 3)):
        begins[places + 1] = False
        begins[places + length] = True

    # words end to end, the ends of texts left out
    is_kept = kinds > 0
    return words_at(letters[is_kept], begins[is_kept])
