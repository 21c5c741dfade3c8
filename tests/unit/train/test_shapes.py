"""Which shapes micro-batches have on a device, and that rounded ones change no loss, no count and no gradient."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from encoder.base.batch import LossTerm, TokenBatch, counts_of
from encoder.models.catalog import build_model
from encoder.models.modernbert import ModernBertConfig
from encoder.objectives.catalog import OBJECTIVES, build_objective
from encoder.objectives.contract import Objective
from encoder.objectives.words import WordEdges
from encoder.train import build
from tests.helpers.loading import loader_with
from tests.helpers.memory_source import SPECIALS, in_memory, sentences_of
from tests.helpers.shards import random_documents
from tests.helpers.small_runs import LONGEST, ROW, SIZES, run_with, trained_by

# beside an objective's defaults: settings by which its loss takes another way
OTHER_WAYS: dict[str, dict[str, Any]] = {
    "mlm": {"z_loss_weight": 1e-2, "whole_words": True},
    "distill": {"soft_targets": "masked"},
    "plm": {"block_tokens": 8, "segment_tokens": 8, "memory_tokens": 8},
    "rtd": {"disallow_correct": True, "temperature": 0.7},
}
SOURCE = in_memory("text", random_documents(60, longest=60), shards=2)
SOURCE.sentences = sentences_of(SOURCE.lengths)
EDGES = WordEdges(np.arange(64) % 3 == 0, np.arange(64) < 59)


def test_shapes_are_rounded_for_bf16_products_on_a_cpu_with_units_for_them(monkeypatch):
    found = []
    for units in (True, False):
        monkeypatch.setattr(build, "computes_bf16", lambda _, units=units: units)
        for precision in ("fp32", "fp64", "autocast", "bf16"):
            run = SimpleNamespace(engine=SimpleNamespace(precision=precision))
            found.append([build.shape_step_of(run, torch.device(d)) for d in ("cpu", "cuda")])
    assert found == [[1, 1], [1, 1], [64, 1], [64, 1]] + 4 * [[1, 1]]


def every_way() -> list[tuple[str, str, dict[str, Any]]]:
    """(objective, family, settings): both catalogs, so that a new objective or family is here by itself."""
    plain = [(word, system, {}) for word in OBJECTIVES for system in trained_by(word)]
    return plain + [
        (word, system, OTHER_WAYS[word])
        for word, system, _ in plain
        if word in OTHER_WAYS and system == trained_by(word)[0]
    ]


def objective_of(settings: Any) -> Objective:
    """Both halves, every stored model that it asks a small one."""
    config = ModernBertConfig(**SIZES, window_radius_tokens=4)
    asked = {
        name: build_model(config, seed=7).requires_grad_(False).eval().double()
        for name in settings.STORED_MODELS
    }
    return build_objective(
        settings,
        vocab_size=64,
        specials=dataclasses.replace(SPECIALS, frame=settings.frame or SPECIALS.frame),
        words=EDGES,
        models=asked,
    )


def micro_batches(objective: Objective, **shapes: Any) -> list[TokenBatch]:
    """Two steps of the second of two ranks, which has a row less: of three micro-batches the last has none."""
    with loader_with(
        [SOURCE],
        max_tokens_per_document=LONGEST,
        row_tokens=ROW,
        window_documents=20,
        masker=objective,
        rank=1,
        world_size=2,
        micro_batch_rows=2,
        rows_at=lambda _: 9,
        **shapes,
    ) as loader:
        return [batch for _ in range(2) for batch in loader.next_step().micro_batches]


def summed(terms: list[dict[str, LossTerm]], name: str) -> dict[str, torch.Tensor]:
    """What the terms of this name say over all micro-batches."""
    found = [term[name] for term in terms]
    sums = {
        "sum": torch.stack([term.sum for term in found]).sum(),
        "count": torch.stack([term.count for term in found]).sum(),
        "correct": torch.stack([term.correct for term in found]).sum(),
    }
    if found[0].scores is not None:
        sums["scores"] = torch.stack([term.scores for term in found]).sum(0)
    return sums


def answers(
    model: Any, objective: Objective, batches: list[TokenBatch]
) -> dict[str, dict[str, torch.Tensor]]:
    """By loss term its sums, with dropout and without; and the gradient of every parameter."""
    counts = counts_of(batches)
    terms = [objective.loss(model, batch) for batch in batches]
    loss = sum(t.weight * t.total / counts[name] for term in terms for name, t in term.items())
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {f"{name} trained": summed(terms, name) for name in objective.terms}
    found["gradients"] = {name: p.grad for name, p in model.named_parameters()}

    model.eval()
    with torch.no_grad():
        terms = [objective.loss(model, batch) for batch in batches]
    model.train()
    return found | {name: summed(terms, name) for name in objective.terms}


@pytest.mark.parametrize("word", OBJECTIVES)
def test_every_objective_trains_a_family_here(word):
    assert trained_by(word)


@pytest.mark.parametrize(
    "word, system, settings", every_way(), ids=lambda x: "-".join(x) if isinstance(x, dict) else x
)
def test_rounded_shapes_change_no_loss_no_count_and_no_gradient(word, system, settings):
    run = run_with(system, word, **settings)
    objective = objective_of(run.objective)
    model = build_model(run.model, seed=1).double()
    plain = micro_batches(objective)
    rounded = micro_batches(objective, shape_step=64)

    # what is compared differs: sizes as they come, and multiples of 64
    sizes = [(len(b.ids_T), *(len(t.value_M) for t in b.targets.values())) for b in plain]
    assert any(size % 64 for batch in sizes for size in batch)
    for batch in rounded:
        assert not any(len(t.value_M) % 64 for t in batch.targets.values())
        assert len(batch.ids_T) % 64 == 0
    assert [b.counts for b in plain] == [b.counts for b in rounded]
    assert any(not any(b.counts.values()) for b in rounded)

    one = answers(model, objective, plain)
    other = answers(model, objective, rounded)
    for name, values in one.items():
        assert [*values] == [*other[name]]
        for key, value in values.items():
            # sums of other lengths are added in another order: last bits of fp64
            error = (other[name][key] - value).abs().max()
            assert error <= 1e-12 * value.abs().max().clamp(min=1e-3), f"{name} {key}: {error}"
    assert all(p.grad.isfinite().all() for p in model.parameters())
