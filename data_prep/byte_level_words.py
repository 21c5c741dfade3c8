"""The words of a text as a byte-level BPE sees it, with their counts: GPT-2's split.

    text      It's  naïve (again).
    parts     It's |  naïve | (again).            cut before white space
    words     It 's |  naïve | _( again ).        parts of ASCII are split further

No word of GPT-2's split goes on from another letter to white space, so the words of the parts are those of the text. A part
with other letters than ASCII stays whole: the tokenizer splits it, which knows what they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow

# white space and what follows it, up to the next
_PART = re.compile(r"\s*\S+|\s+")
# white space for Python alone
_SEPARATORS = re.compile("[\x1c-\x1f]")

# kinds of bytes
_END = b"\xff"  # stands before and behind each text
_SPACE, _LETTER, _DIGIT, _MARK = 1, 2, 3, 4


def _kind(byte: int) -> int:
    if bytes([byte]) == _END:
        return 0
    if byte in b" \t\n\x0b\x0c\r":
        return _SPACE
    letter = chr(byte)
    if letter.isalpha():
        return _LETTER
    return _DIGIT if letter.isdigit() else _MARK


_KINDS = bytes(map(_kind, [*range(128), *[255] * 128]))


class ByteLevelCounter:
    """Counts the words of texts."""

    def __init__(self, *, lowercase: bool) -> None:
        """lowercase: what the tokenizer's normalizer does: 'S is split as 's is."""
        self._lowercase = lowercase

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Each different word of ASCII, and each part with other letters, and how often it is there."""
        plain: list[bytes] = []
        others: Counter[str] = Counter()
        for text in texts:
            of_ascii, parts = _plain_part(text)
            plain.append(of_ascii.encode("ascii"))
            others.update(parts)
        yield from others.items()

        joined = _END + _END.join(plain) + 3 * _END
        found = _words(joined.lower() if self._lowercase else joined).value_counts()
        words = found.field("values").to_pylist()
        counts = found.field("counts").to_pylist()
        for word, count in zip(words, counts, strict=True):
            yield word.decode("ascii"), count


def _plain_part(text: str) -> tuple[str, list[str]]:
    """The parts of ASCII of a text, end to end, and its other parts."""
    if text.isascii():
        return text, []
    if _SEPARATORS.search(text):
        return "", [text]
    parts: list[str] = _PART.findall(text)
    # each begins with white space but the first, which nothing stands before
    return "".join(filter(str.isascii, parts)), [part for part in parts if not part.isascii()]


def _words(joined: bytes) -> pyarrow.BinaryArray:
    """The words of texts of ASCII, with _END around each and three at the end.

    ? I t ' s     a   1 ?        ? is _END
    1 1 0 1 0 1 1 0 1 0 1        begins
    """
    import pyarrow

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
    data = letters[is_kept]
    starts_N1 = np.append(np.flatnonzero(begins[is_kept]), len(data)).astype(np.int32)
    return pyarrow.Array.from_buffers(
        pyarrow.binary(),
        len(starts_N1) - 1,
        [None, pyarrow.py_buffer(starts_N1), pyarrow.py_buffer(data)],
    )
