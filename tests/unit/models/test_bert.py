"""BERT, RoBERTa, DistilBERT and what else their class can be: a plain reference, published counts, places of dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.base.schema import from_mapping
from encoder.models.bert import BertConfig, DistilBertConfig, RobertaConfig
from encoder.models.catalog import PRESETS, SYSTEMS, build_model
from encoder.models.growth import GrowthConfig, grow
from tests.helpers.contracts import check_model
from tests.helpers.packed import packed
from tests.helpers.plain import check_loss_and_gradients, with_random_weights
from tests.reference.plain_encoder import plain_hidden_states

SIZES = dict(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=64,
)
QUIET = dict(embedding_dropout=0.0, attention_output_dropout=0.0, mlp_output_dropout=0.0)
TINY = BertConfig(**SIZES, **QUIET)


def preset(name: str, **changes):
    """The settings of a preset."""
    words = {**PRESETS[name], **changes}
    return from_mapping(SYSTEMS[words.pop("system")], words)


def small(name: str):
    """A preset's kind of model in small, without dropout."""
    config = preset(name, **SIZES, **QUIET)
    return replace(config, mlp_inner_dropout=0.0)


SETTINGS = {
    "bert": TINY,
    "tanh": replace(TINY, mlp="gelu_tanh"),
    "roberta": RobertaConfig(**SIZES, **QUIET),
    "distilbert": DistilBertConfig(**SIZES, **QUIET),
    "mini_roberta": small("mini_roberta"),
    "crammed_bert": small("crammed_bert"),
    "mosaic_bert": small("mosaic_bert"),
    "pre, no embedding norm, rms": replace(
        TINY, norm_place="pre", embedding_norm=False, norm="rmsnorm", norm_bias=False
    ),
    "no norm of the embedding": replace(TINY, embedding_norm=False),
}


def with_segments(batch, segments: int):
    """The batch, the second half of it in the last segment."""
    half = torch.arange(len(batch.ids_T)) >= len(batch.ids_T) // 2
    return replace(batch, segments_T=half.long() * (segments - 1))


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_promises_of_a_family_hold(config):
    check_model(config)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("lengths", [[1], [9, 1, 30, 4]], ids=str)
def test_loss_and_gradients_equal_the_plain_reference_in_fp64(config, lengths):
    model = with_random_weights(config, attention="sdpa" if len(lengths) > 1 else "tiles")
    check_loss_and_gradients(model, lengths)


def test_segments_and_the_sentence_head_equal_the_plain_reference():
    config = replace(TINY, sentence_head=True)
    model = with_random_weights(config, attention="sdpa").eval()
    lengths = [9, 1, 30, 4]
    batch = with_segments(packed(lengths, vocab=60), 2)
    w = model.state_dict()
    x_TC = plain_hidden_states(w, config, batch.ids_T, lengths, batch.segments_T)
    first = batch.cu_seqlens_S1[:4]
    pooled = torch.tanh(x_TC[first] @ w["pooler.dense.weight"].T + w["pooler.dense.bias"])
    expected = pooled @ w["nsp.weight"].T + w["nsp.bias"]
    with torch.no_grad():
        found = model.sentence_decoder(model.hidden_states(batch)[first])
    assert found.shape == (4, 2) and (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("config", [TINY, SETTINGS["crammed_bert"]], ids=["bert", "no head"])
def test_flops_of_head_decoder_and_sentence_head_equal_torchs_counter(config):
    """7 predicted tokens and 3 pairs beyond what none of them costs."""
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(config, sentence_head=True)
    model, x_MC = build_model(config, seed=0), torch.zeros(7, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.decode(x_MC)
        model.sentence_decoder(x_MC[:3])
    none, all_of_them = (
        config.train_flops(lengths=[9], targets=targets) for targets in ({}, {"mlm": 7, "nsp": 3})
    )
    assert all_of_them - none == 3 * counter.get_total_flops()


# parameters by transformers' classes, built without data: with the MLM head, and with the sentence head
COUNTS = {
    "bert_tiny": (4_416_698, 4_433_468),
    "bert_mini": (11_201_594, 11_267_900),
    "bert_small": (28_795_194, 29_058_876),
    "bert_medium": (41_404_730, 41_668_412),
    "bert_base": (109_514_298, 110_106_428),
    "bert_large": (335_174_458, 336_226_108),
    "roberta_base": (124_697_433, None),
    "roberta_large": (355_412_057, None),
    "distilroberta_base": (82_170_201, None),
    "distilbert_base": (66_985_530, None),
    "mini_roberta": (17_699_072, None),
    "mini_roberta_readme": (17_757_017, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_parameters_to_the_unit(name):
    masked, with_sentences = COUNTS[name]
    for config, expected in (
        (preset(name), masked),
        (preset(name, sentence_head=True), with_sentences),
    ):
        if expected is not None:
            with torch.device("meta"):
                built = build_model(config, seed=0).parameter_count()
            assert built == config.parameter_counts().total == expected


def test_cased_vocabularies_have_theirs():
    cased = preset("bert_base", vocab_size=28_996, sentence_head=True)
    assert cased.parameter_counts().total == 108_932_934
    assert preset("distilbert_base", vocab_size=28_996).parameter_counts().total == 65_812_036


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_counts_what_is_built(name):
    config = preset(name)
    with torch.device("meta"):
        assert build_model(config, seed=0).parameter_count() == config.parameter_counts().total


# family -> how often each element of the stream is dropped from, by place
PLACES = {
    "bert": (BertConfig, {"embedding": 1, "attention": 3, "mlp": 3}),
    "roberta": (RobertaConfig, {"embedding": 1, "attention": 3, "mlp": 3}),
    "distilbert": (DistilBertConfig, {"embedding": 1, "mlp": 3}),
}


@pytest.mark.parametrize("family", PLACES)
def test_dropout_stands_where_transformers_has_it(family):
    """Zeros made in a forward, counted by hooks on both sides; attention probabilities are no element of the stream."""
    transformers = pytest.importorskip("transformers")
    kind, places = PLACES[family]
    config = kind(**SIZES)
    sizes = dict(vocab_size=60, hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
    theirs = {
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**sizes, intermediate_size=20)
        ),
        "roberta": lambda: transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(**sizes, intermediate_size=20)
        ),
        "distilbert": lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(
                vocab_size=60, dim=24, n_layers=3, n_heads=3, hidden_dim=20
            )
        ),
    }[family]()
    stream, calls = [], {"ours": 0, "theirs": 0}
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda module, _inputs, out: stream.append((module.p, tuple(out.shape)))
            )
    theirs.train()(input_ids=torch.full((2, 40), 7))
    in_stream = [p for p, shape in stream if shape == (2, 40, 24)]
    assert in_stream == [0.1] * sum(places.values()), calls

    model = build_model(config, attention="sdpa", seed=0).train()
    seen = dropped_shares(model, packed([40, 40], vocab=60))
    assert len(seen) == len(in_stream)
    assert all(share == pytest.approx(0.1, abs=0.03) for share in seen)


def dropped_shares(model, batch) -> list[float]:
    """The share of elements that each active place drops in a forward."""
    from encoder.nn.dropout import AddressedDropout

    shares: list[float] = []
    plain = AddressedDropout._factor

    def counted(self, key_T, dtype):
        factor = plain(self, key_T, dtype)
        shares.append(float((factor == 0).float().mean()))
        return factor

    AddressedDropout._factor = counted
    try:
        model.hidden_states(batch)
    finally:
        AddressedDropout._factor = plain
    return shares


def test_mini_robertas_dropout_is_inside_the_feed_forward_alone():
    config = preset("mini_roberta", **SIZES)
    model = build_model(config, attention="sdpa", seed=0).train()
    shares = dropped_shares(model, packed([40, 40], vocab=60))
    assert len(shares) == 3 and all(share == pytest.approx(0.1, abs=0.03) for share in shares)


def test_dropped_elements_follow_the_token_not_its_place_in_the_batch():
    model = build_model(BertConfig(**SIZES), attention="sdpa", seed=0).train().double()
    batch = packed([9, 1, 30, 4], vocab=60)
    whole = model.hidden_states(batch)
    alone = replace(
        packed([30], vocab=60),
        ids_T=batch.ids_T[10:40],
        token_key_T=batch.token_key_T[10:40],
    )
    assert (whole[10:40] - model.hidden_states(alone)).abs().max() < 1e-12


def test_initial_weights_are_one_sigma_cut_or_not_and_rows_that_no_token_meets_are_zero():
    bert = build_model(BertConfig(**{**SIZES, "vocab_size": 4000}), seed=0).state_dict()
    table = bert["model.embeddings.tok_embeddings.weight"]
    assert table.abs().max() <= 0.04 and table.std() == pytest.approx(0.8796 * 0.02, rel=0.02)
    into_stream = torch.cat([w.flatten() for n, w in bert.items() if n.endswith("Wo.weight")])
    assert into_stream.std() == pytest.approx(0.8796 * 0.02, rel=0.05)
    roberta = build_model(RobertaConfig(**{**SIZES, "vocab_size": 4000}), seed=0).state_dict()
    table = roberta["model.embeddings.tok_embeddings.weight"]
    assert table.abs().max() > 0.06 and table.std() == pytest.approx(0.02, rel=0.02)
    positions = roberta["model.embeddings.position_embeddings.weight"]
    assert positions.shape == (66, 24) and not positions[:2].any() and positions[2:].any()


def test_a_bert_grows_into_a_larger_one():
    old = replace(TINY, sentence_head=True)
    new = replace(old, hidden_size=40, num_attention_heads=5, num_hidden_layers=4)
    weights = build_model(old, seed=1).state_dict()
    grown = grow(weights, old, new, GrowthConfig())
    assert grown.weights["pooler.dense.weight"].shape == (40, 40)
    assert grown.weights["nsp.weight"].shape == (2, 40)
    assert torch.equal(grown.weights["nsp.weight"][:, 8:32], weights["nsp.weight"])


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(mlp="geglu", mlp_inner_dropout=0.1), "a gated layer has no such place"),
        (dict(embedding_dropout=1.0), "embedding_dropout is 1.0; needed: 0 to below 1"),
        (dict(attention_probability_dropout=-0.1), "attention_probability_dropout is -0.1"),
        (dict(position_offset=-1), "position_offset is -1; needed: 0 or more"),
        (dict(positions="sinusoidal", position_offset=2), "there is no table"),
        (dict(hidden_size=25), "hidden_size 25 over 3 heads gives a head width of 8.33333"),
    ],
)
def test_choices_that_cannot_go_together_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        replace(TINY, **wrong)


def test_what_is_not_applied_is_said():
    said = list(TINY.without_effect(lambda name: False, longest_tokens=64))
    assert len(said) == 1 and "attention_probability_dropout 0.1 is not applied" in said[0]
    quiet = replace(TINY, attention_probability_dropout=0.0)
    assert not list(quiet.without_effect(lambda name: False, longest_tokens=64))
