"""Text to ids word by word: each different word is encoded once by tokenizers, and remembered.

    text     The cat. The dog.      words   the cat . the dog .      given to tokenizers   the cat . dog

A word is here a stretch of text between two places over which no rule of the tokenizer looks (word_rules.py). So the ids
of a text are those of its words, end to end. Words are cut and counted in bulk, as bytes of UTF-8. Words of printable
ASCII are not remembered where the model is Unigram: numpy finds their pieces faster (viterbi.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING

import numpy as np

from data_prep.long_texts import by_chars
from data_prep.viterbi import viterbi_of
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
        self._viterbi = viterbi_of(tokenizer, self._rules)
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
        ids, lengths_U = self._ids_of_words(found.dictionary, index_N)

        starts_U = np.cumsum(lengths_U) - lengths_U
        lengths_N = lengths_U[index_N]
        ids_T = ids[_places(starts_U[index_N], lengths_N)]
        ends_N1 = np.concatenate([[0], np.cumsum(lengths_N)])
        return ids_T, np.diff(ends_N1[cut.ends_D], prepend=0)

    def _ids_of_words(
        self, words_U: pyarrow.BinaryArray, index_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids of different words end to end uint32, tokens per word [U] int64); index_N: those that were met."""
        if self._viterbi is None or not len(words_U):
            return self._remembered(words_U.to_pylist(), np.bincount(index_N))

        _, offsets, data = words_U.buffers()
        offsets_U1 = np.frombuffer(offsets, np.int32)[: len(words_U) + 1].astype(np.int64)
        letters = np.frombuffer(data, np.uint8)[: offsets_U1[-1]]
        takes_U = self._viterbi.takes(letters, offsets_U1[1:])
        # so fast that remembering them would take longer
        ids, lengths = self._viterbi.encode(
            letters, offsets_U1[:-1][takes_U], np.diff(offsets_U1)[takes_U]
        )
        others = np.flatnonzero(~takes_U)
        if not len(others):
            return ids, lengths
        places = zip(offsets_U1[others].tolist(), offsets_U1[others + 1].tolist(), strict=True)
        other_words = [letters[begin:end].tobytes() for begin, end in places]
        remembered = self._remembered(other_words, np.bincount(index_N)[others])
        return _merged(takes_U, (ids, lengths), remembered)

    def _remembered(self, words: list[bytes], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids of different words end to end uint32, tokens per word int64); times: how often each was met."""
        known = self._known
        new = [word for word in words if word not in known.numbers]
        if new:
            known.add(new, *self._new.encode(new))
        numbers = np.fromiter(map(known.numbers.__getitem__, words), np.int64, count=len(words))
        known.count(numbers, times)
        lengths = known.lengths_W[numbers]
        ids = known.ids[_places(known.starts_W[numbers], lengths)]
        self._known = known.shrunk()
        return ids, lengths


class WordCounter:
    """Counts the words of texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UnknownStructure."""
        self._rules = rules_of(tokenizer)
        self._characters = KnownCharacters(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Each different word and how often it is there."""
        for word, count in counts_of(_cut(texts, self._rules, self._characters).words_N):
            yield word.decode("utf-8"), count


def counts_of(words_N: pyarrow.BinaryArray) -> Iterator[tuple[bytes, int]]:
    """Each different word and how often it is there."""
    found = words_N.value_counts()
    yield from zip(
        found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True
    )


def words_at(data: np.ndarray, begins: np.ndarray) -> pyarrow.BinaryArray:
    """The words that lie end to end in `data`, uint8; begins: bool, at the first byte of each."""
    import pyarrow

    starts_N1 = np.append(np.flatnonzero(begins), len(data)).astype(np.int32)
    return pyarrow.Array.from_buffers(
        pyarrow.binary(),
        len(starts_N1) - 1,
        [None, pyarrow.py_buffer(starts_N1), pyarrow.py_buffer(data)],
    )


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

    def count(self, numbers: np.ndarray, times: np.ndarray) -> None:
        """These words, each different, were met so often."""
        self._met_W[numbers] += times

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
        return _merged(
            is_plain_W,
            (np.array(plain_ids, np.uint32), plain_lengths),
            (other_ids, other_lengths),
        )

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


def _merged(
    is_first_W: np.ndarray,
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all words end to end [T] uint32, tokens per word [W] int64), from those of the ones and the others."""
    lengths_W = np.zeros(len(is_first_W), np.int64)
    lengths_W[is_first_W] = first[1]
    lengths_W[~is_first_W] = second[1]
    is_first_T = np.repeat(is_first_W, lengths_W)
    ids_T = np.zeros(len(is_first_T), np.uint32)
    ids_T[is_first_T] = first[0]
    ids_T[~is_first_T] = second[0]
    return ids_T, lengths_W


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
    # more at the end, since a character is looked at by three bytes
    encoded = [text.encode("utf-8") for text in texts]
    joined = _END + _END.join(encoded) + 3 * _END
    is_gap = _marked(joined, rules.spaces + _END)
    if rules.between_known:
        is_gap = is_gap.copy()
        is_gap[_unknown_spaces(joined, rules.spaces, characters)] = False
    begins = ~is_gap
    breaks = is_gap[:-1]
    if rules.marks_alone:
        is_mark = _marked(joined, _MARKS)
        breaks = breaks | is_mark[:-1] | is_mark[1:]
    begins[1:] &= breaks

    # words end to end, the gaps left out
    if rules.lowercase:
        joined = joined.translate(_TO_LOWER)
    words_N = words_at(np.frombuffer(joined, np.uint8)[~is_gap], begins[~is_gap])
    ends_D = np.cumsum([len(text) + 1 for text in encoded])
    return _CutTexts(words_N=words_N, ends_D=np.searchsorted(np.flatnonzero(begins), ends_D))


def _marked(data: bytes, which: bytes) -> np.ndarray:
    """Which bytes are among these, bool."""
    table = bytes(byte in which for byte in range(256))
    return np.frombuffer(data.translate(table), bool)


def _unknown_spaces(data: bytes, spaces: bytes, characters: KnownCharacters) -> np.ndarray:
    """Places of spaces in a run that does not lie between two known characters."""
    is_space = _marked(data, spaces)
    # R runs, each from an edge to the next: _END is no space
    edges = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    begins_R = edges[::2]
    ends_R = edges[1::2]
    codes = np.frombuffer(data, np.uint8)

    # most lie between ASCII, which a table tells faster
    is_known_byte = np.zeros(256, bool)
    is_known_byte[:128] = characters(np.arange(128))
    others = np.flatnonzero(~(is_known_byte[codes[begins_R - 1]] & is_known_byte[codes[ends_R]]))
    begins = begins_R[others]
    ends = ends_R[others]
    is_known = characters(_before(codes, begins)) & characters(_behind(codes, ends))
    begins = begins[~is_known]
    return _places(begins, ends[~is_known] - begins)


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
