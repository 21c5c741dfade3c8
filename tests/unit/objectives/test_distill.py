"""Distillation: terms and their places, the loss by torch's own functions, the teacher at rest, and settings that are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder.base.batch import Targets, packed_documents
from encoder.base.errors import ConfigError
from encoder.base.rng import generator
from encoder.engine.graphed import GraphedForward
from encoder.models.bert import BertConfig
from encoder.models.catalog import build_model
from encoder.models.modernbert import ModernBertConfig
from encoder.objectives.catalog import build_objective
from encoder.objectives.distill import DistillConfig
from tests.helpers.contracts import check_objective

V = 50
SPECIALS = SimpleNamespace(mask_id=49, pad_id=48, all_special=(45, 46, 47, 48, 49))
STUDENT = ModernBertConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    window_radius_tokens=4,
)
# another family, another depth; positions and dropout of its own
TEACHER = BertConfig(
    vocab_size=V + 2,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
LENGTHS = (9, 14, 7)
IDS = np.random.default_rng(0).integers(0, 45, sum(LENGTHS))


def teacher(config=TEACHER) -> torch.nn.Module:
    return build_model(config, seed=7).requires_grad_(False).eval()


def objective(*, config=TEACHER, **settings):
    return build_objective(
        DistillConfig(teacher="runs/big", **settings),
        vocab_size=V,
        specials=SPECIALS,
        models={"teacher": teacher(config)},
    )


def batch_of(row):
    documents = torch.from_numpy(row.ids).split([*LENGTHS])
    targets = {
        name: Targets(
            index_M=torch.from_numpy(t.index), value_M=torch.from_numpy(t.value), count=len(t.index)
        )
        for name, t in row.targets.items()
    }
    return packed_documents(documents, targets)


def masked(one):
    return one.mask(IDS, generator(1, "row"), lengths=LENGTHS)


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
@pytest.mark.parametrize(
    "settings", [{}, {"cosine_weight": 0}, {"soft_weight": 0}], ids=["all", "soft", "cosine"]
)
def test_distillation_keeps_the_promises_of_an_objective(soft_targets, settings):
    one = objective(soft_targets=soft_targets, **settings)
    check_objective(one, build_model(STUDENT, seed=1), IDS, LENGTHS)


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
def test_the_loss_is_that_of_torchs_own_functions(soft_targets):
    one = objective(soft_targets=soft_targets, temperature=3.0)
    one.teacher.double()
    student = build_model(replace(STUDENT, attention_output_dropout=0.0), seed=1).double()
    row = masked(one)
    batch = batch_of(row)
    found = one.loss(student, batch)

    x_TC, y_TC = student.hidden_states(batch), one.teacher.hidden_states(batch)
    own_TV, theirs_TV = student.decode(x_TC), one.teacher.decode(y_TC)[:, :V]
    index = torch.from_numpy(row.targets["mlm"].index)
    asked = index if soft_targets == "masked" else torch.arange(len(IDS))
    value = torch.from_numpy(row.targets["mlm"].value)
    expected = {
        "mlm": F.cross_entropy(own_TV[index], value, reduction="sum"),
        "soft": 9.0
        * len(asked)
        * F.kl_div(
            (own_TV[asked] / 3).log_softmax(1),
            (theirs_TV[asked] / 3).softmax(1),
            reduction="batchmean",
        ),
        "cosine": F.cosine_embedding_loss(
            x_TC[asked], y_TC[asked], torch.ones(len(asked)), reduction="sum"
        ),
    }
    for name, term in found.items():
        assert term.total.item() == pytest.approx(expected[name].item(), rel=1e-9), name
    assert {name: term.weight for name, term in found.items()} == {
        "mlm": 2.0,
        "soft": 5.0,
        "cosine": 1.0,
    }
    parameters = [*student.parameters()]
    ours = torch.autograd.grad(sum(t.weight * t.total for t in found.values()), parameters)
    total = 2 * expected["mlm"] + 5 * expected["soft"] + expected["cosine"]
    for a, b in zip(ours, torch.autograd.grad(total, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


def test_the_masks_are_those_of_mlm_and_both_models_see_them():
    one = objective()
    plain = build_objective(
        replace(DistillConfig(teacher="x"), mask_share=0.3), vocab_size=V, specials=SPECIALS
    )
    row = masked(one)
    assert np.array_equal(row.ids, masked(plain).ids) and not np.array_equal(row.ids, IDS)
    seen = []
    one.teacher.hidden_states = lambda batch, *, at_M: (
        seen.append(batch.ids_T) or torch.zeros(len(at_M), TEACHER.hidden_size)
    )
    one.loss(build_model(STUDENT, seed=1), batch_of(row))
    assert np.array_equal(seen[0].numpy(), row.ids)


def test_loader_workers_get_no_teacher_and_the_teacher_no_gradient():
    one = objective()
    assert len(pickle.dumps(one)) < 100_000
    assert pickle.loads(pickle.dumps(one)).teacher is None  # noqa: S301
    assert one.teacher is not None
    student = build_model(STUDENT, seed=1)
    terms = one.loss(student, batch_of(masked(one)))
    sum(term.total for term in terms.values()).backward()
    assert all(p.grad is None for p in one.teacher.parameters())
    assert not one.teacher.training


def test_the_held_out_question_is_masked_tokens_alone_and_asks_no_teacher():
    one = objective()
    settings = one.config.held_out(mask_share=0.15)
    question = build_objective(settings, vocab_size=V, specials=SPECIALS)
    row = masked(question)
    assert [*row.targets] == [*one.terms] == ["mlm", "soft", "cosine"]
    assert len(row.targets["mlm"].index) and not len(row.targets["soft"].index)
    assert question.capacity("soft", 64) == 0
    one.teacher = None
    student = build_model(STUDENT, seed=1).eval()
    with torch.no_grad():
        found = one.loss(student, batch_of(row))
        logits = student.decode(student.hidden_states(batch_of(row)))
    index, value = (torch.from_numpy(x) for x in row.targets["mlm"])
    expected = F.cross_entropy(logits[index], value, reduction="sum")
    assert found["mlm"].sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["soft"].count == found["cosine"].count == 0


def test_work_is_the_students_step_and_the_teachers_forward():
    config = DistillConfig(teacher="x")
    lengths = np.array([30, 34])
    targets = config.expected_targets(documents=2, tokens=64, mask_share=0.25)
    assert targets == {"mlm": 16.0, "soft": 64, "cosine": 64}
    found = config.train_flops(STUDENT, {"teacher": TEACHER}, lengths=lengths, targets=targets)
    own = STUDENT.train_flops(lengths=lengths, targets={"mlm": 80.0})
    theirs = TEACHER.train_flops(lengths=lengths, targets={"mlm": 64.0})
    assert found == own + theirs / 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"soft_weight": -1.0}, "soft_weight -1.0 must be at least 0"),
        ({"soft_weight": 0, "cosine_weight": 0}, "nothing is learned from the teacher"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DistillConfig(teacher="x", **settings)


def test_the_cosine_of_two_widths_is_refused_unless_it_has_no_weight():
    wide = {"teacher": replace(TEACHER, hidden_size=32)}
    with pytest.raises(ConfigError, match=r"hidden_size is 16 .* 32 in the teacher runs/big"):
        DistillConfig(teacher="runs/big").check_models(STUDENT, wide)
    DistillConfig(teacher="runs/big", cosine_weight=0).check_models(STUDENT, wide)
    one = objective(config=wide["teacher"], cosine_weight=0)
    assert [*one.loss(build_model(STUDENT, seed=1), batch_of(masked(one)))] == ["mlm", "soft"]


def test_settings_without_effect_are_told():
    told = [
        *DistillConfig(teacher="x", soft_weight=0).without_effect(lambda name: True),
        *DistillConfig(teacher="x", mlm_weight=0, z_loss_weight=1e-4).without_effect(
            lambda name: False
        ),
    ]
    assert any("temperature has no effect" in line for line in told)
    assert any("z_loss_weight has no effect" in line for line in told)


def test_a_graphed_forward_has_the_same_terms_and_gradients():
    """All but the capture, which needs CUDA: the teacher is asked inside of it."""
    one = objective()
    student = build_model(STUDENT, seed=1)
    batch = batch_of(masked(one))
    graphed = GraphedForward(student, lambda given: one.loss(student, given))
    gradients = []
    for forward in (graphed, lambda given: one.loss(student, given)):
        terms = forward(batch)
        assert {name: term.weight for name, term in terms.items()} == {
            "mlm": 2.0,
            "soft": 5.0,
            "cosine": 1.0,
        }
        total = sum(term.weight * term.total for term in terms.values())
        gradients.append(torch.autograd.grad(total, [*student.parameters()]))
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)
