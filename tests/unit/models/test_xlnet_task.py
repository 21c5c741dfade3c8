"""XLNet with a task: logits and gradients of transformers' classes, whose head stands on a text's last token."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from encoder.base.errors import ConfigError
from encoder.models.catalog import build_model
from encoder.models.hf.catalog import bridge_of
from encoder.models.hf.read import read_hf, read_task_head
from encoder.models.hf.task import FORMS, export_task, their_settings, their_weights
from encoder.models.with_task import HeadShape, build_task_model, first_weights, layers_of
from encoder.models.xlnet import XlnetConfig
from tests.helpers.hf import write_tokenizer_json
from tests.helpers.tasks import BODIES, LETTERS, drawn_places, drawn_task
from tests.helpers.xlnet import QUIET, SPECIALS
from tests.unit.models.test_with_task import COUNT, packed_gradients

transformers = pytest.importorskip("transformers")

CONFIG = XlnetConfig(**LETTERS, **QUIET, query_stream=True)


@pytest.fixture(autouse=True)
def body(monkeypatch):
    monkeypatch.setitem(BODIES, "xlnet", (CONFIG, SPECIALS))


def transformers_model(task) -> nn.Module:
    """Theirs in fp64, with our weights by its names; nothing may be missing."""
    settings = transformers.XLNetConfig.from_dict(their_settings(task, bridge_of(CONFIG)))
    theirs = getattr(transformers, FORMS[task.head.kind].architecture("xlnet"))(settings)
    theirs.load_state_dict(their_weights(task, bridge_of(CONFIG)))
    return theirs.double().train()


def their_loss(theirs, examples, kind: str) -> torch.Tensor:
    """Each text by itself, without padding; one mean over everything that is asked."""
    losses, asked = [], 0
    places = examples.places
    for row, (start, end) in enumerate(zip(examples.starts_N1, examples.starts_N1[1:])):
        ids = torch.from_numpy(examples.ids_A[start:end]).long()
        segments = torch.from_numpy(examples.segments_A[start:end]).long()
        if kind == "text":
            logits = theirs(input_ids=ids[None], token_type_ids=segments[None]).logits
            values = torch.from_numpy(examples.value_P[row : row + 1])
        elif kind == "token":
            own = slice(places.starts_N1[row], places.starts_N1[row + 1])
            tokens = torch.from_numpy(places.token_P[own]).long()
            logits = theirs(input_ids=ids[None], token_type_ids=segments[None]).logits[0][tokens]
            values = torch.from_numpy(examples.value_P[own])
        else:
            own = slice(places.starts_N1[row], places.starts_N1[row + 1])
            firsts = [*places.token_P[own].tolist(), len(ids)]
            choices = [(ids[a:b], segments[a:b]) for a, b in zip(firsts, firsts[1:])]
            logits = torch.cat(
                [
                    theirs(input_ids=i[None, None], token_type_ids=s[None, None]).logits
                    for i, s in choices
                ],
                dim=1,
            )
            values = torch.from_numpy(examples.value_P[own].argmax(axis=0))
        losses.append(nn.functional.cross_entropy(logits, values, reduction="sum"))
        asked += len(values)
    return torch.stack(losses).sum() / asked


@pytest.mark.parametrize("kind", ["text", "token", "choice"])
def test_packed_gradients_of_a_task_are_those_of_transformers(kind):
    task = drawn_task("xlnet", kind=kind)
    examples = drawn_places(COUNT, kind=kind, segments=True)
    theirs = transformers_model(task)
    their_loss(theirs, examples, kind).backward()
    found = packed_gradients(task, examples, [np.arange(4), np.arange(4, COUNT)])
    named = their_weights(dataclasses.replace(task, weights=found), bridge_of(CONFIG))
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(expected) == len(named) - 1
    for name, gradient in expected.items():
        torch.testing.assert_close(named[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["text", "token", "choice"])
def test_a_folder_is_proven_and_read_again_with_its_head(tmp_path, kind):
    task = dataclasses.replace(
        drawn_task("xlnet", kind=kind),
        tokenizer_json=write_tokenizer_json(tmp_path / "tokenizer.json", frame=False),
        results={"dev": {"accuracy": 0.5}},
    )
    proofs = export_task(task, tmp_path / "out")
    assert proofs["transformers"].right_padded == (kind == "token")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [FORMS[kind].architecture("xlnet")]
    side = "right" if kind == "token" else "left"
    assert f"Pad texts on the {side}" in (tmp_path / "out/README.md").read_text()

    head = read_task_head(tmp_path / "out", SPECIALS)
    assert head is not None and head.kind == kind
    assert torch.equal(head.weights["classifier.weight"], task.weights["classifier.weight"])
    back = read_hf(tmp_path / "out")
    assert back.drawn == ("decoder.bias",)
    assert all(
        torch.equal(back.weights[n], w) for n, w in task.weights.items() if n.startswith("model.")
    )


def test_a_fine_tuning_starts_from_the_body_alone():
    pretrained = build_model(CONFIG, seed=7).state_dict()
    model = build_task_model(CONFIG, HeadShape(family="xlnet", outputs=2), seed=8)
    weights, drawn = first_weights(pretrained, model)
    body = [name for name in weights if name.startswith("model.")]
    assert all(torch.equal(weights[name], pretrained[name]) for name in body)
    heads = {f"{n}.{kind}" for n in ("head.dense", "classifier") for kind in ("weight", "bias")}
    assert {*drawn} == heads and {*weights} == {*model.state_dict()}


def test_spans_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="an xlnet has no head of kind span here; needed: one of"):
        layers_of("span", "xlnet")
