"""Words by numpy have the pieces that the Unigram model of tokenizers gives, whatever its scores."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep import viterbi
from data_prep.viterbi import Viterbi, viterbi_of
from data_prep.word_rules import rules_of

MARK = "\u2581"
UNKNOWN = "\uffff0\uffff"
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# equal sums everywhere, sums that round, and sums in which small scores vanish
SCORES = {
    "all alike": lambda chance: -1.0,
    "zero": lambda chance: chance.choice([0.0, -0.0]),
    "tenths": lambda chance: -chance.randint(1, 30) / 10,
    "many digits": lambda chance: -chance.random() * 17,
    "large and small": lambda chance: chance.choice([-1e16, -1.0, -2.0, 1e-9, 3.0]),
    "by letters": None,
}
ALPHABETS = ("ab", "abcXYZ", "the!.-_()=09")


def made(vocabulary: Sequence[tuple[str, float]], *, lead: bool, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(UNKNOWN, 0.0), *vocabulary], 0))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    metaspace = pre_tokenizers.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lead:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, metaspace])
    return tokenizer


def drawn(chance: random.Random, scores: str, alphabet: str) -> list[tuple[str, float]]:
    """Pieces of one to nine letters, with some twice, empty ones, and some with a mark."""
    pieces = [*alphabet, *alphabet.lower(), MARK, ""]
    for _ in range(chance.choice([0, 3, 60, 600])):
        piece = "".join(chance.choices(alphabet, k=chance.randint(1, 9)))
        pieces.append(chance.choice(["", "", MARK, "é", MARK + MARK]) + piece)
    draw = SCORES[scores] or (lambda _: -1.0)
    by_letters = SCORES[scores] is None
    return [(piece, -float(len(piece)) if by_letters else draw(chance)) for piece in pieces]


def words_of(chance: random.Random, alphabet: str) -> list[str]:
    longest = chance.choice([3, 12, 40, 256])
    return ["".join(chance.choices(alphabet, k=chance.randint(1, longest))) for _ in range(60)] + [
        alphabet[0] * longest,
        alphabet[0],
    ]


def found_by(found: Viterbi, words: Sequence[str]) -> list[list[int]]:
    """The ids of each word."""
    data = np.frombuffer("".join(words).encode("ascii"), np.uint8)
    lengths = np.array([len(word) for word in words])
    ends = np.cumsum(lengths)
    assert found.takes(data, ends).all()
    ids, counts = found.encode(data, ends - lengths, lengths)
    assert ids.dtype == np.uint32
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def wanted(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(word, add_special_tokens=False).ids for word in words]


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("scores", SCORES)
def test_pieces_are_those_of_the_library(scores, alphabet, monkeypatch):
    chance = random.Random(f"{scores} {alphabet}")
    for number in range(4):
        # one block, and several
        monkeypatch.setattr(viterbi, "MOST_PLACES", chance.choice([2**16, 4000]))
        lead = bool(number % 2)
        lowercase = bool(number // 2 % 2)
        tokenizer = made(drawn(chance, scores, alphabet), lead=lead, lowercase=lowercase)
        words = words_of(chance, alphabet)
        found = viterbi_of(tokenizer, rules_of(tokenizer))
        assert found_by(found, words) == wanted(tokenizer, words)


@few
@given(
    st.lists(st.tuples(st.text("abc", max_size=12), st.floats(-30, 5)), max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=40), min_size=1, max_size=20),
)
def test_pieces_of_any_scores_are_those_of_the_library(pieces, words):
    singles = [(letter, -9.5) for letter in "abc"]
    tokenizer = made([*singles, (MARK, -3.0), *pieces], lead=True, lowercase=False)
    found = viterbi_of(tokenizer, rules_of(tokenizer))
    assert found_by(found, words) == wanted(tokenizer, words)


def test_only_words_of_known_letters_are_taken():
    tokenizer = made([("a", -1.0), ("b", -1.0), ("ac", -1.0)], lead=False, lowercase=False)
    found = viterbi_of(tokenizer, rules_of(tokenizer))
    words = [b"ab", b"ac", "ä".encode(), b"B", b"a", b"a" * 257, b"a b", b"b" * 256]
    ends = np.cumsum([len(word) for word in words])
    takes = found.takes(np.frombuffer(b"".join(words), np.uint8), ends)
    # c is no piece by itself, which would make it unknown on some paths
    assert takes.tolist() == [True, False, False, False, True, False, False, True]


def test_large_letters_are_small_ones_to_a_model_in_lower_case():
    tokenizer = made([("a", -1.0), ("A", -1.0)], lead=False, lowercase=True)
    found = viterbi_of(tokenizer, rules_of(tokenizer))
    assert found_by(found, ["aA"]) == [[1, 1]]


@pytest.mark.parametrize(
    "vocabulary",
    [
        # no ASCII, no mark by itself, scores whose sums are no numbers, and a piece that is too long
        [("é", -1.0)],
        [("a", -1.0), (MARK + "a", -1.0)],
        [("a", -1e308), (MARK, -1.0)],
        [("a", -1.0), (MARK, -1.0), ("b" * 256, -1.0)],
    ],
)
def test_models_that_the_library_has_to_read_are_left_to_it(vocabulary):
    tokenizer = made(vocabulary, lead=True, lowercase=False)
    assert viterbi_of(tokenizer, rules_of(tokenizer)) is None


def test_a_model_whose_unknown_piece_is_ascii_is_left_to_the_library():
    """Neighbours that are unknown become one."""
    tokenizer = Tokenizer(models.Unigram([("u", 0.0), ("a", -1.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert tokenizer.encode("uua").ids == [0, 1]
    assert viterbi_of(tokenizer, rules_of(tokenizer)) is None


def test_a_trie_that_takes_too_much_memory_is_not_made(monkeypatch):
    tokenizer = made([("a", -1.0)], lead=False, lowercase=False)
    assert viterbi_of(tokenizer, rules_of(tokenizer))
    monkeypatch.setattr(viterbi, "MOST_TABLE_ENTRIES", 1)
    assert viterbi_of(tokenizer, rules_of(tokenizer)) is None
    word_piece = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert viterbi_of(word_piece, rules_of(word_piece)) is None
