"""Pieces of a Unigram model: sums and best segmentations as by hand, and pieces as good as the library's."""

from __future__ import annotations

import math
import random
from collections import defaultdict

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_prep import unigram_training
from data_prep.unigram_training import learn_pieces
from tests.helpers.prep import texts

WORDS = {"abab": 3, "aba": 5, "bab": 2, "b": 1, "abc": 4}


def segmentations(word: str, pieces: dict[str, float]):
    """All of them, as lists of pieces."""
    if not word:
        yield []
    for length in range(1, len(word) + 1):
        if word[:length] in pieces:
            for rest in segmentations(word[length:], pieces):
                yield [word[:length], *rest]


def parts():
    """(words as columns, their pieces, names of those, hits)."""
    words = unigram_training._columns_of(WORDS)
    pieces = unigram_training._seeds(words, least_count=2)
    order = np.argsort(-pieces.lengths_P, kind="stable")
    names = [""] * len(order)
    found = unigram_training._texts_of(unigram_training._letters_of(words, pieces, order))
    for place, name in zip(order, found, strict=True):
        names[place] = name
    return words, pieces, names, unigram_training._hits(words.letters, pieces.hashes_P)


def test_seeds_are_the_substrings_that_words_hold_twice():
    _, pieces, names, _ = parts()
    counts = defaultdict(int)
    for word, count in WORDS.items():
        for begin in range(len(word)):
            for end in range(begin + 1, len(word) + 1):
                counts[word[begin:end]] += count
    wanted = {name: count * len(name) for name, count in counts.items()}
    total = sum(wanted.values())
    found = dict(zip(names, pieces.logs_P, strict=True))
    assert found == pytest.approx({name: math.log(n / total) for name, n in wanted.items()})


def test_expected_counts_are_those_over_all_segmentations():
    words, pieces, names, hits = parts()
    logs = dict(zip(names, pieces.logs_P, strict=True))
    wanted = defaultdict(float)
    for word, count in WORDS.items():
        ways = list(segmentations(word, logs))
        chances = [math.exp(sum(logs[piece] for piece in way)) for way in ways]
        for way, chance in zip(ways, chances, strict=True):
            for piece in way:
                wanted[piece] += count * chance / sum(chances)
    expected_P = unigram_training._expected(hits, pieces, words.counts_W)
    # the order of sums differs
    assert dict(zip(names, expected_P, strict=True)) == pytest.approx(dict(wanted), rel=1e-12)


def test_best_segmentations_are_the_most_probable_ones():
    words, pieces, names, hits = parts()
    logs = dict(zip(names, pieces.logs_P, strict=True))
    paths = unigram_training._paths(hits, pieces.logs_P)
    for row, word in enumerate(sorted(WORDS, key=lambda word: (-len(word), word))):
        best = max(segmentations(word, logs), key=lambda way: sum(logs[piece] for piece in way))
        # from the end
        assert [names[number] for number in paths.ids[paths.rows == row]] == best[::-1]


def counted() -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for text in texts(400, longest=60):
        for word in text.split():
            counts["\u2581" + word] += 1
    # endings and compounds, as words of a language have them
    draw = random.Random(3)
    stems = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(300)]
    for _ in range(6000):
        word = draw.choice(stems) + draw.choice(["", "s", "ing", "er"])
        counts["\u2581" + word] += 1
    return dict(counts)


def test_the_order_of_words_changes_no_digit():
    words = list(counted().items())
    first = learn_pieces(dict(words), wanted=300)
    random.Random(1).shuffle(words)
    assert learn_pieces(dict(words), wanted=300) == first
    assert len(first) == 300 and len({piece for piece, _ in first}) == 300


def test_pieces_are_as_good_as_the_librarys():
    counts = counted()
    ours = Tokenizer(models.Unigram([("<unk>", 0.0), *learn_pieces(counts, wanted=399)], 0, False))
    theirs = Tokenizer(models.Unigram())
    theirs.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator(((word + "\n") * n for word, n in counts.items()), trainer)
    # they differ by 1 in 100 either way on such words, and by 4 in ours' favour on text
    tokens = [
        sum(n * len(side.encode(word).ids) for word, n in counts.items()) for side in (ours, theirs)
    ]
    assert tokens[0] <= 1.02 * tokens[1]


def test_all_letters_stay_and_long_words_are_cut():
    words = {"\u2581" + "ab" * 5000: 2, "\u2581é": 1, "\u2581cat": 9}
    learned = learn_pieces(words, wanted=40)
    pieces = dict(learned)
    assert {"\u2581", "a", "b", "é", "c", "t"} <= pieces.keys()
    assert all(len(piece) <= unigram_training.MOST_LETTERS for piece in pieces)
    assert all(math.isfinite(log) and log < 0 for log in pieces.values())


def test_what_is_in_one_word_that_stands_for_others_is_no_piece():
    pieces = [piece for piece, _ in learn_pieces({"abcd": 7, "xyzz": 100}, wanted=30, least=7)]
    assert "abcd" not in pieces and "xyzz" in pieces


def test_names_of_special_tokens_are_not_learned():
    words = {"<a>": 1000, "bc": 10}
    assert "<a>" in dict(learn_pieces(words, wanted=20))
    assert "<a>" not in dict(learn_pieces(words, wanted=20, without={"<a>"}))


def test_no_words_give_no_pieces():
    assert learn_pieces({}, wanted=10) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wanted", [5, 9, 1000])
def test_more_letters_than_pieces_all_stay_and_the_rest_goes(wanted):
    letters = [chr(0x4E00 + number) for number in range(3000)]
    words = {"\u2581" + letter * 2: 3 for letter in letters}
    learned = [piece for piece, _ in learn_pieces(words, wanted=wanted)]
    assert sorted(learned) == sorted(["\u2581", *letters])


def test_names_that_are_taken_out_leave_as_many_pieces_as_wanted():
    words = {**counted(), "<a>": 9000, "[B]": 9000}
    for wanted in (40, 60, 300):
        learned = learn_pieces(words, wanted=wanted, without={"<a>", "[B]"})
        assert len(learned) == wanted
