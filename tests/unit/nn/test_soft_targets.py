"""Soft targets in pieces against torch's kl_div on whole logits, and the cosine of states against cosine_embedding_loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import encoder.nn.loss as loss_module
from encoder.base.batch import IGNORE
from encoder.nn.heads import TokenDecoder
from encoder.nn.soft_targets import cosine_distance_sum, soft_target_sum
from tests.unit.nn.test_loss import LargestTensor, PiecesOfLogits

VOCAB = 50


def decoder(
    *, seed: int, width: int, words: int = VOCAB, bias: bool = True, dtype=torch.float64
) -> TokenDecoder:
    draw = torch.Generator().manual_seed(seed)
    h_MC, weight_VC, bias_V = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((70, width), (words, width), (words,))
    )
    return TokenDecoder(h_MC, weight_VC, bias_V if bias else None)


def targets() -> torch.Tensor:
    target_M = torch.zeros(70, dtype=torch.int64)
    target_M[5::7] = IGNORE
    return target_M


def whole(student: TokenDecoder, teacher: TokenDecoder, target_M, temperature) -> torch.Tensor:
    """The plain twin: all logits, torch's own KL, a sum over the positions that count."""
    keep_M = target_M != IGNORE
    own, theirs = (F.linear(*d)[keep_M] / temperature for d in (student, teacher))
    mean = F.kl_div(own.log_softmax(1), theirs.softmax(1), reduction="batchmean")
    return mean * temperature**2 * keep_M.sum()


def leaves(d: TokenDecoder) -> list[torch.Tensor]:
    return [x for x in d if x is not None]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("piece, cached", [(1, 1), (16, 1000), (16, 7), (1000, 3)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_pieces_give_torchs_kl_div_and_its_gradients(
    monkeypatch, dtype, tolerance, piece, cached, bias
):
    monkeypatch.setitem(loss_module.PIECE_POSITIONS, "cpu", piece)
    elements = 2 * cached * VOCAB // torch.get_num_threads()
    monkeypatch.setattr("encoder.base.pieces.PIECE_ELEMENTS", elements)
    student = decoder(seed=0, width=6, bias=bias, dtype=dtype)
    teacher = decoder(seed=1, width=9, dtype=dtype)
    twin = decoder(seed=0, width=6, bias=bias)
    found = soft_target_sum(student, teacher, targets(), temperature=2.0)
    expected = whole(twin, decoder(seed=1, width=9), targets(), 2.0)
    (found.total / 60).backward()
    (expected / 60).backward()
    assert found.total.dtype == dtype and found.count == 60
    assert found.sum == found.total and not found.sum.requires_grad
    assert abs(found.total - expected) <= tolerance * expected
    for ours, truth in zip(leaves(student), leaves(twin), strict=True):
        assert (ours.grad - truth.grad).abs().max() <= tolerance * truth.grad.abs().max()
    assert all(x.grad is None for x in teacher)


def test_the_worked_case_of_two_words():
    """T = 2, teacher logits (2 ln 3, 0), so (0.75, 0.25); student (0, 0): 4 (0.75 ln 1.5 + 0.25 ln 0.5)."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([2 * math.log(3), 0.0], dtype=torch.float64)
    found = soft_target_sum(
        TokenDecoder(zero, zero.expand(2, 1), logits),
        TokenDecoder(zero, zero.expand(2, 1), teacher),
        torch.zeros(1, dtype=torch.int64),
        temperature=2.0,
    )
    found.total.backward()
    by_hand = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found.total.item() == pytest.approx(by_hand, rel=1e-12)
    assert found.total.item() == pytest.approx(0.523248, abs=5e-7)
    # T (p_student - p_teacher)
    assert logits.grad.tolist() == pytest.approx([2 * (0.5 - 0.75), 2 * (0.5 - 0.25)])


def test_the_worked_case_of_the_cosine():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    found = cosine_distance_sum(x, y, torch.zeros(1, dtype=torch.int64))
    assert found.sum.item() == pytest.approx(0.292893, abs=5e-7)


def test_cosine_gives_torchs_cosine_embedding_loss_and_its_gradient():
    draw = torch.Generator().manual_seed(2)
    x, y = (torch.randn(70, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    ours, twin = (x.clone().requires_grad_() for _ in range(2))
    keep_M = targets() != IGNORE
    found = cosine_distance_sum(ours, y, targets())
    one_M = torch.ones(int(keep_M.sum()), dtype=torch.float64)
    expected = F.cosine_embedding_loss(twin[keep_M], y[keep_M], one_M, reduction="sum")
    found.total.backward()
    expected.backward()
    assert found.count == 60
    # torch adds 1e-12 to the squared lengths
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(ours.grad, twin.grad, rtol=1e-8, atol=1e-10)


def test_rows_that_one_vocabulary_has_alone_have_no_say():
    """Padding of the embedding: ids that no text has."""
    student = decoder(seed=0, width=6, words=VOCAB + 6)
    teacher = decoder(seed=1, width=9, words=VOCAB + 2)
    found = soft_target_sum(student, teacher, targets(), temperature=2.0)
    cut = [TokenDecoder(d[0], d[1][: VOCAB + 2], d[2][: VOCAB + 2]) for d in (student, teacher)]
    expected = whole(*cut, targets(), 2.0)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert student.weight_VC.grad.shape == (VOCAB + 6, 6)
    assert not student.weight_VC.grad[VOCAB + 2 :].any()


def test_equal_models_have_no_loss_and_no_gradient():
    student, teacher = decoder(seed=0, width=6), decoder(seed=0, width=6)
    found = soft_target_sum(student, teacher, targets(), temperature=3.0)
    found.total.backward()
    assert abs(found.total.item()) < 1e-12
    assert max(float(x.grad.abs().max()) for x in student) < 1e-12


def test_without_positions_the_loss_is_zero_and_connected():
    student, teacher = decoder(seed=0, width=6), decoder(seed=1, width=9)
    none = torch.zeros(0, dtype=torch.int64)
    empty = [TokenDecoder(d.hidden_MC[:0], d.weight_VC, d.bias_V) for d in (student, teacher)]
    found = soft_target_sum(*empty, none, temperature=2.0)
    found.total.backward()
    assert found.total == 0 and found.count == 0
    assert student.weight_VC.grad is not None and not student.weight_VC.grad.any()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_logits_of_all_positions_never_stand_at_once(monkeypatch, autocast):
    """Of each model one piece, and the teacher's probabilities: three pieces in fp32, and two in bf16 beside them."""
    monkeypatch.setitem(loss_module.PIECE_POSITIONS, "cpu", 16)
    student = decoder(seed=0, width=6, dtype=torch.float32)
    teacher = decoder(seed=1, width=9, dtype=torch.float32)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with PiecesOfLogits(16 * VOCAB) as pieces, LargestTensor() as largest, bf16:
        soft_target_sum(student, teacher, targets(), temperature=2.0).total.backward()
    assert largest.elements == 16 * VOCAB < 70 * VOCAB
    assert pieces.most_bytes <= (3 * 4 + 2 * 2 * autocast) * 16 * VOCAB


def test_under_autocast_the_loss_is_that_of_bf16_products():
    student = decoder(seed=0, width=6, dtype=torch.float32)
    teacher = decoder(seed=1, width=9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_target_sum(student, teacher, targets(), temperature=2.0)
    exact = whole(decoder(seed=0, width=6), decoder(seed=1, width=9), targets(), 2.0)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(exact.item(), rel=2e-2)
