"""Every optimizer against its slow truth: whole tensors, and slices of them cut at random as ZeRO cuts groups."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from encoder.base.errors import ConfigError
from encoder.optim import muon, whole_tensors
from encoder.optim.adamw import AdamWConfig
from encoder.optim.catalog import OPTIMIZERS, build_optimizer, state_elements
from encoder.optim.exchange import deal
from encoder.optim.lamb import LambConfig
from encoder.optim.muon import MuonConfig, newton_schulz
from encoder.optim.slices import FlatPart, ParamSlice
from encoder.optim.stable_adamw import StableAdamWConfig
from tests.reference.svd_muon import orthogonal
from tests.reference.updates import slow_updates

LRS = [1e-2, 2e-2, 3e-2, 3e-2, 1e-2, 5e-3]
MAX_LR = 3e-2
HIDDEN = {"qkv": 3, "up": 2, "out": 1}
CONFIGS = {
    "stable_adamw": StableAdamWConfig(weight_decay=0.01),
    "adamw": AdamWConfig(weight_decay=0.3),
    "lamb": LambConfig(),
    "muon": MuonConfig(weight_decay=0.01),
    "muon-jordan": MuonConfig(weight_decay=0.01, matrix_scale="jordan", matrix_lr=3.0),
    "stable_adamw-bare": StableAdamWConfig(weight_decay=0.01, bias_correction=False),
    "adamw-bare": AdamWConfig(weight_decay=0.3, betas=(0.9, 0.999), bias_correction=False),
    "lamb-bare": LambConfig(bias_correction=False),
}
TORCH_TO_1E_12 = dict(rtol=1e-12, atol=1e-13)


class Small(nn.Module):
    """Parameters of all kinds: three matrices in one, two in one, wide ones and tall ones, an embedding, a vector, a bias."""

    def __init__(self, dtype=torch.float64, device="cpu") -> None:
        super().__init__()
        torch.manual_seed(3)
        for name, shape in {
            "table": (5, 2),
            "qkv": (6, 5),
            "norm": (7,),
            "out": (4, 3),
            "up": (6, 2),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=dtype, device=device)))
        self.linear = nn.Linear(2, 3, dtype=dtype, device=device)

    def hidden_matrices(self) -> dict[str, int]:
        return HIDDEN


def start_and_grads(dtype=torch.float64, *, spike=100.0):
    """Weights and one gradient per step and tensor; at step 4 the gradient of `qkv` is 100 times as large."""
    start = {n: p.detach().clone() for n, p in Small(dtype).named_parameters()}
    return start, [
        {
            n: torch.randn_like(p) * (spike if (t, n) == (3, "qkv") else 1.0)
            for n, p in start.items()
        }
        for t in range(len(LRS))
    ]


def truth_of(config, start, grads):
    return slow_updates(start, grads, config, lrs=LRS, max_lr=MAX_LR, hidden_matrices=HIDDEN)


def whole(config, grads, dtype=torch.float64, *, device="cpu", keep=False):
    model = Small(dtype).to(device)
    optimizer, named = build_optimizer(model, config), dict(model.named_parameters())
    for g, lr in zip(grads, LRS):
        for n, p in named.items():
            p.grad = g[n] if keep else g[n].clone()
        for group in optimizer.param_groups:
            group.update(lr=lr, max_lr=MAX_LR)
        optimizer.step()
    return {n: p.detach() for n, p in named.items()}


def cut_groups(model, optimizer, parts, chance):
    """Each group's parameters end to end and one element of padding, cut at random places into some flat tensors (also
    empty ones), as ZeRO gives them to ranks."""
    name_of, flats = {p: n for n, p in model.named_parameters()}, []
    for number, group in enumerate(optimizer.param_groups):
        total = sum(p.numel() for p in group["params"]) + 1
        cuts = [0, *sorted(chance.randrange(total + 1) for _ in range(parts - 1)), total]
        own = []
        for low, high in zip(cuts, cuts[1:]):
            at, slices = 0, []
            for p in group["params"]:
                a, b = max(low, at), min(high, at + p.numel())
                if a < b:
                    slices.append(
                        ParamSlice(
                            name=name_of[p],
                            numel=p.numel(),
                            start=a - at,
                            length=b - a,
                            flat_start=a - low,
                        )
                    )
                at += p.numel()
            own.append(
                FlatPart(
                    tensor=torch.zeros(high - low, dtype=torch.float64),
                    slices=tuple(slices),
                    group=number,
                )
            )
        group["params"] = [part.tensor for part in own]
        flats += own
    return flats


def fill(flats, values):
    for flat, tensor in flats:
        for s in flat.slices:
            s.of(tensor).copy_(values[s.name].flatten()[s.start : s.start + s.length])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_update_is_the_slow_rule(name):
    start, grads = start_and_grads()
    truth, ours = truth_of(CONFIGS[name], start, grads), whole(CONFIGS[name], grads)
    for n in start:
        torch.testing.assert_close(ours[n], truth[n], **TORCH_TO_1E_12)


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_at_random_the_update_is_that_of_whole_tensors(name):
    """All flat tensors in one process: the sums over a tensor's slices, and its matrices, meet without a collective."""
    start, grads = start_and_grads()
    truth = truth_of(CONFIGS[name], start, grads)
    shapes = {n: tuple(p.shape) for n, p in start.items()}
    for seed in range(20):
        model, chance = Small(), random.Random(seed)
        optimizer = build_optimizer(model, CONFIGS[name])
        flats = cut_groups(model, optimizer, parts=1 + seed % 4, chance=chance)
        fill([(flat, flat.tensor) for flat in flats], start)
        optimizer.set_slices(flats, shapes=shapes)
        groups = list(optimizer.param_groups)
        for g, lr in zip(grads, LRS):
            for flat in flats:
                flat.tensor.grad = torch.zeros_like(flat.tensor)
            fill([(flat, flat.tensor.grad) for flat in flats], g)
            for group in groups:  # all groups in one call, or one call a group, as ZeRO makes them
                group.update(lr=lr, max_lr=MAX_LR)
                if seed % 2:
                    optimizer.param_groups = [group]
                    optimizer.step()
            if not seed % 2:
                optimizer.step()
        for flat in flats:
            for s in flat.slices:
                torch.testing.assert_close(
                    s.of(flat.tensor),
                    truth[s.name].flatten()[s.start : s.start + s.length],
                    **TORCH_TO_1E_12,
                )
        assert all(
            flat.tensor[-1] == 0.0
            for flat in flats[len(flats) // len(groups) - 1 :: len(flats) // len(groups)]
            if len(flat.tensor)
        ), "padding must stay zero"
        if "muon" in name:
            assert optimizer.orthogonalized == len(LRS) * sum(HIDDEN.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("elements", [1, 12, 40])
def test_the_update_does_not_depend_on_how_many_tensors_are_moved_together(
    name, elements, monkeypatch
):
    monkeypatch.setattr(whole_tensors, "piece_elements", lambda device: elements)
    start, grads = start_and_grads()
    truth, ours = truth_of(CONFIGS[name], start, grads), whole(CONFIGS[name], grads)
    for n in start:
        torch.testing.assert_close(ours[n], truth[n], **TORCH_TO_1E_12)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_operations_of_a_cpu_and_those_of_a_device_give_one_update(name, monkeypatch):
    """fp32, where a decay of 1e-8 of a weight would be lost in a factor of 1 - 1e-8."""
    config = dataclasses.replace(CONFIGS[name], weight_decay=1e-6)
    start, grads = start_and_grads(torch.float32)
    on_cpu = whole(config, grads, torch.float32)
    monkeypatch.setattr(whole_tensors.WholeTensorOptimizer, "_on_cpu", lambda self, values: False)
    elsewhere = whole(config, grads, torch.float32)
    for n in start:
        torch.testing.assert_close(on_cpu[n], elsewhere[n], rtol=1e-6, atol=1e-7)


def test_a_small_decay_is_not_rounded_in_fp32():
    """A step takes 2e-7 of a weight. A factor of 1 - 2e-7 is 1 - 1.79e-7 in fp32, a tenth less."""
    start = torch.linspace(1.0, 2.0, 2**16)
    p = nn.Parameter(start.clone().view(256, 256))
    optimizer = build_optimizer(nn.ParameterList([p]), AdamWConfig(weight_decay=0.1))
    optimizer.param_groups[0]["lr"] = 2e-6
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    lost = 1.0 - float((p.detach().view(-1).double() / start.double()).mean())
    assert lost == pytest.approx(2e-5, rel=0.02)


@pytest.mark.parametrize(
    ("step", "factor"),
    # fact sheet of the families, 1.4: betas 0.9, 0.999
    [(1, 3.16), (12, 6.57), (100, 3.24), (500, 1.59), (1000, 1.26), (2000, 1.08), (5000, 1.003)],
)
def test_without_bias_correction_a_step_is_as_many_times_as_large(step, factor):
    """A constant gradient: with the correction each step is the rate, so the weight's way tells the factor."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    config = AdamWConfig(betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0, bias_correction=False)
    optimizer = build_optimizer(nn.ParameterList([p]), config)
    optimizer.param_groups[0]["lr"] = 1.0
    moved = {}
    before = 0.0
    for number in range(1, step + 1):
        p.grad = torch.full((1,), 0.5, dtype=torch.float64)
        optimizer.step()
        moved[number] = before - float(p.detach())
        before = float(p.detach())
    assert moved[step] == pytest.approx(factor, abs=0.5 * 10 ** -len(str(factor).split(".")[1]))
    if step >= 100:
        assert max(moved, key=moved.get) == 12


def test_lamb_neither_decays_nor_scales_norms_and_biases():
    """ALBERT's names LayerNorm, layer_norm and bias: the ratio is 1, so such a step is AdamW's without decay."""
    start, grads = start_and_grads()
    ours = whole(CONFIGS["lamb-bare"], grads)
    plain = AdamWConfig(betas=(0.9, 0.999), weight_decay=0.0, bias_correction=False)
    adamw = whole(plain, grads)
    for name in ("norm", "linear.bias"):
        torch.testing.assert_close(ours[name], adamw[name], **TORCH_TO_1E_12)
    assert not torch.allclose(ours["linear.weight"], adamw["linear.weight"])


def test_tensors_are_moved_together_up_to_a_bound_and_a_larger_one_alone(monkeypatch):
    monkeypatch.setattr(whole_tensors, "piece_elements", lambda device: sys.maxsize)
    monkeypatch.setattr(whole_tensors, "TOGETHER_ELEMENTS", 12)
    model = nn.ParameterList([torch.zeros(n) for n in (3, 8, 2, 30, 1, 12)])
    optimizer = build_optimizer(model, AdamWConfig())
    for p in model:
        p.grad = torch.zeros_like(p)
    optimizer.init_state()
    bundles = optimizer._bundles([(optimizer.param_groups[0], p) for p in model])
    assert [[w.numel() for w in b.weights] for b in bundles] == [[3, 8], [2], [30], [1], [12]]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_that_lie_otherwise_in_memory_are_the_same_gradients(name):
    start, grads = start_and_grads()
    turned = [
        {n: g.T.contiguous().T if g.ndim == 2 else g for n, g in step.items()} for step in grads
    ]
    assert not turned[0]["qkv"].is_contiguous()
    plain, ours = whole(CONFIGS[name], grads), whole(CONFIGS[name], turned, keep=True)
    for n in start:
        torch.testing.assert_close(ours[n], plain[n], **TORCH_TO_1E_12)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_model_may_go_to_its_device_after_its_optimizer_is_made(rule):
    """As at stage 0, where no slices are known later. CUDA is pretended: tensors of sizes and devices alone."""
    with FakeTensorMode():
        model = Small(torch.float32, device="cuda")
        optimizer = build_optimizer(model, OPTIMIZERS[rule]())
        optimizer._set_sizes(optimizer._numels.cpu())  # where the model was when it was made
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        kept = [
            x
            for state in optimizer.state.values()
            for x in state.values()
            if isinstance(x, torch.Tensor)
        ]
        assert kept and {x.device.type for x in (*kept, optimizer._numels)} == {"cuda"}


class Operations(TorchDispatchMode):
    """How many were called, but for views: on CUDA each would be a kernel, or one for each hundred tensors of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["stable_adamw", "adamw", "lamb"])
def test_on_a_device_an_update_of_many_tensors_calls_no_more_operations_than_one_of_few(
    rule, monkeypatch
):
    """Lists of tensors are one operation; that which takes a rate for each is a kernel a tensor all the same."""
    monkeypatch.setattr(whole_tensors, "piece_elements", lambda device: sys.maxsize)
    monkeypatch.setattr(
        whole_tensors,
        "_squares",
        lambda values: torch.stack(torch._foreach_norm(values, 2)).double().square(),
    )
    monkeypatch.setattr(whole_tensors.WholeTensorOptimizer, "_on_cpu", lambda self, values: False)
    counts = []
    for tensors in (4, 60):
        model = nn.ParameterList(
            [torch.randn(3, 2) for _ in range(tensors)] + [torch.randn(3) for _ in range(tensors)]
        )
        optimizer = build_optimizer(model, OPTIMIZERS[rule]())
        optimizer.init_state()
        for p in model:
            p.grad = torch.randn_like(p)
        with Operations() as called:
            optimizer.step()
        counts.append(called.count)
    assert counts[0] == counts[1] < 70


def test_a_spike_in_one_tensor_slows_that_tensor_alone():
    _, grads = start_and_grads()
    calm = start_and_grads(spike=1.0)[1]
    with_spike, without = (
        whole(CONFIGS["stable_adamw"], grads),
        whole(CONFIGS["stable_adamw"], calm),
    )
    assert torch.equal(with_spike["norm"], without["norm"]) and torch.equal(
        with_spike["out"], without["out"]
    )
    assert not torch.allclose(with_spike["qkv"], without["qkv"])


def test_a_tensor_without_gradient_is_left_alone_and_does_not_age():
    model = nn.ParameterList([torch.ones(3), torch.ones(3)])
    optimizer = build_optimizer(model, StableAdamWConfig())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.init_state()
    p, q = model
    p.grad = torch.ones(3)
    optimizer.step()
    assert (
        q.tolist() == [1.0, 1.0, 1.0]
        and optimizer.state[q]["step"] == 0
        and optimizer.state[p]["step"] == 1
    )


def test_unsharded_stable_adamw_agrees_with_torch_optimi():
    optimi = pytest.importorskip("optimi")
    start, grads = start_and_grads(torch.float32)
    config = CONFIGS["stable_adamw"]
    theirs = {n: p.clone().requires_grad_() for n, p in start.items()}
    decay = [p for n, p in theirs.items() if p.ndim > 1]
    judge = optimi.StableAdamW(
        [
            {"params": decay},
            {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=MAX_LR,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        decouple_lr=True,
        max_lr=MAX_LR,
        triton=False,
    )
    for g, lr in zip(grads, LRS):
        for n in theirs:
            theirs[n].grad = g[n].clone()
        for group in judge.param_groups:
            group["lr"] = lr
        judge.step()
    ours = whole(config, grads, torch.float32)
    for n in start:
        torch.testing.assert_close(ours[n], theirs[n].detach(), rtol=2e-6, atol=2e-6)


def test_muon_without_the_rest_is_torchs_but_for_its_bf16():
    """torch's Muon takes its decay times the rate and computes in bf16 (two digits) everywhere."""
    start, grads = start_and_grads()
    theirs = start["out"].clone().requires_grad_()
    judge = torch.optim.Muon(
        [theirs], lr=1.0, weight_decay=0.01 / MAX_LR, adjust_lr_fn="match_rms_adamw"
    )
    for g, lr in zip(grads, LRS):
        theirs.grad = g["out"].clone()
        judge.param_groups[0]["lr"] = lr
        judge.step()
    moved = whole(CONFIGS["muon"], grads)["out"] - start["out"]
    assert torch.linalg.vector_norm(
        theirs.detach() - start["out"] - moved
    ) < 2e-2 * torch.linalg.vector_norm(moved)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_the_update_is_the_slow_rule_but_for_newton_schulz_in_bf16(name):
    start, grads = start_and_grads(torch.float32)
    truth = truth_of(CONFIGS[name], start, grads)
    ours = whole(
        CONFIGS[name],
        [{n: g.cuda() for n, g in step.items()} for step in grads],
        torch.float32,
        device="cuda",
    )
    for n, right in truth.items():
        moved, off = right - start[n].double(), ours[n].cpu().double() - right
        two_digits = "muon" in name and n in HIDDEN
        assert torch.linalg.vector_norm(off) < (
            2e-2 if two_digits else 1e-4
        ) * torch.linalg.vector_norm(moved), n


@pytest.mark.parametrize(
    "name, left",
    [
        # by hand: lr 0.02, then 0.01, peak 0.02, weight decay 0.1; no gradient, so that only the decay moves
        ("stable_adamw", (1 - 0.1) * (1 - 0.05)),
        ("muon", (1 - 0.1) * (1 - 0.05)),
        ("adamw", (1 - 0.002) * (1 - 0.001)),
        (
            "lamb",
            (1 - 0.02) * (1 - 0.01),
        ),  # its direction is as long as the weights whatever it is made of
    ],
)
def test_decay_follows_the_rate_as_each_rule_says_and_vectors_do_not_decay(name, left):
    model = Small()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, dataclasses.replace(CONFIGS[name], weight_decay=0.1))
    for lr in (0.02, 0.01):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group.update(lr=lr, max_lr=0.02)
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), start[n] * (left if p.ndim > 1 else 1.0), **TORCH_TO_1E_12
        )


def test_muon_moves_with_the_size_of_adam_in_every_matrix():
    """Root mean square of the update over the rate: 0.2 where all singular values are 1 (arXiv 2502.16982, lemma 1)."""
    start, grads = start_and_grads(spike=1.0)
    moved = whole(MuonConfig(weight_decay=0.0), grads[:1])
    for n in HIDDEN:
        size = float((moved[n] - start[n]).square().mean().sqrt()) / LRS[0]
        assert 0.1 < size < 0.25, f"{n}: {size}"


def test_newton_schulz_makes_tall_and_wide_matrices_orthogonal_as_the_singular_values_say():
    torch.manual_seed(1)
    for shape in ((3, 8), (8, 3), (5, 5), (1, 4)):
        matrix = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(
            newton_schulz(matrix, in_bf16=False),
            torch.from_numpy(orthogonal(matrix.numpy())),
            **TORCH_TO_1E_12,
        )
        values = torch.linalg.svdvals(newton_schulz(matrix, in_bf16=False))
        assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    assert torch.equal(newton_schulz(torch.zeros(2, 3), in_bf16=False), torch.zeros(2, 3))


def test_muon_in_bf16_moves_matrices_by_the_slow_rule_to_two_digits_and_the_rest_as_before():
    start, grads = start_and_grads(torch.float32)
    config = MuonConfig(matrix_precision="bf16")
    truth = truth_of(config, start, grads)
    ours, before = whole(config, grads, torch.float32), whole(MuonConfig(), grads, torch.float32)
    for n, right in truth.items():
        moved, off = right - start[n].double(), ours[n].double() - right
        share = torch.linalg.vector_norm(off) / torch.linalg.vector_norm(moved)
        # fp32 would be nearer: 8 bits of mantissa were used
        assert n not in HIDDEN or 1e-4 < share < 2e-2, n
        assert n in HIDDEN or torch.equal(ours[n], before[n]), n


@pytest.mark.parametrize(
    ("word", "beside_fp32", "beside_bf16"),
    [("auto", False, False), ("model", False, True), ("bf16", True, True)],
)
def test_newton_schulz_on_a_cpu_computes_in_bf16_where_it_was_told_to(
    monkeypatch, word, beside_fp32, beside_bf16
):
    computed = []

    def noted(matrix, *, in_bf16):
        computed.append(in_bf16)
        return newton_schulz(matrix, in_bf16=in_bf16)

    monkeypatch.setattr(muon, "newton_schulz", noted)
    start, grads = start_and_grads(torch.float32)
    config = MuonConfig(matrix_precision=word)
    for told, right in ((config, beside_fp32), (config.beside_bf16(), beside_bf16)):
        computed.clear()
        whole(told, grads, torch.float32)
        assert computed and set(computed) == {right}
    assert StableAdamWConfig().beside_bf16() == StableAdamWConfig()


def test_matrices_are_dealt_the_dearest_first_to_the_rank_with_the_least_to_do():
    assert deal({"a": 1.0, "b": 4.0, "c": 2.0, "d": 2.0}, ranks=2) == {
        "b": 0,
        "c": 1,
        "d": 1,
        "a": 0,
    }
    assert deal({"a": 1.0}, ranks=3) == {"a": 0}


def test_each_optimizer_says_what_it_keeps():
    numbers = {name: state_elements(Small(), config()) for name, config in OPTIMIZERS.items()}
    hidden, all_of_it = 6 * 5 + 4 * 3 + 6 * 2, 5 * 2 + 6 * 5 + 7 + 4 * 3 + 6 * 2 + 3 * 2 + 3
    assert numbers == {
        "stable_adamw": 2 * all_of_it,
        "adamw": 2 * all_of_it,
        "lamb": 2 * all_of_it,
        "muon": 2 * all_of_it - hidden,
    }


@pytest.mark.parametrize(
    "kind, settings",
    [
        (StableAdamWConfig, {"betas": (1.0, 0.9)}),
        (StableAdamWConfig, {"eps": 0.0}),
        (StableAdamWConfig, {"weight_decay": -1.0}),
        (StableAdamWConfig, {"weight_decay": 1.0}),
        (AdamWConfig, {"weight_decay": -1.0}),
        (LambConfig, {"weight_decay": -0.1}),
        (MuonConfig, {"momentum": 1.0}),
        (MuonConfig, {"matrix_lr": 0.0}),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(kind, settings):
    with pytest.raises(ConfigError):
        kind(**settings)
