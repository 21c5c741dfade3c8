"""ALBERT: shared blocks, a narrow embedding, published counts, dropout of each call, growth in width and none in depth."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import encoder.models.encoder as shared
import encoder.tools.plan.activations as activations
from encoder.base.errors import ConfigError, ModelError
from encoder.models.albert import AlbertConfig
from encoder.models.catalog import build_model
from encoder.models.growth import GrowthConfig, grow
from encoder.models.shrink import student_config
from encoder.nn.block import Block
from encoder.nn.dropout import key_of_call
from encoder.objectives.mlm import mlm_loss
from encoder.optim.catalog import build_optimizer
from encoder.optim.muon import MuonConfig
from encoder.tools.plan.activations import count_kept
from tests.helpers.contracts import check_model
from tests.helpers.packed import packed
from tests.helpers.plain import check_loss_and_gradients, with_random_weights
from tests.unit.models.test_bert import QUIET, SIZES, dropped_shares, preset
from tests.unit.models.test_flops import WholeDocuments

TINY = AlbertConfig(**SIZES, embedding_size=10)
# 7 layers over 3 groups are 3, 2 and 2
GROUPED = replace(TINY, num_hidden_layers=7, num_hidden_groups=3, inner_group_num=2)
DROPPED = dict.fromkeys(QUIET, 0.1)
SETTINGS = {
    "one block": TINY,
    "groups of blocks, erf": replace(GROUPED, mlp="gelu"),
    "norms before, an embedding as wide": replace(TINY, norm_place="pre", embedding_size=24),
    "untied, no embedding norm": replace(TINY, tie_word_embeddings=False, embedding_norm=False),
}


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_promises_of_a_family_hold(config):
    check_model(config)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("lengths", [[1], [9, 1, 30, 4]], ids=str)
def test_loss_and_gradients_equal_the_plain_reference_in_fp64(config, lengths):
    model = with_random_weights(config, attention="sdpa" if len(lengths) > 1 else "tiles")
    check_loss_and_gradients(model, lengths)


@pytest.mark.parametrize("layers, groups, inner", [(24, 24, 4), (2, 1, 512), (256, 256, 4)])
def test_what_is_kept_is_counted_for_every_shape_that_may_be(monkeypatch, layers, groups, inner):
    """By a stand-in that keeps a number a token and call: a valid shape is refused nowhere."""
    config = replace(
        TINY, num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner
    )

    def kept(shape, **_):
        return [tokens * (7 + len(shape.block_calls)) for tokens in activations.TOKENS]

    monkeypatch.setattr(activations, "_bytes_kept", kept)
    found = activations._count(config, precision="fp32", device="cpu", fp8=False, zero_3=False)
    whole = layers * found.layer_per_token + found.outside_per_token
    assert whole == pytest.approx(7 + layers * inner)
    assert layers * found.layer_fixed + found.outside_fixed == pytest.approx(0.0, abs=1e-6)


# parameters by transformers' classes (fact sheet 1.3): AlbertForMaskedLM and AlbertForPreTraining
COUNTS = {
    "albert_base": (11_221_680, 11_813_810),
    "albert_large": (16_795_824, 17_847_474),
    "albert_xlarge": (54_821_040, 59_021_490),
    "albert_xxlarge": (206_368_944, 223_158_450),
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_parameters_to_the_unit(name):
    for has_sentences, expected in zip((False, True), COUNTS[name], strict=True):
        config = preset(name, sentence_head=has_sentences)
        with torch.device("meta"):
            built = build_model(config, seed=0).parameter_count()
        assert built == config.parameter_counts().total == expected


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["one block", "groups"])
def test_flops_are_those_of_every_call_by_torchs_counter(monkeypatch, config):
    lengths = [9, 1, 17, 4]
    backend = SimpleNamespace(plan=lambda *_, **__: WholeDocuments(lengths))
    monkeypatch.setattr(shared, "choose_backend", lambda *_: SimpleNamespace(backend=backend))
    model, batch = build_model(config, seed=0), packed(lengths, vocab=60)
    with FlopCounterMode(display=False) as both:
        mlm_loss(model, batch, x_TC=model.hidden_states(batch)).total.backward()
    assert both.get_total_flops() == config.train_flops(lengths=lengths, targets=batch.counts)


def test_a_layer_calls_the_group_that_transformers_calls():
    """Also where floats decide: layer 9 of 18 over 14 groups is of group 6, floor(9 * 14 / 18) is 7."""
    albert = pytest.importorskip("transformers.models.albert.modeling_albert")
    config_class = pytest.importorskip("transformers").AlbertConfig
    sizes = dict(hidden_size=4, num_attention_heads=1, intermediate_size=4, embedding_size=4)
    for layers, groups, inner in ((12, 1, 1), (7, 3, 2), (18, 14, 1), (12, 12, 1)):
        theirs = albert.AlbertTransformer(
            config_class(
                **sizes,
                num_hidden_layers=layers,
                num_hidden_groups=groups,
                inner_group_num=inner,
                attn_implementation="eager",
            )
        )
        called = blocks_called(theirs, layers=layers)
        ours = replace(
            TINY, num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner
        )
        assert [*ours.block_calls] == called


def blocks_called(theirs, *, layers: int) -> list[int]:
    """The number of each block that runs in a forward of their stack."""
    called: list[int] = []
    blocks = [block for group in theirs.albert_layer_groups for block in group.albert_layers]
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    theirs(torch.zeros(1, 2, 4), head_mask=[None] * layers)
    return called


def test_each_place_of_each_call_drops_its_share():
    """As transformers, and after the MLP, where the original has a dropout that transformers' class leaves out."""
    model = build_model(replace(TINY, **DROPPED), attention="sdpa", seed=0).train()
    shares = dropped_shares(model, packed([40, 40], vocab=60))
    assert len(shares) == 1 + 2 * 3
    assert all(share == pytest.approx(0.1, abs=0.04) for share in shares)


def test_transformers_drops_at_one_place_of_a_layer_less():
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=60,
        embedding_size=10,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=20,
        hidden_dropout_prob=0.1,
    )
    theirs = transformers.AlbertForMaskedLM(config).train()
    shapes = []
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    theirs(input_ids=torch.full((2, 40), 7))
    assert shapes.count((2, 40, 10)) == 1 and shapes.count((2, 40, 24)) == 3


def test_calls_of_one_block_drop_other_elements_independently():
    """Of 4,000 tokens with p 0.1 each pair of calls shares 1 % of the dropped ones."""
    draw = torch.Generator().manual_seed(1)
    key_T = torch.randint(-(2**63), 2**63 - 1, (4000,), generator=draw)
    place = build_model(replace(TINY, **DROPPED), seed=0).model.layers[0].attn_dropout
    dropped = [place._factor(key_of_call(key_T, call), torch.float32) == 0 for call in range(4)]
    assert torch.equal(key_of_call(key_T, 0), key_T)
    for one in range(4):
        for other in range(one):
            both = (dropped[one] & dropped[other]).float().mean()
            # 96,000 elements: deviation 0.0003
            assert float(both) == pytest.approx(0.01, abs=0.002)


def test_dropped_elements_follow_the_token_not_its_place_in_the_batch():
    model = build_model(replace(GROUPED, **DROPPED), attention="sdpa", seed=0).train().double()
    batch = packed([9, 1, 30, 4], vocab=60)
    alone = replace(
        packed([30], vocab=60), ids_T=batch.ids_T[10:40], token_key_T=batch.token_key_T[10:40]
    )
    whole = model.hidden_states(batch)
    assert (whole[10:40] - model.hidden_states(alone)).abs().max() < 1e-12


def passes(config, *, again: bool = False, compiled: bool = False, mixed: bool = False):
    """Loss and gradients of a model with dropout."""
    model = build_model(config, attention="sdpa", seed=1)
    if compiled:
        model.compile_blocks_(backend="aot_eager")
    if again:
        model.recompute_blocks_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        loss = mlm_loss(model, packed([30, 20], vocab=60)).total
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "autocast"])
def test_shared_blocks_computed_again_give_the_same_bits(mixed):
    config = replace(GROUPED, **DROPPED)
    (loss, plain), (other, again) = (passes(config, again=a, mixed=mixed) for a in (False, True))
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_shared_block_compiles_once_and_gives_the_same():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(TINY, num_hidden_layers=6, **DROPPED)
    (loss, plain), (other, compiled) = (passes(config, compiled=c) for c in (False, True))
    # before attention and after it, whichever layer asks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
    torch.testing.assert_close(loss, other)
    for one, two in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_shared_matrix_is_muons_and_decays_once():
    model = build_model(GROUPED, seed=0)
    assert len(model.model.layers) == 6 and all(isinstance(b, Block) for b in model.model.layers)
    assert len(model.hidden_matrices()) == 6 * 4
    optimizer = build_optimizer(model, MuonConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [*model.parameters()]
    )


def test_a_plan_counts_activations_of_all_layers_and_weights_once():
    """Cast to bf16 the shared block stands once whatever the depth; a BERT's blocks each stand for themselves."""
    wide = replace(TINY, hidden_size=96, intermediate_size=192)
    found = count_kept(wide, precision="autocast", device="cuda")
    bert = count_kept(
        preset(
            "bert_base",
            **{**SIZES, "hidden_size": 96, "intermediate_size": 192, "mlp": "gelu_tanh"},
            **QUIET,
        ),
        precision="autocast",
        device="cuda",
    )
    assert found.layer_per_token == bert.layer_per_token
    block = 4 * 96 * 96 + 2 * 96 * 192
    assert found.layer_fixed == 0 and bert.layer_fixed >= 2 * block
    assert found.outside_fixed >= 2 * block


def test_depth_grows_by_a_number_and_no_weight():
    weights = build_model(GROUPED, seed=1).state_dict()
    deeper = grow(weights, GROUPED, replace(GROUPED, num_hidden_layers=12), GrowthConfig())
    assert deeper.weights.keys() == weights.keys() and not deeper.not_inherited
    assert all(torch.equal(deeper.weights[name], w) for name, w in weights.items())


def test_width_and_embedding_grow_with_the_source_in_the_centre():
    wider = replace(TINY, hidden_size=40, num_attention_heads=5, embedding_size=14)
    weights = with_random_weights(replace(TINY, sentence_head=True)).float().state_dict()
    new = replace(wider, sentence_head=True)
    grown = grow(weights, replace(TINY, sentence_head=True), new, GrowthConfig()).weights
    table = "model.embeddings.tok_embeddings.weight"
    assert torch.equal(grown[table][:, 2:12], weights[table])
    inner = grown["model.embedding_projection.weight"]
    assert torch.equal(inner[8:32, 2:12], weights["model.embedding_projection.weight"])
    assert torch.equal(grown["head.dense.weight"][2:12, 8:32], weights["head.dense.weight"])
    assert grown["head.norm.bias"].shape == (14,) and grown["nsp.weight"].shape == (2, 40)


def test_maps_of_layers_are_refused_where_they_share_their_weights():
    deeper = replace(TINY, num_hidden_layers=6)
    with pytest.raises(ModelError, match="share 1 block of weights.*Leave layer_map out"):
        grow({}, TINY, deeper, GrowthConfig(layer_map="same_kind"))
    with pytest.raises(ModelError, match="share 6 blocks of weights: there is none to leave out"):
        student_config(GROUPED, (0, 2))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(embedding_size=0), "embedding_size is 0; needed: at least 1"),
        (dict(embedding_size=2**19), "embedding_size is 524,288; needed: at most 262,144"),
        (dict(inner_group_num=0), "inner_group_num is 0; needed: at least 1"),
        (dict(num_hidden_groups=0), "num_hidden_groups is 0; needed: 1 to num_hidden_layers .3."),
        (dict(num_hidden_groups=4), "num_hidden_groups is 4; needed: 1 to num_hidden_layers .3."),
        (dict(inner_group_num=400), "times inner_group_num 400 is 1,200 blocks; needed: at most"),
        (dict(head="none"), "head none with embedding_size 10 and hidden_size 24"),
    ],
)
def test_choices_that_cannot_go_together_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        replace(TINY, **wrong)
