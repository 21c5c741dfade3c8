"""One update of all weights of a model, ours beside torch's AdamW and torch-optimi's StableAdamW.

    python launch/bench.py optimizer [--shape small] [--rules stable_adamw,adamw,lamb,muon]

First each of ours makes three updates of a few small parameters, and the slow truth of the tests makes the same in fp64; then the
peers are timed on the model's own parameters, all with gradients of the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from benchmarks.options import several_of
from benchmarks.report import Report
from benchmarks.timing import in_turn, paired_ratio, ratio_text
from benchmarks.workload import SHAPES, config_of, first_model
from encoder.base.errors import UserError
from encoder.base.model import TrainedModel
from encoder.models.modernbert import ModernBertForMaskedLM
from encoder.optim.catalog import OPTIMIZERS, build_optimizer, state_elements
from encoder.optim.whole_tensors import MomentsConfig

QUICK = dict(shape="tiny")
BOUND = 1e-5  # fp32, three updates, relative to the largest weight
# of its updates: five Newton-Schulz iterations in bf16 stand for a singular value decomposition
MUON_BOUND = 0.2
PEER = "torch AdamW, fused"


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rules", type=several_of(*OPTIMIZERS), default=["stable_adamw", "adamw"])


def ask(args: argparse.Namespace, report: Report) -> None:
    """A line an optimizer."""
    device = torch.device(args.device)
    for rule in args.rules:
        check_rule(OPTIMIZERS[rule](), device=device)
    # shapes alone, for counts
    with torch.device("meta"):
        bare = ModernBertForMaskedLM(config_of(args.shape, dropout=0.0))
    count = sum(p.numel() for p in bare.parameters())
    sides: dict[str, Callable[[], object]] = {
        f"ours, {rule}": ours(args.shape, OPTIMIZERS[rule](), device=device) for rule in args.rules
    }
    sides |= peers(args.shape, device=device)
    timed = in_turn(sides, rounds=args.rounds, device=device)
    ratios = {name: paired_ratio(timed[name], timed[PEER]) for name in timed}
    report.add(
        f"Updates: {args.shape}, {count / 1e6:.1f} M parameters in {len([*bare.parameters()])}"
        " tensors, fp32",
        head=["", "ms", "spread", f"times as fast as {PEER}"],
        rows=[
            [name, f"{1e3 * took.median:.2f}", f"{took.spread:.0%}", ratio_text(ratios[name])]
            for name, took in timed.items()
        ],
        notes=[
            f"checked: three updates of each rule of ours against fp64 within {BOUND:g} (muon"
            f" {MUON_BOUND:g} of its updates)"
        ],
        figures={
            name: {
                "seconds": [*took.seconds],
                "cpu_seconds": [*took.cpu_seconds],
                "ratio": ratios[name],
            }
            for name, took in timed.items()
        }
        | {
            "state_elements": {
                rule: state_elements(bare, OPTIMIZERS[rule]()) for rule in args.rules
            }
        },
    )


def ours(shape: str, config: MomentsConfig, *, device: torch.device) -> Callable[[], None]:
    """Updates by a rule of ours."""
    model = with_gradients(shape, device=device)
    optimizer = build_optimizer(model, config)
    # what the schedule sets before each step
    for group in optimizer.param_groups:
        group.update(lr=1e-4, max_lr=1e-3)
    return optimizer.step


def peers(shape: str, *, device: torch.device) -> dict[str, Callable[[], object]]:
    # foreach and fused are torch's own fast ways
    """torch's AdamW twice, and torch-optimi's StableAdamW where it is installed."""
    settings: dict[str, Any] = dict(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0125)
    forms: dict[str, dict[str, Any]] = {
        PEER: {"fused": True},
        "torch AdamW, foreach": {"foreach": True},
    }
    found: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        parameters = with_gradients(shape, device=device).parameters()
        found[name] = torch.optim.AdamW(parameters, **settings, **form).step
    try:
        from optimi import StableAdamW
    except ImportError:
        return found
    model = with_gradients(shape, device=device)
    return {
        **found,
        "optimi StableAdamW": (
            StableAdamW(model.parameters(), triton=device.type == "cuda", **settings).step
        ),
    }


def with_gradients(shape: str, *, device: torch.device) -> ModernBertForMaskedLM:
    """A model whose gradients are drawn, on the device: of base on a CPU 2 s a side."""
    model = first_model(config_of(shape, dropout=0.0)).to(device)
    draw = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=draw, device=device)
    return model


def check_rule(config: MomentsConfig, *, device: torch.device) -> None:
    """Three updates against the slow truth. Raises UserError."""
    from tests.reference.updates import slow_updates

    draw, lrs, max_lr = torch.Generator().manual_seed(0), [1e-2, 2e-2, 1e-2], 2e-2
    small = _Small().to(device)
    start = {name: p.detach().cpu().clone() for name, p in small.named_parameters()}
    grads = [{name: torch.randn(p.shape, generator=draw) for name, p in start.items()} for _ in lrs]
    # it has what grouping asks for
    optimizer = build_optimizer(cast(TrainedModel, small), config)
    # the gradients of all rules and of the slow twin are the same
    for lr, grad in zip(lrs, grads):
        for name, p in small.named_parameters():
            p.grad = grad[name].to(device)
        for group in optimizer.param_groups:
            group.update(lr=lr, max_lr=max_lr)
        optimizer.step()
    exact = slow_updates(
        start, grads, config, lrs=lrs, max_lr=max_lr, hidden_matrices=small.hidden_matrices()
    )
    for name, p in small.named_parameters():
        # Muon's iterations are approximate, so its bound is a share of how far it moved
        moves_by_muon = config.rule == "Muon" and name in small.hidden_matrices()
        off = (p.detach().cpu().double() - exact[name]).abs().max().item()
        bound = (
            (MUON_BOUND * (exact[name] - start[name]) if moves_by_muon else BOUND * exact[name])
            .abs()
            .max()
            .item()
        )
        if not off <= bound:
            raise UserError(
                f"{config.rule} moves {name} {off:.1e} off its slow twin; needed: at most"
                f" {bound:.1e}. Nothing was timed."
            )


class _Small(nn.Module):
    """A layer's matrix, a norm's vector."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(8, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))

    def hidden_matrices(self) -> dict[str, int]:
        """As the models say it."""
        return {"layer.weight": 1}
