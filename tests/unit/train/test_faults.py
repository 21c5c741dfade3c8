"""The judge of steps and the deadline, by numbers."""

from __future__ import annotations

import math
import time

import pytest

from encoder.base.errors import ConfigError, LedgerError
from encoder.runs.faults import FaultConfig, SpikeConfig
from encoder.train.faults import NOT_FINITE, OK, SPIKE, Deadline, StepMonitor

SPIKES = FaultConfig(bad_steps=2, spike=SpikeConfig(deviations=10.0, over_steps=5))


def judged(judge: StepMonitor, losses: list[float], *, first: int = 1) -> list[str]:
    return [
        judge.classify(first + i, loss=loss, applied=math.isfinite(loss))
        for i, loss in enumerate(losses)
    ]


def test_a_loss_ten_deviations_above_the_median_is_a_spike_once_enough_steps_were_fine():
    """Median 3, deviations 2 1 0 1 2: their median is 1, and so 13 is the bound."""
    judge = StepMonitor(SPIKES, recorded={}, saved={})
    assert judged(judge, [99.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == [OK] * 6, (
        "the first five are taken as they are"
    )
    assert judged(judge, [13.0]) == [OK]
    judge = StepMonitor(SPIKES, recorded={}, saved={"losses": [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert (
        judged(judge, [13.1, 3.0]) == [SPIKE, OK] and judge.in_a_row == 0 and not judge.must_go_back
    )
    assert judged(judge, [40.0, math.nan]) == [SPIKE, NOT_FINITE] and judge.must_go_back


def test_without_the_setting_no_loss_is_a_spike():
    judge = StepMonitor(FaultConfig(), recorded={}, saved={})
    assert judged(judge, [1.0] * 200 + [1e9]) == [OK] * 201


def test_the_judge_goes_on_from_a_checkpoint_where_it_was():
    judge = StepMonitor(SPIKES, recorded={}, saved={})
    judged(judge, [1.0, 2.0, 3.0, 4.0, 5.0, math.nan])
    again = StepMonitor(SPIKES, recorded={}, saved=judge.to_plain())
    assert again.in_a_row == 1 and judged(again, [99.0]) == [SPIKE] and again.must_go_back


def test_steps_done_again_are_what_the_ledger_says():
    judge = StepMonitor(SPIKES, recorded={3: NOT_FINITE, 4: OK, 5: SPIKE}, saved={})
    assert judge.is_left_out(3) and not judge.is_left_out(4) and not judge.is_left_out(5)
    assert judged(judge, [math.nan, 1.0, 1.0], first=3) == [NOT_FINITE, OK, SPIKE]
    with pytest.raises(LedgerError, match="step 4 is not finite; it was before the stop"):
        judged(judge, [math.nan], first=4)


def test_weights_that_moved_by_a_loss_that_is_not_finite_are_given_up_at_once():
    judge = StepMonitor(FaultConfig(bad_steps=3), recorded={}, saved={})
    assert judge.classify(1, loss=math.inf, applied=True) == NOT_FINITE and judge.must_go_back


def test_the_nearer_end_counts_and_room_is_left_for_two_of_the_slowest_saves():
    started = time.time() - 100.0
    assert not Deadline(None, started=started, env={}).is_near()
    by_slurm = Deadline(1.0, started=started, env={"SLURM_JOB_END_TIME": str(int(started) + 165)})
    assert by_slurm.of == "SLURM_JOB_END_TIME" and by_slurm.is_near(), (
        "65 s are left, 10 + 2 x 60 are wanted"
    )
    by_slurm.saved(20.0)
    assert not by_slurm.is_near(), "10 + 2 x 20"
    by_slurm.saved(40.0)
    assert by_slurm.is_near()
    assert (
        Deadline(0.05, started=started, env={"SLURM_JOB_END_TIME": str(int(started) + 9999)}).of
        == "faults.max_hours"
    )
    for text in ("²", "", "Unknown", "9" * 5000):
        assert Deadline(None, started=started, env={"SLURM_JOB_END_TIME": text}).of == ""


@pytest.mark.parametrize(
    "setting, text",
    [
        ({"bad_steps": 0}, "bad_steps 0 must be at least 1"),
        ({"max_hours": 0.0}, "max_hours 0 must be above 0"),
        ({"watchdog_minutes": -1.0}, "Use watchdog_minutes: null for none"),
        ({"watchdog_minutes": 1e300}, "at most 10,000,000"),
        ({"max_hours": math.inf}, "at most 10,000,000"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting, text):
    with pytest.raises(ConfigError, match=text):
        FaultConfig(**setting)


def test_a_spike_needs_a_measure():
    with pytest.raises(ConfigError, match="over_steps 2"):
        SpikeConfig(over_steps=2)
