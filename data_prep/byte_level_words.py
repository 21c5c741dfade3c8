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

# white space and what follows it, up to the next
_PART = re.compile(r"\s*\S+|\s+")
# GPT-2's split, of ASCII
_WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# white space for Python alone
_SEPARATORS = re.compile("[\x1c-\x1f]")


class ByteLevelCounter:
    """Counts the words of texts."""

    def __init__(self, *, lowercase: bool) -> None:
        """lowercase: what the tokenizer's normalizer does: 'S is split as 's is."""
        self._lowercase = lowercase

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Each different word of ASCII, and each part with other letters, and how often it is there."""
        counts: Counter[str] = Counter()
        for text in texts:
            plain, others = _plain_part(text)
            counts.update(_WORD.findall(plain.lower() if self._lowercase else plain))
            counts.update(others)
        yield from counts.items()


def _plain_part(text: str) -> tuple[str, list[str]]:
    """The parts of ASCII of a text, end to end, and its other parts."""
    if text.isascii():
        return text, []
    if _SEPARATORS.search(text):
        return "", [text]
    parts: list[str] = _PART.findall(text)
    # each begins with white space but the first, which nothing stands before
    return "".join(filter(str.isascii, parts)), [part for part in parts if not part.isascii()]
