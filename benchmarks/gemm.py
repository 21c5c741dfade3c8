"""The device's own ceiling: TFLOP/s of bf16 matrix products, for large square ones and for every shape that a model multiplies.

    python launch/bench.py gemm --device cuda --shape base --tokens 98304

Each forward product has two of the same FLOP on the way back, of other layouts. A small product of each shape and layout is held
against fp64 first.
"""

from __future__ import annotations

import argparse
import functools
import math

import torch
from torch import Tensor

from benchmarks.report import Report
from benchmarks.timing import in_turn
from benchmarks.workload import MASK_SHARE, SHAPES, config_of
from encoder.base.command import count
from encoder.base.errors import UserError
from encoder.nn.loss import PIECE_POSITIONS
from encoder.train.meters import bf16_peak

QUICK = dict(shape="tiny", tokens=256, square=256)
# n: as it lies, t: transposed
FORMS = {"forward": "nt", "d input": "nn", "d weight": "tn"}
PRODUCTS = 5  # of a round at least: one alone is too short for the clock
# FLOP of a round on CUDA: 10 ms at 1 PFLOP/s, or launching and waiting, about 20 us, would show
GPU_ROUND = 1e13
# of the largest element: bf16 has 8 bits, and rounds inputs alike on both sides
BOUND = 0.02


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=count, default=4096, help="of a micro-batch")
    parser.add_argument(
        "--square",
        type=count,
        default=None,
        help="side of the square products: 1024 on a CPU, 8192 on CUDA",
    )


def ask(args: argparse.Namespace, report: Report) -> None:
    """A line a shape."""
    device, found, rows = torch.device(args.device), {}, []
    # operands of the forward product and of both on the way back
    for name, (m, k, n) in shapes_of(args).items():
        operands = {form: operands_of(form, m, k, n, device=device) for form in FORMS}
        for form, (a, b) in operands.items():
            check_product(a[:64], b[:, :64], what=f"{name}, {form}")
        # as many products as make a round long enough for the clock
        times = max(
            PRODUCTS, math.ceil(GPU_ROUND / (2 * m * k * n)) if device.type == "cuda" else 0
        )
        timed = in_turn(
            {form: functools.partial(repeat, *pair, times) for form, pair in operands.items()},
            rounds=args.rounds,
            device=device,
        )
        # a product of m x k and k x n has 2 m k n FLOP
        found[name] = {
            form: 2e-12 * m * k * n * times / took.median for form, took in timed.items()
        }
        rows.append(
            [
                name,
                f"{m:,} x {k:,} x {n:,}",
                *(f"{found[name][form]:.4g}" for form in FORMS),
                f"{max(took.spread for took in timed.values()):.0%}",
            ]
        )
    # of the best square product, in its best form
    ceiling = max(found["square"].values())
    for row, name in zip(rows, found):
        row.append(f"{sum(found[name].values()) / len(FORMS) / ceiling:.0%}")
    peak = bf16_peak(device)
    report.add(
        f"Matrix products in bf16, TFLOP/s: {args.shape}, {args.tokens:,} tokens",
        head=["", "tokens x in x out", *FORMS, "spread", "of the ceiling"],
        rows=rows,
        notes=[
            f"ceiling: the best square product, {ceiling:.4g} TFLOP/s"
            + (
                f", {ceiling * 1e12 / peak:.0%} of the data sheet's {peak / 1e12:,.0f}"
                if peak
                else ""
            ),
            "rounds are short: a card under a whole step's load clocks lower",
            f"checked: 64 rows and columns of each against fp64 within {BOUND:g} of the largest",
        ],
        figures={"tflops": found, "ceiling_tflops": ceiling, "sheet_tflops": peak and peak / 1e12},
    )


def repeat(a: Tensor, b: Tensor, times: int) -> None:
    """The product so many times, one result in memory."""
    for _ in range(times):
        a @ b


def shapes_of(args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """name -> (rows, in, out) of the forward products."""
    config, device = config_of(args.shape, dropout=0.0), args.device
    c, f, inner = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_width,
    )
    side = args.square or (1024 if device == "cpu" else 8192)
    return {
        "square": (side, side, side),
        "Wqkv": (args.tokens, c, 3 * inner),
        "Wo": (args.tokens, inner, c),
        "Wi": (args.tokens, c, 2 * f),
        "mlp Wo": (args.tokens, f, c),
        "head": (max(1, int(MASK_SHARE * args.tokens)), c, c),
        "decoder, a piece": (PIECE_POSITIONS[device], c, config.vocab_size),
    }


def operands_of(
    form: str, m: int, k: int, n: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The two factors as autograd hands them to the product: views, transposed where FORMS says t."""
    # shapes of the factors as they lie in memory, before they are transposed
    left, right = {
        "forward": ((m, k), (n, k)),
        "d input": ((m, n), (n, k)),
        "d weight": ((m, n), (m, k)),
    }[form]
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in (left, right))
    return a.T if FORMS[form][0] == "t" else a, b.T if FORMS[form][1] == "t" else b


def check_product(a: Tensor, b: Tensor, *, what: str) -> None:
    """Raises UserError where the product is wrong."""
    exact = a.double() @ b.double()
    off = ((a @ b).double() - exact).abs().max() / exact.abs().max()
    if not off <= BOUND:
        raise UserError(
            f"{what} is off by {off:.1e} of the largest element; needed: at most {BOUND:g}. Nothing"
            " was timed."
        )
