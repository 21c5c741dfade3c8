"""Counts of words in bounded memory: exact where all have room, else a fair part of the rare ones."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from data_prep import counted_words
from data_prep.counted_words import WORD_BYTES, count_words

FREQUENT = [(f"word{number:04}", 1000 + number) for number in range(100)]
RARE = [(f"rare{number:06}", 1) for number in range(20_000)]


def test_words_that_all_have_room_are_counted_exactly():
    words = [("the", 2), ("cat", 1), ("the", 3)]
    counted = count_words(words, most_chars=6)
    assert counted.counts == {"the": 5, "cat": 1}
    assert counted.is_whole and counted.met == 2


def test_frequent_words_stay_and_rare_ones_count_for_each_other():
    counted = count_words([*FREQUENT, *RARE], most_chars=10_800)
    assert not counted.is_whole and counted.met == 20_100
    assert 10_790 < sum(map(len, counted.counts)) <= 10_800
    rare = {word: count for word, count in counted.counts.items() if word.startswith("rare")}
    assert dict(FREQUENT) == {word: n for word, n in counted.counts.items() if word not in rare}
    # 1,000 of them for 20,000: T is 20, give or take what chance does
    assert len(rare) == 1000 and len({*rare.values()}) == 1
    assert sum(rare.values()) == pytest.approx(20_000, rel=0.1)


def test_the_same_words_stay_in_whatever_order_they_come():
    words = [*FREQUENT, *RARE]
    first = count_words(words, most_chars=10_000)
    random.Random(1).shuffle(words)
    assert count_words(words, most_chars=10_000) == first


def test_endlessly_many_words_are_counted_in_bounded_memory(monkeypatch):
    most = 3000 * WORD_BYTES
    monkeypatch.setattr(counted_words, "MOST_COUNTED_BYTES", most)
    real = counted_words._kept

    def watched(counts, *, most_chars):
        assert sum(WORD_BYTES + 2 * len(word) for word in counts) < most + WORD_BYTES + 100
        return real(counts, most_chars=most_chars)

    monkeypatch.setattr(counted_words, "_kept", watched)
    counted = count_words([*RARE, *FREQUENT], most_chars=8000)
    # those of the beginning and of the end are kept alike
    kept = Counter(int(word[4:]) // 10_000 for word in counted.counts if word.startswith("rare"))
    assert not counted.is_whole and kept[0] == pytest.approx(kept[1], rel=0.2)
    assert dict(FREQUENT).items() <= counted.counts.items()


def test_a_word_as_long_as_the_text_is_cut(monkeypatch):
    monkeypatch.setattr(counted_words, "LONGEST_WORD", 50)
    long = "".join(chr(0x4E00 + number) for number in range(2000))
    counted = count_words([(long, 1), *FREQUENT], most_chars=1000)
    assert not counted.is_whole and counted.counts.keys() >= dict(FREQUENT).keys()
    # some of its parts have the room that is left
    rest = counted.counts.keys() - dict(FREQUENT).keys()
    assert rest and all(part in long and len(part) == 50 for part in rest)
