"""Packing: the fast version against the slow truth, and how full real lengths make the rows."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.data.packing import pack_best_fit
from tests.reference.packing import best_fit_decreasing, fewest_rows


def rows_of(lengths, capacity):
    packing = pack_best_fit(lengths, capacity)
    return [part.tolist() for part in np.split(packing.pieces_P, packing.row_starts_R1[1:-1])][
        : packing.rows
    ]


def test_a_packing_by_hand():
    assert rows_of([3, 5, 1, 4, 3], 8) == [[1, 0], [3, 4, 2]]  # 5+3, 4+3+1


def test_nothing_packs_into_no_rows():
    assert rows_of([], 8) == []


@pytest.mark.parametrize("seed", range(20))
def test_rows_equal_the_slow_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(8, 100)) if seed else 2**16 + 50  # beyond 16 bits once
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 200)).tolist()
    assert rows_of(lengths, capacity) == best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_as_few_as_johnsons_bound_allows(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, rng.integers(1, 9)).tolist()
    rows = rows_of(lengths, 12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 for row in rows)
    assert fewest_rows(lengths, 12) <= len(rows) <= 11 / 9 * fewest_rows(lengths, 12) + 6 / 9


@pytest.mark.parametrize("longest", [1024, 8192])
def test_rows_of_web_like_lengths_are_over_99_5_percent_full(longest):
    # log-normal with the median and spread of web pages; the longest cut off as pieces are
    lengths = np.clip(np.random.default_rng(0).lognormal(6.0, 1.2, 8192).astype(int), 3, longest)
    assert lengths.sum() / (pack_best_fit(lengths, 16384).rows * 16384) > 0.995
