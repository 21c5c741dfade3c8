"""StableAdamW against the looped twin, torch-optimi and torch's AdamW; whole and cut into stretches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.optim.slices import FlatPart, Stretch, first_gap
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from tests.reference.looped_stable_adamw import looped_stable_adamw

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2)}
LRS = [1e-2, 2e-2, 3e-2, 3e-2, 1e-2, 5e-3]
CONFIG = StableAdamWConfig(weight_decay=0.01)


def start_and_grads(dtype=torch.float64, *, spike=100.0):
    """Weights and one gradient per step and tensor; at step 4 the gradient of `a` is 100 times as large."""
    torch.manual_seed(3)
    start = {n: torch.randn(s, dtype=dtype) for n, s in SHAPES.items()}
    grads = [{n: torch.randn(s, dtype=dtype) * (spike if (t, n) == (3, "a") else 1.0) for n, s in SHAPES.items()}
             for t in range(len(LRS))]
    return start, grads


def by_loop(start, grads, config=CONFIG):
    return {n: torch.tensor(looped_stable_adamw(
        start[n].flatten().tolist(), [g[n].flatten().tolist() for g in grads], lrs=LRS, max_lr=0.03, betas=config.betas,
        eps=config.eps, weight_decay=config.weight_decay, update_clipping=config.update_clipping),
        dtype=torch.float64).view(SHAPES[n]) for n in start}


def by_optimizer(start, grads, config=CONFIG):
    params = {n: p.clone() for n, p in start.items()}
    optimizer = StableAdamW(params.values(), config)
    for g, lr in zip(grads, LRS):
        for n in params:
            params[n].grad = g[n].clone()
        optimizer.param_groups[0].update(lr=lr, max_lr=0.03)
        optimizer.step()
    return params


def cut_into(parts):
    """Stretches of a, b, c laid end to end (15 + 7 + 4 elements and 2 of padding), for flat tensors of the given lengths."""
    numels = {n: int(torch.Size(s).numel()) for n, s in SHAPES.items()}
    result, at = [], 0
    for length in parts:
        stretches, offset = [], 0
        for name, numel in numels.items():
            low, high = max(at, offset), min(at + length, offset + numel)
            if low < high:
                stretches.append(Stretch(name=name, numel=numel, start=low - offset, length=high - low, flat_start=low - at))
            offset += numel
        result.append(FlatPart(tensor=torch.zeros(length, dtype=torch.float64), stretches=tuple(stretches)))
        at += length
    return result, numels


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, update_clipping=False)], ids=["clipped", "plain"])
def test_the_update_is_the_looped_rule(config):
    start, grads = start_and_grads()
    truth, ours = by_loop(start, grads, config), by_optimizer(start, grads, config)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-12, atol=1e-13)


def test_a_spike_in_one_tensor_slows_that_tensor_alone():
    start, grads = start_and_grads()
    calm = start_and_grads(spike=1.0)[1]
    with_spike, without = by_optimizer(start, grads), by_optimizer(start, calm)
    assert torch.equal(with_spike["b"], without["b"]) and torch.equal(with_spike["c"], without["c"])
    assert not torch.allclose(with_spike["a"], without["a"])


@pytest.mark.parametrize("parts", [(28,), (16, 12), (10, 8, 10)], ids=str)
def test_cut_into_stretches_the_update_is_that_of_whole_tensors(parts):
    """All flat tensors in one process: the sums over a tensor's stretches meet without a collective."""
    start, grads = start_and_grads()
    flats, numels = cut_into(parts)

    def fill(flats, values):
        for flat in flats:
            for s in flat.stretches:
                s.of(flat.tensor).copy_(values[s.name].flatten()[s.start:s.start + s.length])

    fill(flats, start)
    optimizer = StableAdamW([f.tensor for f in flats], CONFIG)
    optimizer.set_stretches(flats, numels=numels)
    for g, lr in zip(grads, LRS):
        for flat in flats:
            flat.tensor.grad = torch.zeros_like(flat.tensor)
            fill([FlatPart(tensor=flat.tensor.grad, stretches=flat.stretches)], g)
        optimizer.param_groups[0].update(lr=lr, max_lr=0.03)
        optimizer.step()
    truth = by_loop(start, grads)
    for flat in flats:
        for s in flat.stretches:
            torch.testing.assert_close(s.of(flat.tensor), truth[s.name].flatten()[s.start:s.start + s.length],
                                       rtol=1e-12, atol=1e-13)
    assert flats[-1].tensor[-2:].tolist() == [0.0, 0.0], "padding must stay zero"


def test_the_step_survives_one_call_per_group_as_zero_makes_them():
    start, grads = start_and_grads()
    params = {n: p.clone() for n, p in start.items()}
    optimizer = StableAdamW([{"params": [p]} for p in params.values()], CONFIG)
    groups = optimizer.param_groups
    for g, lr in zip(grads, LRS):
        for group, n in zip(groups, params):
            params[n].grad = g[n].clone()
            group.update(lr=lr, max_lr=0.03)
            optimizer.param_groups = [group]
            optimizer.step()
    truth = by_loop(start, grads)
    for name in SHAPES:
        torch.testing.assert_close(params[name], truth[name], rtol=1e-12, atol=1e-13)


def test_a_tensor_without_gradient_is_left_alone_and_does_not_age():
    p, q = torch.ones(3), torch.ones(3)
    optimizer = StableAdamW([p, q], CONFIG, lr=0.1)
    optimizer.init_state()
    p.grad = torch.ones(3)
    optimizer.step()
    assert q.tolist() == [1.0, 1.0, 1.0] and optimizer.state[q]["step"] == 0 and optimizer.state[p]["step"] == 1


def test_unsharded_it_agrees_with_torch_optimi():
    optimi = pytest.importorskip("optimi")
    start, grads = start_and_grads(torch.float32)
    theirs = {n: p.clone().requires_grad_() for n, p in start.items()}
    judge = optimi.StableAdamW(list(theirs.values()), lr=0.03, betas=CONFIG.betas, eps=CONFIG.eps,
                               weight_decay=CONFIG.weight_decay, decouple_lr=True, max_lr=0.03, triton=False)
    for g, lr in zip(grads, LRS):
        for n in theirs:
            theirs[n].grad = g[n].clone()
        judge.param_groups[0]["lr"] = lr
        judge.step()
    ours = by_optimizer(start, grads)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=2e-6, atol=2e-6)


def test_without_clipping_it_is_torchs_adamw():
    start, grads = start_and_grads()
    theirs = {n: p.clone().requires_grad_() for n, p in start.items()}
    judge = torch.optim.AdamW(list(theirs.values()), lr=1.0, betas=CONFIG.betas, eps=CONFIG.eps,
                              weight_decay=CONFIG.weight_decay / 0.03)
    for g, lr in zip(grads, LRS):
        for n in theirs:
            theirs[n].grad = g[n].clone()
        judge.param_groups[0]["lr"] = lr
        judge.step()
    ours = by_optimizer(start, grads, dataclasses.replace(CONFIG, update_clipping=False))
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-13)


def test_settings_outside_their_range_are_refused():
    for settings in ({"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -1.0}, {"weight_decay": 1.0}):
        with pytest.raises(ConfigError):
            StableAdamWConfig(**settings)


def test_a_gap_or_an_overlap_of_stretches_is_found():
    def stretch(start, length, name="a", numel=6):
        return Stretch(name=name, numel=numel, start=start, length=length, flat_start=0)

    assert first_gap({"a": 6}, [stretch(0, 4), stretch(4, 2)]) is None
    assert "covered by no rank" in first_gap({"a": 6}, [stretch(0, 4)])
    assert "covered by no rank" in first_gap({"a": 6}, [stretch(0, 3), stretch(4, 2)])
    assert "covered twice" in first_gap({"a": 6}, [stretch(0, 4), stretch(3, 3)])
    assert "no parameter" in first_gap({"a": 6}, [stretch(0, 6), stretch(0, 6, name="b")])
