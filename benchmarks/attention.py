"""Attention of one packed micro-batch, forward and backward, by every route that can run here, side by side in one process.

    python launch/bench.py attention [--documents real|8x512|30,500,1000] [--dtypes float32,bfloat16]

Values and gradients of every route are checked, document by document, against a dense mask in fp64 before anything is timed.
`real` are documents of the four domains, at most --length tokens each, --tokens together.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import several_of
from benchmarks.report import Report
from benchmarks.timing import in_turn, paired_ratio, ratio_text
from benchmarks.workload import make_batch
from encoder.base.command import count
from encoder.base.errors import UserError
from encoder.nn.attend import BACKENDS, AttentionRequest
from encoder.train.meters import document_lengths

RADIUS = 64
QUICK = dict(documents=[40, 100, 7], heads=2, head_width=16)
DENSE_TOKENS = 16_384  # a mask over the row of more has more than 2^28 places
Route = Callable[[Tensor, Tensor, Tensor], Tensor]


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument(
        "--documents", type=lengths, default="real", help="real, 8x512, or lengths: 30,500,1000"
    )
    parser.add_argument("--tokens", type=count, default=4096, help="of real documents")
    parser.add_argument("--length", type=count, default=1024, help="longest real document")
    parser.add_argument(
        "--dtypes", type=several_of("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--head-width", type=count, default=64)


def lengths(text: str) -> list[int] | str:
    """'8x512' -> eight times 512; 'real' stays."""
    if text == "real":
        return text
    number, _, length = text.partition("x")
    if length:
        return [count(length)] * count(number)
    return [count(n) for n in text.split(",")]


def ask(args: argparse.Namespace, report: Report) -> None:
    """A table a precision and kind of layer."""
    documents = args.documents
    if documents == "real":
        batch = make_batch(
            vocab_size=1024, longest=args.length, row_tokens=args.tokens, rows=1, number=0
        )
        documents = [n for n in document_lengths(batch).tolist() if n]
    for dtype in (getattr(torch, word) for word in args.dtypes):
        for local in (False, True):
            measure(documents, dtype=dtype, local=local, args=args, report=report)


def measure(
    lengths: list[int], *, dtype: torch.dtype, local: bool, args: argparse.Namespace, report: Report
) -> None:
    """Milliseconds of forward and backward by route."""
    device = torch.device(args.device)
    draw = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        torch.randn(sum(lengths), args.heads, args.head_width, generator=draw).to(dtype).to(device)
        for _ in range(4)
    )
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    routes = {"padded to a batch and back": padded(lengths, local=local, device=device)}
    # the mask has a place for each pair of tokens
    if sum(lengths) <= DENSE_TOKENS:
        routes = {
            "dense mask over the row": dense_row(lengths, local=local, device=device),
            **routes,
        }
    if not local:
        routes["nested, jagged"] = jagged(lengths, ends.long())
    situation = AttentionRequest(
        device=device, dtype=dtype, head_width=args.head_width, training=True
    )
    for name, backend in BACKENDS.items():
        # tiles is for CPUs, sdpa the judge's: cuDNN would make a plan for each of some 100 lengths
        if device.type == "cuda" and name in ("tiles", "sdpa"):
            continue
        if backend.why_not(situation) is None:
            plan = backend.plan(
                ends, max_seqlen=max(lengths), tokens=len(q), window_radius_tokens=RADIUS
            )
            routes[name] = functools.partial(plan, local=local)
    check(routes, q, k, v, d_out, lengths=lengths, local=local)
    timed = in_turn(
        {
            name: functools.partial(both_ways, route, q, k, v, d_out)
            for name, route in routes.items()
        },
        rounds=args.rounds,
        device=device,
    )
    first = next(iter(timed))
    ratios = {name: paired_ratio(took, timed[first]) for name, took in timed.items()}
    kind = f"window {RADIUS}" if local else "global"
    report.add(
        f"Attention, {str(dtype).removeprefix('torch.')}, {kind}: {len(lengths)} documents of up to"
        f" {max(lengths):,} tokens, {sum(lengths):,} together, {args.heads} heads x"
        f" {args.head_width}",
        head=["route", "ms", "spread", "tokens/s", f"times as fast as {first}"],
        rows=[
            [
                name,
                f"{1e3 * took.median:.2f}",
                f"{took.spread:.0%}",
                f"{sum(lengths) / took.median:,.0f}",
                ratio_text(ratios[name]),
            ]
            for name, took in timed.items()
        ],
        notes=["checked: output and gradients of each against fp64"],
        figures={
            name: {
                "seconds": [*took.seconds],
                "cpu_seconds": [*took.cpu_seconds],
                "ratio": ratios[name],
                "peak_bytes": took.peak_bytes,
            }
            for name, took in timed.items()
        },
    )


def check(
    routes: dict[str, Route],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    *,
    lengths: list[int],
    local: bool,
) -> None:
    """Every route against a dense mask a document, in fp64. Raises UserError."""
    # of a block's length as a vector; seen: 1e-5 and 5e-3
    bound = 1e-4 if q.dtype == torch.float32 else 0.02
    found = {name: both_ways(route, q, k, v, d_out) for name, route in routes.items()}
    # attention knows no other document, so each is computed alone
    for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths):
        own = slice(start, start + length)
        exact = both_ways(
            dense_row([length], local=local, device=q.device),
            *(x[own].double() for x in (q, k, v, d_out)),
        )
        for name, values in found.items():
            off = max(
                difference(ours[own], truth) for ours, truth in zip(values, exact, strict=True)
            )
            if not off < bound:
                raise UserError(
                    f"attention {name} is off by {off:.1e}; needed: below {bound:.0e}. Nothing was"
                    " timed."
                )


def difference(ours: Tensor, truth: Tensor) -> float:
    """The largest, over blocks of 128 tokens of a head, of the length of the difference over that of the truth.

    [L, H, D] both. The largest element would not do: of documents of 8,192 tokens all are below 0.2. Nor would the whole
    document: what a kernel does wrong at its end alone is 1 % of it.
    """
    # [L, H, D] -> [blocks, 128, H, D] -> a norm for each block and head
    off, whole = (
        F.pad(x, (0, 0, 0, 0, 0, -len(x) % 128)).unflatten(0, (-1, 128)).norm(dim=(1, 3))
        for x in (ours.double() - truth, truth)
    )
    # the second term keeps blocks whose truth is near 0 from deciding
    return (off / (whole + 1e-2 * (min(len(truth), 128) * truth.shape[2]) ** 0.5)).max().item()


def both_ways(route: Route, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    """Output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = route(*leaves)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def dense_row(lengths: list[int], *, local: bool, device: torch.device) -> Route:
    """One call over all tokens, with a mask of T x T."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    # the same document, and in local layers near enough
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
    # places of tokens in the padded batch, for the way there and back
    at = real.flatten().nonzero()[:, 0].to(device)
    sees = None if real.all() else real[:, None, None, :].expand(-1, 1, longest, -1)
    if local:
        near = (place[:, None] - place).abs() <= RADIUS
        sees = near if sees is None else sees & near
    sees = None if sees is None else sees.to(device)

    def route(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            x.new_zeros(len(lengths) * longest, *x.shape[1:])
            .index_copy(0, at, x)
            .view(len(lengths), longest, *x.shape[1:])
            .transpose(1, 2)
            for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, at)

    return route


def jagged(lengths: list[int], ends: Tensor) -> Route:
    """Nested tensors; they know no windows."""
    # lengths are told, or each call would ask the device
    make = functools.partial(
        torch.nested.nested_tensor_from_jagged,
        offsets=ends,
        min_seqlen=min(lengths),
        max_seqlen=max(lengths),
    )

    def route(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (make(x).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    return route
