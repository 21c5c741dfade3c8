"""Learning rates and batch sizes against numbers worked out by hand and the published ones."""

from __future__ import annotations

import math
import random

import pytest

from encoder.base.errors import ConfigError
from encoder.optim.schedule import (
    SCHEDULES,
    BatchWarmup,
    Bert,
    Constant,
    Cosine,
    CosineInverseSqrt,
    Electra,
    Linear,
    OneMinusSqrt,
    WarmupStableDecay,
    highest_at,
    rows_at,
)


def test_wsd_rises_stays_and_falls_linearly():
    wsd = WarmupStableDecay(peak=8.0, warmup_tokens=100, decay_tokens=200, floor_share=0.5)
    assert [wsd.at(t, phase_tokens=1000) for t in (0, 25, 100, 500, 800, 900, 1000)] == [
        0,
        2,
        8,
        8,
        8,
        6,
        4,
    ]


def test_wsd_without_a_decay_stays_at_the_peak_to_the_end_and_beyond():
    wsd = WarmupStableDecay(peak=8e-4, warmup_tokens=3_000_000_000)
    assert wsd.at(1_500_000_000, phase_tokens=1_719_000_000_000) == pytest.approx(4e-4)
    assert wsd.at(1_719_000_000_000, phase_tokens=1_719_000_000_000) == 8e-4
    assert wsd.at(1_719_000_000_001, phase_tokens=1_719_000_000_000) == 8e-4


def test_one_minus_sqrt_has_lost_half_after_a_quarter_of_the_decay():
    schedule = OneMinusSqrt(peak=2.0, floor_share=0.0)
    assert [schedule.at(t, phase_tokens=400) for t in (0, 100, 225, 400, 500)] == [
        2.0,
        1.0,
        0.5,
        0.0,
        0.0,
    ]
    late = OneMinusSqrt(peak=2.0, decay_tokens=100, floor_share=0.5)
    assert [late.at(t, phase_tokens=400) for t in (0, 300, 325, 400)] == [2.0, 2.0, 1.5, 1.0]


def test_one_minus_sqrt_ends_at_a_thousandth_as_published():
    assert OneMinusSqrt(peak=3e-4).at(50_000_000_000, phase_tokens=50_000_000_000) == pytest.approx(
        3e-7
    )


def test_cosine_is_halfway_in_the_middle_and_at_the_floor_at_the_end():
    cosine = Cosine(peak=1.0, warmup_tokens=100, floor_share=0.2)
    assert [cosine.at(t, phase_tokens=300) for t in (50, 100, 200, 300, 301)] == pytest.approx(
        [0.5, 1.0, 0.6, 0.2, 0.2]
    )


def test_linear_falls_on_one_line_from_the_warm_up_to_the_end_of_the_phase():
    linear = Linear(peak=4.0, warmup_tokens=100, floor_share=0.25)
    assert [linear.at(t, phase_tokens=300) for t in (50, 100, 200, 300, 301)] == [
        2.0,
        4.0,
        2.5,
        1.0,
        1.0,
    ]


def test_berts_warm_up_stands_in_place_of_the_lines_beginning():
    """google-research/bert, optimization.py: peak (1 - t / T), and peak t / W while t < W; so the rate falls at t = W."""
    bert = Bert(peak=8.0, warmup_tokens=250)
    found = [bert.at(t, phase_tokens=1000) for t in (0, 125, 249, 250, 500, 1000, 1001)]
    assert found == pytest.approx([0.0, 4.0, 8.0 * 249 / 250, 6.0, 4.0, 0.0, 0.0])


def test_berts_line_over_two_lengths_is_one_line_in_two_phases():
    whole = Bert(peak=1e-4, warmup_tokens=100)
    first = Bert(peak=1e-4, warmup_tokens=100, floor_share=0.1)
    second = Linear(peak=1e-5)
    for t in (0, 50, 100, 101, 5000, 9000):
        assert first.at(t, phase_tokens=9000) == pytest.approx(whole.at(t, phase_tokens=10_000))
    for t in (9000, 9500, 10_000):
        right = whole.at(t, phase_tokens=10_000)
        assert second.at(t - 9000, phase_tokens=1000) == pytest.approx(right, abs=1e-20)


def test_electras_rate_is_the_product_of_warm_up_and_line():
    electra = Electra(peak=8.0, warmup_tokens=500)
    found = [electra.at(t, phase_tokens=1000) for t in (0, 250, 500, 750, 1000, 1001)]
    assert found == pytest.approx([0.0, 0.5 * 6.0, 4.0, 2.0, 0.0, 0.0])


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("warmup", [0, 100, 400, 900])
@pytest.mark.parametrize("kind", [Bert, Electra, Linear])
def test_the_highest_rate_is_where_it_is_said_to_be(kind, warmup, floor):
    schedule = kind(peak=1.0, warmup_tokens=warmup, floor_share=floor)
    rates = [schedule.at(t, phase_tokens=1000) for t in range(1001)]
    top = highest_at(schedule, phase_tokens=1000)
    near = rates[max(0, top - 1) : top + 2]
    assert max(near) == max(rates)


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (120, 0.0), (120, 0.001), (400, 0.5)])
def test_linear_is_transformers_polynomial_decay_of_power_one(warmup, floor):
    """XLNet's has lr_end = 0.001 of the peak (its flag min_lr_ratio), RoBERTa's 0."""
    import torch
    import transformers

    rule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-4)
    theirs = transformers.get_polynomial_decay_schedule_with_warmup(
        rule, num_warmup_steps=warmup, num_training_steps=1000, lr_end=4e-4 * floor, power=1.0
    ).lr_lambdas[0]
    ours = Linear(peak=4e-4, warmup_tokens=warmup, floor_share=floor)
    for t in range(0, 1001, 40):
        assert ours.at(t, phase_tokens=1000) == pytest.approx(4e-4 * theirs(t), abs=1e-18)


def test_cosine_to_nothing_is_transformers_cosine_and_miniroberta_s():
    import torch
    import transformers

    rule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-4)
    theirs = transformers.get_cosine_schedule_with_warmup(
        rule, num_warmup_steps=100, num_training_steps=1000
    ).lr_lambdas[0]
    ours = Cosine(peak=6e-4, warmup_tokens=100, floor_share=0.0)
    for t in range(0, 1001, 40):
        assert ours.at(t, phase_tokens=1000) == pytest.approx(6e-4 * theirs(t), abs=1e-18)


def test_cosine_inverse_sqrt_is_the_published_one_piece_by_piece():
    """delta and gamma as FlexBERT's scheduler has them (fact sheet 3.2), with W = 100, T = 1,100, Tc = 275, alpha_f = 0.2."""
    schedule = CosineInverseSqrt(peak=2.0, warmup_tokens=100, floor_share=0.2)
    delta = 275 * (1.2 - math.pi * 0.8) / (math.pi * 0.8)
    gamma = 0.6 * math.sqrt(275 + delta)
    assert [schedule.at(t, phase_tokens=1100) for t in (50, 100, 375)] == pytest.approx(
        [1.0, 2.0, 1.2]
    )
    assert schedule.at(200, phase_tokens=1100) == pytest.approx(
        2 * (0.2 + 0.8 * (1 + math.cos(math.pi * 100 / 550)) / 2)
    )
    assert schedule.at(900, phase_tokens=1100) == pytest.approx(2 * gamma / math.sqrt(800 + delta))
    cooled = CosineInverseSqrt(peak=2.0, warmup_tokens=100, decay_tokens=200, floor_share=0.2)
    at_start = 2 * gamma / math.sqrt(800 + delta)
    assert [cooled.at(t, phase_tokens=1100) for t in (900, 1000, 1100, 1200)] == pytest.approx(
        [at_start, (at_start + 0.4) / 2, 0.4, 0.4]
    )


def test_cosine_and_inverse_square_root_meet_with_one_value_and_one_slope():
    schedule = CosineInverseSqrt(peak=1.0, cosine_tokens=10**6, floor_share=0.1)
    before, at, after = (schedule.at(10**6 + t, phase_tokens=10**7) for t in (-1000, 0, 1000))
    assert at == pytest.approx(0.55) and (at - before) == pytest.approx(after - at, rel=1e-2)
    with pytest.raises(ConfigError, match="use schedule: constant"):
        CosineInverseSqrt(peak=1.0, floor_share=1.0)


def test_constant_is_constant_after_its_warm_up():
    assert [Constant(peak=3.0, warmup_tokens=4).at(t, phase_tokens=9) for t in (2, 4, 9)] == [
        1.5,
        3.0,
        3.0,
    ]
    assert Constant(peak=3.0).at(0, phase_tokens=9) == 3.0


def test_a_schedule_longer_than_its_phase_is_refused_in_one_line():
    with pytest.raises(
        ConfigError,
        match="warmup_tokens 600 and decay_tokens 500 are more than the phase's 1,000 tokens",
    ):
        WarmupStableDecay(peak=1.0, warmup_tokens=600, decay_tokens=500).at(0, phase_tokens=1000)
    for settings in ({"peak": 0.0}, {"peak": 1.0, "floor_share": 1.5}):
        with pytest.raises(ConfigError):
            SCHEDULES["wsd"](**settings)


def test_batch_warmup_has_the_published_thresholds_of_modernbert_base():
    """768 to 4,608 rows of 1,024 by steps of 768 over 50 B tokens: 3.33, 10, 20, 33.3, 50 B (fact sheet 3.3)."""
    warmup = BatchWarmup(from_tokens=768 * 1024, over_tokens=50_000_000_000)
    rows = {}
    for size, threshold in zip(
        (768, 1536, 2304, 3072, 3840),
        (3_333_333_334, 10_000_000_000, 20_000_000_000, 33_333_333_334, 50_000_000_000),
    ):
        for seen in (threshold - 1, threshold):
            rows[seen] = rows_at(seen, batch_tokens=4608 * 1024, row_tokens=1024, warmup=warmup)
        assert rows[threshold - 1] == size
        assert rows[threshold] == size + 768
    assert rows_at(0, batch_tokens=4608 * 1024, row_tokens=1024, warmup=warmup) == 768


def staircase(*, first, full, over_tokens):
    """{rows: (steps, tokens)} of a warm-up by steps of `first` rows, all rows full of 1,024 tokens."""
    warmup, seen, stairs = BatchWarmup(from_tokens=first * 1024, over_tokens=over_tokens), 0, {}
    while (rows := rows_at(seen, batch_tokens=full * 1024, row_tokens=1024, warmup=warmup)) < full:
        steps, tokens = stairs.get(rows, (0, 0))
        stairs[rows] = steps + 1, tokens + rows * 1024
        seen += rows * 1024
    return stairs


def test_batch_warmup_of_base_is_the_published_staircase():
    """Fact sheet 3.3: 3.33, 6.67, 10.0, 13.3, 16.7 B tokens, about 4,239 steps each."""
    stairs = staircase(first=768, full=4608, over_tokens=50_000_000_000)
    assert list(stairs) == [768, 1536, 2304, 3072, 3840]
    assert [round(tokens / 1e9, 2) for _, tokens in stairs.values()] == [
        3.33,
        6.67,
        10.0,
        13.33,
        16.67,
    ]
    assert [steps for steps, _ in stairs.values()] == pytest.approx([4239] * 5, abs=1)


def test_batch_warmup_of_large_is_the_published_staircase():
    """Fact sheet 3.3: 448 to 4,480 by steps of 448, 0.182 to 1.818 B tokens, about 396 steps each; to one step."""
    stairs = staircase(first=448, full=4928, over_tokens=10_000_000_000)
    assert list(stairs) == list(range(448, 4481, 448))
    assert [tokens / 1e9 for _, tokens in stairs.values()] == pytest.approx(
        [i * 0.1818 for i in range(1, 11)], abs=4.6e-3
    )
    assert [steps for steps, _ in stairs.values()] == pytest.approx([396] * 10, abs=1)


def test_the_rate_of_base_is_warm_on_the_first_stair_and_that_of_large_on_the_fifth():
    base, large = (
        WarmupStableDecay(peak=1.0, warmup_tokens=tokens)
        for tokens in (3_000_000_000, 2_000_000_000)
    )
    assert (
        base.at(3_000_000_000 - 786_432, phase_tokens=10**12),
        base.at(3_000_000_000, phase_tokens=10**12),
    ) == (pytest.approx(3814 / 3815, abs=1e-5), 1.0)
    warm = {"batch_tokens": 4928 * 1024, "row_tokens": 1024}
    assert (
        rows_at(
            3_000_000_000,
            batch_tokens=4608 * 1024,
            row_tokens=1024,
            warmup=BatchWarmup(from_tokens=768 * 1024, over_tokens=50_000_000_000),
        )
        == 768
    )
    assert (
        rows_at(
            2_000_000_000,
            warmup=BatchWarmup(from_tokens=448 * 1024, over_tokens=10_000_000_000),
            **warm,
        )
        == 2240
    )
    assert large.at(2_000_000_000, phase_tokens=10**12) == 1.0


@pytest.mark.parametrize("tokens", [0, 1, 10**9, 3 * 10**9, 17 * 10**9, 49 * 10**9, 50 * 10**9])
def test_the_schedules_of_modernbert_are_the_fact_sheets_formulas(tokens):
    t, w, d, whole = tokens, 3 * 10**9, 10 * 10**9, 50 * 10**9
    wsd = t / w if t < w else 1 if t < whole - d else max(0, 1 - (1 - 0.1) * (t - (whole - d)) / d)
    ours = WarmupStableDecay(peak=1.0, warmup_tokens=w, decay_tokens=d, floor_share=0.1)
    assert ours.at(t, phase_tokens=whole) == pytest.approx(wsd, abs=1e-9)
    sqrt = max(0.001, 0.001 + (1 - 0.001) * (1 - math.sqrt(t / whole)))
    assert OneMinusSqrt(peak=1.0).at(t, phase_tokens=whole) == pytest.approx(sqrt, abs=1e-12)


def test_every_size_of_a_batch_warmup_gets_the_same_number_of_steps():
    warmup = BatchWarmup(from_tokens=200, over_tokens=100_000, increase_tokens=100)
    seen, steps = 0, {}
    while seen < 100_000:
        rows = rows_at(seen, batch_tokens=600, row_tokens=100, warmup=warmup)
        steps[rows] = steps.get(rows, 0) + 1
        seen += rows * 100
    assert list(steps) == [2, 3, 4, 5]
    assert max(steps.values()) - min(steps.values()) <= 1


def test_a_batch_that_is_not_whole_rows_names_its_neighbours():
    with pytest.raises(ConfigError) as error:
        rows_at(0, batch_tokens=100_000, row_tokens=2048, warmup=None)
    assert (
        str(error.value)
        == "batch_tokens 100,000 is not a whole number of rows of 2,048. Nearest: 98,304, 100,352."
    )
    with pytest.raises(ConfigError, match="from_tokens 4,096 is not below batch_tokens 4,096"):
        rows_at(
            0,
            batch_tokens=4096,
            row_tokens=2048,
            warmup=BatchWarmup(from_tokens=4096, over_tokens=9),
        )
    with pytest.raises(ConfigError, match=r"batch_warmup.from_tokens 1,000 .* Nearest: 2,048\."):
        rows_at(
            0,
            batch_tokens=4096,
            row_tokens=2048,
            warmup=BatchWarmup(from_tokens=1000, over_tokens=9),
        )


def test_the_stair_of_any_amount_of_tokens_is_that_of_the_sum_also_among_millions():
    chance = random.Random(2)
    for _ in range(200):
        row, first, stair, full = (
            16,
            chance.randint(1, 9),
            chance.randint(1, 5),
            chance.randint(10, 40),
        )
        warmup = BatchWarmup(
            from_tokens=first * row,
            over_tokens=chance.randint(1, 5000),
            increase_tokens=stair * row,
        )
        seen, passed, sizes = chance.randint(0, 6000), 0, range(first, full, stair)
        expected = full
        for size in sizes:
            passed += size
            if seen * sum(sizes) < warmup.over_tokens * passed:
                expected = size
                break
        assert rows_at(seen, batch_tokens=full * row, row_tokens=row, warmup=warmup) == expected
    huge = BatchWarmup(from_tokens=64, over_tokens=10**15)
    assert rows_at(10**14, batch_tokens=64 * 10**12, row_tokens=64, warmup=huge) == pytest.approx(
        10**12 * 0.1**0.5, rel=1e-6
    )
