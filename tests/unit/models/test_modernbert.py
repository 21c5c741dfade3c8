"""ModernBERT as a whole: transformers' numbers, the published sizes, and a loss that does not depend on the packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from encoder.base.batch import Targets
from encoder.base.errors import ConfigError
from encoder.base.schema import from_mapping, to_plain
from encoder.models.catalog import PRESETS, SYSTEMS, build_model
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.objectives.mlm import mlm_loss
from tests.helpers.hf import transformers_modernbert
from tests.helpers.packed import packed

SMALL = ModernBertConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    window_radius_tokens=6,
    initializer_range=0.3,
)


def preset(name: str) -> ModernBertConfig:
    values = dict(PRESETS[name])
    return from_mapping(SYSTEMS[values.pop("system")], values)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name, parameters", [("modernbert_base", 149_655_232), ("modernbert_large", 395_881_664)]
)
def test_the_presets_have_the_published_number_of_parameters(name, parameters):
    config = preset(name)
    with torch.device("meta"):
        model = build_model(config, seed=0)
    assert model.parameter_count() == parameters == config.parameter_counts().total


def test_the_names_are_hugging_faces_and_the_tied_matrix_has_one_name():
    state = ModernBertForMaskedLM(SMALL).state_dict()
    layer = (
        "attn_norm.weight",
        "attn.Wqkv.weight",
        "attn.Wo.weight",
        "mlp_norm.weight",
        "mlp.Wi.weight",
        "mlp.Wo.weight",
    )
    expected = {
        "model.embeddings.tok_embeddings.weight",
        "model.embeddings.norm.weight",
        "model.final_norm.weight",
        "head.dense.weight",
        "head.norm.weight",
        "decoder.bias",
    }
    expected |= {f"model.layers.{i}.{part}" for i in range(4) for part in layer} - {
        "model.layers.0.attn_norm.weight"
    }
    assert set(state) == expected
    assert state["model.layers.0.attn.Wqkv.weight"].shape == (96, 32)
    assert state["model.layers.0.mlp.Wi.weight"].shape == (96, 32)


@pytest.mark.parametrize("attention", ["sdpa", "tiles"])
@pytest.mark.parametrize("thetas", [(10000.0, 10000.0), (160000.0, 10000.0)])
def test_logits_equal_transformers_across_the_edge_of_the_window(attention, thetas):
    config = ModernBertConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    ours = ModernBertForMaskedLM(config, attention=attention, seed=4).eval()
    ours.set_phase_({"global_rope_theta": thetas[0], "local_rope_theta": thetas[1]})
    theirs = transformers_modernbert(
        replace(config, global_rope_theta=thetas[0], local_rope_theta=thetas[1])
    )
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing in ([], ["decoder.weight"]) and unexpected == []
    theirs.tie_weights()
    lengths = [1, 64, 65, 66, 127, 128, 129, 130, 131, 300]
    batch = packed(lengths, vocab=200)
    with torch.no_grad():
        for ids, found in zip(
            batch.ids_T.split(lengths), ours.logits(batch).split(lengths), strict=True
        ):
            expected = theirs(input_ids=ids[None]).logits[0]
            assert (found - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(
    "lengths", [[5, 7, 1, 6], [13, 12, 9, 14], [40, 3, 30, 27]], ids=["short", "middle", "long"]
)
def test_backends_give_the_same_loss_and_gradients(lengths):
    batch, found = packed(lengths, vocab=96), {}
    for attention in ("sdpa", "tiles"):
        model = ModernBertForMaskedLM(SMALL, attention=attention, seed=1).double()
        loss = mlm_loss(model, batch).total
        loss.backward()
        found[attention] = loss.item(), gradients(model)
    assert found["sdpa"][0] == pytest.approx(found["tiles"][0], rel=1e-12)
    for name, expected in found["sdpa"][1].items():
        assert (found["tiles"][1][name] - expected).abs().max() <= 1e-10 * expected.abs().max(), (
            name
        )


def test_the_loss_of_a_packed_batch_is_the_sum_of_its_documents_dropout_included():
    lengths = [20, 1, 33, 10]
    batch = packed(lengths, vocab=96, predict=30)
    model = ModernBertForMaskedLM(SMALL, seed=1).double()
    whole = mlm_loss(model, batch).total
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    alone, start = 0.0, 0
    for length in lengths:
        inside = (batch.targets["mlm"].index_M >= start) & (
            batch.targets["mlm"].index_M < start + length
        )
        part = slice(start, start + length)
        targets = Targets(
            index_M=batch.targets["mlm"].index_M[inside] - start,
            value_M=batch.targets["mlm"].value_M[inside],
            count=int(inside.sum()),
        )
        document = replace(
            batch,
            ids_T=batch.ids_T[part],
            positions_T=batch.positions_T[part],
            max_seqlen=length,
            cu_seqlens_S1=torch.tensor([0, length], dtype=torch.int32),
            token_key_T=batch.token_key_T[part],
            targets={"mlm": targets},
            tokens=length,
        )
        loss = mlm_loss(model, document).total
        loss.backward()
        alone, start = alone + loss.item(), start + length
    assert whole.item() == pytest.approx(alone, rel=1e-12)
    for name, grad in gradients(model).items():
        assert torch.allclose(
            grad, expected[name], rtol=0, atol=1e-10 * expected[name].abs().max()
        ), name
    assert mlm_loss(model.eval(), batch).total.item() != pytest.approx(
        whole.item(), rel=1e-6
    )  # dropout was on


@pytest.mark.parametrize("capacity", [0, 8])
def test_nothing_to_predict_gives_zero_gradients_for_every_parameter(capacity):
    batch = packed([9, 20], vocab=96, predict=capacity)
    nothing = replace(
        batch.targets["mlm"], value_M=torch.full_like(batch.targets["mlm"].value_M, -100), count=0
    )
    batch = replace(batch, targets={"mlm": nothing})
    model = ModernBertForMaskedLM(SMALL)
    loss = mlm_loss(model, batch).total
    loss.backward()
    assert loss == 0
    for name, grad in gradients(model).items():
        assert grad is not None and not grad.any(), name


@pytest.mark.parametrize("attention", ["sdpa", "tiles"])
def test_a_micro_batch_without_tokens_gives_zero_gradients_for_every_parameter(attention):
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = replace(
        packed([1], vocab=96, predict=0),
        ids_T=nothing,
        positions_T=nothing.int(),
        token_key_T=nothing,
        cu_seqlens_S1=torch.zeros(4, dtype=torch.int32),
        max_seqlen=0,
        tokens=0,
    )
    model = ModernBertForMaskedLM(SMALL, attention=attention)
    mlm_loss(model, batch).total.backward()
    assert all(grad is not None and not grad.any() for grad in gradients(model).values())


def test_theta_can_change_between_steps_and_moves_only_the_layers_it_is_for():
    batch = packed([60], vocab=96)
    all_global = ModernBertForMaskedLM(replace(SMALL, global_attn_every_n_layers=1), seed=1).eval()
    before = mlm_loss(all_global, batch).total
    all_global.set_phase_({"global_rope_theta": 10000.0, "local_rope_theta": 500.0})
    assert torch.equal(mlm_loss(all_global, batch).total, before)
    all_global.set_phase_({"global_rope_theta": 500.0, "local_rope_theta": 500.0})
    assert not torch.equal(mlm_loss(all_global, batch).total, before)


def test_precisions_keep_their_words():
    batch = packed([30, 80], vocab=96)
    model = ModernBertForMaskedLM(SMALL, seed=1).eval()
    exact = mlm_loss(model, batch).total
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mlm_loss(model, batch).total
    mixed.backward()
    assert mixed.dtype == torch.float32 and all(
        p.grad.dtype == torch.float32 for p in model.parameters()
    )
    assert 0 < abs(mixed - exact) < 0.02 * exact
    low = ModernBertForMaskedLM(SMALL, seed=1).eval().bfloat16()
    assert (
        mlm_loss(low, batch).total.dtype == torch.float32
        and abs(mlm_loss(low, batch).total - exact) < 0.05 * exact
    )
    assert (
        mlm_loss(ModernBertForMaskedLM(SMALL, seed=1).double(), batch).total.dtype == torch.float64
    )


def test_settings_survive_the_schema():
    config = replace(SMALL, global_rope_theta=160000.0)
    assert from_mapping(ModernBertConfig, to_plain(config)) == config


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            dict(hidden_size=100),
            (
                "hidden_size 100 over 12 heads gives a head width of 8.33333.*Nearest hidden_size:"
                " 96 or 120"
            ),
        ),
        (
            dict(hidden_size=36),
            "head width of 3; needed: a whole number, even where.*Nearest hidden_size: 24 or 48",
        ),
        (dict(vocab_size=0), "vocab_size is 0; needed: at least 1"),
        (
            dict(attention_output_dropout=1.0),
            "attention_output_dropout is 1.0; needed: 0 to below 1",
        ),
        (dict(norm_eps=-1e-5), "norm_eps is -1e-05; needed: more than 0"),
    ],
)
def test_a_shape_that_cannot_be_says_what_can(wrong, words):
    with pytest.raises(ConfigError, match=words):
        ModernBertConfig(**wrong)


@pytest.mark.slow  # 150 M weights, twice; test_logits_equal_transformers has tiny ones
def test_the_base_model_gives_transformers_logits():
    """Random Megatron weights at the published shape, fp32: 22 layers of the true width add up more rounding than tiny ones."""
    transformers = pytest.importorskip("transformers")
    config = replace(preset("modernbert_base"), global_rope_theta=160000.0)
    ours = ModernBertForMaskedLM(config, seed=4).eval()
    theirs = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(attn_implementation="sdpa", reference_compile=False)
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing in ([], ["decoder.weight"]) and unexpected == []
    theirs.tie_weights()
    lengths = [1, 127, 128, 129, 130, 600]
    batch = packed(lengths, vocab=config.vocab_size)
    with torch.no_grad():
        for ids, found in zip(
            batch.ids_T.split(lengths), ours.logits(batch).split(lengths), strict=True
        ):
            difference = (found - theirs(input_ids=ids[None]).logits[0]).abs().max()
            print(len(ids), f"{difference:.1e}")
            assert difference <= 1e-4
