"""Initial weights: the deviation of each matrix, and that they depend on the seed and the name alone."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scipy import special
from torch import nn

from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn.init import (
    drawn_later,
    initial_values,
    mimetic_values,
    sigma_of,
    truncated_normal_,
    why_not_mimetic,
)

SHAPE = dict(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=2,
)
EVERYTHING = dict(
    SHAPE,
    tie_word_embeddings=False,
    positions="learned",
    max_position_embeddings=512,
    type_vocab_size=200,
    attention_bias=True,
    mlp_bias=True,
    head_bias=True,
    norm_bias=True,
)
RULE = dict(initializer_range=0.02, layers=4)
CUT_AT_TWO = 0.87962566  # deviation of a standard normal cut at +-2
WIDE, NARROW, LOGITS = 0.02, 0.02 / math.sqrt(2 * 4), 1 / math.sqrt(128)
SIGMA = {
    "tok_embeddings": WIDE,
    "position_embeddings": WIDE,
    "token_type_embeddings": WIDE,
    "Wqkv": WIDE,
    "Wi": WIDE,
    "head.dense": WIDE,
    "attn.Wo": NARROW,
    "mlp.Wo": NARROW,
    "decoder": LOGITS,
}


@functools.cache
def model(seed: int = 0, **changes) -> ModernBertForMaskedLM:
    return ModernBertForMaskedLM(ModernBertConfig(**{**SHAPE, **changes}), seed=seed)


def everything() -> ModernBertForMaskedLM:
    return model(**EVERYTHING)


def expected(name: str) -> float:
    return next(sigma for part, sigma in SIGMA.items() if part in name)


def test_each_matrix_has_megatrons_deviation_cut_at_two_sigma():
    matrices = {n: p for n, p in everything().named_parameters() if p.ndim == 2}
    assert len(matrices) == 5 + 4 * 4
    assert {part for part in SIGMA if any(part in name for name in matrices)} == set(SIGMA)
    for name, p in matrices.items():
        sigma, count = expected(name), p.numel()
        # the standard error of a deviation, of itself: sqrt((kurtosis - 1) / 4 / count), the cut normal's kurtosis is 2.366
        assert p.std().item() == pytest.approx(
            CUT_AT_TWO * sigma, rel=4 * math.sqrt(0.3415 / count)
        ), name
        assert abs(p.mean().item()) < 4 * CUT_AT_TWO * sigma / math.sqrt(count), name
        assert p.abs().max() <= 2 * sigma * (1 + 1e-6), name
        assert p.abs().max() > 1.99 * sigma, name


def test_head_dense_is_not_divided_by_the_depth_as_transformers_does():
    assert model(num_hidden_layers=8).head.dense.weight.std().item() == pytest.approx(
        CUT_AT_TWO * 0.02, rel=0.03
    )


@pytest.mark.parametrize("named", [model, everything])
def test_norms_start_at_one_and_every_bias_at_zero(named):
    vectors = {n: p for n, p in named().named_parameters() if p.ndim == 1}
    assert "decoder.bias" in vectors
    for name, p in vectors.items():
        assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_values_depend_on_the_seed_and_the_name_not_on_what_else_there_is():
    small, deep = model(num_hidden_layers=2).state_dict(), model(num_hidden_layers=4).state_dict()
    wqkv = "model.layers.1.attn.Wqkv.weight"
    assert torch.equal(small[wqkv], deep[wqkv])
    assert not torch.equal(small[wqkv], model(seed=1, num_hidden_layers=2).state_dict()[wqkv])
    assert not torch.equal(small[wqkv], small["model.layers.0.attn.Wqkv.weight"])
    torch.manual_seed(99)
    assert torch.equal(small[wqkv], model.__wrapped__(num_hidden_layers=2).state_dict()[wqkv])


def test_a_models_weights_are_its_initial_values_one_by_one_also_where_it_stands_on_no_device():
    with torch.device("meta"):
        hollow = ModernBertForMaskedLM(ModernBertConfig(**EVERYTHING))
    for name, p in everything().named_parameters():
        assert torch.equal(p, hollow.initial_values(name, p.shape)), name


@pytest.mark.parametrize("shape", [(4, 4), (4,)])
def test_a_parameter_without_a_rule_is_refused(shape):
    with pytest.raises(AssertionError, match="no rule to draw pooler.weight"):
        initial_values("pooler.weight", shape, seed=0, cutoff_factor=2.0, **RULE)


def test_megatron_core_agrees_on_the_deviation_before_the_cut():
    utils = pytest.importorskip("megatron.core.utils")
    for name, p in everything().named_parameters():
        if p.ndim == 2 and "decoder" not in name:  # Megatron's own decoder is tied
            scaled = name.endswith("Wo.weight")
            judge = (
                utils.scaled_init_method_normal(0.02, 4)
                if scaled
                else utils.init_method_normal(0.02)
            )
            torch.manual_seed(0)
            drawn = judge(torch.empty(300, 1000))
            assert sigma_of(name, p.shape, **RULE) == pytest.approx(
                drawn.std().item(), rel=0.006
            ), name


def test_layers_whose_weights_are_drawn_later_take_no_chance_from_torch():
    before = torch.get_rng_state()
    with drawn_later():
        nn.Embedding(5, 4)
        nn.Linear(4, 3)
        norm = nn.LayerNorm(4)
    assert torch.equal(torch.get_rng_state(), before)
    # what is no chance is set, and what has a generator of its own is drawn
    assert norm.weight.eq(1.0).all() and norm.bias.eq(0.0).all()
    with drawn_later():
        own = nn.init.normal_(torch.zeros(3), generator=torch.Generator().manual_seed(1))
    assert own.abs().min() > 0.0
    nn.Linear(4, 3)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("inner", "width"), [(24, 24), (32, 24), (16, 24)])
def test_mimetic_attention_passes_on_what_it_sees(inner, width):
    drawn = {"Wqkv": torch.randn(3 * inner, width), "Wo": torch.randn(width, inner)}
    found = {
        name: mimetic_values(
            f"model.layers.3.attn.{name}.weight", w, seed=4, strength=0.25, turns={}
        )
        for name, w in drawn.items()
    }
    assert torch.equal(found["Wqkv"][: 2 * inner], drawn["Wqkv"][: 2 * inner])
    passed = found["Wo"] @ found["Wqkv"][2 * inner :] / 0.25
    if inner >= width:
        assert passed == pytest.approx(torch.eye(width), abs=1e-6)
    else:
        # a projection on as many directions as attention has features
        assert passed @ passed == pytest.approx(passed, abs=1e-6)
        assert passed.trace().item() == pytest.approx(inner, abs=1e-4)


def test_mimetic_layers_differ_and_other_parameters_stay():
    drawn = torch.randn(24, 24)
    one, other, again = (
        mimetic_values(f"model.layers.{n}.attn.Wo.weight", drawn, seed=4, strength=1.0, turns={})
        for n in (0, 1, 0)
    )
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.1
    for name in (
        "model.layers.0.mlp.Wo.weight",
        "pooler.dense.weight",
        "model.layers.0.attn_norm.weight",
        "x.attn.Wo.bias",
    ):
        assert mimetic_values(name, drawn, seed=4, strength=1.0, turns={}) is drawn


def test_a_mimetic_head_turns_to_neighbours():
    name, drawn, turns = "head.dense.weight", torch.randn(24, 24), {24: torch.randn(24, 24)}
    found = mimetic_values(name, drawn, seed=4, strength=0.25, turns=turns)
    assert torch.equal(found, turns[24])
    # of a width that no table of vectors has
    found = mimetic_values(name, drawn, seed=4, strength=0.25, turns={8: torch.eye(8)})
    assert torch.equal(found, torch.eye(24))


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        (
            {
                "l.0.attn.Wqkv.weight": (72, 24),
                "l.0.attn.Wo.weight": (24, 24),
                "head.dense.weight": (24, 24),
            },
            None,
        ),
        ({"l.0.attn.Wqkv.weight": (72, 24), "l.0.attn.Wo.weight": (24, 24)}, None),
        ({"l.0.attn.Wkv.weight": (48, 24), "l.0.attn.Wo.weight": (24, 24)}, "not one matrix"),
        (
            {
                "l.0.attn.Wqkv.weight": (72, 24),
                "l.0.attn.Wo.weight": (24, 24),
                "head.dense.weight": (8, 24),
            },
            "not as wide as its layers",
        ),
    ],
    ids=["as ModernBERT", "without a head", "as XLNet", "as ALBERT"],
)
def test_models_that_cannot_begin_mimetic_are_told(shapes, why):
    said = why_not_mimetic(shapes)
    assert (why is None and said is None) or why in said


def test_mimetic_signs_are_not_the_librarys(monkeypatch):
    drawn, name, qr = torch.randn(24, 24), "model.layers.0.attn.Wo.weight", torch.linalg.qr
    expected = mimetic_values(name, drawn, seed=4, strength=1.0, turns={})
    monkeypatch.setattr(torch.linalg, "qr", lambda x: tuple(-part for part in qr(x)))
    assert mimetic_values(name, drawn, seed=4, strength=1.0, turns={}) == pytest.approx(expected)


def test_a_seed_draws_the_same_under_every_version_of_torch():
    """nn.init.trunc_normal_ gave other values from some version after 2.11 on: a run's first weights would have moved."""
    drawn = initial_values("tok_embeddings.weight", (64, 64), seed=3, cutoff_factor=2.0, **RULE)
    # drawn with torch 2.11
    torch.testing.assert_close(
        drawn[0, :6].tolist(),
        [0.0002587991, 0.0128262816, 0.0002558583, 0.017060848, -0.0240790453, 0.0213436391],
        rtol=1e-5,
        atol=0,
    )

    if torch.__version__.startswith("2.11."):
        ours, theirs = torch.empty(10**5), torch.empty(10**5)
        draw = torch.Generator().manual_seed(1)
        truncated_normal_(ours, sigma=0.0030151, cutoff_factor=2.0, draw=draw)
        cut = 2.0 * 0.0030151
        draw = torch.Generator().manual_seed(1)
        nn.init.trunc_normal_(theirs, std=0.0030151, a=-cut, b=cut, generator=draw)
        assert torch.equal(ours, theirs)

    # the formula, by scipy
    uniform = torch.empty(1000).uniform_(generator=torch.Generator().manual_seed(1)).double()
    share = special.erf(2 / math.sqrt(2))
    expected = 0.02 * math.sqrt(2) * special.erfinv((2 * uniform.numpy() - 1) * share)
    draw = torch.Generator().manual_seed(1)
    found = truncated_normal_(torch.empty(1000), sigma=0.02, cutoff_factor=2.0, draw=draw)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=1e-7)
