"""The loss in pieces against all logits at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import encoder.nn.loss as loss_module
from encoder.base.batch import IGNORE
from encoder.nn.loss import cross_entropy_sum
from tests.reference.dense import whole_vocabulary_loss


def question(
    dtype=torch.float64, *, positions: int = 70, vocab: int = 50, width: int = 6
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((positions, width), (vocab, width), (vocab,))
    )
    target = torch.randint(0, vocab, (positions,), generator=draw)
    target[5::7] = IGNORE
    return [h, weight, bias, target]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "piece_positions, cached_positions", [(1, 1), (16, 1000), (1000, 1000), (16, 7), (1000, 3)]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("z_loss_weight", [0.0, 1e-2])
def test_pieces_give_the_whole_vocabulary_loss_and_its_gradients(
    monkeypatch, dtype, tolerance, piece_positions, cached_positions, bias, z_loss_weight
):
    monkeypatch.setitem(loss_module.PIECE_POSITIONS, "cpu", piece_positions)
    monkeypatch.setattr(
        "encoder.base.pieces.PIECE_ELEMENTS", cached_positions * 50 // torch.get_num_threads()
    )
    h, weight, b, target = question(dtype)
    ours = [h, weight, b] if bias else [h, weight]
    truth = [x.detach().double().requires_grad_() for x in ours]
    found = cross_entropy_sum(h, weight, b if bias else None, target, z_loss_weight=z_loss_weight)
    expected = whole_vocabulary_loss(
        *truth, *[None] * (not bias), target, z_loss_weight=z_loss_weight
    )
    plain = whole_vocabulary_loss(*truth, *[None] * (not bias), target)
    (found.total / 60).backward()
    (expected / 60).backward()
    assert found.total.dtype == found.sum.dtype == dtype
    assert abs(found.total - expected) <= tolerance * expected
    assert abs(found.sum - plain) <= tolerance * plain and not found.sum.requires_grad
    assert found.count == 60 and found.count.dtype == torch.int64
    for a, b in zip(ours, truth, strict=True):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max().clamp(min=1)


def test_z_loss_of_a_single_position_by_hand():
    """Four equal logits of 0: logsumexp = log 4; its pull on each logit is 2 w log 4 / 4."""
    bias = torch.zeros(4, requires_grad=True)
    found = cross_entropy_sum(
        torch.zeros(1, 2), torch.zeros(4, 2), bias, torch.tensor([2]), z_loss_weight=0.5
    )
    found.total.backward()
    assert found.total.item() == pytest.approx(math.log(4) + 0.5 * math.log(4) ** 2)
    assert found.sum.item() == pytest.approx(math.log(4))
    pull = 0.25 * (1 + math.log(4))
    assert bias.grad.tolist() == pytest.approx([pull, pull, pull - 1, pull])


class PiecesOfLogits(TorchDispatchMode):
    """The most bytes that tensors of a piece's logits hold at a time; views and what is written in place count once."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.most_bytes, self._alive = elements, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() == self.elements and x.is_floating_point():
                self._alive[x.untyped_storage()._cdata] = (
                    StorageWeakRef(x.untyped_storage()),
                    x.nbytes,
                )
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out


@pytest.mark.parametrize("autocast, width", [(False, 4), (True, 4 + 2)], ids=["fp32", "autocast"])
def test_a_piece_of_logits_is_gone_before_the_next_stands(monkeypatch, autocast, width):
    """In fp32, and beside it in bf16 under autocast: what a run's memory is planned with."""
    monkeypatch.setitem(loss_module.PIECE_POSITIONS, "cpu", 16)
    ours = question(torch.float32, positions=48, vocab=100, width=8)
    with PiecesOfLogits(16 * 100) as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cross_entropy_sum(*ours, z_loss_weight=1e-4).total.backward()
    assert seen.most_bytes == width * 16 * 100


class LargestTensor(TorchDispatchMode):
    """Sees what every operation gives, also in backward, and keeps the largest number of elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_ever_larger_than_a_piece_of_logits_or_the_weight(autocast):
    """700 positions over 1,000 words: 512,000 logits at a time, never 700,000."""
    ours = question(torch.float32, positions=700, vocab=1000, width=32)
    with LargestTensor() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cross_entropy_sum(*ours, z_loss_weight=1e-4).total.backward()
    assert seen.elements == 512 * 1000
    with LargestTensor() as seen:
        whole_vocabulary_loss(*ours).backward()
    assert seen.elements == 700 * 1000


@pytest.mark.parametrize("masked", [40, 83, 307])
def test_bf16_gradients_keep_the_exact_scale_of_the_step(masked):
    """world / masked tokens is no bf16 number: rounded first, it would scale every gradient wrongly, by world size."""
    for world in (1, 3, 5):
        h, weight, bias, target = question(
            torch.float32, positions=700, width=32
        )  # 22,400 roundings average out
        h_half = h.detach().bfloat16().requires_grad_()
        (plain,) = torch.autograd.grad(
            cross_entropy_sum(h_half, weight, bias, target).total, h_half
        )
        (scaled,) = torch.autograd.grad(
            cross_entropy_sum(h_half, weight, bias, target).total * (world / masked), h_half
        )
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
    assert torch.allclose(
        cross_entropy_sum(h, weight, bias, torch.tensor([2])).total, torch.tensor(4.0).log()
    )


def test_without_gradients_the_loss_is_the_same_and_keeps_nothing():
    h, weight, bias, target = question()
    with torch.no_grad():
        found = cross_entropy_sum(h, weight, bias, target).total
    assert not found.requires_grad and torch.equal(
        found, cross_entropy_sum(h, weight, bias, target).total.detach()
    )


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


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_cuda_the_loss_is_the_cpus_and_the_host_never_waits(autocast):
    ours, truth = (
        question(torch.float32, positions=5000, vocab=1000, width=64),
        question(positions=5000, vocab=1000, width=64),
    )
    there = [x.detach().cuda().requires_grad_(x.is_floating_point()) for x in ours]
    whole_vocabulary_loss(*truth, z_loss_weight=1e-3).backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = cross_entropy_sum(*there, z_loss_weight=1e-3)
        found.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = whole_vocabulary_loss(*truth, z_loss_weight=1e-3)
    bound = 2e-2 if autocast else 1e-4  # bf16 has 3 digits, TF32 is off
    assert (
        abs(found.total.item() - expected.item()) <= bound * expected.item()
        and found.count == (ours[3] != IGNORE).sum()
    )
    for a, b in zip(
        there[:3], truth[:3], strict=True
    ):  # under autocast seen on a CPU: 1e-2, 8e-3, 6e-3
        assert (a.grad.cpu() - b.grad).norm() <= bound * b.grad.norm()


@pytest.mark.parametrize("piece_positions", [1, 16, 1000])
def test_without_gradients_hits_are_counted_where_the_targets_logit_is_the_highest(
    monkeypatch, piece_positions
):
    monkeypatch.setitem(loss_module.PIECE_POSITIONS, "cpu", piece_positions)
    h, weight, bias, target = question()
    highest = (h @ weight.T + bias).argmax(1)
    target[:20] = highest[:20]
    target[2] = IGNORE
    with torch.no_grad():
        found = cross_entropy_sum(h, weight, bias, target)
    assert found.correct == ((highest == target) & (target != IGNORE)).sum() >= 19
    assert cross_entropy_sum(h, weight, bias, target).correct == 0, (
        "a step of training does not look"
    )
