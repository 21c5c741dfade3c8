"""The loss in pieces against all logits at once."""

from __future__ import annotations

import pytest
import torch

import encoder.nn.loss as loss_module
from encoder.base.batch import IGNORE
from encoder.nn.loss import cross_entropy_sum
from tests.reference.dense import whole_vocabulary_loss


def question(dtype=torch.float64, *, positions: int = 70, vocab: int = 50, width: int = 6) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
                       for shape in ((positions, width), (vocab, width), (vocab,)))
    target = torch.randint(0, vocab, (positions,), generator=draw)
    target[5::7] = IGNORE
    return [h, weight, bias, target]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("piece_positions", [1, 16, 1000])
def test_pieces_give_the_whole_vocabulary_loss_and_its_gradients(monkeypatch, dtype, tolerance, piece_positions):
    monkeypatch.setattr(loss_module, "PIECE_BYTES", piece_positions * 50 * dtype.itemsize)
    ours, truth = question(dtype), question(torch.float64)
    truth[:3] = [x.detach().double().requires_grad_() for x in ours[:3]]
    found, expected = cross_entropy_sum(*ours).total, whole_vocabulary_loss(*truth)
    (found / 60).backward()
    (expected / 60).backward()
    assert found.dtype == dtype
    assert abs(found - expected) <= tolerance * expected
    for a, b in zip(ours[:3], truth[:3], strict=True):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max().clamp(min=1)


@pytest.mark.parametrize("masked", [40, 83, 307])
def test_bf16_gradients_keep_the_exact_scale_of_the_step(masked):
    """world / masked tokens is no bf16 number: rounded first, it would scale every gradient wrongly, by world size."""
    for world in (1, 3, 5):
        h, weight, bias, target = question(torch.float32, positions=700, width=32)   # 22,400 roundings average out
        h_half = h.detach().bfloat16().requires_grad_()
        plain, = torch.autograd.grad(cross_entropy_sum(h_half, weight, bias, target).total, h_half)
        scaled, = torch.autograd.grad(cross_entropy_sum(h_half, weight, bias, target).total * (world / masked), h_half)
        factor = float((scaled.double() * plain.double()).sum() / plain.double().square().sum())
        assert factor == pytest.approx(world / masked, rel=5e-4)


def test_ignored_positions_contribute_exactly_zero():
    h, weight, bias, target = question()
    cross_entropy_sum(h, weight, bias, target).total.backward()
    assert (h.grad[target == IGNORE] == 0).all() and (h.grad[target != IGNORE] != 0).any()
    kept = target != IGNORE
    alone = cross_entropy_sum(h[kept], weight, bias, target[kept]).total
    assert torch.allclose(alone, cross_entropy_sum(h, weight, bias, target).total, rtol=1e-14)


@pytest.mark.parametrize("positions", [0, 3])
def test_nothing_to_predict_gives_zero_and_zero_gradients(positions):
    h, weight, bias, target = question(positions=positions)
    total = cross_entropy_sum(h, weight, bias, target.fill_(IGNORE)).total
    total.backward()
    assert total == 0
    assert all(x.grad is not None and not x.grad.any() for x in (h, weight, bias))


def test_a_single_position_by_hand():
    h, weight, bias = torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0.0, 0.0, 0.0, 0.0])
    assert torch.allclose(cross_entropy_sum(h, weight, bias, torch.tensor([2])).total, torch.tensor(4.0).log())


def test_without_gradients_the_loss_is_the_same_and_keeps_nothing():
    h, weight, bias, target = question()
    with torch.no_grad():
        found = cross_entropy_sum(h, weight, bias, target).total
    assert not found.requires_grad and torch.equal(found, cross_entropy_sum(h, weight, bias, target).total.detach())


def test_bf16_weights_give_an_fp32_sum_near_the_exact_one():
    ours = question(torch.bfloat16)
    found = cross_entropy_sum(*ours).total
    found.backward()
    truth = whole_vocabulary_loss(*(x.detach().double() for x in ours[:3]), ours[3])
    assert found.dtype == torch.float32 and ours[1].grad.dtype == torch.bfloat16
    assert abs(found - truth) < 0.01 * truth


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    ours, exact = question(torch.float32), question(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy_sum(*ours).total
    found.backward()
    expected = cross_entropy_sum(*exact).total
    expected.backward()
    assert found.dtype == torch.float32 and ours[1].grad.dtype == torch.float32
    assert 0 < abs(found - expected) < 0.01 * expected
    assert (ours[1].grad - exact[1].grad).abs().max() < 0.05 * exact[1].grad.abs().max()
