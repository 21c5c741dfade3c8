"""Dropout by address: the right rate, no visible dependence, and the same elements however the tokens are dealt."""

from __future__ import annotations

import math

import pytest
import torch

from encoder.nn.dropout import AddressedDropout, quantile_of_int64


def keys(tokens: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        -(2**63), 2**63 - 1, (tokens,), generator=torch.Generator().manual_seed(seed)
    )


def fallen(layer: AddressedDropout, key_T: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(len(key_T), len(layer.constant_C))
    return layer(torch.zeros_like(ones), ones, key_T) == 0


def test_the_rate_is_p_within_four_standard_errors():
    tokens, width, p = 4096, 256, 0.1
    share = fallen(AddressedDropout(width=width, layer=3, p=p), keys(tokens)).float().mean()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / (tokens * width))


def test_each_channel_and_each_token_falls_out_at_the_rate():
    out = fallen(AddressedDropout(width=512, layer=0, p=0.1), keys(8192)).double()
    for axis, count in ((0, 8192), (1, 512)):
        error = math.sqrt(0.09 / count)
        assert (out.mean(axis) - 0.1).abs().max() < 5.5 * error
        assert abs(out.mean(axis).std() / error - 1) < 0.15


@pytest.mark.parametrize("between", ["channels", "tokens", "layers"])
def test_pairs_are_uncorrelated(between):
    key_T = keys(8192)
    if between == "tokens":
        first = fallen(AddressedDropout(width=8192, layer=0, p=0.1), keys(128)).double().T
    else:
        first = fallen(AddressedDropout(width=128, layer=0, p=0.1), key_T).double()
    second = (
        fallen(AddressedDropout(width=128, layer=1, p=0.1), key_T).double()
        if between == "layers"
        else first
    )
    a, b = ((x - x.mean(0)) / x.std(0) for x in (first, second))
    correlation = a.T @ b / len(a)
    if between != "layers":
        correlation.fill_diagonal_(0)
    error = 1 / math.sqrt(len(a))
    assert (
        correlation.abs().max() < 6 * error
    )  # 16,384 pairs: 4.2 is usual, a dependent pair would be 10 and more
    assert abs(correlation.std() / error - 1) < 0.05


def test_the_elements_do_not_depend_on_how_tokens_are_dealt_to_micro_batches():
    layer, key_T = AddressedDropout(width=64, layer=2, p=0.1), keys(300)
    x, y = torch.randn(300, 64), torch.randn(300, 64)
    whole = layer(x, y, key_T)
    parts = [layer(*three) for three in zip(x.split(77), y.split(77), key_T.split(77), strict=True)]
    assert torch.equal(whole, torch.cat(parts))
    turned = torch.arange(299, -1, -1)
    assert torch.equal(whole[turned], layer(x[turned], y[turned], key_T[turned]))


def test_kept_elements_are_scaled_so_that_the_mean_stays():
    layer, key_T = AddressedDropout(width=8, layer=0, p=0.25), keys(50)
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    out = layer(x, y, key_T)
    keep = ~fallen(layer, key_T)
    assert torch.allclose(out, x + y * keep / 0.75, rtol=1e-12)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.allclose(
        y.grad, keep / torch.tensor(0.75).double()
    )


def test_eval_mode_and_p_zero_add_plainly():
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.equal(AddressedDropout(width=8, layer=0, p=0.0)(x, y, keys(5)), x + y)
    assert torch.equal(AddressedDropout(width=8, layer=0, p=0.5).eval()(x, y, keys(5)), x + y)


def test_constants_are_odd_stay_out_of_the_state_and_are_always_the_same():
    layer = AddressedDropout(width=64, layer=1, p=0.1)
    assert (layer.constant_C % 2).abs().eq(1).all() and len(layer.constant_C.unique()) == 64
    assert layer.state_dict() == {}
    assert layer.constant_C[:2].tolist() == [
        7446848796272061249,
        -8795302849968712471,
    ]  # a change would change every run


def test_quantiles_of_int64():
    assert quantile_of_int64(0.5) == 0
    assert quantile_of_int64(0.25) == -(2**62)
    assert quantile_of_int64(0.0) == -(2**63)


def test_in_bf16_the_sum_is_the_exact_one_rounded_once():
    layer, key_T = AddressedDropout(width=64, layer=0, p=0.1), keys(100)
    x, y = torch.randn(100, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    assert torch.equal(layer(x, y, key_T), layer(x.float(), y.float(), key_T).bfloat16())


def test_constants_are_made_where_they_are_needed_and_not_before():
    with torch.device("meta"):
        shape_alone = AddressedDropout(width=64, layer=1, p=0.1)
        plain = AddressedDropout(width=64, layer=1, p=0.1, place="mlp")
    unused = AddressedDropout(width=64, layer=1, p=0.0)
    assert not any(len(layer.constant_C) for layer in (shape_alone, plain, unused))
    made, key_T = AddressedDropout(width=64, layer=1, p=0.1), keys(50)
    assert torch.equal(fallen_of(shape_alone, key_T), fallen_of(made, key_T))
    assert torch.equal(shape_alone.constant_C, made.constant_C) and shape_alone.state_dict() == {}


def fallen_of(layer: AddressedDropout, key_T: torch.Tensor) -> torch.Tensor:
    return layer.alone(torch.ones(len(key_T), 64), key_T) == 0
