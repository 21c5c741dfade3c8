"""First values: the deviation of each matrix, and that they depend on the seed and the name alone."""

from __future__ import annotations

import math

import pytest
import torch

from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn.init import sigma_of

SHAPE = dict(vocab_size=2048, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2)
CUT_AT_TWO = 0.87962566        # deviation of a standard normal cut at +-2


def model(seed: int = 0, **changes) -> ModernBertForMaskedLM:
    return ModernBertForMaskedLM(ModernBertConfig(**{**SHAPE, **changes}), seed=seed)


def test_each_matrix_has_megatrons_deviation_cut_at_two_sigma():
    wide, narrow = 0.02, 0.02 / math.sqrt(2 * 4)
    sigmas = {"tok_embeddings": wide, "Wqkv": wide, "Wi": wide, "head.dense": wide, "attn.Wo": narrow, "mlp.Wo": narrow}
    matrices = {n: p for n, p in model().named_parameters() if p.ndim == 2}
    assert len(matrices) == 2 + 4 * 4
    for name, p in matrices.items():
        sigma = next(s for part, s in sigmas.items() if part in name)
        assert sigma_of(name, initializer_range=0.02, layers=4) == pytest.approx(sigma)
        assert p.std().item() == pytest.approx(CUT_AT_TWO * sigma, rel=4 / math.sqrt(2 * p.numel()) + 1e-3), name
        assert abs(p.mean().item()) < 5 * sigma / math.sqrt(p.numel()), name
        assert p.abs().max() <= 2 * sigma * (1 + 1e-6), name
        assert p.abs().max() > 1.9 * sigma, name


def test_head_dense_is_not_divided_by_the_depth_as_transformers_does():
    assert model(num_hidden_layers=8).head.dense.weight.std().item() == pytest.approx(CUT_AT_TWO * 0.02, rel=0.03)


def test_norms_start_at_one_and_the_decoder_bias_at_zero():
    for name, p in model().named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name == "decoder.bias" else 1)).all(), name


def test_values_depend_on_the_seed_and_the_name_not_on_what_else_there_is():
    small, deep = model(num_hidden_layers=2).state_dict(), model(num_hidden_layers=4).state_dict()
    wqkv = "model.layers.1.attn.Wqkv.weight"
    assert torch.equal(small[wqkv], deep[wqkv])
    assert not torch.equal(small[wqkv], model(seed=1, num_hidden_layers=2).state_dict()[wqkv])
    assert not torch.equal(small[wqkv], small["model.layers.0.attn.Wqkv.weight"])
    torch.manual_seed(99)
    assert torch.equal(small[wqkv], model(num_hidden_layers=2).state_dict()[wqkv])


def test_megatron_core_agrees_on_the_deviation_before_the_cut():
    utils = pytest.importorskip("megatron.core.utils")
    for name, judge in (("model.layers.0.attn.Wqkv.weight", utils.init_method_normal(0.02)),
                        ("model.layers.0.mlp.Wo.weight", utils.scaled_init_method_normal(0.02, 22))):
        torch.manual_seed(0)
        drawn = judge(torch.empty(1000, 1000))
        assert sigma_of(name, initializer_range=0.02, layers=22) == pytest.approx(drawn.std().item(), rel=0.004), name
