"""Attention of one packed micro-batch, forward and backward, by every route that can run here, side by side in one process.

    python benchmarks/attention.py [--device cpu] [--documents 8x512] [--dtypes float32,bfloat16] [--json FILE]

Routes are timed in turn, round after round, so that what else the machine does hits all of them; the figures are medians,
and the ratios are those of the table's first line. One thread on a CPU is timed by its own CPU time, so that neighbours
matter less; anything else by the clock on the wall. Values and gradients of every route are checked against a dense mask
in fp64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.nn.attend import BACKENDS, Situation

RADIUS = 64
Route = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """One table a precision and kind of layer."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--documents", default="8x512", help="8x512, or lengths: 30,500,1000")
    asked.add_argument("--dtypes", default="float32,bfloat16")
    asked.add_argument("--heads", type=int, default=4)
    asked.add_argument("--head-width", type=int, default=64)
    asked.add_argument("--rounds", type=int, default=15)
    asked.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked.add_argument("--json", type=Path)
    args = asked.parse_args()
    torch.set_num_threads(args.threads)
    count, _, length = args.documents.partition("x")
    lengths = [int(length)] * int(count) if length else [int(n) for n in args.documents.split(",")]
    rows = []
    for dtype in (getattr(torch, word) for word in args.dtypes.split(",")):
        for local in (False, True):
            rows += measure(lengths, dtype=dtype, local=local, args=args)
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": None, "torch": torch.__version__, "rows": rows}, indent=1))


def measure(lengths: list[int], *, dtype: torch.dtype, local: bool, args: argparse.Namespace) -> list[dict]:
    """Milliseconds of forward and backward by route."""
    device = torch.device(args.device)
    draw = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(sum(lengths), args.heads, args.head_width, generator=draw).to(dtype).to(device)
                      for _ in range(4))
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    routes = {"dense mask over the row": dense_row(lengths, local=local, device=device),
              "padded to a batch": padded(lengths, local=local, device=device)}
    if not local:
        routes["nested, jagged"] = jagged(ends)
    situation = Situation(device=device, dtype=dtype, head_width=args.head_width, training=True)
    for name, backend in BACKENDS.items():
        if backend.why_not(situation) is None:
            plan = backend.plan(ends, max_seqlen=max(lengths), tokens=len(q),
                                window_radius_tokens=RADIUS)
            routes[name] = lambda q, k, v, plan=plan: plan(q, k, v, local=local)

    exact = both_ways(routes["dense mask over the row"], *(x.double() for x in (q, k, v, d_out)))
    bound = 1e-4 if dtype == torch.float32 and device.type == "cpu" else 0.05
    for name, route in routes.items():
        for ours, truth in zip(both_ways(route, q, k, v, d_out), exact, strict=True):
            off = (ours.double() - truth).abs().max().item()
            if not off < bound:
                sys.exit(f"{name} is off by {off:.1e}; needed: below {bound:.0e}. Nothing was timed.")

    seconds = {name: [] for name in routes}
    for _ in range(args.rounds):
        for name, route in routes.items():
            start = now(device, args.threads)
            both_ways(route, q, k, v, d_out)
            seconds[name].append(now(device, args.threads) - start)
    medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    first = next(iter(medians.values()))
    kind = f"window {RADIUS}" if local else "global"
    print(f"\n{str(dtype).removeprefix('torch.')}, {kind}, {args.documents} documents, {args.heads} heads x {args.head_width}, "
          f"{device.type}, {args.threads} threads\n{'route':<26}{'ms':>8}{'ratio':>8}")
    for name, ms in medians.items():
        print(f"{name:<26}{ms:>8.1f}{first / ms:>8.2f}")
    return [{"dtype": str(dtype), "layer": kind, "route": name, "ms": ms, "ratio": first / ms} for name, ms in medians.items()]


def both_ways(route: Route, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    """Output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = route(*leaves)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def dense_row(lengths: list[int], *, local: bool, device: torch.device) -> Route:
    """One call over all tokens, with a mask of T x T."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    sees = document[:, None] == document
    if local:
        sees &= (place[:, None] - place).abs() <= RADIUS
    sees = sees.to(device)

    def route(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)[0].transpose(0, 1)

    return route


def padded(lengths: list[int], *, local: bool, device: torch.device) -> Route:
    """A batch of documents as long as the longest, as encoders that do not pack run it."""
    longest = max(lengths)
    place = torch.arange(longest)
    real = place < torch.tensor(lengths)[:, None]
    at = real.flatten().nonzero()[:, 0].to(device)
    sees = None if real.all() else real[:, None, None, :].expand(-1, 1, longest, -1)
    if local:
        near = (place[:, None] - place).abs() <= RADIUS
        sees = near if sees is None else sees & near
    sees = None if sees is None else sees.to(device)

    def route(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = [x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, at, x)
                 .view(len(lengths), longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*batch, attn_mask=sees)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, at)

    return route


def jagged(ends: Tensor) -> Route:
    """Nested tensors; they know no windows."""

    def route(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nested = (torch.nested.nested_tensor_from_jagged(x, ends.long()).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*nested).transpose(1, 2).values()

    return route


def now(device: torch.device, threads: int) -> float:
    """Seconds, after everything asked of the device is done."""
    if device.type == "cpu" and threads == 1:
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
