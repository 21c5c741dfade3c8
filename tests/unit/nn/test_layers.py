"""Facts of the layers, each checked against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from encoder.nn.embedding import TokenEmbedding
from encoder.nn.heads import PredictionHead
from encoder.nn.mlp import FeedForward
from encoder.nn.norm import make_norm
from encoder.nn.rope import half_split_rows, rope_table, split_and_rotate
from tests.reference.dense import rotate_pair_by_pair


def randn(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_rotation_turns_the_pair_j_and_j_plus_half_by_position_times_theta_to_the_minus_2j_over_width():
    positions = torch.tensor([0, 1, 2, 63, 500, 0, 1], dtype=torch.int32)
    qkv = randn(7, 3, 2, 8)
    q, k, v = split_and_rotate(qkv, rope_table(positions, theta=160000.0, head_width=8))
    for found, which in ((q, 0), (k, 1)):
        expected = rotate_pair_by_pair(qkv[:, which], positions, theta=160000.0)
        assert torch.allclose(
            found, expected, rtol=0, atol=2e-4
        )  # fp32 angles: 500 * 2^-24 * a few
        assert torch.equal(found[0], qkv[0, which])  # position 0 does not turn
    assert torch.equal(v, qkv[:, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_tokens_turned_a_few_at_a_time_are_those_turned_together(monkeypatch, tokens, dtype):
    table = rope_table(torch.arange(tokens, dtype=torch.int32), theta=100.0, head_width=8)
    qkv, d = (
        randn(tokens, 3, 2, 8, dtype=dtype).requires_grad_(),
        [randn(tokens, 2, 8, dtype=dtype, seed=i) for i in range(3)],
    )

    def turned():
        out = split_and_rotate(qkv, table)
        return [*out, *torch.autograd.grad(out, qkv, d)]

    together = turned()
    monkeypatch.setattr(
        "encoder.base.pieces.PIECE_ELEMENTS", 4 * 2 * 2 * 8 // torch.get_num_threads()
    )  # four tokens
    assert all(torch.equal(a, b) for a, b in zip(turned(), together, strict=True))
    monkeypatch.setattr("encoder.base.pieces.PIECE_ELEMENTS", 1)  # one token, which is the least
    assert all(torch.equal(a, b) for a, b in zip(turned(), together, strict=True))


def test_rotated_scores_depend_on_the_distance_only():
    qkv = randn(1, 3, 1, 8).expand(9, 3, 1, 8)
    q, k, _ = split_and_rotate(
        qkv, rope_table(torch.arange(9, dtype=torch.int32), theta=100.0, head_width=8)
    )
    scores = q[:, 0] @ k[:, 0].T
    for distance in range(-8, 9):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[:1].expand_as(along), rtol=0, atol=1e-5)


def test_a_rotation_of_neighbours_gives_the_same_scores_once_its_rows_are_laid_as_ours():
    """Two heads of 8, pairs (2j, 2j + 1) turned as complex numbers, against our rotation of the laid rows."""
    x_TC, query_QC, key_QC = randn(9, 6), randn(16, 6, seed=1), randn(16, 6, seed=2)
    place_T = torch.arange(9, dtype=torch.int32)
    table = rope_table(place_T, theta=100.0, head_width=8)
    turn = torch.complex(*table.double())[:, 0]

    def neighbours(rows: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x_TC @ rows.T).view(9, 2, 4, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    expected = torch.einsum("qhd,khd->hqk", neighbours(query_QC), neighbours(key_QC))
    laid = [x_TC @ half_split_rows(rows, heads=2).T for rows in (query_QC, key_QC)]
    qkv = torch.stack([*laid, laid[0]], dim=1).view(9, 3, 2, 8)
    q, k, _ = split_and_rotate(qkv, table)
    assert torch.allclose(torch.einsum("qhd,khd->hqk", q, k), expected, rtol=0, atol=1e-12)


def test_the_gradient_of_the_rotation_is_exact():
    table = rope_table(torch.arange(3, dtype=torch.int32), theta=100.0, head_width=4)
    qkv = randn(3, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, table), (qkv,))


def test_the_rotation_in_bf16_is_the_fp32_one_rounded_once():
    qkv = randn(100, 3, 2, 64, dtype=torch.float32).bfloat16()
    table = rope_table(torch.arange(8000, 8100, dtype=torch.int32), theta=10000.0, head_width=64)
    for found, exact in zip(
        split_and_rotate(qkv, table), split_and_rotate(qkv.float(), table), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("kind", ["geglu", "swiglu"])
def test_the_gated_layer_bends_the_first_half_and_leaves_the_second_straight(kind):
    mlp = FeedForward(kind=kind, width=4, intermediate=3, bias=False).double()
    x = randn(5, 4)
    both = x @ mlp.Wi.weight.T
    a, gate = both[:, :3], both[:, 3:]
    bent = (
        0.5 * a * (1 + torch.erf(a / math.sqrt(2))) if kind == "geglu" else a / (1 + torch.exp(-a))
    )
    assert torch.allclose(mlp(x), (bent * gate) @ mlp.Wo.weight.T, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(mlp, (x.requires_grad_(),))
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(mlp, {"Wi.weight": w}, (x,)),
        (mlp.Wi.weight.detach().clone().requires_grad_(),),
    )


def test_the_plain_layer_has_one_half_and_exact_gelu():
    mlp = FeedForward(kind="gelu", width=4, intermediate=3, bias=True).double()
    x = randn(5, 4)
    inner = x @ mlp.Wi.weight.T + mlp.Wi.bias
    expected = (0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))) @ mlp.Wo.weight.T + mlp.Wo.bias
    assert mlp.Wi.weight.shape == (3, 4) and torch.allclose(mlp(x), expected, rtol=0, atol=1e-14)


def test_the_layer_norm_has_the_biased_variance_and_a_bias_only_where_asked():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    for bias in (False, True):
        norm = make_norm("layernorm", 4, eps=1e-5, bias=bias)
        assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"][: 1 + bias]
        assert torch.allclose(
            norm(x), (x - 3.0) / math.sqrt(3.5 + 1e-5)
        )  # squares 4 1 0 9, mean 3.5


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_of_bf16_adds_up_the_gradient_of_its_weight_without_rounding_on_the_way(
    kind, weights
):
    norm = make_norm(kind, 32, eps=1e-5, bias=False)
    x, d = (randn(4096, 32).bfloat16() for _ in range(2))
    norm.double()(x.double()).backward(d.double())
    truth = norm.weight.grad.clone()
    norm.zero_grad()
    out = norm.to(weights)(x)
    assert out.dtype == torch.bfloat16
    out.backward(d)
    assert (
        norm.weight.grad.double() - truth
    ).norm() <= 2**-8 * truth.norm()  # torch's own LayerNorm: 5e-2


def test_an_embedding_of_bf16_adds_up_the_gradients_of_a_frequent_token_without_rounding_on_the_way():
    layer = TokenEmbedding(vocab_size=5, width=8, norm=torch.nn.Identity(), positions=3).bfloat16()
    ids, places, d = (
        torch.tensor([3, 0] * 2000),
        torch.tensor([1] * 4000),
        (randn(4000, 8) + 0.3).bfloat16(),
    )
    out = layer(ids, places)
    assert out.dtype == torch.bfloat16
    out.backward(d)
    for table, at in ((layer.tok_embeddings, ids), (layer.position_embeddings, places)):
        truth = torch.zeros(table.weight.shape, dtype=torch.float64).index_add_(0, at, d.double())
        assert (
            table.weight.grad.double() - truth
        ).norm() <= 2**-8 * truth.norm()  # torch's own: 9e-2


def test_the_rms_norm_divides_by_the_root_of_the_mean_square():
    norm = make_norm("rmsnorm", 4, eps=1e-5, bias=False)
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])  # squares 1 4 9 36, mean 12.5
    assert torch.allclose(norm(x), x / math.sqrt(12.5 + 1e-5))


def test_the_embedding_is_a_lookup_and_a_norm_without_scaling():
    layer = TokenEmbedding(
        vocab_size=5, width=4, norm=make_norm("layernorm", 4, eps=1e-5, bias=False)
    )
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(
        layer(ids, torch.arange(3)), F.layer_norm(layer.tok_embeddings.weight[ids], (4,), eps=1e-5)
    )


def test_learned_positions_and_segment_zero_are_added_before_the_norm():
    layer = TokenEmbedding(
        vocab_size=5,
        width=4,
        norm=make_norm("layernorm", 4, eps=1e-5, bias=False),
        positions=6,
        segments=2,
    )
    ids, places = torch.tensor([3, 0, 3]), torch.tensor([0, 1, 0])
    x = (
        layer.tok_embeddings.weight[ids]
        + layer.position_embeddings.weight[places]
        + layer.token_type_embeddings.weight[0]
    )
    assert torch.equal(layer(ids, places), F.layer_norm(x, (4,), eps=1e-5))


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_is_dense_then_gelu_then_norm(bias):
    head = PredictionHead(
        width=4, out_width=4, bias=bias, norm=make_norm("layernorm", 4, eps=1e-5, bias=False)
    )
    x = randn(3, 4, dtype=torch.float32)
    assert torch.allclose(
        head(x),
        F.layer_norm(F.gelu(F.linear(x, head.dense.weight, head.dense.bias)), (4,), eps=1e-5),
    )
