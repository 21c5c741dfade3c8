"""Rows that do not divide are told, with the nearest numbers that do; judged by dealing the rows."""

from __future__ import annotations

import re

import numpy as np
import pytest

from encoder.data.assembly import RowSpec, deal
from encoder.runs.config import read_run
from encoder.tools.plan.fit import fit_ranks, idle_warnings, share_of_rows

BASE = "configs/pretrain/modernbert_base.yaml"


def dealt(rows: int, *, ranks: int, micro_batch_rows: int) -> list[list[int]]:
    """Rows of each micro-batch of each rank, as the loader deals them."""
    specs = [row(n) for n in range(rows)]
    return [
        [
            len(some)
            for some in deal(specs, rank=r, world_size=ranks, micro_batch_rows=micro_batch_rows)
        ]
        for r in range(ranks)
    ]


def row(number: int) -> RowSpec:
    return RowSpec(
        address=("window", 0, number), number=number, pieces_P4=np.zeros((0, 4), dtype=np.int64)
    )


@pytest.mark.parametrize(
    "rows, ranks, size", [(288, 64, 3), (288, 64, 1), (288, 64, 6), (7, 3, 2), (8, 8, 4), (9, 2, 9)]
)
def test_the_share_of_a_rank_is_what_the_loader_deals(rows, ranks, size):
    ranks_rows = dealt(rows, ranks=ranks, micro_batch_rows=size)
    share = share_of_rows(rows, ranks=ranks, micro_batch_rows=size, padded=False)
    assert share.rows == max(sum(own) for own in ranks_rows)
    assert {share.micro_batches} == {len(own) for own in ranks_rows}
    padded = share_of_rows(rows, ranks=ranks, micro_batch_rows=size, padded=True)
    assert padded.rows == size * len(ranks_rows[0])


def test_288_rows_on_64_ranks_are_told_with_what_would_divide():
    """2 micro-batches of 3 rows on 64 ranks are room for 384 rows: steps take a third longer, a quarter of which is idle."""
    (said,) = idle_warnings(read_run(BASE), ranks=64, padded=True)
    assert said == (
        "phases stable, extension, decay: 288 rows a step over 64 ranks are 2 micro-batches of 3"
        " rows on each, room for 384: 25% of the ranks' time is idle. Nearest without: batch_tokens"
        " 4,194,304 (loader.micro_batch_rows 2) or 6,291,456; 48 or 72 (loader.micro_batch_rows 2)"
        " ranks. With less: loader.micro_batch_rows 1 (10%)."
    )


@pytest.mark.parametrize("ranks", [5, 7, 24, 40, 56, 64, 80, 100])
@pytest.mark.parametrize("padded", [True, False])
def test_what_is_named_leaves_no_rank_idle(ranks, padded):
    run = read_run(BASE)
    for said in idle_warnings(run, ranks=ranks, padded=padded):
        nearest = said.split("Nearest without: ")[1]
        batches, *others = nearest.split(" With less: ")[0].split("; ")
        found = re.findall(r"([\d,]+)(?: \(loader.micro_batch_rows (\d+)\))?", batches)
        counts = [text for text in others if text.endswith(" ranks.") or text.endswith(" ranks")]
        for tokens, size in found:
            rows = int(tokens.replace(",", "")) / run.data.row_tokens
            assert_all_busy(rows, ranks, size or run.loader.micro_batch_rows, padded=padded)
        for text in counts:
            for count, size in re.findall(r"(\d+)(?: \(loader.micro_batch_rows (\d+)\))?", text):
                assert_all_busy(288, int(count), size or run.loader.micro_batch_rows, padded=padded)


def assert_all_busy(rows: float, ranks: int, size: int | str, *, padded: bool) -> None:
    every = dealt(int(rows), ranks=ranks, micro_batch_rows=int(size))
    assert int(rows) == rows and len({sum(own) for own in every}) == 1
    assert not padded or {n for own in every for n in own} == {int(size)}


def test_rows_that_divide_are_not_told_and_the_doctor_says_the_same():
    run = read_run(BASE)
    assert not idle_warnings(run, ranks=8, padded=True)
    told = fit_ranks(run, ranks=64, padded=True).warnings
    assert told[-1:] == tuple(idle_warnings(run, ranks=64, padded=True))
    # 5 rows on the busiest of 64: a tenth is idle, which is not told
    assert not idle_warnings(run, ranks=64, padded=False)


def test_a_rank_with_fewer_rows_than_a_micro_batch_is_told_the_batch_of_one_smaller():
    """70 rows on 64 ranks in micro-batches of 64: 64 rows in micro-batches of 1, not 2,048 rows."""
    run = read_run(
        BASE,
        [
            "loader.micro_batch_rows=64",
            *(f"phases.{i}.batch_tokens={70 * 16384}" for i in range(3)),
        ],
    )
    for said in idle_warnings(run, ranks=64, padded=True):
        assert f"batch_tokens {64 * 16384:,} (loader.micro_batch_rows 1)" in said


def test_lanes_divide_the_batch_that_is_named():
    run = read_run(BASE, ["data.lanes=16"])
    (said,) = idle_warnings(run, ranks=40, padded=True)
    for tokens in re.findall(r"[\d,]{7,}", said):
        assert int(tokens.replace(",", "")) % (16 * run.data.row_tokens) == 0
