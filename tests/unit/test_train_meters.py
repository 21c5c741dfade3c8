"""Rates and the share of the peak, by numbers that are checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import encoder.train.meters as meters
from encoder.train.meters import SpeedMeter, bf16_peak, document_lengths
from tests.packed_for_tests import packed


def test_rates_are_sums_over_seconds_and_pauses_are_left_out(monkeypatch):
    now = iter([0.0, 2.0, 102.0, 104.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(now))
    meter = SpeedMeter(peak=8e12)
    assert meter.tokens_per_second == meter.tflops_per_second == meter.mfu == 0.0
    meter.step(100, 6e12)
    meter.pause()
    meter.step(300, 2e12)
    assert (meter.tokens_per_second, meter.tflops_per_second, meter.mfu) == (100.0, 2.0, 0.25)
    assert meter.seconds_for(500) == 5.0


def test_a_device_without_a_known_peak_has_no_utilization(monkeypatch):
    assert bf16_peak(torch.device("cpu")) is None and SpeedMeter(peak=None).mfu is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert bf16_peak(torch.device("cuda", 0)) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert bf16_peak(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("tokens, expected", [(10, [3, 5, 2]), (8, [3, 5]), (0, [])])
def test_padding_behind_the_tokens_is_no_document(tokens, expected):
    """packed repeats the last end, as static shapes do."""
    assert document_lengths(replace(packed([3, 5, 2], vocab=9), tokens=tokens))[:len(expected)].tolist() == expected
    assert document_lengths(replace(packed([3, 5, 2], vocab=9), tokens=tokens)).sum() == tokens
