"""The different words of a text with their counts, in memory that does not grow with the text.

Trainers go over all different words dozens of times, so they take as long as those, not as the text. Where there are
too many, frequent words stay with their counts. Rare ones stand for each other: of those below T, one in T / count
stays, and counts as T. So scripts without spaces, whose words are sentences met once, keep their share.

    met            the 90   of 70   cat 4   sat 2   mat 2   hat 1   bat 1   rat 1   dog 1
    room for 5     the 90   of 70   cat 4   mat 4   rat 4                               T = 4
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

# of words while they are counted, which are 3 million of 9 letters; choosing among them takes as much again
MOST_COUNTED_BYTES = 2**29
WORD_BYTES = 160  # of an entry: string, number and place, without its letters, of 2 bytes each
# text without spaces is one word, which would leave no room for any other
LONGEST_WORD = 2**16


@dataclass(frozen=True, kw_only=True)
class CountedWords:
    """Different words and how often they stand in a text, or how often they are to count."""

    counts: dict[str, int]
    met: int  # different words that were met; where memory ran out, at least so many
    is_whole: bool  # all of them are here
    least: int = 1  # T, what a rare word counts


def count_words(words: Iterable[tuple[str, int]], *, most_chars: int) -> CountedWords:
    """Counts of words that may come several times.

    words: each with how often it was met
    most_chars: of all different words that are kept
    """
    counts: dict[str, int] = {}
    met = 0
    bytes_ = 0
    least = 0.0  # T
    is_whole = True
    for word, count in _cut(words):
        before = counts.get(word)
        if before is not None:
            counts[word] = before + count
            continue
        counts[word] = count
        met += 1
        bytes_ += _bytes_of(word)
        if bytes_ > MOST_COUNTED_BYTES:
            # the same words give way each time, so those of the beginning fare no worse
            is_whole = False
            counts, dropped = _kept(counts, most_chars=_chars_of(counts) // 2)
            least = max(least, dropped)
            bytes_ = sum(map(_bytes_of, counts))
    if _chars_of(counts) > most_chars:
        is_whole = False
        counts, dropped = _kept(counts, most_chars=most_chars)
        least = max(least, dropped)
    if is_whole:
        return CountedWords(counts=counts, met=met, is_whole=True)
    counts = {word: max(count, round(least)) for word, count in counts.items()}
    return CountedWords(counts=counts, met=met, is_whole=False, least=max(1, round(least)))


def _cut(words: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The words, the longest in parts."""
    for word, count in words:
        if len(word) <= LONGEST_WORD:
            yield word, count
            continue
        for begin in range(0, len(word), LONGEST_WORD):
            yield word[begin : begin + LONGEST_WORD], count


def _bytes_of(word: str) -> int:
    return WORD_BYTES + 2 * len(word)


def _chars_of(words: Iterable[str]) -> int:
    return sum(map(len, words))


def _kept(counts: dict[str, int], *, most_chars: int) -> tuple[dict[str, int], float]:
    """The words of the highest ranks, and the highest rank of the others.

    A rank is a word's count, divided by a number between 0 and 1 that is drawn from its letters. So of words with one
    count those above a rank T are a share of count / T (priority sampling, Duffield, Lund and Thorup 2007).
    """
    words = list(counts)
    counts_W = np.fromiter(counts.values(), np.int64, count=len(words))
    chars_W = np.fromiter(map(len, words), np.int64, count=len(words))
    ranks_W = counts_W / np.fromiter(map(_drawn, words), np.float64, count=len(words))
    order_W = np.argsort(-ranks_W, kind="stable")
    is_kept_W = np.cumsum(chars_W[order_W]) <= most_chars
    kept = order_W[is_kept_W]
    dropped = order_W[~is_kept_W]
    kept_counts = {words[number]: int(counts_W[number]) for number in kept.tolist()}
    return kept_counts, float(ranks_W[dropped[0]])


def _drawn(word: str) -> float:
    digest = hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 1) / 2**64
