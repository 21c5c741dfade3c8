"""A model held against the plain encoder of tests/reference: every parameter off its first value, loss and every gradient."""

from __future__ import annotations

import pytest
import torch

from encoder.models.catalog import build_model
from encoder.models.contract import Model, ModelConfig
from encoder.objectives.mlm import mlm_loss
from tests.helpers.packed import packed
from tests.reference.dense import whole_vocabulary_loss
from tests.reference.plain_encoder import plain_logits

VOCAB = 60


def with_random_weights(config: ModelConfig, *, attention: str = "auto") -> Model:
    """In fp64, every parameter off its first value: zero biases and norms of one would hide a mistake."""
    model = build_model(config, attention=attention, seed=0).double()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(around + 0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return model


def check_loss_and_gradients(model: Model, lengths: list[int]) -> None:
    """Of packed documents, in fp64: the loss to 1e-12, every gradient to 1e-10 of its largest number.

    model: of VOCAB words
    lengths: of the documents
    """
    batch = packed(lengths, vocab=VOCAB, seed=len(lengths))
    targets = batch.targets["mlm"]
    found = mlm_loss(model, batch).total
    found.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()}
    logits = plain_logits(weights, model.config, batch.ids_T, lengths)[targets.index_M]
    eye = torch.eye(VOCAB, dtype=torch.float64)
    zeros = torch.zeros(VOCAB, dtype=torch.float64)
    expected = whole_vocabulary_loss(logits, eye, zeros, targets.value_M)
    expected.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, p in model.named_parameters():
        true = weights[name].grad
        # what reaches no loss has none in the reference
        true = torch.zeros_like(p) if true is None else true
        assert (p.grad - true).abs().max() <= 1e-10 * true.abs().max().clamp(min=1e-3), name
