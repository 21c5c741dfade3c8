"""Exact numbers of predicted tokens, words, n-grams and spans: the rule of each family, counted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from encoder.base.errors import ConfigError
from encoder.base.rng import generator
from encoder.objectives.catalog import build_objective
from encoder.objectives.masking import Run, number_of, span_weights, take_runs
from encoder.objectives.mlm import MlmConfig
from encoder.objectives.words import WordEdges
from tests.reference.albert_masks import covered_by

V, UNK, CLS, SEP, PAD, MASK = 105, 100, 101, 102, 103, 104
SPECIALS = SimpleNamespace(mask_id=MASK, pad_id=PAD, all_special=(UNK, CLS, SEP, PAD, MASK))

BERT = {"mask_share": 0.15, "mask_count": "round", "random_tokens": "vocabulary"}
ROBERTA = {
    "mask_share": 0.15,
    "mask_count": "round_at_random",
    "mask_special_tokens": True,
    "random_tokens": "not_special",
}
MINIROBERTA = {
    "mask_share": 0.15,
    "mask_count": "floor",
    "count_special_tokens": False,
    "random_tokens": "vocabulary",
}
ELECTRA = {"mask_share": 0.15, "mask_count": "round", "random_share": 0.0, "keep_share": 0.15}
ALBERT = {**BERT, "spans": "ngram", "whole_words": True}


def edges_of(begins: np.ndarray) -> WordEdges:
    """Words that begin at the ids marked, and at special ones."""
    begins_V = np.ones(V, dtype=bool)
    open_V = np.ones(V, dtype=bool)
    begins_V[: len(begins)] = begins
    open_V[100:] = False
    return WordEdges(begins_V, open_V)


def objective(settings, **more):
    config = MlmConfig(**{**settings, **more})
    words = edges_of(np.arange(100) % 3 == 0) if config.whole_words else None
    return build_objective(config, vocab_size=V, specials=SPECIALS, words=words)


def row_of(lengths, seed=0):
    """Documents [CLS] ... [SEP] of these lengths."""
    random = np.random.default_rng(seed)
    return np.concatenate([[CLS, *random.integers(0, 100, n - 2), SEP] for n in lengths])


def counts_of(ask, lengths, seed):
    """Predicted tokens of each document."""
    row = ask.mask(row_of(lengths), generator(1, "a", seed), lengths=lengths)
    document_T = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(document_T[row.targets["mlm"].index], minlength=len(lengths))


def chi_square(seen, expected) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def test_the_number_is_berts_literally():
    """Fact sheet of the families 2.2, case 3: halves go to the even number, and each document has one."""
    lengths = [13, 3, 10, 30, 128, 512]
    for seed in range(20):
        assert counts_of(objective(BERT), lengths, seed).tolist() == [2, 1, 2, 4, 19, 77]
    most = objective(BERT, max_predicted_tokens=20)
    assert counts_of(most, lengths, 0).tolist() == [2, 1, 2, 4, 19, 20]


def test_the_number_is_fairseqs_literally():
    """Fact sheet 3.2: 15 of 100 always; 13 or 14 of 90, half of the time each."""
    ask = objective(ROBERTA)
    found = np.array([counts_of(ask, [100, 90], seed) for seed in range(800)])
    assert set(found[:, 0]) == {15} and set(found[:, 1]) == {13, 14}
    more = int((found[:, 1] == 14).sum())
    assert abs(more - 400) < 5 * math.sqrt(800 / 4)


def test_fairseqs_number_has_the_share_as_its_mean():
    random = generator(1, "numbers")
    for tokens in (7, 64, 511):
        drawn = np.array(
            [
                number_of("round_at_random", share=0.15, tokens=tokens, generator=random)
                for _ in range(4000)
            ]
        )
        low = math.floor(0.15 * tokens)
        assert set(drawn) <= {low, low + 1}
        assert abs(drawn.mean() - 0.15 * tokens) < 5 * 0.5 / math.sqrt(4000)


def test_the_number_is_minirobertas_literally():
    """int(0.15 n) of the tokens between the special ones; a short document has none."""
    lengths = [8, 9, 22, 128]
    assert counts_of(objective(MINIROBERTA), lengths, 0).tolist() == [0, 1, 3, 18]


def test_electra_hides_85_of_100_and_keeps_15_and_draws_no_place_twice():
    lengths = [128] * 200
    row = objective(ELECTRA).mask(row_of(lengths), generator(1, "a"), lengths=lengths)
    index, value = row.targets["mlm"]
    assert len(np.unique(index)) == len(index) == 19 * 200
    shown = row.ids[index]
    assert ((shown == MASK) | (shown == value)).all()
    hidden = int((shown == MASK).sum())
    assert abs(hidden - 0.85 * len(index)) < 5 * math.sqrt(len(index) * 0.85 * 0.15)


def test_roberta_masks_special_tokens_and_draws_none():
    lengths = [20] * 2000
    ask = objective(ROBERTA, random_share=1.0, keep_share=0.0)
    row = ask.mask(row_of(lengths), generator(1, "a"), lengths=lengths)
    index, value = row.targets["mlm"]
    assert {CLS, SEP} <= set(value)
    assert set(row.ids[index]) == set(range(100))


def test_berts_random_ids_are_of_the_whole_vocabulary():
    lengths = [20] * 2000
    ask = objective(BERT, random_share=1.0, keep_share=0.0)
    row = ask.mask(row_of(lengths), generator(1, "a"), lengths=lengths)
    index, value = row.targets["mlm"]
    assert set(row.ids[index]) == set(range(V)) and value.max() < 100


def test_every_place_of_a_document_is_drawn_equally_often():
    lengths = [22] * 2000
    row = objective(BERT).mask(row_of(lengths), generator(1, "a"), lengths=lengths)
    seen = np.bincount(row.targets["mlm"].index % 22, minlength=22)
    assert seen[0] == seen[-1] == 0 and seen.sum() == 3 * 2000
    # 19 degrees of freedom: above 50.8 once in 10^4
    assert chi_square(seen[1:-1], 3 * 2000 / 20) < 50.8


def test_a_document_is_masked_as_many_times_as_it_is_long_in_any_row():
    lengths = [5, 40, 3, 100, 17]
    whole = counts_of(objective(BERT), lengths, 0)
    alone = [int(counts_of(objective(BERT), [n], 0)[0]) for n in lengths]
    assert whole.tolist() == alone


def test_the_runs_are_those_of_the_worked_case():
    """Fact sheet 4.2: units of 1, 2, 1, 3 tokens, 3 to predict."""
    units = np.array([1, 2, 1, 3])

    def taken(order, sizes):
        return [*take_runs(units, np.array(order), np.array(sizes), 3)]

    assert taken([0, 1, 2, 3], [3, 1, 1, 1]) == [Run(0, 2)]
    assert taken([3, 0, 1, 2], [1, 1, 1, 1]) == [Run(3, 1)]
    assert taken([1, 0, 2, 3], [2, 1, 1, 1]) == [Run(1, 2)]


def test_the_runs_are_those_of_albert_s_code_on_lists():
    random = np.random.default_rng(5)
    for _ in range(500):
        lengths = random.integers(1, 5, random.integers(1, 30))
        order = random.permutation(len(lengths))
        sizes = np.minimum(random.integers(1, 4, len(lengths)), len(lengths) - order)
        number = int(random.integers(1, 12))
        ends = np.cumsum(lengths)
        units = [
            [*range(end - length, end)]
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]
        ours = [
            sum(units[run.first : run.first + run.units], [])
            for run in take_runs(lengths, order, sizes, number)
        ]
        assert ours == covered_by(units, order.tolist(), sizes.tolist(), number)
        assert sum(map(len, ours)) <= number


def test_n_grams_are_drawn_as_one_over_n():
    """6/11, 3/11, 2/11 over 10^5 draws, in documents with room for all of them."""
    choice = objective(ALBERT)._exact
    order = np.arange(1000)
    drawn = np.concatenate([choice._sizes(order, generator(1, i))[:-3] for i in range(101)])
    seen = np.bincount(drawn, minlength=4)[1:]
    assert seen.sum() > 10**5
    # 2 degrees of freedom: above 18.4 once in 10^4
    assert chi_square(seen, seen.sum() * np.array([6, 3, 2]) / 11) < 18.4
    near_end = choice._sizes(order, generator(2))[-2:]
    assert near_end[0] <= 2 and near_end[1] == 1


def test_spans_are_drawn_as_spanbert_draws_them():
    weights = span_weights("geometric", 10)
    assert weights / weights.sum() @ np.arange(1, 11) == pytest.approx(3.8, abs=0.01)
    assert weights[1] / weights[0] == pytest.approx(0.8)


@pytest.mark.parametrize("spans", ["ngram", "geometric"])
def test_spans_are_whole_words_and_never_too_many_tokens(spans):
    lengths = [60, 128, 3, 9]
    ask = objective(ALBERT, spans=spans)
    ids = row_of(lengths)
    word_T = edges_of(np.arange(100) % 3 == 0).words(ids)
    document_T = np.repeat(np.arange(4), lengths)
    for seed in range(200):
        index, _ = ask.mask(ids, generator(1, seed), lengths=lengths).targets["mlm"]
        asked = np.zeros(len(ids), dtype=bool)
        asked[index] = True
        ordinary = ids < 100
        of_word = np.bincount(word_T, weights=ordinary)
        got = np.bincount(word_T, weights=asked)
        assert ((got == 0) | (got == of_word)).all() and not asked[~ordinary].any()
        counts = np.bincount(document_T[index], minlength=4)
        assert (counts <= [9, 19, 1, 1]).all() and counts[1] >= 12


def test_a_geometric_span_is_shown_alike_and_an_n_gram_is_not():
    lengths = [128] * 60
    for spans, alike in (("geometric", True), ("ngram", False)):
        ask = objective({**BERT, "spans": spans, "random_share": 0.0, "keep_share": 0.5})
        ids = row_of(lengths)
        chosen = ask._exact.choose(ids, ids < 100, lengths, generator(1, "a"), share=0.15)
        row = ask.mask(ids, generator(1, "a"), lengths=lengths)
        index = row.targets["mlm"].index
        assert (index == chosen.index_M).all()
        hidden = row.ids[index] == MASK
        mixed = [len(set(hidden[chosen.run_M == run])) > 1 for run in set(chosen.run_M)]
        assert any(mixed) != alike


@pytest.mark.parametrize("settings", [BERT, ROBERTA, MINIROBERTA, ALBERT], ids=str)
def test_the_capacity_of_an_exact_number_holds_all_of_it(settings):
    ask = objective(settings)
    random = np.random.default_rng(0)
    for seed in range(200):
        lengths = []
        while sum(lengths) < 500:
            lengths.append(int(random.integers(5, 200)))
        tokens = sum(lengths)
        index, _ = ask.mask(row_of(lengths), generator(1, seed), lengths=lengths).targets["mlm"]
        assert len(index) <= ask.capacity("mlm", tokens) <= 0.3 * tokens


def test_masks_of_the_same_address_are_equal_and_documents_may_be_left_unsaid():
    lengths = [60, 128]
    one = objective(ALBERT).mask(row_of(lengths), generator(1, "a"), lengths=lengths)
    same = objective(ALBERT).mask(row_of(lengths), generator(1, "a"), lengths=lengths)
    assert (one.ids == same.ids).all()
    assert len(objective(BERT).mask(row_of([100]), generator(1, "a")).targets["mlm"].index) == 15


def test_a_document_of_special_tokens_alone_has_none():
    ids = np.array([CLS, SEP, CLS, 5, SEP])
    index, _ = objective(ALBERT).mask(ids, generator(1, "a"), lengths=[2, 3]).targets["mlm"]
    assert index.tolist() == [3]


def test_the_held_out_masks_are_the_same_for_every_rule():
    held_out = {MlmConfig(**s).held_out(mask_share=0.15) for s in (BERT, ROBERTA, MINIROBERTA)}
    ids = row_of([100] * 10)
    rows = [
        build_objective(s, vocab_size=V, specials=SPECIALS).mask(ids, generator(1, "a"))
        for s in held_out
    ]
    assert all((row.ids == rows[0].ids).all() for row in rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spans": "ngram"}, "need a number of tokens to predict. Set mask_count: round"),
        ({"max_predicted_tokens": 20}, "needs a number of tokens to predict"),
        ({**BERT, "max_predicted_tokens": 0}, "must be at least 1"),
        ({**ALBERT, "longest_span": 0}, "longest_span 0 must be 1 to 64"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        MlmConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count_special_tokens": True}, "with mask_count bernoulli no token is counted"),
        ({**ROBERTA, "count_special_tokens": False}, "may be masked, and are counted"),
        ({**BERT, "longest_span": 3}, "longest_span has no effect: spans is none"),
        ({"mask_special_tokens": True, "random_tokens": "used"}, "ids are drawn as for the"),
    ],
)
def test_settings_without_effect_are_told(settings, said):
    hints = [*MlmConfig(**settings).without_effect(settings.__contains__)]
    assert len(hints) == 1 and said in hints[0]


@pytest.mark.parametrize("settings", [BERT, ROBERTA, MINIROBERTA, ELECTRA, ALBERT], ids=str)
def test_the_rules_of_the_families_say_nothing_without_effect(settings):
    assert [*MlmConfig(**settings).without_effect(settings.__contains__)] == []
