"""Rates and the share of the peak, by numbers that are checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import encoder.train.meters as meters
from encoder.engine.precision import computes_bf16
from encoder.train.meters import Clock, SpeedMeter, bf16_peak, document_lengths
from tests.helpers.packed import packed


def test_every_moment_has_one_kind_and_rates_know_training_and_waiting_alone(monkeypatch):
    now = iter([0.0, 5.0, 5.0, 6.0, 8.0, 8.0, 108.0, 110.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(meters.time, "time", lambda: 1_003.0)
    clock = Clock(began=1_000.0)
    clock.turn_to("training")  # at 5
    meter = SpeedMeter(clock, peak=8e12)  # at 5
    assert (
        meter.tokens_per_second
        == meter.tflops_per_second
        == meter.mfu
        == meter.waiting_share
        == 0.0
    )
    clock.turn_to("waiting")  # at 6
    clock.turn_to("training")  # at 8
    with clock.doing("saving"):  # 8 to 108
        pass
    meter.step(400, 12e12)  # at 110
    assert clock._seconds == {
        "starting": 8.0,
        "training": 3.0,
        "waiting": 2.0,
        "evaluating": 0.0,
        "saving": 100.0,
    }
    assert (meter.tokens_per_second, meter.tflops_per_second, meter.mfu, meter.waiting_share) == (
        80.0,
        2.4,
        0.3,
        0.4,
    )
    assert meter.seconds_for(400) == 5.0


def test_a_device_without_a_known_peak_has_no_utilization(monkeypatch):
    assert bf16_peak(torch.device("cpu")) is None and SpeedMeter(Clock(began=0.0)).mfu is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert bf16_peak(torch.device("cuda", 0)) == 989e12
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    )
    assert bf16_peak(torch.device("cuda", 0)) is None


@pytest.mark.parametrize(
    "units, can",
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_a_cpu_computes_in_bf16_if_it_has_units_for_it(monkeypatch, units, can):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert computes_bf16(torch.device("cpu")) is can


@pytest.mark.parametrize("tokens, expected", [(10, [3, 5, 2]), (8, [3, 5]), (0, [])])
def test_padding_behind_the_tokens_is_no_document(tokens, expected):
    """packed repeats the last end, as static shapes do."""
    assert (
        document_lengths(replace(packed([3, 5, 2], vocab=9), tokens=tokens))[
            : len(expected)
        ].tolist()
        == expected
    )
    assert document_lengths(replace(packed([3, 5, 2], vocab=9), tokens=tokens)).sum() == tokens
