"""Learning rates and batch sizes against numbers worked out by hand and the published ones."""

from __future__ import annotations

import pytest

from encoder.base.errors import ConfigError
from encoder.optim.schedule import SCHEDULES, BatchWarmup, Constant, Cosine, OneMinusSqrt, WarmupStableDecay, rows_at


def test_wsd_rises_stays_and_falls_linearly():
    wsd = WarmupStableDecay(peak=8.0, warmup_tokens=100, decay_tokens=200, floor_share=0.5)
    assert [wsd.at(t, phase_tokens=1000) for t in (0, 25, 100, 500, 800, 900, 1000)] == [0, 2, 8, 8, 8, 6, 4]


def test_wsd_without_a_decay_stays_at_the_peak_to_the_end_and_beyond():
    wsd = WarmupStableDecay(peak=8e-4, warmup_tokens=3_000_000_000)
    assert wsd.at(1_500_000_000, phase_tokens=1_719_000_000_000) == pytest.approx(4e-4)
    assert wsd.at(1_719_000_000_000, phase_tokens=1_719_000_000_000) == 8e-4
    assert wsd.at(1_719_000_000_001, phase_tokens=1_719_000_000_000) == 8e-4


def test_one_minus_sqrt_has_lost_half_after_a_quarter_of_the_decay():
    schedule = OneMinusSqrt(peak=2.0, floor_share=0.0)
    assert [schedule.at(t, phase_tokens=400) for t in (0, 100, 225, 400, 500)] == [2.0, 1.0, 0.5, 0.0, 0.0]
    late = OneMinusSqrt(peak=2.0, decay_tokens=100, floor_share=0.5)
    assert [late.at(t, phase_tokens=400) for t in (0, 300, 325, 400)] == [2.0, 2.0, 1.5, 1.0]


def test_one_minus_sqrt_ends_at_a_thousandth_as_published():
    assert OneMinusSqrt(peak=3e-4).at(50_000_000_000, phase_tokens=50_000_000_000) == pytest.approx(3e-7)


def test_cosine_is_halfway_in_the_middle_and_at_the_floor_at_the_end():
    cosine = Cosine(peak=1.0, warmup_tokens=100, floor_share=0.2)
    assert [cosine.at(t, phase_tokens=300) for t in (50, 100, 200, 300, 301)] == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2])


def test_constant_is_constant_after_its_warm_up():
    assert [Constant(peak=3.0, warmup_tokens=4).at(t, phase_tokens=9) for t in (2, 4, 9)] == [1.5, 3.0, 3.0]
    assert Constant(peak=3.0).at(0, phase_tokens=9) == 3.0


def test_a_schedule_longer_than_its_phase_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="warmup_tokens 600 and decay_tokens 500 are more than the phase's 1,000 tokens"):
        WarmupStableDecay(peak=1.0, warmup_tokens=600, decay_tokens=500).at(0, phase_tokens=1000)
    for settings in ({"peak": 0.0}, {"peak": 1.0, "floor_share": 1.5}):
        with pytest.raises(ConfigError):
            SCHEDULES["wsd"](**settings)


def test_batch_warmup_has_the_published_thresholds_of_modernbert_base():
    """768 to 4,608 rows of 1,024 by steps of 768 over 50 B tokens: 3.33, 10, 20, 33.3, 50 B (fact sheet 3.3)."""
    warmup = BatchWarmup(from_tokens=768 * 1024, over_tokens=50_000_000_000)
    rows = {}
    for size, threshold in zip((768, 1536, 2304, 3072, 3840), (3_333_333_334, 10_000_000_000, 20_000_000_000,
                                                               33_333_333_334, 50_000_000_000)):
        for seen in (threshold - 1, threshold):
            rows[seen] = rows_at(seen, batch_tokens=4608 * 1024, row_tokens=1024, warmup=warmup)
        assert rows[threshold - 1] == size
        assert rows[threshold] == size + 768
    assert rows_at(0, batch_tokens=4608 * 1024, row_tokens=1024, warmup=warmup) == 768


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
    assert str(error.value) == "batch_tokens 100,000 is not a whole number of rows of 2,048. Nearest: 98,304, 100,352."
    with pytest.raises(ConfigError, match="from_tokens 4,096 is not below batch_tokens 4,096"):
        rows_at(0, batch_tokens=4096, row_tokens=2048, warmup=BatchWarmup(from_tokens=4096, over_tokens=9))
    with pytest.raises(ConfigError, match=r"batch_warmup.from_tokens 1,000 .* Nearest: 2,048\."):
        rows_at(0, batch_tokens=4096, row_tokens=2048, warmup=BatchWarmup(from_tokens=1000, over_tokens=9))
