"""encoder.engine.graphed: the same loss and gradients as a plain micro-step, captured when and only when something changed."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.engine.graphed import GraphedForward
from encoder.engine.zero.config import EngineConfig
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.objectives.mlm import mlm_loss
from tests.helpers.packed import packed

CONFIG = ModernBertConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    window_radius_tokens=6,
    attention_output_dropout=0.1,
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCALE = 0.37


def pair(device: str = "cpu", z_loss_weight: float = 0.0):
    """A graphed model and its plain twin; their forward gives the loss terms, as under an engine."""
    models = [ModernBertForMaskedLM(CONFIG, seed=3).to(device) for _ in range(2)]
    terms = [functools.partial(_terms_of, model, z_loss_weight) for model in models]
    models[0].forward = GraphedForward(models[0], terms[0])
    models[1].forward = terms[1]
    return models


def _terms_of(model, z_loss_weight, some):
    return {"mlm": mlm_loss(model, some, z_loss_weight=z_loss_weight)}


def batch(seed: int = 0, device: str = "cpu"):
    if (
        device == "cuda"
    ):  # as in training: torch's embedding has another backward above 3,072 tokens, a loss piece is 2,048
        return packed([3000, 1, 500, 1200, 35], vocab=96, seed=seed, predict=3000).to(device)
    return packed([30, 1, 50, 12, 35], vocab=96, seed=seed).to(device)


def step(model, some):
    loss = model(some)["mlm"]
    (loss.total * SCALE).backward()
    return loss


def assert_same_gradients(ours, judge, *, within):
    for (name, p), q in zip(ours.named_parameters(), judge.parameters(), strict=True):
        assert torch.allclose(
            p.grad, q.grad, rtol=within, atol=within * q.grad.abs().max().item()
        ), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_micro_steps_add_up_to_the_plain_gradients_and_follow_the_weights(device, autocast):
    ours, judge = pair(device)
    context = torch.autocast(device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    for _ in range(2):
        for seed in range(3):  # three micro-batches of one shape, added up in .grad
            with context:
                a, b = step(ours, batch(seed, device)), step(judge, batch(seed, device))
            assert a.total.item() == pytest.approx(b.total.item(), rel=1e-2 if autocast else 1e-6)
            assert a.sum.item() == pytest.approx(b.sum.item(), rel=1e-2 if autocast else 1e-6)
            assert int(a.count) == int(b.count) > 0
        assert_same_gradients(ours, judge, within=2e-2 if autocast else 1e-5)
        for model in (ours, judge):  # in place, as an optimizer does: the next replay sees it
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.7)
                    p.grad = None
    assert ours.forward.captures == 1


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradients_of_a_graph_are_made_past_the_hooks_of_the_parameters(device):
    """DeepSpeed's hang on a node of autograd's that was made on the default stream: a capture that meets it is refused by CUDA."""
    ours, _ = pair(device)
    called, kept = [], []
    for name, p in ours.named_parameters():
        p.register_hook(lambda _, name=name: called.append(name))
        node = p.view_as(p).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name: called.append(name))
        kept.append(node)
    loss = ours(batch(0, device))["mlm"]
    assert called == []
    loss.total.backward()
    assert sorted(called) == sorted(2 * [name for name, _ in ours.named_parameters()])


def test_a_later_replay_does_not_write_over_gradients_that_a_parameter_keeps():
    ours, _ = pair()
    step(ours, batch(0))
    kept = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours(batch(1))
    assert all(torch.equal(p.grad, kept[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_whatever_a_graph_is_bound_to_captures_another_and_nothing_else_does(device):
    ours, judge = pair(device, z_loss_weight=1e-3)

    def captures_after(change=lambda model: None, some=None, *, autocast=False):
        for model in (ours, judge):
            change(model)
            model.zero_grad()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                step(model, (some or batch(1)).to(device))
        assert_same_gradients(ours, judge, within=2e-2 if autocast else 1e-5)
        return ours.forward.captures

    assert captures_after() == 1 and captures_after(some=batch(2)) == 1
    assert captures_after(some=packed([60, 1, 66], vocab=96)) == 2
    assert captures_after(some=replace(batch(0), max_seqlen=64)) == 3
    assert captures_after() == 4
    assert (
        captures_after(lambda m: m.set_phase_({"global_rope_theta": 5e3, "local_rope_theta": 1e3}))
        == 5
    )
    assert captures_after(lambda m: m.eval()) == 6 and captures_after(lambda m: m.train()) == 7
    assert captures_after(autocast=True) == 8 and captures_after() == 9

    def moved(model):
        p = model.get_parameter("head.dense.weight")
        p.data = p.data * 2

    assert captures_after(moved) == 10 and captures_after() == 10
    with torch.no_grad():
        some = batch(3).to(device)
        assert (
            torch.allclose(ours(some)["mlm"].total, judge(some)["mlm"].total)
            and ours.forward.captures == 10
        )


@pytest.mark.parametrize("device", DEVICES)
def test_room_for_more_documents_captures_once_and_a_micro_batch_of_fewer_runs_in_it(device):
    ours, judge = pair(device)
    lengths, captures = ([30, 1, 50, 12, 35], [64, 64], [32] * 4, [128], [16] * 8, [60, 1, 67]), []
    for seed, documents in enumerate(lengths):
        some = replace(packed(documents, vocab=96, seed=seed, predict=40), max_seqlen=128).to(
            device
        )
        for model in (ours, judge):
            model.zero_grad()
            step(model, some)
        assert_same_gradients(ours, judge, within=1e-5)
        captures.append(ours.forward.captures)
    assert captures == [1, 1, 1, 1, 2, 2]


def test_a_loss_that_is_kept_does_not_keep_the_memory_of_a_graph_that_is_gone():
    """A later capture's memory would stand beside it: the loss of a micro-batch lives until the next one's is there."""
    ours, _ = pair()
    kept = step(ours, batch(0))
    gone = weakref.ref(ours.forward._graph)
    step(ours, packed([60, 1, 66], vocab=96))
    gc.collect()  # of the CPU's stand-in for a graph, which knows itself
    assert kept.total.isfinite() and ours.forward.captures == 2 and gone() is None


def test_a_backward_whose_gradients_are_gone_is_refused():
    ours, _ = pair()
    first, _ = ours(batch(0))["mlm"], ours(batch(1))
    with pytest.raises(RuntimeError, match="two forwards before a backward"):
        first.total.backward()


@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"activation_checkpointing": "blocks"}])
def test_where_a_micro_step_is_taken_apart_a_graph_is_refused(settings):
    with pytest.raises(
        ConfigError, match="graphs micro_step with zero_stage 3 or activation_checkpointing"
    ):
        EngineConfig(graphs="micro_step", **settings)
