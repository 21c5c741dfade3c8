"""Peak memory of the loss, forward and backward, at the size of a real micro-batch; beside it the dense route.

    python launch/bench.py loss [--tokens 98304] [--vocab 50368] [--width 768]

Each figure is above what stood there before (hidden states, weight and bias). On CPU it is the kernel's high-water mark of
resident memory (Linux), from a process of its own; on CUDA torch's count of allocated bytes, from this one. The dense route is
measured at two smaller numbers of positions, since at the whole one it may not fit, and the line through them extended.
Both routes must give the same loss first.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.report import Report
from benchmarks.workload import MASK_SHARE
from encoder.base.command import count
from encoder.base.errors import UserError
from encoder.nn.loss import PIECE_POSITIONS, cross_entropy_sum

DENSE_POSITIONS = (512, 2048)
SAME_LOSS = {"fp32": 1e-5, "autocast": 2e-3}
QUICK = dict(tokens=2048, vocab=1024, width=64)
ROOT = Path(__file__).resolve().parents[1]


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--tokens", type=count, default=98_304)
    parser.add_argument("--vocab", type=count, default=50_368)
    parser.add_argument("--width", type=count, default=768)


def ask(args: argparse.Namespace, report: Report) -> None:
    """A line a precision and route."""
    positions, found, rows = math.ceil(args.tokens * MASK_SHARE), {}, []
    for precision in SAME_LOSS:

        def here(route: str, positions: int, precision: str = precision) -> dict[str, float]:
            return measure(
                route,
                precision,
                positions,
                device=args.device,
                vocab=args.vocab,
                width=args.width,
            )

        def case(route: str, positions: int, precision: str = precision) -> dict[str, float]:
            # on CUDA bytes are counted, and six processes would load it for 20 s
            if args.device == "cuda":
                return here(route, positions, precision)
            return in_a_process(route, precision, positions, args)

        # both routes on a few positions: what is wrong is not measured
        a, b = here("pieces", 64)["loss"], here("dense", 64)["loss"]
        if not abs(a - b) <= SAME_LOSS[precision] * abs(b):
            raise UserError(
                f"the loss is {a:.6f} in pieces and {b:.6f} dense; needed: equal within"
                f" {SAME_LOSS[precision]:g}. Nothing was measured."
            )
        ours, small, large = (
            case("pieces", positions),
            *(case("dense", m)["bytes"] for m in DENSE_POSITIONS),
        )
        # the line through both measured points, at the whole number of positions
        dense = large + (positions - DENSE_POSITIONS[1]) * (large - small) / (
            DENSE_POSITIONS[1] - DENSE_POSITIONS[0]
        )
        found[precision] = {
            "pieces_bytes": ours["bytes"],
            "dense_bytes": dense,
            "pieces_seconds": ours["seconds"],
        }
        rows += [
            [
                f"{precision}, pieces of {PIECE_POSITIONS[args.device]:,}",
                in_gb(ours["bytes"]),
                f"{ours['seconds']:.3g}",
            ],
            [f"{precision}, dense, extended", in_gb(dense), "-"],
        ]
    report.add(
        f"Memory of the loss: {positions:,} of {args.tokens:,} tokens, vocabulary {args.vocab:,},"
        f" width {args.width}",
        head=["", "peak", "s"],
        rows=rows,
        figures=found,
        notes=[
            f"all logits in fp32 would be {in_gb(4 * positions * args.vocab)}; checked: both routes"
            " give the same loss"
        ],
    )


def in_a_process(
    route: str, precision: str, positions: int, args: argparse.Namespace
) -> dict[str, float]:
    """The figures of one case, from a process that did nothing else before."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loss",
        route,
        precision,
        *map(str, (positions, args.device, args.vocab, args.width)),
    ]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT
    )
    if done.returncode:
        raise UserError(
            f"the loss, {route}, {precision}, {positions:,} positions:"
            f" {done.stderr.strip().splitlines()[-1]}"
        )
    return json.loads(done.stdout)


def measure(
    route: str, precision: str, positions: int, *, device: str, vocab: int, width: int
) -> dict[str, float]:
    """Bytes above what stood before, and seconds, of one forward and backward."""
    draw = torch.Generator().manual_seed(0)
    h_MC = torch.randn(positions, width, generator=draw).to(device).requires_grad_()
    weight_VC = (0.02 * torch.randn(vocab, width, generator=draw)).to(device).requires_grad_()
    bias_V = torch.zeros(vocab, device=device, requires_grad=True)
    target_M = torch.randint(0, vocab, (positions,), generator=draw).to(device)
    # libraries load their parts
    step(route, precision, h_MC[:8], weight_VC, bias_V, target_M[:8])
    # on CUDA kernels are compiled before; on a CPU a first pass would leave memory to be found
    if device == "cuda":
        step(route, precision, h_MC, weight_VC, bias_V, target_M)
    # gradients are made anew inside of the measured step
    h_MC.grad = weight_VC.grad = bias_V.grad = None
    before = reset_peak(device)
    began = time.perf_counter()
    loss = step(route, precision, h_MC, weight_VC, bias_V, target_M)
    seconds = time.perf_counter() - began
    return {"bytes": peak(device) - before, "seconds": seconds, "loss": loss}


def step(
    route: str,
    precision: str,
    h_MC: torch.Tensor,
    weight_VC: torch.Tensor,
    bias_V: torch.Tensor,
    target_M: torch.Tensor,
) -> float:
    """Forward and backward; the sum of the losses."""
    with torch.autocast(h_MC.device.type, torch.bfloat16, enabled=precision == "autocast"):
        if route == "dense":
            total = F.cross_entropy(F.linear(h_MC, weight_VC, bias_V), target_M, reduction="sum")
        else:
            total = cross_entropy_sum(h_MC, weight_VC, bias_V, target_M).total
    total.backward()
    return total.item()


def reset_peak(device: str) -> int:
    """Bytes in use now; the peak counts from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present
    return status_bytes("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since reset_peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A line of the process's status, which is in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def in_gb(size: float) -> str:
    """1_234_000_000 -> '1.23 GB'."""
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    route, precision, positions, device, vocab, width = sys.argv[1:]
    print(
        json.dumps(
            measure(
                route, precision, int(positions), device=device, vocab=int(vocab), width=int(width)
            )
        )
    )
