"""Peak memory of the loss, forward and backward, at the size of a real micro-batch; beside it the dense route.

    python benchmarks/loss_memory.py [--device cuda] [--tokens 98304] [--share 0.3] [--vocab 50368] [--width 768]

Each figure comes from a process of its own, above what stood there before (hidden states, weight and bias). On CPU it is
the kernel's high-water mark of resident memory (Linux), on CUDA torch's count of allocated bytes. The dense route is
measured at two smaller numbers of positions, since at the whole one it may not fit, and the line through them extended.
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

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoder.nn.loss import PIECE_POSITIONS, cross_entropy_sum

DENSE_POSITIONS = (512, 2048)


def main() -> None:
    """Measures all cases one after the other and prints a table; with --case only that one, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--vocab", type=int, default=50_368)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--case", nargs=3, metavar=("ROUTE", "PRECISION", "POSITIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case[:2], int(args.case[2]), device=args.device, vocab=args.vocab, width=args.width)))
        return
    positions, piece = math.ceil(args.tokens * args.share), PIECE_POSITIONS[args.device]
    print(f"{positions:,} of {args.tokens:,} tokens predicted, V = {args.vocab:,}, C = {args.width}, {args.device}")
    print(f"all logits in fp32 {in_gb(4 * positions * args.vocab)}, a piece of {piece:,} {in_gb(4 * piece * args.vocab)}")
    for precision in ("fp32", "autocast"):
        ours = in_a_process(sys.argv[1:], "pieces", precision, positions)
        small, large = (in_a_process(sys.argv[1:], "dense", precision, m)["bytes"] for m in DENSE_POSITIONS)
        slope = (large - small) / (DENSE_POSITIONS[1] - DENSE_POSITIONS[0])
        dense = small + slope * (positions - DENSE_POSITIONS[0])
        print(f"{precision:<9} pieces {in_gb(ours['bytes'])} in {ours['seconds']:.0f} s")
        print(f"{'':<9} dense  {in_gb(dense)}, by the line through {DENSE_POSITIONS[0]:,} positions ({in_gb(small)}) and "
              f"{DENSE_POSITIONS[1]:,} ({in_gb(large)})")


def in_a_process(arguments: list[str], route: str, precision: str, positions: int) -> dict[str, float]:
    """The figures of one case, from a process that did nothing else before."""
    command = [sys.executable, __file__, *arguments, "--case", route, precision, str(positions)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(route: str, precision: str, positions: int, *, device: str, vocab: int, width: int) -> dict[str, float]:
    """Bytes above what stood before, and seconds, of one forward and backward."""
    draw = torch.Generator().manual_seed(0)
    h_MC = torch.randn(positions, width, generator=draw).to(device).requires_grad_()
    weight_VC = (0.02 * torch.randn(vocab, width, generator=draw)).to(device).requires_grad_()
    bias_V = torch.zeros(vocab, device=device, requires_grad=True)
    target_M = torch.randint(0, vocab, (positions,), generator=draw).to(device)
    step(route, precision, h_MC[:8], weight_VC, bias_V, target_M[:8])       # libraries load their parts
    h_MC.grad = weight_VC.grad = bias_V.grad = None
    before, began = reset_peak(device), time.perf_counter()
    step(route, precision, h_MC, weight_VC, bias_V, target_M)
    return {"bytes": peak(device) - before, "seconds": time.perf_counter() - began}


def step(route: str, precision: str, h_MC: torch.Tensor, weight_VC: torch.Tensor, bias_V: torch.Tensor,
         target_M: torch.Tensor) -> None:
    """Forward and backward."""
    with torch.autocast(h_MC.device.type, torch.bfloat16, enabled=precision == "autocast"):
        if route == "dense":
            total = F.cross_entropy(F.linear(h_MC, weight_VC, bias_V), target_M, reduction="sum")
        else:
            total = cross_entropy_sum(h_MC, weight_VC, bias_V, target_M).total
    total.backward()


def reset_peak(device: str) -> int:
    """Bytes in use now; the peak counts from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")       # resets VmHWM to the present
    return status_bytes("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since reset_peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A line of the process's status, which is in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def in_gb(size: float) -> str:
    """1_234_000_000 -> '1.23 GB'."""
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
