"""Windows: source shares, cutting, conservation, and any position in no time."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from encoder.base.errors import ConfigError
from encoder.data.windows import cut, documents_per_window, shards_of_lanes
from tests.helpers import memory_source
from tests.helpers.loading import windows_with


def planned(name, lengths, *, documents_per_shard=10):
    return memory_source.planned(name, lengths, shards=-(-len(lengths) // documents_per_shard))


def windows_of(
    sources,
    *,
    weights=None,
    cap=32,
    row_tokens=64,
    window_documents=20,
    seed=1,
    phase=0,
    lanes=1,
    **order,
):
    return windows_with(
        sources,
        weights=weights or [1.0] * len(sources),
        seed=seed,
        phase=phase,
        lanes=lanes,
        max_tokens_per_document=cap,
        row_tokens=row_tokens,
        window_documents=window_documents,
        **order,
    )


def random_lengths(count, longest, seed=0):
    return np.random.default_rng(seed).integers(3, longest + 1, count)


def test_a_document_is_cut_as_drawn_in_the_first_lines():
    pieces = cut(0, np.array([5]), np.array([9]), 6)
    assert pieces.pieces_P4.tolist() == [[0, 5, 0, 4], [0, 5, 4, 9]]
    assert pieces.tokens_D.tolist() == [5, 6]  # C a b c S' and C' d e f g S


def test_a_document_with_cls_at_its_end_gets_sep_and_cls_back():
    pieces = cut(0, np.array([5]), np.array([9]), 6, frame="end")
    assert pieces.pieces_P4.tolist() == [[0, 5, 0, 3], [0, 5, 3, 9]]
    assert pieces.tokens_D.tolist() == [5, 6]  # a b c S' C' and d e f g S C


@pytest.mark.parametrize("frame", ["both_ends", "end"])
@pytest.mark.parametrize("cap", [3, 4, 7, 32])
def test_pieces_cover_every_token_once_and_differ_by_one(cap, frame):
    for length in range(1, 100):
        pieces = cut(2, np.array([8]), np.array([length]), cap, frame=frame)
        starts, ends = pieces.pieces_P4[:, 2], pieces.pieces_P4[:, 3]
        assert (
            starts[0] == 0
            and ends[-1] == length
            and (starts[1:] == ends[:-1]).all()
            and (starts < ends).all()
        )
        assert (pieces.tokens_D <= cap).all()
        assert pieces.tokens_D.max() - pieces.tokens_D.min() <= 1
        assert len(pieces.tokens_D) == (1 if length <= cap else -(-(length - 2) // (cap - 2)))


def test_one_epoch_of_windows_holds_every_stored_token_exactly_once():
    lengths = random_lengths(200, 100)
    plans = [
        windows_of([planned("web", lengths)]).plan(k) for k in range(10)
    ]  # 10 windows of 20 documents
    seen = Counter()
    for plan in plans:
        for _, document, start, end in plan.pieces_P4.tolist():
            seen.update((document, place) for place in range(start, end))
    assert seen == Counter({(d, place): 1 for d in range(200) for place in range(lengths[d])})


def test_rows_hold_their_pieces_and_no_more_than_their_capacity():
    source = planned("web", random_lengths(300, 100))
    plan = windows_of([source], window_documents=300).plan(0)
    assert plan.row_starts_R1[0] == 0 and plan.row_starts_R1[-1] == len(plan.pieces_P4)
    for row in range(plan.rows):
        tokens = sum(
            end - start + (start > 0) + (end < source.lengths[document])
            for _, document, start, end in plan.pieces(row).tolist()
        )
        assert tokens == plan.tokens_R[row] <= 64


def test_weights_are_shares_of_tokens():
    # a: mean 10 tokens, b: mean 40; equal tokens need four documents of a to one of b
    sources = [planned("a", [10] * 50), planned("b", [40] * 50)]
    assert documents_per_window([s.card for s in sources], [1.0, 1.0], 20) == [
        Fraction(16),
        Fraction(4),
    ]
    windows = windows_of(sources, weights=[3.0, 1.0], cap=64, window_documents=20)
    drawn = np.array(windows.documents_before(1000)) * [10, 40]
    assert abs(drawn[0] / drawn.sum() - 0.75) < 0.001


def test_documents_before_a_window_are_exact_at_window_one_billion():
    windows = windows_of(
        [planned("a", [10] * 7), planned("b", [13] * 11), planned("c", [17] * 13)],
        weights=[0.3, 0.1, 0.6],
        window_documents=20,
    )
    for k in (0, 1, 10**9, 10**9 + 1):
        for before, after in zip(
            windows.documents_before(k), windows.documents_before(k + 1), strict=True
        ):
            assert 0 <= after - before <= 20
        assert abs(sum(windows.documents_before(k)) - 20 * k) <= 3
    shares = documents_per_window([s.card for s in windows._sources], [0.3, 0.1, 0.6], 20)
    assert windows.documents_before(10**9) == [int(Fraction(10**9) * x) for x in shares]
    assert sum(shares) == 20


def test_window_one_billion_is_planned_without_those_before():
    source = planned("web", random_lengths(100, 100))
    plan = windows_of([source]).plan(10**9)
    assert (plan.pieces_P4 == windows_of([source]).plan(10**9).pieces_P4).all()
    # window 10^9 of 20 documents: documents 2 * 10^10 on, the first fifth of epoch 2 * 10^8
    assert len(set(plan.pieces_P4[:, 1].tolist())) == 20


def test_sources_of_a_window_follow_their_share_and_every_document_comes_once_an_epoch():
    sources = [
        planned("a", random_lengths(60, 30, seed=1)),
        planned("b", random_lengths(30, 60, seed=2)),
    ]
    windows = windows_of(sources, weights=[1.0, 2.0], window_documents=12)
    seen = [Counter(), Counter()]
    k = 0
    while min(windows.documents_before(k)[s] - sources[s].card.documents for s in (0, 1)) < 0:
        for source, document, start, _ in windows.plan(k).pieces_P4.tolist():
            seen[source][document] += start == 0
        k += 1
    taken = windows.documents_before(k)
    for s in (0, 1):
        epochs, rest = divmod(taken[s], sources[s].card.documents)
        assert sum(seen[s].values()) == taken[s]
        assert sorted(
            Counter(seen[s][d] for d in range(sources[s].card.documents)).items()
        ) == sorted(
            Counter(
                {epochs: sources[s].card.documents - rest, epochs + 1: rest}
                if rest
                else {epochs: sources[s].card.documents}
            ).items()
        )


def test_rows_are_shuffled_and_each_phase_by_its_own_chance():
    source = planned("web", random_lengths(500, 30))
    one, two = (windows_of([source], window_documents=500, phase=p).plan(0) for p in (0, 1))
    assert one.pieces_P4[:50].tolist() != two.pieces_P4[:50].tolist()
    # packing opens rows from the longest piece down; after the shuffle the first rows are no longer the longest
    first_lengths = [int(source.lengths[one.pieces(r)[0, 1]]) for r in range(one.rows)]
    assert first_lengths != sorted(first_lengths, reverse=True)


def test_mixed_pieces_make_rows_of_many_documents_that_are_as_full():
    """Twenty documents of 256 tokens in pieces of 32, four a row: in their order each row is of one document."""
    sources = [planned("a", [256] * 20)]
    found = {}
    for order in ("mixed", "documents"):
        plan = windows_of(sources, row_tokens=128, piece_order=order).plan(0)
        assert len(plan.pieces_P4) == 20 * 9
        documents = [len(set(plan.pieces(row)[:, 1].tolist())) for row in range(plan.rows)]
        found[order] = {
            "pieces": sorted(plan.pieces_P4.tolist()),
            "tokens": sorted(plan.tokens_R.tolist()),
            "documents": sum(documents) / plan.rows,
        }
    mixed, before = found["mixed"], found["documents"]
    assert mixed["pieces"] == before["pieces"] and mixed["tokens"] == before["tokens"]
    assert before["documents"] < 2.0 and mixed["documents"] > 3.5


def test_a_window_of_less_than_one_document_may_be_empty():
    windows = windows_of([planned("a", [10] * 5), planned("b", [10] * 5)], window_documents=1)
    assert [windows.plan(k).rows for k in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "weights, word",
    [
        ([1.0], "2 sources with 1 weights"),
        ([1.0, 0.0], "weight 0.0 of source b"),
        ([1.0, float("nan")], "weight nan"),
        ([1.0, float("inf")], "weight inf"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, word):
    with pytest.raises(ConfigError, match=word):
        documents_per_window([planned("a", [10]).card, planned("b", [10]).card], weights, 20)


def test_more_lanes_than_shards_of_a_source_are_refused():
    sources = [planned("a", [10] * 60), planned("b", [10] * 20)]
    assert windows_of(sources, lanes=2).plan(0, lane=1).rows > 0
    with pytest.raises(
        ConfigError,
        match="source b has 2 shards for 3 lanes; needed: a shard for each. Set data.lanes to 2",
    ):
        windows_of(sources, lanes=3)


def test_lanes_of_unequal_documents_are_refused():
    with pytest.raises(
        ConfigError,
        match="a has 9 shards, which make 8 lanes of 100 to 200 documents; needed: at most 5%",
    ):
        windows_of([planned("a", [10] * 900, documents_per_shard=100)], lanes=8)
    shards_of_lanes("a", np.array([95, 100]), 2)
    with pytest.raises(
        ConfigError, match="94 to 100 documents.*Set data.lanes lower, or prepare smaller shards"
    ):
        shards_of_lanes("a", np.array([94, 100]), 2)


def test_epochs_are_those_of_the_lane_that_repeats_most():
    # 20 documents a window; lanes of 25 documents
    assert windows_of([planned("a", [10] * 50, documents_per_shard=25)], lanes=2).epochs_before(
        [2, 3]
    ) == {"a": 60 / 25}
    # lanes of 49 and 48 documents, at the same window
    assert windows_of([planned("a", [10] * 97, documents_per_shard=49)], lanes=2).epochs_before(
        [12, 12]
    ) == {"a": 240 / 48}


def test_what_is_left_out_leaves_its_rows_and_moves_nothing_else():
    from tests.helpers.memory_source import planned

    source = planned("web", np.random.default_rng(0).integers(3, 60, 200).tolist(), shards=5)
    whole, without = (
        windows_with(
            [source],
            max_tokens_per_document=32,
            row_tokens=64,
            window_documents=50,
            left_out=left_out,
        )
        for left_out in ((), ((0, 1), (0, 4)))
    )
    for window in range(5):
        old, new = whole.plan(window), without.plan(window)
        assert new.rows == old.rows
        for row in range(old.rows):
            kept = [p for p in old.pieces(row).tolist() if p[1] // 40 not in (1, 4)]
            assert new.pieces(row).tolist() == kept
            tokens = sum(
                end - start + (start > 0) + (end < source.lengths[d]) for _, d, start, end in kept
            )
            assert new.tokens_R[row] == tokens
    assert without.shards(0, 9, at_most=9)[0] == [
        s for s in whole.shards(0, 9, at_most=9)[0] if s not in (1, 4)
    ]
