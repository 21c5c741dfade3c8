"""Counting: parameters against the built model, pairs against a mask, FLOP against torch's own counter."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import encoder.models.encoder as shared
from encoder.base.batch import Targets
from encoder.base.schema import from_mapping
from encoder.models.bert import BertConfig
from encoder.models.catalog import PRESETS, build_model
from encoder.models.flops import attended_pairs
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import mlm_loss
from encoder.objectives.pairs import MlmNspConfig
from tests.helpers.memory_source import SPECIALS
from tests.helpers.packed import packed

SMALL = ModernBertConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    window_radius_tokens=16,
    max_position_embeddings=64,
)
SETTINGS = {
    "modernbert": {},
    "gelu, wide heads, untied": dict(
        mlp="gelu", attention_head_width=10, tie_word_embeddings=False
    ),
    "swiglu, narrow heads, only global layers": dict(
        mlp="swiglu", attention_head_width=4, global_attn_every_n_layers=1
    ),
    "bert": dict(
        mlp="gelu",
        norm_place="post",
        positions="learned",
        type_vocab_size=2,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        head_bias=True,
    ),
    "gated biases, no decoder bias": dict(
        attention_bias=True, mlp_bias=True, decoder_bias=False, norm="rmsnorm"
    ),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_parameters_of_every_setting_are_counted(setting):
    config = replace(SMALL, **setting)
    assert config.parameter_counts().total == ModernBertForMaskedLM(config).parameter_count()


@pytest.mark.parametrize("radius", [None, 1, 3, 8, 100])
def test_pairs_are_those_of_the_mask(radius):
    place = np.arange(20)
    near = np.abs(place[:, None] - place[None, :]) <= (100 if radius is None else radius)
    for n in range(21):
        assert attended_pairs([n], radius) == near[:n, :n].sum(), n
    assert attended_pairs(range(21), radius) == sum(near[:n, :n].sum() for n in range(21))


def test_pairs_by_hand():
    """Four tokens, radius 1: 2 + 3 + 3 + 2 keys; one token sees itself; nothing sees nothing."""
    assert attended_pairs([4], 1) == 10 and attended_pairs([4, 1], None) == 17
    assert attended_pairs([], 64) == 0
    assert attended_pairs([8192, 8192], 64) == 2 * (8192 * 129 - 64 * 65)


def test_flops_by_hand():
    """One layer of width 2 with one head, MLP width 3, 5 words; documents of 2 and 1 tokens, one position predicted:
    3 tokens x 2 (2 x 6 + 2 x 2 + 2 x 6 + 3 x 2) = 204; 5 pairs x 4 x 2 = 40; head 2 (2 x 2 + 2 x 5) = 28.
    """
    config = ModernBertConfig(
        vocab_size=5, hidden_size=2, intermediate_size=3, num_hidden_layers=1, num_attention_heads=1
    )
    assert config.train_flops(lengths=[2, 1], targets={"mlm": 1}) == 3 * (204 + 40 + 28)


@pytest.mark.parametrize("lengths", [[17], [9, 1, 17, 4]], ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_flops_equal_torchs_counter_forward_and_backward(monkeypatch, setting, lengths):
    """Attention by plain products of whole documents, which the counter sees; with 17 tokens a window of 16 is whole."""
    backend = SimpleNamespace(plan=lambda *_, **__: WholeDocuments(lengths))
    monkeypatch.setattr(shared, "choose_backend", lambda *_: SimpleNamespace(backend=backend))
    config = replace(SMALL, **setting)
    model, batch = ModernBertForMaskedLM(config), packed(lengths, vocab=96)
    expected = config.train_flops(lengths=lengths, targets=batch.counts)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        mlm_loss(model, batch, x_TC=model.hidden_states(batch))
    assert 3 * forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as both:
        mlm_loss(model, batch, x_TC=model.hidden_states(batch)).total.backward()
    assert both.get_total_flops() == expected


def test_of_tokens_that_are_not_asked_all_behind_the_last_attention_is_left_out(monkeypatch):
    """By torch's counter: 3 x 2 for each number of Wo and the MLP and each such token; also where a global layer is last."""
    lengths = [9, 1, 17, 4]
    backend = SimpleNamespace(plan=lambda *_, **__: WholeDocuments(lengths))
    monkeypatch.setattr(shared, "choose_backend", lambda *_: SimpleNamespace(backend=backend))
    model, batch = ModernBertForMaskedLM(SMALL), packed(lengths, vocab=96)
    with FlopCounterMode(display=False) as asked:
        mlm_loss(model, batch).total.backward()
    whole = SMALL.train_flops(lengths=lengths, targets=batch.counts)
    last = model.model.layers[-1]
    numbers = sum(p.numel() for p in (last.attn.Wo.weight, *last.mlp.parameters()))
    assert whole - asked.get_total_flops() == 3 * 2 * numbers * (sum(lengths) - batch.counts["mlm"])


def test_a_sentence_head_costs_its_pooler_and_two_logits_for_each_pair(monkeypatch):
    """By torch's counter, and by hand: 3 x 2 (32 x 32 + 32 x 2) for each of three pairs."""
    lengths = [9, 4, 17]
    backend = SimpleNamespace(plan=lambda *_, **__: WholeDocuments(lengths))
    monkeypatch.setattr(shared, "choose_backend", lambda *_: SimpleNamespace(backend=backend))
    shape = dict(hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
    config = BertConfig(vocab_size=96, sentence_head=True, **shape)
    model = build_model(config, seed=1)
    batch = packed(lengths, vocab=96)
    first = Targets(index_M=batch.cu_seqlens_S1[:3].long(), value_M=torch.zeros(3).long(), count=3)
    batch = replace(batch, targets={**batch.targets, "nsp": first})
    objective = build_objective(MlmNspConfig(), vocab_size=96, specials=SPECIALS)
    with FlopCounterMode(display=False) as both:
        sum(term.total for term in objective.loss(model, batch).values()).backward()
    found = config.train_flops(lengths=lengths, targets=batch.counts)
    assert both.get_total_flops() == found
    without = config.train_flops(lengths=lengths, targets={"mlm": batch.counts["mlm"]})
    assert found - without == 3 * 3 * 2 * (32 * 32 + 32 * 2)


class WholeDocuments:
    """A backend's plan."""

    traceable = False

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, q_THD, k_THD, v_THD, *, local):
        out = []
        for q, k, v in zip(
            *(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q_THD, k_THD, v_THD)),
            strict=True,
        ):
            out.append(torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v))
        return torch.cat(out, dim=1).transpose(0, 1)


def test_flops_of_base_are_those_of_the_papers_formula():
    base = from_mapping(
        ModernBertConfig, {k: v for k, v in PRESETS["modernbert_base"].items() if k != "system"}
    )
    for length, forward in ((1024, 2.75e8), (8192, 4.51e8)):
        assert base.train_flops(lengths=[length], targets={"mlm": 0.3 * length}) == pytest.approx(
            3 * length * forward, rel=0.005
        )
    counts = base.parameter_counts()
    assert (
        counts.embedding == 38_682_624
        and counts.matrices + counts.norms == 110_331_648
        and counts.biases == 0
    )
