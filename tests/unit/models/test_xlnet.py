"""XLNet: a plain reference with folded scores, packed against alone and with room, dropout, growth, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import encoder.nn.two_streams as two_streams
from encoder.base.batch import packed_documents
from encoder.base.errors import ConfigError, ModelError
from encoder.models.catalog import PRESETS, build_model
from encoder.models.growth import GrowthConfig, grow
from encoder.models.xlnet import XlnetConfig
from encoder.nn.two_streams import plain_order
from tests.helpers.contracts import check_model
from tests.helpers.plain import with_random_weights
from tests.helpers.xlnet import QUIET, TINY, batch_of, objective_of, only, with_room
from tests.reference.dense import whole_vocabulary_loss
from tests.reference.plain_xlnet import plain_query_logits

LENGTHS = [30, 9, 41, 5, 3]
OBJECTIVES = {
    "whole": objective_of(),
    "forward": objective_of(directions="forward"),
    "memory": objective_of(memory_tokens=6, segment_tokens=16),
}


def test_the_promises_of_a_family_hold():
    check_model(TINY)
    check_model(replace(TINY, query_stream=False, mlp="gelu"))


@pytest.mark.parametrize("name, count", [("base", 116_750_336), ("large", 360_300_800)])
def test_the_parameters_of_a_preset_are_the_published_ones(name, count):
    shape = {k: v for k, v in PRESETS[f"xlnet_{name}"].items() if k != "system"}
    config = XlnetConfig(**shape, query_stream=True)
    with torch.device("meta"):
        assert build_model(config, seed=0).parameter_count() == count
    assert config.parameter_counts().total == count


@pytest.mark.parametrize("scores", [2**22, 2000, 1])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_and_gradients_equal_the_plain_reference(monkeypatch, kind, scores):
    """In fp64 to 2e-5: angles of distances are fp32 here, sums of two angles there. Blocks of any size give the same."""
    monkeypatch.setitem(two_streams.BLOCK_SCORES, "cpu", scores)
    objective = OBJECTIVES[kind]
    model = with_random_weights(TINY)
    batch = batch_of(objective, LENGTHS)
    found = objective.loss(model, batch)["plm"]
    found.total.backward()

    w = {name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()}
    expected = torch.zeros((), dtype=torch.float64)
    start = 0
    for length in LENGTHS:
        alone = only(batch, start, start + length)
        targets = alone.targets["plm"]
        order = objective.order(alone)
        logits = plain_query_logits(w, TINY, alone.ids_T, order, targets.index_M)
        eye = torch.eye(logits.shape[1], dtype=torch.float64)
        expected = expected + whole_vocabulary_loss(
            logits, eye, torch.zeros(len(eye)).double(), targets.value_M
        )
        start += length
    expected.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=2e-5)
    for name, p in model.named_parameters():
        assert (p.grad - w[name].grad).abs().max() <= 2e-5 * w[name].grad.abs().max(), name


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_packed_alone_and_with_room_give_the_same_loss_and_gradients(kind):
    objective = OBJECTIVES[kind]
    model = with_random_weights(TINY)
    batch = batch_of(objective, LENGTHS)
    packed_loss, expected = loss_and_gradients(model, objective, [batch])
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    singles = [only(batch, a, b) for a, b in zip(starts, starts[1:])]
    for others in (singles, [with_room(batch, tokens=7, targets=4)]):
        loss, found = loss_and_gradients(model, objective, others)
        assert loss == pytest.approx(packed_loss, rel=1e-12)
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-10), name


def loss_and_gradients(model, objective, batches):
    model.zero_grad(set_to_none=True)
    total = sum(objective.loss(model, batch)["plm"].total for batch in batches)
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_target_changes_no_logit_of_its_own_and_of_those_before_it():
    objective = objective_of(directions="forward")
    model = with_random_weights(TINY).eval()
    batch = batch_of(objective, [40])
    targets = batch.targets["plm"]
    order = objective.order(batch)
    rank_M = order.key_rank_T[targets.index_M]
    with torch.no_grad():
        before = model.decode(model.predicted_states(batch, targets, order))
        for m, place in enumerate(targets.index_M.tolist()):
            ids_T = batch.ids_T.clone()
            ids_T[place] = (ids_T[place] + 1) % 60
            other = replace(batch, ids_T=ids_T)
            after = model.decode(model.predicted_states(other, targets, order))
            same_M = (after == before).all(1)
            assert same_M[rank_M <= rank_M[m]].all() and not same_M[rank_M > rank_M[m]].any()


def test_masked_tokens_are_answered_by_what_is_around_them_alone():
    """The same answers whatever stands at the masks; of a single one those of the plain reference."""
    model = with_random_weights(TINY).eval()
    batch = packed_documents([torch.arange(20) + 7, torch.arange(9) + 30])
    index_M = torch.tensor([3, 11, 22])
    with torch.no_grad():
        found = model.masked_states(batch, index_M)
        other = replace(batch, ids_T=batch.ids_T.index_fill(0, index_M, 4))
        assert torch.equal(model.masked_states(other, index_M), found)
        (alone,) = model.decode(model.masked_states(batch, torch.tensor([3])))
    order = plain_order(batch.positions_T[:20], None)
    order = replace(order, key_rank_T=order.key_rank_T.index_fill(0, torch.tensor(3), 1))
    (expected,) = plain_query_logits(
        model.state_dict(), TINY, batch.ids_T[:20], order, torch.tensor([3])
    )
    assert (alone - expected).abs().max() < 1e-5


def test_gradients_do_not_flow_into_the_memory_but_reach_its_keys_and_values():
    """Of two segments, the loss of the second alone: no embedding of the first is reached, the second reads it."""
    objective = objective_of(memory_tokens=8, segment_tokens=8, directions="forward")
    model = with_random_weights(TINY)
    batch = batch_of(objective, [16])
    targets = batch.targets["plm"]
    second = targets.index_M >= 8
    late = replace(
        targets, index_M=targets.index_M[second], value_M=targets.value_M[second], count=1
    )
    batch = replace(batch, ids_T=torch.arange(16) + 20, targets={"plm": late})
    loss = objective.loss(model, batch)["plm"].total
    loss.backward()
    # the decoder reaches all rows alike: what the embedding of an id adds stands out against an id nobody has
    decoder_only = model.model.embeddings.tok_embeddings.weight.grad
    x_MC = model.predicted_states(batch, late, objective.order(batch)).detach()
    logits = model.decode(x_MC)
    by_decoder = (torch.softmax(logits, -1) - torch.eye(60)[late.value_M]).T @ x_MC
    of_embedding = decoder_only - by_decoder
    assert of_embedding[20:28].abs().max() < 1e-12 < 1e-4 < of_embedding[28:36].abs().max()
    other = replace(batch, ids_T=batch.ids_T.index_fill(0, torch.arange(8), 7))
    assert objective.loss(model, other)["plm"].total.item() != pytest.approx(loss.item(), rel=1e-6)


def test_dropout_is_that_of_the_tokens_keys():
    config = replace(TINY, **dict.fromkeys(QUIET, 0.2))
    objective = OBJECTIVES["memory"]
    model = with_random_weights(config)
    batch = batch_of(objective, LENGTHS)
    first, expected = loss_and_gradients(model, objective, [batch])
    again, found = loss_and_gradients(model, objective, [batch])
    assert first == again and all(torch.equal(found[n], expected[n]) for n in expected)
    model.eval()
    assert objective.loss(model, batch)["plm"].total.item() != pytest.approx(first, rel=1e-3)


def test_recomputed_layers_give_the_same_loss_and_gradients():
    objective = OBJECTIVES["memory"]
    model = with_random_weights(TINY)
    batch = batch_of(objective, LENGTHS)
    loss, expected = loss_and_gradients(model, objective, [batch])
    model.recompute_blocks_()
    again, found = loss_and_gradients(model, objective, [batch])
    assert loss == again and all(torch.equal(found[n], expected[n]) for n in expected)


def test_flops_are_those_of_torchs_counter_but_for_distances():
    """One document: products of rows and keys; keys of distances and scores beyond a row's own keys are left out."""
    objective = objective_of(directions="forward", block_tokens=64)
    # without gradients, so that no block is computed again
    model = build_model(TINY, seed=0).requires_grad_(False)
    length, layers, width = 34, 2, 24
    batch = batch_of(objective, [length])
    queries = batch.counts["plm"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective.loss(model, batch)
    distances = 2 * length - 1
    beyond = 2 * layers * (distances * width * width + (length + queries) * (length - 1) * width)
    found = TINY.train_flops(lengths=[length], targets=batch.counts)
    assert 3 * (counter.get_total_flops() - beyond) == pytest.approx(found, rel=1e-12)


def test_a_model_grows_in_depth_and_inside_the_mlp_alone():
    weights = build_model(TINY, seed=1).state_dict()
    larger = replace(TINY, num_hidden_layers=3, intermediate_size=32)
    grown = grow(weights, TINY, larger, GrowthConfig()).weights
    assert grown.keys() == build_model(larger, seed=0).state_dict().keys()
    assert torch.equal(grown["first_query.weight"], weights["first_query.weight"])
    wider = replace(TINY, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ModelError, match="hidden_size is 24 in the source and 32 .* cannot grow"):
        grow(weights, TINY, wider, GrowthConfig())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"hidden_size": 25}, "hidden_size 25 over 3 heads .* Nearest hidden_size: 24 or 30"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; needed: 1 to 1,024"),
        ({"last_dropout": 1.0}, "last_dropout is 1.0; needed: 0 to below 1"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; needed: more than 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **settings)
