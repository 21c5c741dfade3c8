"""What every family and every objective owes, asked of one of them: call these in a family's own test.

    check_model(BertConfig(vocab_size=50, hidden_size=8, ...))
    check_objective(objective, model, ids, lengths)

A failed assert says in words which promise does not hold.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence

import numpy as np
import torch

from encoder.base.batch import Targets, TokenBatch, packed_documents
from encoder.base.objective import MaskedRow, RowPairs
from encoder.models.catalog import build_model
from encoder.models.contract import Model, ModelConfig
from encoder.models.growth import axes_of
from encoder.objectives.contract import Objective

DRAWS = 20  # rows that capacity and repetition are looked at


def check_model(config: ModelConfig, *, atol: float = 1e-6) -> Model:
    """A small model of the settings, whose promises hold: names, counts, growth, packing.

    config: a small shape, of at least 10 words
    atol: between a document packed and alone, in fp32
    """
    model = build_model(config, seed=1)
    again = build_model(config, seed=1).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name]), f"{name} is no function of the seed"
    for name, parameter in model.named_parameters():
        whole = model.initial_values(name, parameter.shape)
        assert torch.equal(whole.to(parameter), parameter), f"initial_values of {name} differ"
        axes = axes_of(name, config.growth())
        lengths = [axis.length(config) * axis.blocks(config) for axis in axes]
        assert lengths == [*parameter.shape], f"growth() has {lengths} for {name}"
    counted = config.parameter_counts().total
    assert counted == sum(p.numel() for p in model.parameters()), f"parameter_counts(): {counted}"

    matrices = dict(model.named_parameters())
    for name in model.hidden_matrices():
        assert matrices[name].ndim == 2, f"hidden_matrices() has {name}, which is no matrix"

    documents = [torch.arange(length) % 10 for length in (5, 1, 9)]
    model.eval()
    with torch.no_grad():
        whole_TC = model.hidden_states(packed_documents(documents))
        parts = whole_TC.split([len(document) for document in documents])
        for document, found in zip(documents, parts, strict=True):
            alone = model.hidden_states(packed_documents([document]))
            assert torch.allclose(alone, found, atol=atol), "a document sees its neighbours"
    model.train()
    batch = packed_documents(documents)
    _check_states_of_some(model, _with_keys(batch), atol=atol)
    return model


def _with_keys(batch: TokenBatch) -> TokenBatch:
    """Each token draws for itself which of its features are dropped."""
    keys_T = torch.randint(2**62, (len(batch.ids_T),), generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(batch, token_key_T=keys_T)


def _check_states_of_some(model: Model, batch: TokenBatch, *, atol: float) -> None:
    """hidden_states at a few tokens, one of them twice, and at none: values and gradients, the same features dropped."""
    for index_M in (torch.tensor([0, 4, 6, 6, 14]), torch.tensor([], dtype=torch.int64)):
        found = []
        for x_MC in (
            model.hidden_states(batch).index_select(0, index_M),
            model.hidden_states(batch, at_M=index_M),
        ):
            model.zero_grad()
            x_MC.sin().sum().backward()
            found.append([x_MC.detach(), *(p.grad for p in model.parameters())])
        for whole, some in zip(*found, strict=True):
            assert (whole is None) == (some is None), "a gradient of states of some tokens is none"
            if whole is not None and some is not None:
                assert torch.allclose(whole, some, atol=atol), "states of some tokens differ"
    model.zero_grad()


def check_objective(
    objective: Objective, model: Model, ids: np.ndarray, lengths: Sequence[int]
) -> None:
    """The promises of both halves: rows repeat, fit their capacity, and give a gradient to every parameter.

    objective: of a phase
    model: small, and of its vocabulary
    ids: int64 [T], a clean row
    lengths: of its documents
    """
    # it is sent to worker processes
    copy = pickle.loads(pickle.dumps(objective))  # noqa: S301
    for seed in range(DRAWS):
        row = _mask(objective, ids, lengths, seed)
        for other in (_mask(objective, ids, lengths, seed), _mask(copy, ids, lengths, seed)):
            assert _same(row, other), "mask() draws from something else than its generator"
        _check_row(objective, row, ids)
    batch = _batch(row, lengths)
    loss = objective.loss(model, batch)
    terms = [*objective.terms]
    assert [*loss] == terms, f"loss() has the terms {[*loss]}, `terms` is {terms}"
    for name, term in loss.items():
        count = batch.targets[name].count
        assert int(term.count) == count, f"{name}: {count} targets, the loss counted {term.count}"

    everything = objective.all_targets(torch.from_numpy(ids))
    assert [*everything] == terms, f"all_targets() has {[*everything]}, `terms` is {terms}"

    # a batch without any target: gradients are zeros and not None
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = {name: Targets(index_M=nothing, value_M=nothing, count=0) for name in terms}
    model.zero_grad(set_to_none=True)
    loss = objective.loss(model, packed_documents([torch.from_numpy(ids)], empty))
    torch.stack([term.total for term in loss.values()]).sum().backward()
    lost = [name for name, p in model.named_parameters() if p.grad is None]
    assert not lost, f"no gradient reaches {', '.join(lost)} in a batch without targets"
    model.zero_grad(set_to_none=True)


def _mask(objective: Objective, ids: np.ndarray, lengths: Sequence[int], seed: int) -> MaskedRow:
    before = ids.copy()
    row = objective.mask(
        ids,
        np.random.default_rng(seed),
        lengths=lengths,
        phase_tokens=0,
        **_pairs(objective, lengths),
    )
    assert np.array_equal(ids, before), "mask() changed the clean ids"
    return row


def _pairs(objective: Objective, lengths: Sequence[int]) -> dict[str, RowPairs]:
    """What mask() of an objective of pairs gets, too."""
    if objective.pairs is None:
        return {}
    labels = np.arange(len(lengths)) % 2
    return {"pairs": RowPairs(labels, np.array([length // 2 for length in lengths]))}


def _same(row: MaskedRow, other: MaskedRow) -> bool:
    equal = [np.array_equal(row.ids, other.ids), [*row.targets] == [*other.targets]]
    for name, targets in row.targets.items():
        equal.append(np.array_equal(targets.index, other.targets[name].index))
        equal.append(np.array_equal(targets.value, other.targets[name].value))
    return all(equal)


def _check_row(objective: Objective, row: MaskedRow, ids: np.ndarray) -> None:
    terms = [*objective.terms]
    assert [*row.targets] == terms, f"mask() has the targets {[*row.targets]}, `terms` is {terms}"
    assert row.ids.shape == ids.shape, "mask() changed the row's length"
    assert (row.segments is not None) == objective.has_segments, (
        "has_segments is not what rows have"
    )
    for name, targets in row.targets.items():
        room = objective.capacity(name, len(ids))
        found = len(targets.index)
        assert found <= room, (
            f"capacity({name!r}) is {room} of {len(ids)} tokens, a row has {found}"
        )
        assert np.all(np.diff(targets.index) > 0), f"{name}: the index does not ascend"


def _batch(row: MaskedRow, lengths: Sequence[int]) -> TokenBatch:
    documents = torch.from_numpy(row.ids).split([*lengths])
    targets = {
        name: Targets(
            index_M=torch.from_numpy(found.index),
            value_M=torch.from_numpy(found.value),
            count=len(found.index),
        )
        for name, found in row.targets.items()
    }
    batch = packed_documents(documents, targets)
    if row.segments is not None:
        batch = batch.with_tensors(
            {**batch.tensors(), "segments_T": torch.from_numpy(row.segments)}
        )
    return batch
