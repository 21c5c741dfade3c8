"""The order of documents: a permutation in every epoch, reached anywhere in no time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from encoder.data.order import SHARDS_PER_GROUP, DocumentOrder, deal_shards


def order_of(samples, *, seed=1, phase=0, source="web"):
    return DocumentOrder(np.array(samples), seed=seed, phase=phase, source=source)


@pytest.mark.parametrize("samples", [[1], [7], [5, 1, 3], [3] * 16, [3] * 17, list(range(1, 60))])
def test_every_epoch_is_a_permutation_of_all_documents(samples):
    order, total = order_of(samples), sum(samples)
    for epoch in range(3):
        assert sorted(order.documents(epoch * total, total)) == list(range(total))


def test_epochs_phases_seeds_and_sources_have_orders_of_their_own():
    orders = [
        order_of([50] * 4, **other) for other in ({}, {"seed": 2}, {"phase": 1}, {"source": "x"})
    ]
    drawn = [tuple(o.documents(0, 200)) for o in orders] + [tuple(orders[0].documents(200, 200))]
    assert len(set(drawn)) == 5


def test_any_stretch_is_the_same_however_it_is_asked_for():
    samples = [11, 2, 30, 7] * 10
    whole = order_of(samples).documents(0, 1200)
    assert (order_of(samples).documents(0, 1200) == whole).all()
    asked = order_of(samples)
    for start in [1100, 0, 499, 501, 3, 998]:  # backwards, over groups and over the end of an epoch
        assert (asked.documents(start, 100) == whole[start : start + 100]).all()
    assert len(asked.documents(5, 0)) == 0


def test_documents_of_a_group_come_from_few_shards():
    order = order_of([10] * 160)
    for group in range(10):
        shards = set(order.documents(group * 10 * SHARDS_PER_GROUP, 10 * SHARDS_PER_GROUP) // 10)
        assert len(shards) == SHARDS_PER_GROUP


def test_a_place_far_away_costs_as_much_as_the_first_and_memory_is_bounded():
    order = order_of([1000] * 30_000)  # 30 million documents
    start = time.process_time()
    for place in [0, 10**9, 10**12, 10**15, 123456789, 5 * 10**6, 17]:
        assert len(order.documents(place, 100)) == 100
    assert time.process_time() - start < 2.0  # a permutation of 30 million alone takes longer
    assert len(order._groups) == 1 and order._groups.popitem()[1].nbytes <= 16 * 1000 * 4


def test_places_of_documents_are_spread_evenly():
    # document 0 over 400 epochs: the mean place is N/2 within five standard errors
    order, total = order_of([5] * 40), 200
    places = [int(np.flatnonzero(order.documents(e * total, total) == 0)[0]) for e in range(400)]
    assert abs(np.mean(places) - 99.5) < 5 * 57.7 / 20


@pytest.mark.parametrize("lanes", [2, 3, 7])
def test_lanes_part_the_shards_and_each_goes_through_its_own_once_an_epoch(lanes):
    samples = np.arange(5, 30)  # 25 shards
    shard_of = np.repeat(np.arange(25), samples)
    seen = []
    for lane, own in enumerate(deal_shards(samples, lanes)):
        order = DocumentOrder(samples, seed=1, phase=0, source="web", lane=(lane, own))
        for epoch in range(2):
            drawn = order.documents(epoch * order.documents_per_epoch, order.documents_per_epoch)
            assert set(shard_of[drawn]) == set(own) and len(set(drawn)) == len(drawn)
        seen += drawn.tolist()
    assert sorted(seen) == list(range(samples.sum()))


def test_the_largest_shards_are_dealt_first_each_to_the_lane_of_fewest_documents():
    # 9 8 7 | 5 to the lane of 7 | 4 to that of 8 | 3 to that of 9: 12 each
    assert [own.tolist() for own in deal_shards(np.array([3, 9, 4, 8, 5, 7]), 3)] == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    assert [own.tolist() for own in deal_shards(np.array([2, 2, 2, 2]), 2)] == [
        [0, 2],
        [1, 3],
    ]  # ties: the lower first
    assert deal_shards(np.array([3, 9, 4]), 1)[0].tolist() == [0, 1, 2]


def test_segments_with_a_short_last_shard_make_lanes_of_equal_documents():
    samples = np.array(
        [700, 700, 150] * 200
    )  # shards l, l + 3, l + 6, ... would be 140,000, 140,000 and 30,000
    for lanes in (2, 3, 4, 8):
        documents = [int(samples[own].sum()) for own in deal_shards(samples, lanes)]
        assert sum(documents) == samples.sum() and min(documents) > 0.98 * max(documents)


def test_sixty_thousand_shards_are_dealt_in_no_time():
    samples = np.random.default_rng(0).integers(100, 900, 60_000)
    start = time.process_time()
    deal_shards(samples, 64)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("group", [1, 8, 20, 64])
def test_a_wider_group_visits_every_document_once_and_any_place_at_once(group):
    samples = np.array([10] * 50)
    whole = DocumentOrder(samples, seed=1, phase=0, source="web", group_shards=group)
    order = whole.documents(0, 1000)
    assert sorted(order[:500]) == sorted(order[500:]) == list(range(500)) and not np.array_equal(
        order[:500], order[500:]
    )
    for start in (0, 3, 199, 499, 777):
        again = DocumentOrder(samples, seed=1, phase=0, source="web", group_shards=group)
        assert np.array_equal(again.documents(start, 100), order[start : start + 100])
    assert len(set((order[: 10 * min(group, 50)] // 10).tolist())) == min(group, 50)
    if group == 8:
        assert np.array_equal(
            DocumentOrder(samples, seed=1, phase=0, source="web").documents(0, 1000), order
        )


def test_a_wider_group_makes_the_order_less_local():
    def spread(group: int) -> float:
        orders = [
            DocumentOrder(
                np.array([20] * 100), seed=seed, phase=0, source="web", group_shards=group
            ).documents(0, 2000)
            for seed in range(60)
        ]
        return float(np.std([np.corrcoef(np.arange(2000), order)[0, 1] for order in orders]))

    assert spread(8) > 0.1 > 0.06 > spread(100)
