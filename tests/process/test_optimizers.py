"""Fed the same reduced gradients, every optimizer moves the weights as its slow truth does, at any ZeRO stage and rank count."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.process import optimizer_cases
from tests.process.optimizer_cases import CONFIGS, LRS, MAX_LR, gradient
from tests.process.ranks import run_ranks, start_ranks, wait_for
from tests.process.tiny import tiny_model
from tests.reference.updates import slow_updates


def is_run(name: str, stage: int, ranks: int) -> bool:
    """All 12 of muon, whose matrices are dealt to ranks; of the others every two of rule, stage and ranks."""
    if name.endswith("_bare"):
        # without a term of the same rules
        return (ranks, stage) in ((2, 0), (2, 3))
    rule = [*CONFIGS].index(name)
    return name == "muon" or (rule + stage) % 3 == ranks - 1


CASES = {
    ranks: [
        {"optimizer": name, "zero_stage": stage, "label": f"{name}-s{stage}x{ranks}"}
        for name in CONFIGS
        for stage in range(4)
        if is_run(name, stage, ranks)
    ]
    for ranks in (1, 2, 3)
}
CASES[3] += [
    {"optimizer": "muon", "zero_stage": a, "then": b, "label": f"muon-s{a}x3->s{b}"}
    for a, b in ((1, 3), (3, 0))
]
LABELS = [case["label"] for cases in CASES.values() for case in cases]


@functools.lru_cache(None)
def out() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="optimizers-"))
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.lru_cache(None)
def moved() -> dict:
    launches = [
        start_ranks(optimizer_cases.updates, ranks, out=str(out()), settings=cases)
        for ranks, cases in CASES.items()
    ]
    return {
        label: [rank[label] for rank in results]
        for results in [wait_for(ranks, timeout_seconds=300.0) for ranks in launches]
        for label in results[0]
    }


@functools.lru_cache(None)
def truth(optimizer: str) -> dict[str, torch.Tensor]:
    model = tiny_model()
    start = {n: p.detach() for n, p in model.named_parameters()}
    grads = [{n: gradient(n, p.shape, step) for n, p in start.items()} for step in range(len(LRS))]
    return slow_updates(
        start,
        grads,
        CONFIGS[optimizer],
        lrs=LRS,
        max_lr=MAX_LR,
        hidden_matrices=model.hidden_matrices(),
    )


@pytest.mark.parametrize("label", LABELS)
def test_the_update_is_the_slow_one_at_every_stage_and_rank_count(label):
    moved()
    ours, right = load_file(out() / f"{label}.safetensors"), truth(label.split("-s")[0])
    off = sum(float((ours[n].double() - right[n]).square().sum()) for n in right) ** 0.5
    assert off < 1e-5 * sum(float(w.square().sum()) for w in right.values()) ** 0.5


@pytest.mark.parametrize("label", [label for label in LABELS if "muon" in label])
def test_newton_schulz_ran_on_every_matrix_of_every_step_once_and_on_all_of_them_at_stage_0(label):
    """Two layers: query, key, value, Wo, both halves of Wi, Wo. Under ZeRO each matrix has one rank, and each rank some."""
    ranks, steps = moved()[label], 1 if "->" in label else len(LRS)
    for rank in ranks:
        assert rank["all"] == steps * 14 * (
            len(ranks) if label.endswith("s0") or "-s0x" in label else 1
        )
        assert rank["own"] > 0
        assert rank["kinds"] == ["exp_avg", "exp_avg_sq", "master", "momentum"]


def test_muon_is_told_of_bf16_products_under_autocast_where_it_asks_for_the_models():
    (found,) = run_ranks(optimizer_cases.muons_settings, 1)
    assert found == [
        ["fp32", "model", "model"],
        ["autocast", "model", "bf16"],
        ["autocast", "auto", "auto"],
    ]
