"""A head on a packed body gives the logits and gradients of transformers' class on padded batches, of each family."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from encoder.base.errors import ConfigError
from encoder.base.world import World
from encoder.data.examples import ExampleDealing, Examples, deal_examples, micro_batch
from encoder.models.catalog import build_model
from encoder.models.hf.catalog import bridge_of
from encoder.models.hf.parity import KeepFloat64
from encoder.models.hf.task import FORMS, TrainedTask, task_model, their_settings, their_weights
from encoder.models.with_task import HeadShape, TaskModel, first_weights
from encoder.objectives.text_tasks import TERM, Classes, Numbers, Picks, TextObjective, YesNo
from tests.helpers.tasks import BODIES, drawn_examples, drawn_places, drawn_task

KINDS = ("text", "token", "span", "choice")
CASES = [
    *((family, kind, "cls") for kind in KINDS for family in BODIES),
    ("modernbert", "text", "mean"),
    ("modernbert", "choice", "mean"),
]
OBJECTIVES: dict[str, TextObjective] = {
    "text": Classes(),
    "token": Classes(),
    "span": Picks(outputs=2),
    "choice": Picks(outputs=1, documents=2),
}
COUNT = 9


def transformers_model(task: TrainedTask) -> nn.Module:
    """Theirs in fp64, with our weights by its names; nothing may be missing."""
    import transformers

    bridge = bridge_of(task.config, task.specials)
    settings = transformers.AutoConfig.for_model(**their_settings(task, bridge))
    # eager attention takes the softmax of ModernBERT in fp32; ELECTRA has no other
    auto_class = getattr(transformers, FORMS[task.head.kind].auto_class)
    theirs = auto_class.from_config(settings, attn_implementation=bridge.attention)
    theirs.load_state_dict(their_weights(task, bridge))
    return theirs.double().eval()


def padded(examples: Examples, pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of all documents, padded on the right, as transformers is asked."""
    starts, documents = examples.starts_N1, len(examples)
    places = examples.places
    if places is not None and places.documents:
        starts = np.repeat(starts[:-1], np.diff(places.starts_N1)) + places.token_P
        starts = np.append(starts, len(examples.ids_A))
        documents = len(starts) - 1
    ids_BL = torch.full((documents, int(np.diff(starts).max())), pad_id)
    real_BL = torch.zeros_like(ids_BL)
    segments_BL = torch.zeros_like(ids_BL)
    for row, (start, end) in enumerate(zip(starts, starts[1:])):
        ids_BL[row, : end - start] = torch.from_numpy(examples.ids_A[start:end]).long()
        real_BL[row, : end - start] = 1
        if examples.segments_A is not None:
            segments_BL[row, : end - start] = torch.from_numpy(examples.segments_A[start:end])
    asked = {"input_ids": ids_BL, "attention_mask": real_BL}
    if examples.segments_A is not None:
        asked["token_type_ids"] = segments_BL
    return asked


def loss_of_texts(theirs: nn.Module, examples: Examples, pad_id: int) -> torch.Tensor:
    """-log p of each example's class, summed over one padded batch and divided by the examples once."""
    logits_BK = theirs(**padded(examples, pad_id)).logits
    return nn.functional.cross_entropy(logits_BK, torch.from_numpy(examples.value_P))


def loss_of_words(theirs: nn.Module, examples: Examples, pad_id: int) -> torch.Tensor:
    """Their own loss of one padded batch: a mean over all labelled tokens."""
    asked = padded(examples, pad_id)
    labels_BL = torch.full_like(asked["input_ids"], -100)
    rows = np.repeat(np.arange(len(examples)), np.diff(examples.places.starts_N1))
    labels_BL[rows, examples.places.token_P] = torch.from_numpy(examples.value_P)
    return theirs(**asked, labels=labels_BL).loss


def loss_of_spans(theirs: nn.Module, examples: Examples, pad_id: int) -> torch.Tensor:
    """Their own loss of each window by itself, without padding; the mean over windows."""
    losses = []
    asked = padded(examples, pad_id)
    for row, (start, end) in enumerate(zip(examples.starts_N1, examples.starts_N1[1:])):
        one = {name: x[row : row + 1, : end - start] for name, x in asked.items()}
        first, last = torch.from_numpy(examples.value_P[start:end].argmax(axis=0)[:, None])
        losses.append(theirs(**one, start_positions=first, end_positions=last).loss)
    return torch.stack(losses).mean()


def loss_of_choices(theirs: nn.Module, examples: Examples, pad_id: int) -> torch.Tensor:
    """Their own loss of each example by itself, its choices padded; the mean over examples."""
    losses = []
    asked, starts = padded(examples, pad_id), examples.places.starts_N1
    for start, end in zip(starts, starts[1:]):
        one = {name: x[None, start:end] for name, x in asked.items()}
        right = torch.from_numpy(examples.value_P[start:end].argmax(axis=0))
        losses.append(theirs(**one, labels=right).loss)
    return torch.stack(losses).mean()


LOSSES = {
    "text": loss_of_texts,
    "token": loss_of_words,
    "span": loss_of_spans,
    "choice": loss_of_choices,
}


def packed_gradients(
    task: TrainedTask,
    examples: Examples,
    parts: list[np.ndarray],
    *,
    objective: TextObjective | None = None,
) -> dict[str, torch.Tensor]:
    """Ours over several micro-batches, each a sum that is divided by what is asked in all."""
    ours = task_model(task).double()
    objective = objective or OBJECTIVES[task.head.kind]
    batches = [micro_batch(examples, numbers, term=TERM).batch for numbers in parts]
    asked = sum(batch.targets[TERM].count for batch in batches)
    for batch in batches:
        (objective.loss(ours, batch)[TERM].total / asked).backward()
    return {name: p.grad for name, p in ours.named_parameters()}


@pytest.mark.parametrize(("family", "kind", "pooling"), CASES)
def test_packed_gradients_are_those_of_transformers_with_one_denominator(family, kind, pooling):
    task = drawn_task(family, kind=kind, pooling=pooling)
    examples = drawn_places(COUNT, kind=kind, segments=family == "bert")
    theirs = transformers_model(task)
    with KeepFloat64():
        LOSSES[kind](theirs, examples, task.specials.pad_id).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}

    # their names hold gradients, too: the map is one of rows and names
    all_at_once = packed_gradients(task, examples, [np.arange(COUNT)])
    found = their_weights(
        dataclasses.replace(task, weights=all_at_once),
        bridge_of(task.config, task.specials),
    )
    for name, gradient in expected.items():
        if gradient is not None and name in found:
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10)
    assert sum(name in found for name in expected) >= len(expected) - 1

    one_by_one = packed_gradients(task, examples, [np.array([n]) for n in range(COUNT)])
    accumulated = packed_gradients(
        task, examples, np.split(np.random.default_rng(1).permutation(COUNT), [4, 7])
    )
    dealing = [
        ExampleDealing(
            world=World(rank=r, size=3, local_rank=r, local_size=3), micro_batch_tokens=40
        )
        for r in range(3)
    ]
    over_ranks = [part for d in dealing for part in deal_examples(examples.lengths_N, d)]
    for other in (one_by_one, accumulated, packed_gradients(task, examples, over_ranks)):
        for name, gradient in all_at_once.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("objective", "problem"),
    [(YesNo(outputs=3), "multi_label_classification"), (Numbers(outputs=1), "regression")],
)
def test_several_labels_and_numbers_have_transformers_gradients_too(objective, problem):
    outputs = objective.outputs
    task = dataclasses.replace(drawn_task("bert", outputs=outputs), problem=problem)
    draw = np.random.default_rng(2)
    values = draw.normal(size=(COUNT, outputs)).astype(np.float32)
    if outputs > 1:
        values = (values > 0).astype(np.float32)
    examples = dataclasses.replace(drawn_examples(COUNT, segments=True), value_P=values)

    theirs = transformers_model(task)
    asked = padded(examples, task.specials.pad_id)
    target_BK = torch.from_numpy(values).double()
    theirs(**asked, labels=target_BK).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}

    # a part without examples is what a rank has that only keeps the others company
    parts = [np.arange(4), np.array([], dtype=np.int64), np.arange(4, COUNT)]
    found = their_weights(
        dataclasses.replace(
            task, weights=packed_gradients(task, examples, parts, objective=objective)
        ),
        bridge_of(task.config, task.specials),
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10)


def test_a_head_drops_the_same_elements_of_an_example_whatever_it_is_packed_with():
    task = drawn_task("roberta", dropout=0.5)
    ours = task_model(task).double().train()
    examples = drawn_examples(COUNT)
    keys = lambda number: np.array([number * 977 + 5], dtype=np.uint64)  # noqa: E731

    def logits(numbers: list[int]) -> torch.Tensor:
        batch = micro_batch(examples, np.array(numbers), term=TERM, keys_of=keys).batch
        return ours.answers(batch, batch.targets[TERM].index_M)

    together = logits([3, 1, 7])
    torch.testing.assert_close(together[1:2], logits([1]))
    assert not torch.allclose(together[1:2], ours.eval().answers(*_asked(examples, 1)))


def _asked(examples: Examples, number: int):
    batch = micro_batch(examples, np.array([number]), term=TERM).batch
    return batch, batch.targets[TERM].index_M


@pytest.mark.parametrize("family", BODIES)
def test_a_head_takes_over_what_the_pretrained_model_has_of_it(family):
    config, _ = BODIES[family]
    pretrained = build_model(config, seed=7).state_dict()
    if family == "bert":
        pretrained |= {
            "pooler.dense.weight": torch.ones(16, 16),
            "pooler.dense.bias": torch.ones(16),
        }
    model = TaskModel(config, HeadShape(family=family, outputs=2), seed=8)
    weights, drawn = first_weights(pretrained, model)
    body = [name for name in weights if name.startswith("model.")]
    assert all(torch.equal(weights[name], pretrained[name]) for name in body)
    kept = {"modernbert": "head.dense.weight", "bert": "pooler.dense.weight"}.get(family)
    if kept:
        assert torch.equal(weights["head.dense.weight"], pretrained[kept])
    assert ("head.dense.weight" in drawn) is (kept is None) and "classifier.weight" in drawn
    assert set(weights) == set(model.state_dict())


def test_a_mean_is_refused_where_transformers_has_none():
    with pytest.raises(ConfigError, match="pooling mean with a bert.*Use pooling: cls"):
        HeadShape(family="bert", outputs=2, pooling="mean")
