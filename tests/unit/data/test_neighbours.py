"""Neighbours: what is counted, against pairs counted one by one; and which documents are read."""

from __future__ import annotations

from fractions import Fraction
from math import lcm

import numpy as np
import pytest

from encoder.base.errors import ConfigError, DamagedShard
from encoder.base.rng import generator
from encoder.data import neighbours
from encoder.data.neighbours import count_neighbours, first_documents
from encoder.data.shards import Source, open_source
from encoder.data.windows import DataOrder, RowGeometry, Windows
from tests.helpers.shards import random_documents, write_source
from tests.reference.neighbour_vectors import counted

V = 19


def drawn_documents(count: int) -> list[np.ndarray]:
    """Of 0 to 29 tokens."""
    random = generator(1, "neighbours")
    return [random.integers(0, V, random.integers(0, 30)).astype(np.uint16) for _ in range(count)]


def as_dict(found: neighbours.Neighbours, *, window: int) -> dict[tuple[int, int], Fraction]:
    unit = lcm(*range(1, window + 1))
    rows = zip(found.first_P.tolist(), found.second_P.tolist(), found.count_P.tolist(), strict=True)
    return {(a, b): Fraction(n, unit) for a, b, n in rows}


@pytest.mark.parametrize("window", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("left_out", [(), (0, 5)])
@pytest.mark.parametrize("stretch", [1, 40, 2**20])
def test_pairs_are_those_counted_one_by_one(window, left_out, stretch, monkeypatch):
    monkeypatch.setattr(neighbours, "STRETCH_TOKENS", stretch)
    documents = drawn_documents(40)
    found = count_neighbours(documents, window=window, vocab_size=V, left_out=left_out)
    expected = counted([d.tolist() for d in documents], window=window, left_out=left_out)
    assert as_dict(found, window=window) == expected
    assert found.tokens == sum(int((~np.isin(d, left_out)).sum()) for d in documents)


def test_a_pair_of_a_large_vocabulary_keeps_its_ids():
    vocab_size = 50_368
    documents = [np.array([50_367, 50_366, 50_367, 3]), np.array([50_366, 50_367])]
    found = count_neighbours(documents, window=2, vocab_size=vocab_size)
    expected = counted([d.tolist() for d in documents], window=2)
    assert as_dict(found, window=2) == expected


def test_the_order_of_documents_does_not_matter():
    documents = drawn_documents(40)
    one = count_neighbours(documents, window=3, vocab_size=V)
    other = count_neighbours(documents[::-1], window=3, vocab_size=V)
    assert as_dict(one, window=3) == as_dict(other, window=3)


@pytest.mark.parametrize("documents", [[], [np.zeros(0, np.uint16)], [np.array([3], np.uint16)]])
def test_text_without_a_pair_counts_nothing(documents):
    found = count_neighbours(documents, window=2, vocab_size=V)
    assert len(found.first_P) == len(found.count_P) == 0


@pytest.mark.parametrize("window", [0, 17])
def test_a_window_that_cannot_be_counted_is_refused(window):
    with pytest.raises(ConfigError, match="needed: 1 to 16"):
        count_neighbours([], window=window, vocab_size=V)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    """Two, of many small shards."""
    root = tmp_path_factory.mktemp("neighbours")
    opened = []
    for name, seed in (("a", 1), ("b", 2)):
        documents = random_documents(120, seed=seed, longest=40)
        write_source(root / name, documents, vocab_size=64, shard_bytes=1 << 9)
        opened.append(open_source(root / name, name=name))
    return opened


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("shuffle_shards", [1, 8])
def test_documents_are_those_that_the_first_phase_reads_first(sources, lanes, shuffle_shards):
    source = sources[0]
    order = DataOrder(
        weights=[1.0],
        seed=7,
        phase=0,
        window_documents=4,
        lanes=lanes,
        shuffle_shards=shuffle_shards,
    )
    geometry = RowGeometry(row_tokens=64, max_tokens_per_document=64)
    windows = Windows([source], order=order, geometry=geometry)
    found = first_documents(
        [source], [1.0], seed=7, tokens=600, lanes=lanes, shuffle_shards=shuffle_shards
    )
    for lane in range(lanes):
        taken: list[tuple[int, ...]] = []
        while sum(map(len, taken)) < 600 / lanes:
            taken.append(tuple(next(found).tolist()))
        # a window has four documents in an order of its own
        for window in range(len(taken) // 4):
            planned = windows.plan(window, lane=lane).pieces_P4[:, 1].tolist()
            here = taken[4 * window : 4 * window + 4]
            assert sorted(here) == sorted(tuple(source.read(d).tolist()) for d in planned)
        assert len(taken) > 8
    assert next(found, None) is None


def test_each_source_gives_its_share(sources):
    a, b = sources
    found = list(first_documents(sources, [3.0, 1.0], seed=7, tokens=800))
    of_a = [*first_documents([a], [1.0], seed=7, tokens=600)]
    of_b = [*first_documents([b], [1.0], seed=7, tokens=200)]
    assert [d.tolist() for d in found] == [d.tolist() for d in [*of_a, *of_b]]
    assert 0 < len(of_b) < len(of_a)


def test_a_source_with_less_text_than_its_share_gives_each_document_once(sources):
    source = sources[0]
    found = sorted(d.tolist() for d in first_documents([source], [1.0], seed=7, tokens=10**6))
    assert found == sorted(source.read(i).tolist() for i in range(source.documents))


def test_damaged_shards_are_left_out_where_that_is_asked_for(tmp_path):
    write_source(
        tmp_path / "a", random_documents(60, seed=1, longest=40), vocab_size=64, shard_bytes=1 << 9
    )
    bad = sorted((tmp_path / "a").glob("*.mds"))[1]
    bad.write_bytes(b"\xff" * bad.stat().st_size)
    source = open_source(tmp_path / "a", name="a")
    with pytest.raises(DamagedShard):
        list(first_documents([source], [1.0], seed=7, tokens=10**6))
    found = list(first_documents([source], [1.0], seed=7, tokens=10**6, skip_damaged=True))
    assert len(found) == source.documents - source.samples_per_shard[1]
