"""Pairs of sentences: the fact sheet's cases, a slow twin of sentence lists, and what a window of them promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from encoder.base.objective import LEAST_PAIR_TOKENS, PairRule
from encoder.base.rng import generator
from encoder.data.pairs import WindowSentences, pairs_of
from encoder.data.sentences import SentenceLists
from encoder.data.shards import open_source
from encoder.data.windows import GOES_ON, Windows
from encoder.objectives.catalog import OBJECTIVES, build_objective
from tests.helpers import memory_source
from tests.helpers.loading import held_out_with, windows_with
from tests.helpers.shards import random_documents, write_sentences, write_source
from tests.reference.sentence_pairs import sentence_pairs

NSP = PairRule(label_1="random", short_share=0.0)
SOP = PairRule(label_1="swapped", short_share=0.0)


class Said:
    """Chance that says what it is told: the same number for all documents of a turn."""

    def __init__(self, *, splits=(), coins=(), partners=(), firsts=()) -> None:
        self.splits, self.coins = list(splits), list(coins)
        self.others = [partners, firsts]
        self.asked = 0

    def random(self, count):
        self.asked += 1
        return np.full(count, 1.0 if self.asked == 1 else self.coins.pop(0))

    def integers(self, low, high, count=None):
        if count is not None and low == 2:
            return np.full(count, low)
        if low == 1:
            return np.full(len(high), self.splits.pop(0))
        said = self.others[0 if count is not None else 1]
        number = said[0] if said else 0
        return np.full(count if count is not None else len(high), number)

    def binomial(self, dropped, share):
        assert share == 0.5
        return np.zeros_like(dropped)


def text_of(*documents: list[int]) -> WindowSentences:
    counts = [len(sentences) for sentences in documents]
    lists = SentenceLists(
        np.concatenate([[0], np.cumsum(counts)]), np.array([n for d in documents for n in d])
    )
    return WindowSentences.joined([(0, np.arange(len(documents)), lists)])


def parts(pairs) -> list[tuple[tuple[int, int, int], tuple[int, int, int], int]]:
    """Of each pair (document, start, end) of both parts, and the label."""
    pieces = [tuple(piece[1:]) for piece in pairs.pieces_P4.tolist()]
    return list(zip(pieces[::2], pieces[1::2], pairs.label.tolist(), strict=True))


def test_a_chunk_is_cut_to_ten_tokens_as_in_the_fact_sheet():
    """families 2.2, case 1: sentences of 4, 3, 5, 6; A = 4, B = 3 + 5, two tokens off B; then the last sentence alone."""
    made = pairs_of(
        text_of([4, 3, 5, 6]), NSP, max_tokens=13, chance=Said(splits=[1, 1], coins=[0.9, 0.9])
    )
    assert parts(made)[0] == ((0, 1, 5), (0, 5, 11), 0)
    assert made.tokens[0] == 13
    # the second chunk has one sentence: its B is of another document, for want of one of the same
    assert parts(made)[1:] == [((0, 13, 19), (0, 1, 5), 1)]


def test_sentences_behind_a_random_next_are_read_again():
    """Case 1, random: B of another document until it has 6, and the next chunk begins at the second sentence."""
    text = text_of([4, 3, 5, 6], [2, 2, 5, 9])
    made = pairs_of(
        text, NSP, max_tokens=13, chance=Said(splits=[1] * 9, coins=[0.1] * 9, firsts=[1])
    )
    mine = [pair for pair in parts(made) if pair[0][0] == 0]
    assert mine[0] == ((0, 1, 5), (1, 3, 9), 1)
    assert [a[1] for a, _, _ in mine] == [1, 5, 8, 13]
    assert all(label == 1 for _, _, label in parts(made))


def test_ties_are_cut_at_the_second_part_first():
    """Case 2: A = 6, B = 6, ten tokens: 5 and 5; with eleven the second has lost one more."""
    for max_tokens, lengths in ((13, (5, 5)), (14, (6, 5))):
        made = pairs_of(
            text_of([6, 6]), NSP, max_tokens=max_tokens, chance=Said(splits=[1], coins=[0.9])
        )
        assert tuple(end - start for _, _, start, end in made.pieces_P4.tolist()) == lengths


def test_sentences_change_places_as_in_the_fact_sheet():
    """families 4.2: s1 s2 s3 with a = 1: label 0 is s1 | s2 s3, label 1 is s2 s3 | s1."""
    text = text_of([2, 3, 4])
    for coin, expected in ((0.9, ((0, 1, 3), (0, 3, 10), 0)), (0.1, ((0, 3, 10), (0, 1, 3), 1))):
        made = pairs_of(text, SOP, max_tokens=13, chance=Said(splits=[1], coins=[coin]))
        assert parts(made) == [expected]


def random_text(seed: int, *, sources: int = 2, documents: int = 40, longest: int = 9):
    """Documents of 0 to 12 sentences of several sources; and the same as lists of tokens."""
    rng = np.random.default_rng(seed)
    joined, lists = [], []
    for source in range(sources):
        counts = rng.integers(0, 13, documents)
        tokens = rng.integers(1, longest + 1, int(counts.sum()))
        starts = np.concatenate([[0], np.cumsum(counts)])
        numbers = rng.permutation(1000)[:documents]
        joined.append((source, numbers, SentenceLists(starts, tokens)))
        for number, first, end in zip(numbers.tolist(), starts[:-1], starts[1:]):
            place, sentences = 1, []
            for count in tokens[first:end].tolist():
                sentences.append([(source, number, place + i) for i in range(count)])
                place += count
            lists.append(sentences)
    return WindowSentences.joined(joined), lists


@pytest.mark.parametrize("label_1", ["random", "swapped"])
@pytest.mark.parametrize("max_tokens", [LEAST_PAIR_TOKENS, 13, 40, 500])
def test_pairs_are_those_of_sentence_lists(label_1, max_tokens):
    for seed in range(6):
        text, lists = random_text(seed)
        rule = PairRule(label_1=label_1, short_share=0.3)
        made = pairs_of(text, rule, max_tokens=max_tokens, chance=generator(seed, "pairs"))
        slow = sentence_pairs(
            lists,
            label_1=label_1,
            short_share=0.3,
            room=max_tokens - 3,
            chance=generator(seed, "pairs"),
        )
        pieces = [
            [(source, document, place) for place in range(start, end)]
            for source, document, start, end in made.pieces_P4.tolist()
        ]
        fast = list(zip(pieces[::2], pieces[1::2], made.label.tolist(), strict=True))
        assert fast == [pair for pairs in slow for pair in pairs]
        assert made.tokens.tolist() == [len(a) + len(b) + 3 for a, b, _ in fast]


def source_of(name: str, *, documents: int, seed: int, longest: int = 12):
    rng = np.random.default_rng(seed)
    sentences = [
        rng.integers(1, longest + 1, rng.integers(2, 20)).tolist() for _ in range(documents)
    ]
    return memory_source.of_sentences(name, sentences, shards=5)


def windows_of(sources, rule, **changes) -> Windows:
    settings = dict(
        weights=[1.0] * len(sources),
        seed=3,
        phase=0,
        max_tokens_per_document=32,
        row_tokens=64,
        window_documents=60,
        pairs=rule,
    )
    return windows_with(sources, **{**settings, **changes})


@pytest.mark.parametrize("rule", [NSP, SOP], ids=["nsp", "sop"])
def test_a_window_of_pairs_is_a_function_of_its_number(rule):
    sources = [source_of("a", documents=100, seed=1), source_of("b", documents=80, seed=2)]
    windows = windows_of(sources, rule)
    plans = [windows.plan(k) for k in (7, 3, 7)]
    assert np.array_equal(plans[0].pieces_P4, plans[2].pieces_P4)
    assert not np.array_equal(plans[0].pieces_P4, plans[1].pieces_P4)
    for plan in plans:
        assert plan.tokens_R.max() <= 64
        assert (plan.label_P[1::2] == GOES_ON).all() and (plan.label_P[::2] >= 0).all()
        assert (plan.row_starts_R1 % 2 == 0).all()
        lengths_P = plan.pieces_P4[:, 3] - plan.pieces_P4[:, 2]
        tokens = lengths_P.reshape(-1, 2).sum(axis=1) + 3
        assert lengths_P.min() >= 1 and tokens.max() <= 32
        sums = np.add.reduceat(tokens, plan.row_starts_R1[:-1] // 2)
        assert np.array_equal(sums, plan.tokens_R)


@pytest.mark.parametrize("rule", [NSP, SOP], ids=["nsp", "sop"])
def test_half_of_the_pairs_have_label_1(rule):
    """Coins, within three standard deviations: of first pairs, since later chunks may have one sentence and no choice."""
    text = text_of(*[[2] * 40] * 3000)
    made = pairs_of(text, rule, max_tokens=64, chance=generator(1, rule.label_1))
    first = np.unique(made.pieces_P4[::2, 1], return_index=True)[1]
    if rule is SOP:  # part A of a swapped pair is laid second, of the same document
        assert len(made.label) == 2 * 3000
    assert abs(made.label[first].mean() - 0.5) < 3 * 0.5 / 3000**0.5


def test_a_tenth_of_the_documents_has_shorter_pairs():
    """A target for a document: uniform from 2 to 61, so that 2 of 60 short ones look like the others."""
    text = text_of(*[[1] * 200] * 3000)
    rule = PairRule(label_1="swapped", short_share=0.1)
    made = pairs_of(text, rule, max_tokens=64, chance=generator(1, "short"))
    longest_D = np.zeros(3000)
    np.maximum.at(longest_D, made.pieces_P4[::2, 1], made.tokens)
    share = (longest_D < 64).mean()
    expected = 0.1 * 59 / 60
    assert abs(share - expected) < 3 * (expected * (1 - expected) / 3000) ** 0.5


def test_swapped_pairs_use_every_token_once_but_what_is_cut_off():
    """ALBERT: with chunks never longer than a pair and no chunk of one sentence each token is in one pair."""
    text = text_of(*[[2] * (10 * n) for n in range(1, 9)])
    made = pairs_of(text, SOP, max_tokens=23, chance=generator(5, "sop"))
    seen = Counter(
        (document, place)
        for _, document, start, end in made.pieces_P4.tolist()
        for place in range(start, end)
    )
    assert seen == {(d, place): 1 for d in range(8) for place in range(1, 20 * (d + 1) + 1)}


def test_random_pairs_begin_at_every_sentence_that_is_no_b_once():
    """BERT: the first parts and the B of label 0 of a document are all its sentences, once and in their order."""
    text, _ = random_text(3, sources=1)
    made = pairs_of(text, NSP, max_tokens=500, chance=generator(2, "nsp"))
    own: dict[int, list[tuple[int, int]]] = {}
    for (document, *a), (_, *b), label in parts(made):
        own.setdefault(document, []).append(tuple(a))
        own[document] += [tuple(b)] if label == 0 else []
    for document, stretches in own.items():
        place = int(np.flatnonzero(text.document_D == document)[0])
        first, end = text.starts_D1[place : place + 2]
        assert [s for s, _ in stretches] == [1, *(e for _, e in stretches[:-1])]
        assert stretches[-1][1] - 1 == text.before_N1[end] - text.before_N1[first]


def test_a_b_is_never_of_its_own_document_where_there_is_another():
    text, _ = random_text(4)
    made = pairs_of(text, NSP, max_tokens=20, chance=generator(2, "nsp"))
    pieces = made.pieces_P4.reshape(-1, 2, 4)
    same = (pieces[:, 0, :2] == pieces[:, 1, :2]).all(axis=1)
    assert np.array_equal(same, made.label == 0)
    alone = pairs_of(text_of([5], []), NSP, max_tokens=20, chance=generator(2, "nsp"))
    assert alone.label.tolist() == [1] and alone.pieces_P4.tolist() == [[0, 0, 1, 6]] * 2


def test_without_sentences_there_is_no_pair():
    made = pairs_of(text_of([], []), NSP, max_tokens=20, chance=generator(2, "nsp"))
    assert len(made.label) == 0 and made.pieces_P4.shape == (0, 4)


def test_a_lost_shard_takes_whole_pairs_and_moves_nothing_else():
    sources = [source_of("a", documents=100, seed=1), source_of("b", documents=80, seed=2)]
    whole = windows_of(sources, NSP).plan(2)
    lost = windows_of(sources, NSP, left_out=[(0, 1)]).plan(2)
    assert whole.rows == lost.rows and lost.tokens_R.sum() < whole.tokens_R.sum()
    first = int(sources[0].samples_per_shard[:1].sum())
    end = first + int(sources[0].samples_per_shard[1])
    for row in range(whole.rows):
        pairs = whole.pieces(row).reshape(-1, 2, 4)
        gone = (pairs[:, :, 0] == 0) & (pairs[:, :, 1] >= first) & (pairs[:, :, 1] < end)
        kept = pairs[~gone.any(axis=1)]
        assert np.array_equal(lost.pieces(row), kept.reshape(-1, 4))
        assert lost.tokens_R[row] == (kept[:, :, 3] - kept[:, :, 2]).sum() + 3 * len(kept)
        assert np.array_equal(lost.labels(row)[::2], whole.labels(row)[::2][~gone.any(axis=1)])


@pytest.mark.parametrize("name", ["mlm_nsp", "mlm_sop"])
def test_held_out_pairs_are_the_same_on_any_ranks(tmp_path, name):
    documents = random_documents(60, seed=9, longest=150)
    folder = write_source(tmp_path / "held", documents)
    write_sentences(folder, memory_source.sentences_of([len(ids) for ids in documents]))
    source = open_source(folder, name="held")
    masker = build_objective(OBJECTIVES[name](), vocab_size=64, specials=memory_source.SPECIALS)

    def held_out(rank: int, world_size: int):
        return held_out_with(
            source,
            rows=7,
            seed=3,
            max_tokens_per_document=32,
            row_tokens=64,
            masker=masker,
            rank=rank,
            world_size=world_size,
            micro_batch_rows=2,
            static_shapes=False,
        )

    def pairs_in(batches) -> Counter:
        found: Counter = Counter()
        for batch in batches:
            ends = batch.cu_seqlens_S1.tolist()
            labels = batch.targets[masker.terms[1]].value_M.tolist()
            ids = batch.ids_T.tolist()
            found.update((tuple(ids[a:b]), y) for a, b, y in zip(ends, ends[1:], labels))
        return found

    one = held_out(0, 1)
    every = [batch for rank in range(3) for batch in held_out(rank, 3)]
    term = masker.terms[1]
    assert pairs_in(one) == pairs_in(every)
    assert sum(b.tokens for b in one) > 6 * 50
    labels = [v for b in one for v in b.targets[term].value_M.tolist()]
    assert 0 < sum(labels) < len(labels)
