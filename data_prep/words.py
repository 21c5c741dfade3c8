"""Text to ids word by word: each different word is encoded once by tokenizers, and remembered.

    text     The cat. The dog.      words   the cat . the dog .      given to tokenizers   the cat . dog

A word is here a stretch of text between two places over which no rule of the tokenizer looks (word_rules.py). So the ids
of a text are those of its words, end to end. Words are cut and counted in bulk, as bytes of UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING

import numpy as np

from data_prep.long_texts import by_chars
from data_prep.word_rules import KnownCharacters, WordRules, rules_of

if TYPE_CHECKING:
    import pyarrow
    from tokenizers import Tokenizer

# words remembered by a process, 220 bytes each, and the bytes of their texts
MOST_WORDS = 2**18
MOST_WORD_BYTES = 2**25
KEPT_SHARE = 0.5  # of them, when there are more: those that were met most often
NEW_CHARS = 2**16  # of new words, given to tokenizers at a time

# stands before and behind each text while words are cut: no byte of UTF-8
_END = b"\xff"
_MARKS = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_TO_LOWER = bytes(range(256)).lower()


class WordEncoder:
    """Ids of texts, by the words that they are made of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` encodes new words. Raises UnknownStructure."""
        self._tokenizer = tokenizer
        self._rules = rules_of(tokenizer)
        self._known = _KnownWords()
        self._new = _NewWords(tokenizer, self._rules)
        self._characters = KnownCharacters(tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end [T] uint32, tokens per text [D] int64)."""
        # such a token may lie over several words
        if any(token in text for token in self._rules.added for text in texts):
            return ids_of_each(self._tokenizer, texts)

        # U different words, N in all
        cut = _cut(texts, self._rules, self._characters)
        found = cut.words_N.dictionary_encode()
        # to_numpy would load pandas
        index_N = np.frombuffer(found.indices.buffers()[1], np.int32)[: len(cut.words_N)]
        numbers_U = self._numbers(found.dictionary.to_pylist())
        self._known.count(numbers_U, index_N)
        numbers_N = numbers_U[index_N]

        lengths_N = self._known.lengths_W[numbers_N]
        ids_T = self._known.ids[_places(self._known.starts_W[numbers_N], lengths_N)]
        self._known = self._known.shrunk()
        ends_N1 = np.concatenate([[0], np.cumsum(lengths_N)])
        return ids_T, np.diff(ends_N1[cut.ends_D], prepend=0)

    def _numbers(self, words_U: list[bytes]) -> np.ndarray:
        """The numbers of words among the known ones, which new ones join."""
        numbers = self._known.numbers
        new = [word for word in words_U if word not in numbers]
        if new:
            self._known.add(new, *self._new.encode(new))
        return np.fromiter(map(numbers.__getitem__, words_U), np.int64, count=len(words_U))


class WordCounter:
    """Counts the words of texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UnknownStructure."""
        self._rules = rules_of(tokenizer)
        self._characters = KnownCharacters(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Each different word and how often it is there."""
        found = _cut(texts, self._rules, self._characters).words_N.value_counts()
        words = found.field("values").to_pylist()
        counts = found.field("counts").to_pylist()
        for word, count in zip(words, counts, strict=True):
            yield word.decode("utf-8"), count


class _KnownWords:
    """The ids of words that were met before, bounded. W words."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.ids = np.zeros(0, np.uint32)  # of all words, end to end
        self.starts_W = np.zeros(0, np.int64)
        self.lengths_W = np.zeros(0, np.int64)
        self._met_W = np.zeros(0, np.int64)
        self._bytes = 0

    def add(self, words: Sequence[bytes], ids: np.ndarray, lengths: np.ndarray) -> None:
        """New words with their ids end to end."""
        first = len(self.numbers)
        self.numbers.update(zip(words, range(first, first + len(words)), strict=True))
        starts = np.cumsum(lengths) - lengths + len(self.ids)
        self.starts_W = np.concatenate([self.starts_W, starts])
        self.lengths_W = np.concatenate([self.lengths_W, lengths])
        self._met_W = np.concatenate([self._met_W, np.zeros(len(words), np.int64)])
        self.ids = np.concatenate([self.ids, ids])
        self._bytes += sum(map(len, words))

    def count(self, numbers_U: np.ndarray, index_N: np.ndarray) -> None:
        """These words were met so often."""
        self._met_W[numbers_U] += np.bincount(index_N, minlength=len(numbers_U))

    def shrunk(self) -> _KnownWords:
        """Without the words that were met least, where there are too many."""
        if len(self.numbers) <= MOST_WORDS and self._bytes <= MOST_WORD_BYTES:
            return self
        words = list(self.numbers)
        bytes_W = np.fromiter(map(len, words), np.int64, count=len(words))
        order = np.argsort(-self._met_W, kind="stable")[: int(MOST_WORDS * KEPT_SHARE)]
        kept = order[np.cumsum(bytes_W[order]) <= MOST_WORD_BYTES * KEPT_SHARE]
        fewer = _KnownWords()
        lengths = self.lengths_W[kept]
        places = _places(self.starts_W[kept], lengths)
        fewer.add([words[number] for number in kept.tolist()], self.ids[places], lengths)
        # halved, so that words of long ago give way at last
        fewer._met_W = self._met_W[kept] // 2
        return fewer


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of stretches, one after another: starts 5 0, lengths 2 3 -> 5 6 0 1 2."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)


class _NewWords:
    """Ids of words that were not met before."""

    def __init__(self, tokenizer: Tokenizer, rules: WordRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._model = tokenizer.model

    def encode(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all words end to end, tokens per word [W] int64)."""
        is_plain_W = _printable_ascii(words)
        if self._rules.plain is None:
            is_plain_W[:] = False
        plain = list(compress(words, is_plain_W.tolist()))
        others = [word.decode("utf-8") for word in compress(words, (~is_plain_W).tolist())]

        # normalizer and pre-tokenizer take longer than the model, and do nothing else to plain words
        found = list(map(self._model.tokenize, self._ready(plain)))
        plain_lengths = np.fromiter(map(len, found), np.int64, count=len(found))
        plain_ids = [token.id for token in chain.from_iterable(found)]
        other_ids, other_lengths = ids_of_each(self._tokenizer, others)
        lengths_W = np.zeros(len(words), np.int64)
        lengths_W[is_plain_W] = plain_lengths
        lengths_W[~is_plain_W] = other_lengths
        is_plain_T = np.repeat(is_plain_W, lengths_W)
        ids_T = np.zeros(len(is_plain_T), np.uint32)
        ids_T[is_plain_T] = plain_ids
        ids_T[~is_plain_T] = other_ids
        return ids_T, lengths_W

    def _ready(self, plain: Sequence[bytes]) -> list[str]:
        """What the model sees of words of printable ASCII."""
        if not plain:
            return []
        # all at once, since a step of Python for each word takes as long as a third of the model
        joined = b" ".join(plain)
        if self._rules.plain == "lower":
            joined = joined.lower()
        text = self._rules.prefix + joined.decode("ascii").replace(" ", " " + self._rules.prefix)
        return text.split(" ")


def _printable_ascii(words: Sequence[bytes]) -> np.ndarray:
    """Which words have nothing but printable ASCII, bool [W]; no word is empty."""
    data = np.frombuffer(b"".join(words), np.uint8)
    ends = np.cumsum(np.fromiter(map(len, words), np.int64, count=len(words)))
    others = np.flatnonzero((data < 33) | (data > 126))
    is_printable_W = np.ones(len(words), bool)
    is_printable_W[np.searchsorted(ends, others, side="right")] = False
    return is_printable_W


def ids_of_each(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all texts end to end [T] uint32, tokens per text [D] int64): each as if it were alone."""
    ids = [np.zeros(0, np.uint32)]
    lengths = [np.zeros(0, np.int64)]
    for batch in by_chars(texts, most_chars=NEW_CHARS):
        # one list of texts costs half of as many texts: each has no objects of its own
        found = tokenizer.encode(batch, is_pretokenized=True, add_special_tokens=False)
        ids.append(np.array(found.ids, np.uint32))
        text_of = np.array(found.word_ids, np.int64)
        lengths.append(np.bincount(text_of, minlength=len(batch)))
    return np.concatenate(ids), np.concatenate(lengths)


@dataclass(frozen=True, kw_only=True)
class _CutTexts:
    """The words of some texts."""

    words_N: pyarrow.BinaryArray
    ends_D: np.ndarray  # words up to the end of each text


def _cut(texts: Sequence[str], rules: WordRules, characters: KnownCharacters) -> _CutTexts:
    """Texts into words.

    ? t h e   c a t . ?        ? is _END
    1 0 0 0 1 0 0 0 0 1        gap
      ^       ^     ^          begins, where marks stand alone
    """
    import pyarrow

    # more at the end, since a character is looked at by three bytes
    encoded = [text.encode("utf-8") for text in texts]
    joined = _END + _END.join(encoded) + 3 * _END
    is_gap = _marked(joined, rules.spaces + _END)
    if rules.between_known:
        is_gap = is_gap & ~_unknown_spaces(joined, rules.spaces, characters)
    begins = ~is_gap
    breaks = is_gap[:-1]
    if rules.marks_alone:
        is_mark = _marked(joined, _MARKS)
        breaks = breaks | is_mark[:-1] | is_mark[1:]
    begins[1:] &= breaks

    # words end to end, the gaps left out
    if rules.lowercase:
        joined = joined.translate(_TO_LOWER)
    data = np.frombuffer(joined, np.uint8)[~is_gap]
    starts_N1 = np.append(np.flatnonzero(begins[~is_gap]), len(data)).astype(np.int32)
    words_N = pyarrow.Array.from_buffers(
        pyarrow.binary(),
        len(starts_N1) - 1,
        [None, pyarrow.py_buffer(starts_N1), pyarrow.py_buffer(data)],
    )
    ends_D = np.cumsum([len(text) + 1 for text in encoded])
    return _CutTexts(words_N=words_N, ends_D=np.searchsorted(np.flatnonzero(begins), ends_D))


def _marked(data: bytes, which: bytes) -> np.ndarray:
    """Which bytes are among these, bool."""
    table = bytes(byte in which for byte in range(256))
    return np.frombuffer(data.translate(table), bool)


def _unknown_spaces(data: bytes, spaces: bytes, characters: KnownCharacters) -> np.ndarray:
    """Which bytes are spaces in a run that does not lie between two known characters, bool."""
    is_space = _marked(data, spaces)
    # R runs, each from an edge to the next: _END is no space
    edges = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    begins_R = edges[::2]
    ends_R = edges[1::2]
    codes = np.frombuffer(data, np.uint8)
    is_known_R = characters(_before(codes, begins_R)) & characters(_behind(codes, ends_R))

    # + 1 where an unknown run begins, - 1 where it ends
    steps = np.zeros(len(codes), np.int8)
    steps[begins_R[~is_known_R]] = 1
    steps[ends_R[~is_known_R]] = -1
    return np.cumsum(steps, dtype=np.int8).astype(bool)


def _before(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The code points of the characters that end at these places of UTF-8; 0 for those of four bytes."""
    last, middle, first = (data[places - back].astype(np.int64) for back in (1, 2, 3))
    two = (middle & 0x1F) << 6 | last & 0x3F
    three = (first & 0x0F) << 12 | (middle & 0x3F) << 6 | last & 0x3F
    is_two = middle >= 0xC0
    is_three = (first >= 0xE0) & (first < 0xF0)
    return np.select([last < 0x80, is_two & (last < 0xC0), is_three], [last, two, three], 0)


def _behind(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The code points of the characters that begin at these places of UTF-8; 0 for those of four bytes."""
    first, middle, last = (data[places + on].astype(np.int64) for on in (0, 1, 2))
    two = (first & 0x1F) << 6 | middle & 0x3F
    three = (first & 0x0F) << 12 | (middle & 0x3F) << 6 | last & 0x3F
    return np.select([first < 0x80, first < 0xE0, first < 0xF0], [first, two, three], 0)
