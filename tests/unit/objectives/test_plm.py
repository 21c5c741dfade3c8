"""Permutation language modelling: who sees whom by two ranks, where targets are, and both directions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch

from encoder.base.batch import Targets, packed_documents
from encoder.base.errors import ConfigError
from encoder.models.catalog import build_model
from encoder.objectives.catalog import build_objective
from encoder.objectives.plm import PlmConfig, blocks_of_text, rank_in_group, span_places, two_ranks
from tests.helpers.contracts import check_objective
from tests.helpers.hf import SPECIALS as BOTH_ENDS
from tests.helpers.xlnet import SPECIALS, TINY, VOCAB, batch_of, objective_of, row_of
from tests.reference.xlnet_masks import local_perm, sample_mask, two_halves


def test_the_ten_tokens_of_the_worked_case():
    """A half of four tokens and one of six; 6, 8 and 9 are functional, 1, 3 and 4 targets."""
    rank_T = torch.tensor([2, 0, 3, 1, 4, 0, 2, 5, 1, 3])
    block_T = torch.tensor([0] * 4 + [1] * 6)
    is_target_T = torch.zeros(10, dtype=torch.bool)
    is_target_T[[1, 3, 4]] = True
    is_functional_T = torch.zeros(10, dtype=torch.bool)
    is_functional_T[[6, 8, 9]] = True
    key_T, query_T = two_ranks(
        rank_T, block_T, is_target_T=is_target_T, is_functional_T=is_functional_T, block_tokens=4
    )
    assert key_T.tolist() == [-1, 0, -1, 1, 9, 4, 7, 4, 6, 8]
    assert query_T.tolist() == [0, 0, 0, 1, 9, 5, 8, 5, 7, 9]
    rows = ["".join(map(str, row)) for row in (key_T[None] < query_T[:, None]).int().tolist()]
    first = ["1010000000"] * 3 + ["1110000000"]
    second = ["1111011111", "1111010100", "1111011110", "1111010100", "1111010110", "1111011111"]
    assert rows == first + second


def test_ranks_are_the_two_part_formula_of_the_published_code():
    draw = np.random.default_rng(0)
    for _ in range(300):
        sizes = draw.integers(1, 9, 2)
        kinds = [draw.integers(0, 3, size) for size in sizes]
        orders = [draw.permutation(size) for size in sizes]
        halves = [
            local_perm(order.tolist(), (kind == 1).tolist(), (kind == 2).tolist())
            for order, kind in zip(orders, kinds)
        ]
        kind_T = torch.from_numpy(np.concatenate(kinds))
        key_T, query_T = two_ranks(
            torch.from_numpy(np.concatenate(orders)),
            torch.tensor([0] * sizes[0] + [1] * sizes[1]),
            is_target_T=kind_T == 1,
            is_functional_T=kind_T == 2,
            block_tokens=int(sizes[0]),
        )
        assert (key_T[None] < query_T[:, None]).tolist() == two_halves(*halves)


def test_ranks_count_inside_groups_by_ascending_key():
    found = rank_in_group(torch.tensor([5, -3, 9, 2, 2, 8]), torch.tensor([1, 0, 1, 0, 0, 1]))
    assert found.tolist() == [0, 0, 2, 1, 2, 1]


CUMULATIVE = (np.cumsum(1 / np.arange(1, 6)) / (1 / np.arange(1, 6)).sum()).tolist()


@pytest.mark.parametrize("size, number", [(256, 43), (253, 42), (31, 5), (4, 1)])
def test_spans_are_those_of_the_published_code(size, number):
    draw = np.random.default_rng(size)
    for _ in range(50):
        uniforms = draw.random(4 * size).tolist()
        starts = (draw.random(size) < 0.6).tolist()
        found = span_places(
            starts,
            [True] * size,
            number,
            iter(uniforms).__next__,
            cumulative=CUMULATIVE,
            context_tokens=6,
        )
        expected = sample_mask(starts, number, iter(uniforms).__next__, alpha=6, longest=5)
        assert found == expected and len(found) == number


LENGTH_SHARES = np.diff([0.0, *CUMULATIVE])


def sizes_of_spans(number: int, draw: np.random.Generator) -> np.ndarray:
    """Lengths of the spans in a text with room for all of them; at least one token lies between two."""
    size = 8 * number
    places = span_places(
        [True] * size,
        [True] * size,
        number,
        draw.random,
        cumulative=CUMULATIVE,
        context_tokens=6,
    )
    begins = np.flatnonzero(np.diff(places, prepend=-9) > 1)
    return np.diff(begins, append=number)


def test_lengths_of_spans_are_drawn_by_one_over_n():
    """The first 20 of some 46 spans, which the number of targets does not cut: 4,000 draws, chi-square of 4 degrees."""
    draw = np.random.default_rng(3)
    drawn = np.concatenate([sizes_of_spans(100, draw)[:20] for _ in range(200)])
    counts = np.bincount(drawn, minlength=6)[1:]
    assert scipy.stats.chisquare(counts, LENGTH_SHARES * counts.sum()).pvalue > 1e-3
    # as the paper's K = 6 has it
    assert np.dot(np.arange(1, 6), LENGTH_SHARES) == pytest.approx(2.19, abs=0.005)


def spans_expected(number: int) -> np.ndarray:
    """Spans of each length among so many targets, the last of them cut: by the chance that a walk of lengths meets a sum."""
    chance_of_sum = np.zeros(number + 1)
    chance_of_sum[0] = 1.0
    expected = np.zeros(5)
    for before in range(number):
        for length, share in enumerate(LENGTH_SHARES, 1):
            laid = min(length, number - before)
            expected[laid - 1] += chance_of_sum[before] * share
            chance_of_sum[before + laid] += chance_of_sum[before] * share
    return expected


def test_the_last_of_43_targets_cuts_its_span_as_chance_has_it():
    """Counts of a block depend on each other, so their means over blocks are judged: Hotelling's T squared, 4 degrees."""
    draw = np.random.default_rng(4)
    blocks = 2000
    drawn = [np.bincount(sizes_of_spans(43, draw), minlength=6)[1:] for _ in range(blocks)]
    expected = spans_expected(43)
    assert np.dot(np.arange(1, 6), expected) == pytest.approx(43)

    def p_value(supposed: np.ndarray) -> float:
        # the fifth count follows from the others: their tokens are 43
        off = (np.mean(drawn, axis=0) - supposed)[:4]
        spread = np.cov(np.array(drawn)[:, :4].T)
        return float(scipy.stats.chi2.sf(blocks * off @ np.linalg.solve(spread, off), 4))

    assert p_value(expected) > 1e-3
    # and it can tell: as many targets in spans of which none was cut
    assert p_value(LENGTH_SHARES * 43 / 2.19) < 1e-3


def test_85_of_512_tokens_are_targets_and_none_is_special():
    assert sum(number for *_, number in blocks_of_text(512, block_tokens=256, share=0.166)) == 85
    objective = objective_of(block_tokens=256)
    lengths = [514, 258, 6, 3, 2]
    ids = row_of(lengths)
    ids[40] = SPECIALS.unk_id
    for seed in range(20):
        found = objective.mask(ids, np.random.default_rng(seed), lengths=lengths)
        targets = found.targets["plm"]
        counts = [
            int(((targets.index >= start) & (targets.index < end)).sum())
            for start, end in pairwise(np.cumsum([0, *lengths]))
        ]
        assert counts == [85, 42, 1, 0, 0]
        assert (targets.value >= 5).all() and (found.ids == ids).all()


def test_a_span_begins_where_a_word_does():
    """Every third token begins a word; a number below a sixth leaves no single token over."""
    from encoder.objectives.words import WordEdges

    begins_V = np.zeros(VOCAB, dtype=bool)
    begins_V[5] = True
    words = WordEdges(begins_V, np.ones(VOCAB, dtype=bool))
    objective = build_objective(
        PlmConfig(mask_share=0.05), vocab_size=VOCAB, specials=SPECIALS, words=words
    )
    ids = np.append(np.where(np.arange(240) % 3, 7, 5), [2, 1])
    begun = []
    for seed in range(40):
        index = objective.mask(ids, np.random.default_rng(seed), lengths=[242]).targets["plm"].index
        begun += index[np.diff(index, prepend=-9) > 1].tolist()
    # a span that runs over a begin is one with it; single tokens are few
    assert np.mean(np.array(begun) % 3 == 0) > 0.9


def test_all_orders_of_three_targets_are_as_likely():
    """3,000 documents: chi-square of 5 degrees."""
    objective = objective_of(directions="forward")
    documents = [torch.arange(5, 13)] * 3000
    index_M = (torch.arange(3000)[:, None] * 8 + torch.tensor([0, 2, 5])).flatten()
    targets = {"plm": Targets(index_M=index_M, value_M=index_M, count=len(index_M))}
    plain = packed_documents(documents, targets)
    draw = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**63), 2**63 - 1, plain.ids_T.shape, generator=draw)
    order = objective.order(replace(plain, token_key_T=keys))
    ranks = order.key_rank_T[index_M].view(3000, 3)
    assert all(len({*row}) == 3 for row in ranks.tolist())
    found = np.unique(ranks.argsort(1).numpy() @ [9, 3, 1], return_counts=True)[1]
    assert len(found) == 6 and scipy.stats.chisquare(found).pvalue > 1e-3


def test_half_of_the_documents_are_read_from_their_end():
    lengths = [9] * 400
    objective = objective_of(block_tokens=4)
    order = objective.order(batch_of(objective, lengths))
    place = order.place_T.view(400, 9)
    backwards = place[:, 8] < 0
    assert scipy.stats.binomtest(int(backwards.sum()), 400).pvalue > 1e-3
    forward, back = place[~backwards][0], place[backwards][0]
    assert forward.tolist() == [*range(9)]
    # the frame stands before the text: the same distances as if the text were laid backwards
    assert back.tolist() == [*range(7), -1, -2]
    stream = order.stream_T.view(400, 9)[backwards][0]
    assert stream.tolist() == [6, 5, 4, 3, 2, 1, 0, 7, 8]
    distance = back[:, None] - back[None]
    assert torch.equal(distance, -(stream[:, None] - stream[None]))


def test_a_block_sees_those_before_it_in_the_order_of_reading():
    objective = objective_of(block_tokens=4)
    batch = batch_of(objective, [14] * 8)
    order = objective.order(batch)
    sees = order.key_rank_T[None] < order.query_rank_T[:, None]
    for start in range(0, 8 * 14, 14):
        own = sees[start : start + 14, start : start + 14]
        first, last = (0, 8) if order.place_T[start + 13] > 0 else (8, 0)
        assert own[last : last + 4, first : first + 4].all()
        assert not own[first : first + 4, last : last + 4].any()


def test_the_promises_of_an_objective_hold():
    lengths = [30, 12, 5, 9]
    model = build_model(TINY, seed=0)
    check_objective(objective_of(), model, row_of(lengths), lengths)
    check_objective(objective_of(mask_share=0.5), model, row_of(lengths), lengths)


def test_room_for_targets_is_never_too_little():
    for share in (0.166, 0.05, 0.4, 0.9):
        objective = objective_of(mask_share=share, block_tokens=256)
        for text in range(1, 400):
            number = sum(n for *_, n in blocks_of_text(text, block_tokens=256, share=share))
            assert number <= objective.capacity("plm", text + 2)


def test_the_held_out_question_is_k_6_at_any_rate():
    held_out = PlmConfig(mask_share=0.3, memory_tokens=384).held_out(mask_share=0.15)
    assert (held_out.mask_share, held_out.context_tokens) == (0.166, 6)
    assert held_out.memory_tokens == 384 and not held_out.needs_word_edges


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"mask_share": 1.0}, "mask_share 1.0 must lie between 0 and 1"),
        ({"block_tokens": 0}, "block_tokens is 0; needed: at least 1"),
        ({"memory_tokens": -1}, "memory_tokens is -1; needed: 0"),
        (
            {"memory_tokens": 9, "segment_tokens": 300},
            "segment_tokens 300 is not a whole number of blocks of 256. Nearest: 256, 512",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        PlmConfig(**settings)


def test_a_memory_without_anything_before_it_is_refused():
    with pytest.raises(ConfigError, match="not below the longest document, 384 tokens"):
        PlmConfig(memory_tokens=384).check_documents(longest_tokens=384)
    with pytest.raises(ConfigError, match="are one segment of 512, which has nothing before it"):
        PlmConfig(memory_tokens=384).check_documents(longest_tokens=512)
    PlmConfig(memory_tokens=384).check_documents(longest_tokens=513)
    PlmConfig().check_documents(longest_tokens=16)


def test_documents_that_begin_with_cls_are_refused():
    with pytest.raises(ConfigError, match="has \\[CLS\\] before each text; .* text <sep> <cls>"):
        build_objective(PlmConfig(word_starts=False), vocab_size=VOCAB, specials=BOTH_ENDS)
