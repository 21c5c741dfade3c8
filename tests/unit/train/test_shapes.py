"""Which shapes micro-batches have on a device."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from encoder.train import build


def test_shapes_are_rounded_for_bf16_products_on_a_cpu_with_units_for_them(monkeypatch):
    found = []
    for units in (True, False):
        monkeypatch.setattr(build, "computes_bf16", lambda _, units=units: units)
        for precision in ("fp32", "fp64", "autocast", "bf16"):
            run = SimpleNamespace(engine=SimpleNamespace(precision=precision))
            found.append([build.shape_step_of(run, torch.device(d)) for d in ("cpu", "cuda")])
    assert found == [[1, 1], [1, 1], [64, 1], [64, 1]] + 4 * [[1, 1]]
