"""Draws by addressed noise: the softmax's frequencies, a twin in Python's integers, and nothing but the address."""

from __future__ import annotations

import math

import pytest
import torch

from encoder.base.batch import IGNORE
from encoder.nn import loss, sampling
from encoder.nn.loss import cross_entropy_sum, drawn_cross_entropy_sum
from encoder.nn.sampling import Draws, draw_from_logits, gumbel_noise
from tests.reference.plain_rtd import MASK64, plain_noise

DRAWS, WORDS = 100_000, 12


def keys(number: int, *, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (number,), generator=draw)


def drawn(logits_V: torch.Tensor, key_M: torch.Tensor, **how) -> torch.Tensor:
    logits_MV = logits_V.expand(len(key_M), -1)
    target_M = torch.full((len(key_M),), how.pop("target", IGNORE))
    asked = {"temperature": 1.0, "leaves_target_out": False, **how}
    return draw_from_logits(logits_MV, None, target_M, key_M, **asked)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_of_many_draws_are_those_of_the_softmax(temperature):
    logits_V = torch.randn(WORDS, generator=torch.Generator().manual_seed(1))
    expected_V = (logits_V.double() / temperature).softmax(0) * DRAWS
    found_V = drawn(logits_V, keys(DRAWS), temperature=temperature).bincount(minlength=WORDS)
    chi_square = float(((found_V - expected_V).square() / expected_V).sum())
    # 11 degrees of freedom: above 31.3 once in a thousand
    assert chi_square < 31.3


def test_the_noise_is_that_of_pythons_integers_and_gumbels():
    key_M = keys(3)
    steps_V = (torch.arange(5) + 1) * sampling._STEP
    found_MV = gumbel_noise(key_M, steps_V, dtype=torch.float64)
    for key, row in zip(key_M.tolist(), found_MV.tolist(), strict=True):
        twin = [plain_noise(key & MASK64, word, use=sampling._USE) for word in range(5)]
        assert row == pytest.approx(twin, rel=1e-12)

    # mean: Euler's constant; deviation: pi / sqrt 6; both of 10^6 numbers
    many = gumbel_noise(keys(1000), (torch.arange(1000) + 1) * sampling._STEP, dtype=torch.float32)
    assert many.double().mean() == pytest.approx(0.577216, abs=5e-3)
    assert many.double().std() == pytest.approx(math.pi / math.sqrt(6), abs=5e-3)
    assert many.isfinite().all()


def test_a_draw_follows_its_key_whatever_stands_beside_it_and_in_fp32():
    draw = torch.Generator().manual_seed(2)
    logits_MV = torch.randn(700, 40, generator=draw, dtype=torch.float64)
    key_M, target_M = keys(700), torch.zeros(700, dtype=torch.int64)
    how = {"temperature": 1.0, "leaves_target_out": False}
    whole = draw_from_logits(logits_MV, None, target_M, key_M, **how)
    order = torch.randperm(700, generator=draw)
    moved = draw_from_logits(logits_MV[order], None, target_M, key_M[order], **how)
    assert torch.equal(moved, whole[order])
    assert torch.equal(draw_from_logits(logits_MV.float(), None, target_M, key_M, **how), whole)
    assert not torch.equal(drawn(logits_MV[0], keys(700, seed=9)), drawn(logits_MV[0], key_M))


def test_what_is_left_out_is_never_drawn_and_no_target_leaves_nothing_out():
    logits_V = torch.tensor([0.0, 8.0, 0.0])
    likely = drawn(logits_V, keys(300))
    assert (likely == 1).sum() > 290
    without = drawn(logits_V, keys(300), target=1, leaves_target_out=True)
    assert not (without == 1).any() and (without == 0).sum() > 100
    assert torch.equal(drawn(logits_V, keys(300), leaves_target_out=True), likely)


@pytest.mark.parametrize("piece", [4, 512])
def test_the_loss_draws_in_pieces_and_its_gradients_stay_those_without(piece, monkeypatch):
    monkeypatch.setitem(loss.PIECE_POSITIONS, "cpu", piece)
    draw = torch.Generator().manual_seed(4)
    h, weight = (
        torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((11, 6), (30, 6))
    )
    bias = torch.randn(30, generator=draw, dtype=torch.float64)
    target = torch.randint(0, 30, (11,), generator=draw)
    target[3] = IGNORE
    key_M = keys(11)
    term, found = drawn_cross_entropy_sum(h, weight, bias, target, Draws(key_M=key_M))
    logits = (h @ weight.T + bias).detach()
    how = {"temperature": 1.0, "leaves_target_out": False}
    assert torch.equal(found, draw_from_logits(logits, None, target, key_M, **how))
    assert not found.requires_grad
    grads = torch.autograd.grad(term.total, (h, weight))
    plain = cross_entropy_sum(h, weight, bias, target)
    assert torch.equal(term.total, plain.total)
    for ours, theirs in zip(grads, torch.autograd.grad(plain.total, (h, weight)), strict=True):
        assert torch.equal(ours, theirs)
