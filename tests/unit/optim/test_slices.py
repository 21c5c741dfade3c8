"""Slices of parameters must cover every element once."""

from __future__ import annotations

from encoder.optim.slices import ParamSlice, first_gap


def test_a_gap_or_an_overlap_of_stretches_is_found():
    def part(start, length, name="a", numel=6):
        return ParamSlice(name=name, numel=numel, start=start, length=length, flat_start=0)

    assert first_gap({"a": 6}, [part(0, 4), part(4, 2)]) is None
    assert "covered by no rank" in first_gap({"a": 6}, [part(0, 4)])
    assert "covered by no rank" in first_gap({"a": 6}, [part(0, 3), part(4, 2)])
    assert "covered twice" in first_gap({"a": 6}, [part(0, 4), part(3, 3)])
    assert "no parameter" in first_gap({"a": 6}, [part(0, 6), part(0, 6, name="b")])
