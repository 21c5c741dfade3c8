"""Growing a model: every tensor as the published formulas say, and what cannot grow is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from encoder.base.errors import ModelError
from encoder.models.growth import GrowthConfig, axes_of, grow, layer_sources
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from tests.reference import growth as reference

# base -> large in small: 12 -> 16 heads (a shift of 2 heads), 22 -> 28 layers, intermediate 1.5 and 2.5625 of hidden
BASE = ModernBertConfig(
    vocab_size=11,
    hidden_size=24,
    num_attention_heads=12,
    num_hidden_layers=22,
    intermediate_size=36,
    max_position_embeddings=8,
)
LARGE = replace(
    BASE, hidden_size=32, num_attention_heads=16, num_hidden_layers=28, intermediate_size=82
)
SMALL = replace(
    BASE, hidden_size=8, num_attention_heads=2, intermediate_size=6, num_hidden_layers=4
)
MEDIUM = replace(
    SMALL,
    hidden_size=17,
    num_attention_heads=4,
    attention_head_width=4,
    intermediate_size=11,
    num_hidden_layers=7,
)  # odd differences of hidden and intermediate size: the floor counts
EVERYTHING = dict(
    norm_bias=True,
    attention_bias=True,
    mlp_bias=True,
    head_bias=True,
    tie_word_embeddings=False,
    positions="learned",
    type_vocab_size=2,
    norm_place="post",
    mlp="gelu",
)


def chance_weights(config: ModernBertConfig, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Every parameter drawn, norms and biases too, so that nothing can be mistaken for a first value."""
    draw = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=draw)
        for n, p in ModernBertForMaskedLM(config).state_dict().items()
    }


def assert_as_the_formulas_say(
    old: ModernBertConfig, new: ModernBertConfig, *, layers: list[int], **settings: str
) -> None:
    settings = {"mode": "middle", "layer_map": "modernbert", "final_norm": "copy", **settings}
    source = chance_weights(old)
    fresh = {n: p.numpy() for n, p in ModernBertForMaskedLM(new, seed=3).state_dict().items()}
    expected = reference.grown(
        {n: w.numpy() for n, w in source.items()},
        fresh,
        layers=layers,
        mode=settings["mode"],
        gated=old.mlp != "gelu",
        copy_final_norm=settings["final_norm"] == "copy",
    )
    found = grow(source, old, new, GrowthConfig(seed=3, **settings)).weights
    assert list(found) == list(expected)
    for name, weight in found.items():
        assert torch.equal(weight, torch.from_numpy(expected[name])), name


def test_base_to_large_is_the_published_growth():
    assert list(layer_sources(BASE, LARGE, layer_map="modernbert")) == reference.BASE_TO_LARGE
    assert_as_the_formulas_say(BASE, LARGE, layers=reference.BASE_TO_LARGE)
    assert_as_the_formulas_say(BASE, LARGE, layers=reference.BASE_TO_LARGE, final_norm="ones")


def test_new_heads_are_old_heads_two_to_the_left_and_wrap_around():
    source = chance_weights(BASE)
    grown = grow(source, BASE, LARGE, GrowthConfig()).weights
    old_heads = [10, 11, *range(12), 0, 1]
    columns = [(c - 4) % 24 for c in range(32)]
    old = source["model.layers.0.attn.Wqkv.weight"].view(3, 12, 2, 24)
    new = grown["model.layers.0.attn.Wqkv.weight"].view(3, 16, 2, 32)
    for head, old_head in enumerate(old_heads):
        assert torch.equal(new[:, head], old[:, old_head][..., columns]), head


@pytest.mark.parametrize("mode", ["middle", "edge", "centre"])
@pytest.mark.parametrize("choices", [{}, {"mlp": "swiglu", "norm": "rmsnorm"}, EVERYTHING])
def test_every_mode_and_every_optional_parameter_is_as_the_formulas_say(mode, choices):
    old, new = (replace(c, **choices) for c in (SMALL, MEDIUM))
    assert_as_the_formulas_say(old, new, layers=[0, 1, 1, 2, 2, 3, 3], mode=mode)


def test_the_table_knows_every_parameter_of_every_kind_of_model():
    for choices in ({}, EVERYTHING, {"decoder_bias": False, "mlp": "swiglu"}):
        config = replace(MEDIUM, **choices)
        for name, parameter in ModernBertForMaskedLM(config).state_dict().items():
            axes = axes_of(name, config.growth())
            assert (
                tuple(axis.blocks(config) * axis.length(config) for axis in axes) == parameter.shape
            ), name


def test_halves_go_to_the_even_layer_and_the_last_layer_is_never_passed():
    for old, new in ((22, 28), (4, 7), (3, 6), (4, 8), (2, 9), (5, 5)):
        found = layer_sources(
            replace(SMALL, num_hidden_layers=old),
            replace(SMALL, num_hidden_layers=new),
            layer_map="modernbert",
        )
        assert list(found) == [
            min(reference.round_half_even(i * old, new), old - 1) for i in range(new)
        ]


def test_same_kind_gives_global_layers_to_global_ones_and_local_to_local():
    sources = layer_sources(BASE, LARGE, layer_map="same_kind")
    assert [sources[i] for i in range(0, 28, 3)] == [
        0,
        3,
        6,
        6,
        9,
        12,
        15,
        18,
        18,
        21,
    ]  # 8 -> 10 global layers
    assert all(BASE.is_local(s) == LARGE.is_local(i) for i, s in enumerate(sources))
    assert [s for i, s in enumerate(sources) if LARGE.is_local(i)] == [
        1,
        2,
        4,
        4,
        5,
        7,
        8,
        8,
        10,
        11,
        13,
        14,
        14,
        16,
        17,
        19,
        19,
        20,
    ]  # 14 -> 18 local ones
    layers = [
        0,
        1,
        1,
        3,
        2,
        2,
        3,
    ]  # halves: global 1 of 3 is old 0.67 -> 1; local 1 of 4 is old 0.5 -> 0
    assert_as_the_formulas_say(SMALL, MEDIUM, layers=layers, layer_map="same_kind")


def test_a_grown_model_that_is_only_deeper_copies_each_tensor():
    deeper = replace(SMALL, num_hidden_layers=5)
    source = chance_weights(SMALL)
    grown = grow(source, SMALL, deeper, GrowthConfig()).weights
    assert list(layer_sources(SMALL, deeper, layer_map="modernbert")) == [0, 1, 2, 2, 3]
    assert torch.equal(
        grown["model.layers.4.mlp.Wi.weight"], source["model.layers.3.mlp.Wi.weight"]
    )
    assert torch.equal(grown["decoder.bias"], source["decoder.bias"])


def test_what_is_not_inherited_is_said():
    weights = chance_weights(SMALL)
    assert grow(weights, SMALL, MEDIUM, GrowthConfig()).not_inherited == ()
    ones = grow(weights, SMALL, MEDIUM, GrowthConfig(final_norm="ones"))
    assert ones.not_inherited == (
        "model.final_norm.weight: as the new model has it, as final_norm ones asks",
    )
    assert torch.equal(ones.weights["model.final_norm.weight"], torch.ones(17))
    deep = grow(
        weights, SMALL, replace(SMALL, num_hidden_layers=9), GrowthConfig()
    )  # 0 0 1 1 2 2 3 3 3
    assert deep.not_inherited == (
        (
            "model.layers.1.attn_norm.weight: as the new model has it, for layer 0 of the source"
            " has none"
        ),
    )
    assert (
        "mode centre" in grow(weights, SMALL, MEDIUM, GrowthConfig(mode="centre")).not_inherited[0]
    )
    other = grow(
        weights,
        SMALL,
        replace(MEDIUM, global_rope_theta=160000.0, window_radius_tokens=3),
        GrowthConfig(),
    )
    assert other.other_settings == (
        "window_radius_tokens: 64 in the source, 3 in the new model",
        "global_rope_theta: 10000.0 in the source, 160000.0 in the new model",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"intermediate_size": 5},
            "intermediate_size is 6 in the source and 5 in the new model; needed: at least 6",
        ),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 4 in the source and 3"),
        ({"hidden_size": 4, "num_attention_heads": 1}, "hidden_size is 8 in the source and 4"),
        (
            {"vocab_size": 12},
            (
                "vocab_size is 11 in the source and 12 in the new model; it cannot grow.*Set"
                " vocab_size: 11"
            ),
        ),
        (
            {"hidden_size": 16},
            "attention_head_width is 4 in the source and 8 .*or num_attention_heads: 4",
        ),
        (
            {"hidden_size": 20, "num_attention_heads": 5},
            "2 -> 5 in mode middle shifts by 1.5 of them .*Nearest .*: 4 or 6",
        ),
        ({"mlp": "swiglu", "num_hidden_layers": 7}, "mlp is geglu in the source and swiglu"),
        ({"norm_bias": True}, "norm_bias is False in the source and True"),
        ({"positions": "learned"}, "positions is rope in the source and learned"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is True in the source and False"),
        ({}, "the new model is as large as the source .*name the source as init_from"),
    ],
)
def test_a_shape_that_cannot_grow_is_refused_by_name(changes, words):
    with pytest.raises(ModelError, match=words):
        grow({}, SMALL, replace(SMALL, **changes), GrowthConfig())


def test_a_learned_position_table_cannot_grow_but_what_rope_promises_may():
    learned = replace(SMALL, positions="learned")
    with pytest.raises(ModelError, match="max_position_embeddings is 8 in the source and 16"):
        grow(
            {},
            learned,
            replace(learned, max_position_embeddings=16, hidden_size=16, num_attention_heads=4),
            GrowthConfig(),
        )
    longer = replace(MEDIUM, max_position_embeddings=16)
    assert grow(chance_weights(SMALL), SMALL, longer, GrowthConfig()).other_settings


def test_odd_heads_may_grow_from_the_edge_and_choices_without_effect_are_refused():
    three = replace(SMALL, hidden_size=12, num_attention_heads=3)
    assert_as_the_formulas_say(SMALL, three, layers=[0, 1, 2, 3], mode="edge")
    post = replace(SMALL, norm_place="post")
    with pytest.raises(ModelError, match="this model has no final norm"):
        grow({}, post, replace(post, num_hidden_layers=5), GrowthConfig(final_norm="ones"))
    only_global = replace(SMALL, num_hidden_layers=2, global_attn_every_n_layers=1)
    with pytest.raises(ModelError, match="the source has 0 local layers, the new model 4"):
        grow({}, only_global, MEDIUM, GrowthConfig(layer_map="same_kind"))
    with pytest.raises(ModelError, match="the source has 3 local layers, the new model 2"):
        grow(
            {},
            replace(SMALL, global_attn_every_n_layers=4),
            replace(SMALL, num_hidden_layers=5, global_attn_every_n_layers=2),
            GrowthConfig(layer_map="same_kind"),
        )
