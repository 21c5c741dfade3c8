"""The loss's Triton kernel beside its twin: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from encoder.base.batch import IGNORE
from encoder.nn import loss, loss_kernel

ROOT = Path(__file__).resolve().parents[3]
WORDS = (1, 50, 4096, 9001)  # less than a block, one, and more
CASES = [*itertools.product((torch.float32, torch.bfloat16), WORDS, (True, False), (0.0, 1e-2))]


def worst_difference(
    dtype: torch.dtype, words: int, bias: bool, z_loss_weight: float, *, device: str
) -> dict[str, float]:
    """Of 6 positions, two of them ignored, the first word and the last among the targets, rows further apart than they are long."""
    draw = torch.Generator().manual_seed(words)
    logits = (4 * torch.randn(6, words + 8, generator=draw)).to(device, dtype)[:, :words]
    b = torch.randn(words, generator=draw).to(device) if bias else None
    target = torch.randint(0, words, (6,), generator=draw)
    target[0], target[1], target[2], target[5] = 0, words - 1, IGNORE, IGNORE
    target, twins = target.to(device), logits.clone()
    d_bias, twin_d_bias = torch.ones(
        (2, words), device=device
    ).unbind()  # what is there is added to
    by_kernel = loss_kernel.turn_into_gradient_(
        logits, target, b, d_bias if bias else None, z_loss_weight=z_loss_weight
    )
    by_twin = loss.turn_into_gradient_(
        twins, target, b, twin_d_bias if bias else None, z_loss_weight=z_loss_weight
    )
    assert (logits[target == IGNORE] == 0).all() and all(
        (x[target == IGNORE] == 0).all() for x in by_kernel
    )
    assert words == 1 or (logits[target != IGNORE] != 0).any()
    step = 2**-7 * (dtype == torch.bfloat16)  # of bf16: the interpreter cuts off what a GPU rounds
    wrong = (logits.double() - twins.double()).abs() - step * twins.double().abs()
    sums = [
        ((x - y).abs() / (1 + y.abs())).max().item()
        for x, y in zip(by_kernel, by_twin, strict=True)
    ]
    assert (d_bias - twin_d_bias).abs().max() <= 6 * step + 1e-6 and (
        not bias or words == 1 or (d_bias != 1).any()
    )
    return {"gradient": wrong.max().item(), "sums": max(sums)}


def check(device: str) -> int:
    """All cases; how many."""
    for case in CASES:
        off = worst_difference(*case, device=device)
        assert off["gradient"] <= 1e-6 and off["sums"] <= 2e-6, (case, off)
    return len(CASES)


def test_in_the_interpreter_the_kernel_gives_its_twins_numbers():
    pytest.importorskip("triton")
    code = "from tests.unit.nn.test_loss_kernel import check; print(check('cpu'), 'cases')"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(len(CASES)), "cases"]


@pytest.mark.gpu
def test_on_cuda_the_kernel_gives_its_twins_numbers():
    assert check("cuda") == len(CASES)
