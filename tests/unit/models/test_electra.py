"""Two networks in one model: published counts, transformers' classes with one embedding, sharing, dropout, first weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from encoder.base.errors import ConfigError, ModelError
from encoder.base.schema import from_mapping
from encoder.models.catalog import PRESETS, SYSTEMS, build_model, networks_of
from encoder.models.electra import ElectraConfig
from encoder.models.growth import GrowthConfig, grow
from encoder.models.hf.catalog import bridge_of
from encoder.models.rtd import SECOND_NETWORK, weights_of_network
from encoder.models.shrink import student_config
from encoder.models.vocabulary import NewRows, with_new_rows
from encoder.nn.dropout import key_of_call
from encoder.objectives.catalog import build_objective
from encoder.objectives.rtd import RtdConfig
from tests.helpers import hf
from tests.helpers.contracts import check_model
from tests.helpers.memory_source import SPECIALS
from tests.helpers.packed import packed
from tests.helpers.rtd import ELECTRA, SETTINGS, SIZES, masked_batch
from tests.unit.models.test_bert import dropped_shares, with_random_weights

# by transformers' classes: ElectraForPreTraining, ElectraForMaskedLM of the generator
COUNTS = {
    "electra_small": (13_549_057, 4_620_026),
    "electra_base": (109_483_009, 33_740_602),
    "electra_large": (335_142_913, 51_295_290),
}


def preset(name: str, **changes):
    words = {**PRESETS[name], **changes}
    return from_mapping(SYSTEMS[words.pop("system")], words)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_promises_of_a_family_hold_for_both_and_for_each(config):
    check_model(config)
    for network in networks_of(config).values():
        check_model(network)


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_parameters_to_the_unit(name):
    config = preset(name)
    counts = tuple(network.parameter_counts().total for network in networks_of(config).values())
    assert counts == COUNTS[name]
    with torch.device("meta"):
        built = [build_model(network, seed=0) for network in networks_of(config).values()]
        both = build_model(config, seed=0)
    assert tuple(model.parameter_count() for model in built) == COUNTS[name]
    # the embedding is shared: tables, and its norm
    shared = config.embedding_width * (30_522 + 512 + 2 + 2)
    assert both.parameter_count() == config.parameter_counts().total == sum(counts) - shared


def test_a_discriminator_without_its_head_has_the_count_of_the_body():
    config = preset("electra_small").discriminator
    head = config.parameter_counts().head
    assert (head, config.parameter_counts().total - head) == (66_049, 13_483_008)


# (heads, width, MLP) of the generators of google-research/electra
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("electra_small", (1, 64, 256)),
        ("electra_base", (4, 256, 1024)),
        ("electra_large", (4, 256, 1024)),
    ],
)
def test_generators_have_the_published_shapes(name, shape):
    g = preset(name).generator
    assert (g.num_attention_heads, g.hidden_size, g.intermediate_size) == shape
    assert g.num_hidden_layers == preset(name).num_hidden_layers


def theirs_of(ours):
    """transformers' two classes in fp64 without dropout, one embedding module in both, with our weights."""
    transformers = pytest.importorskip("transformers")
    made = {}
    for name, class_name in (
        ("generator", "ElectraForMaskedLM"),
        ("discriminator", "ElectraForPreTraining"),
    ):
        config = getattr(ours.config, name)
        bridge = bridge_of(config, hf.SPECIALS)
        settings = bridge.to_settings(config, hf.SPECIALS)
        settings["attention_probs_dropout_prob"] = 0.0
        model = getattr(transformers, class_name)(transformers.ElectraConfig.from_dict(settings))
        weights = weights_of_network(ours.state_dict(), ours.config, name)
        notes = model.double().load_state_dict(bridge.weights_to(weights, config), strict=False)
        assert not notes.unexpected_keys and {*notes.missing_keys} <= {*bridge.tied}
        # the pad row would get no gradient: here its id stands in the text
        model.electra.embeddings.word_embeddings.padding_idx = None
        made[name] = model.train()
    made["discriminator"].electra.embeddings = made["generator"].electra.embeddings
    return made["generator"], made["discriminator"]


def padded(values_T, lengths, fill=0):
    return torch.nn.utils.rnn.pad_sequence(
        values_T.split(lengths), batch_first=True, padding_value=fill
    )


@pytest.mark.parametrize("name", ["small", "base", "of one shape"])
def test_joint_losses_and_every_gradient_are_those_of_transformers_padded(name):
    """Documents of 1, 2, 40 and the longest length, packed by us and padded by them; ids drawn by us."""
    config = SETTINGS[name]
    ours = with_random_weights(config, attention="sdpa").train()
    generator, discriminator = theirs_of(ours)
    lengths = [1, 40, 2, 64, 17]
    batch = masked_batch(lengths)
    asking = build_objective(RtdConfig(), vocab_size=64, specials=SPECIALS)
    seen = []
    handle = ours.discriminator.model.register_forward_pre_hook(
        lambda _module, inputs, _named: seen.append(inputs[0].ids_T), with_kwargs=True
    )
    terms = asking.loss(ours, batch)
    handle.remove()
    loss = sum(term.weight * term.total / int(term.count) for term in terms.values())
    loss.backward()

    real_BL = padded(torch.ones_like(batch.ids_T), lengths)
    masked, clean_T = batch.targets["mlm"], batch.targets["rtd"].value_M
    labels_T = torch.full_like(clean_T, -100)
    labels_T[masked.index_M] = masked.value_M
    mlm = generator(
        input_ids=padded(batch.ids_T, lengths),
        attention_mask=real_BL,
        labels=padded(labels_T, lengths, -100),
    ).loss
    replaced_T = (seen[0] != clean_T).long()
    rtd = discriminator(
        input_ids=padded(seen[0], lengths),
        attention_mask=real_BL,
        labels=padded(replaced_T, lengths),
    )
    logits_T = rtd.logits[real_BL.bool()]
    bce = F.binary_cross_entropy_with_logits(logits_T, replaced_T.double())
    # its own loss, of the same positions, is rounded to fp32
    assert bce.item() == pytest.approx(rtd.loss.item(), rel=1e-6)
    expected = mlm + 50.0 * bce
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert 0 < int(replaced_T.sum()) <= len(masked.value_M)
    with torch.no_grad():
        states = ours.hidden_states(replace(batch, ids_T=seen[0]))
        found = ours.replaced_logits(states)
    assert (found - logits_T).abs().max() < 1e-11

    # theirs share the embedding, so its gradient stands in both
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    for network, model in (("generator", generator), ("discriminator", discriminator)):
        own = getattr(config, network)
        mine = weights_of_network(gradients, config, network)
        mine = bridge_of(own, hf.SPECIALS).weights_to(mine, own)
        true = {n: p.grad for n, p in model.named_parameters()}
        assert mine.keys() == true.keys()
        for n, grad in mine.items():
            assert (grad - true[n]).abs().max() <= 1e-9 * true[n].abs().max().clamp(min=0.1), n


def test_differences_leave_the_generators_tables_to_its_own_loss():
    """DeBERTaV3, 3.2: no gradient of the second loss reaches them; the discriminator starts from them."""
    config = SETTINGS["differences"]
    model = build_model(config, seed=0).double()
    tables = [n for n, _ in model.named_parameters() if "discriminator.model.embeddings.tok" in n]
    assert tables and not model.state_dict()[tables[0]].any()
    batch = packed([9, 4], vocab=60)
    generators, own = model.generator.model.embeddings, model.discriminator.model.embeddings
    rows = (batch.ids_T, batch.positions_T, None)
    assert torch.equal(
        own.norm(generators.rows(*rows)), own(*rows, None, beside_TC=generators.rows(*rows))
    )
    terms = build_objective(RtdConfig(), vocab_size=64, specials=SPECIALS).loss(
        model, masked_batch([9, 4])
    )
    terms["rtd"].total.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is None for n, g in grads.items() if n.startswith("generator."))
    assert grads["discriminator.model.embeddings.tok_embeddings.weight"].any()


def test_a_network_by_itself_has_the_states_that_it_has_in_the_model():
    for config in SETTINGS.values():
        model = with_random_weights(config, attention="sdpa").eval()
        batch = packed([9, 1, 30], vocab=60)
        for name, network in networks_of(config).items():
            alone = build_model(network, attention="sdpa", seed=0).double().eval()
            alone.load_state_dict(weights_of_network(model.state_dict(), config, name))
            whole = model.generator_states if name == "generator" else model.hidden_states
            with torch.no_grad():
                assert torch.allclose(alone.hidden_states(batch), whole(batch), atol=1e-12)


def test_both_networks_drop_as_much_and_not_the_same_elements():
    config = replace(ELECTRA, embedding_dropout=0.1, mlp_output_dropout=0.1)
    model = build_model(config, attention="sdpa", seed=0).train()
    batch = packed([60, 60], vocab=60)
    shares = dropped_shares(model, batch)
    assert len(shares) == 4 and all(share == pytest.approx(0.1, abs=0.03) for share in shares)

    # what the shared embedding drops of each network's tokens
    place = model.generator.model.embeddings.dropout
    ones_TC = torch.ones(120, 16)
    keys = [batch.token_key_T, key_of_call(batch.token_key_T, SECOND_NETWORK)]
    kept = [place.alone(ones_TC, key_T) > 0 for key_T in keys]
    both_out = float((~kept[0] & ~kept[1]).float().mean())
    assert both_out == pytest.approx(0.01, abs=0.005)


def test_first_weights_are_cut_normals_but_for_two_matrices_of_tensorflows_default():
    config = replace(ELECTRA, vocab_size=4000, hidden_size=192, embedding_size=48)
    weights = build_model(config, seed=0).state_dict()
    table = weights["generator.model.embeddings.tok_embeddings.weight"]
    assert table.abs().max() <= 0.04 and table.std() == pytest.approx(0.8796 * 0.02, rel=0.02)
    for name in ("model.embedding_projection", "classifier"):
        w = weights[f"discriminator.{name}.weight"]
        edge = math.sqrt(6 / sum(w.shape))
        assert w.abs().max() <= edge and w.abs().max() > 0.95 * edge
        assert w.std() == pytest.approx(edge / math.sqrt(3), rel=0.1)
    # networks of one shape do not begin as one
    twins = build_model(SETTINGS["of one shape"], seed=0).state_dict()
    name = "model.layers.0.attn.Wqkv.weight"
    assert not torch.equal(twins[f"generator.{name}"], twins[f"discriminator.{name}"])


def test_flops_are_those_of_both_networks_and_of_their_heads():
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(ELECTRA, attention="sdpa", seed=0).eval()
    lengths = [20, 9]
    batch = packed(lengths, vocab=60)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x_TC = model.generator_states(batch)
        model.generator.decode(x_TC[:7])
        model.replaced_logits(model.hidden_states(batch))
    found = ELECTRA.train_flops(lengths=lengths, targets={"mlm": 7, "rtd": 29})
    # attention on a CPU is not among what the counter knows: two products in 3 layers of 36 and 12 features
    pairs = sum(length**2 for length in lengths)
    assert found == 3 * (counter.get_total_flops() + 3 * 4 * (36 + 12) * pairs)


def test_it_does_not_grow_and_its_vocabulary_does():
    larger = replace(ELECTRA, hidden_size=72, num_attention_heads=6)
    weights = build_model(ELECTRA, seed=1).state_dict()
    with pytest.raises(ModelError, match="a model of two networks does not grow or shrink"):
        grow(weights, ELECTRA, larger, GrowthConfig())
    with pytest.raises(ModelError, match="a discriminator does not grow or shrink"):
        student_config(ELECTRA.discriminator, [0, 2])
    wider = replace(ELECTRA, vocab_size=64)
    found = with_new_rows(weights, wider, NewRows(means={60: [5, 6]}), seed=0)
    name = "generator.model.embeddings.tok_embeddings.weight"
    assert found[name].shape == (64, 16)
    assert torch.equal(found[name][60], weights[name][[5, 6]].mean(0))
    assert found["generator.decoder.bias"].shape == (64,)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(generator_fraction=2.0), "generator_fraction is 2.0; .* no wider than its discrim"),
        (dict(generator_fraction=0.0), "generator_fraction is 0.0; needed: above 0"),
        (dict(generator_layers=4), "generator_layers is 4; needed: 1 to num_hidden_layers .3"),
        (dict(embedding_size=0), "embedding_size is 0; needed: at least 1"),
        (dict(embedding_size=24, head="none"), "gives no generator: head none"),
        (dict(hidden_size=37), "hidden_size 37 over 3 heads"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_a_sentence(wrong, words):
    with pytest.raises(ConfigError, match=words):
        replace(ELECTRA, **wrong)


def test_a_large_generator_is_told_about():
    said = [
        line
        for fraction in (0.25, 1.0)
        for line in ElectraConfig(
            **SIZES, generator_fraction=fraction, attention_probability_dropout=0.0
        ).without_effect(lambda name: False, longest_tokens=64)
    ]
    assert len(said) == 1 and "generator_fraction 1: a generator of more than half" in said[0]
