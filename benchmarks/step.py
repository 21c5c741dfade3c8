"""Training steps of one model on real document lengths, every way of ours in turn, beside transformers' ModernBERT.

    python launch/bench.py step --shape small --against hf
    python launch/bench.py step --device cuda --shape base --row-tokens 16384 --rows 2,4,6 --compile off,blocks --against hf

A step is forward and backward of one micro-batch of packed documents and one update of StableAdamW; transformers' is the same
documents (benchmarks/peers.py) and torch's AdamW. Tokens are counted without padding. All start from the same weights; the loss of
each on the same documents and masks, and the gradients of all weights, must be those of the plainest code in fp32 before anything
is timed: at the start every wrong model has a loss near log(vocabulary), too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.options import several, several_of
from benchmarks.peers import KINDS, Theirs
from benchmarks.report import Report
from benchmarks.timing import Timed, cpu_ratio, in_turn, paired_ratio, ratio_text
from benchmarks.workload import SHAPES, config_of, first_model, make_batch
from encoder.base.batch import LossTerm, TokenBatch
from encoder.base.command import count
from encoder.base.errors import ConfigError, UserError
from encoder.engine.graphed import GraphedForward
from encoder.engine.precision import Precision, computes_bf16
from encoder.models.modernbert import ModernBertConfig
from encoder.nn.attend import BACKENDS, AttentionRequest
from encoder.objectives.mlm import MLM, mlm_loss
from encoder.optim.groups import decay_groups
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from encoder.train.meters import bf16_peak, document_lengths

# of the loss, beside the judge's in fp32
SAME_LOSS = {"fp32": 1e-5, "autocast": 2e-3, "fp8": 2e-3}
# of each tensor's gradient: the length of the difference over the judge's. Seen at `small` and `base`: 1e-6 in fp32, 8e-3 under
# autocast, 1e-1 with layers in 8 bits (E5M2 has 2 bits of mantissa)
SAME_GRADIENT = {"fp32": 1e-4, "autocast": 0.03, "fp8": 0.2}
# transformers' under autocast: torch's LayerNorm on a CPU adds up its weight's gradient in bf16 (encoder/nn/norm.py), which at the
# head, the one norm with bf16 input, is 2e-2 to 4e-2 off at `small` and grows with the root of the tokens of a batch
PEER_GRADIENT = {"fp32": 1e-4, "autocast": 0.15}
QUICK = dict(shape="tiny", length=128, row_tokens=256, rows=[1], batches=1, hf_batch=4)


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--length", type=count, default=1024, help="longest document, in tokens")
    parser.add_argument("--row-tokens", type=count, default=4096)
    parser.add_argument(
        "--rows",
        type=several(count),
        default=[4],
        help="rows of a micro-batch; several: a line each",
    )
    parser.add_argument(
        "--precision",
        type=several_of("fp32", "autocast", "fp8"),
        default=None,
        help=(
            "fp32, autocast (bf16), fp8: autocast with layers in 8 bits (default: autocast where"
            " the device has units for bf16, else fp32)"
        ),
    )
    parser.add_argument(
        "--attention",
        type=several(str),
        default=["auto"],
        help="flash, flash2 to flash4, varlen, flex, tiles, sdpa; all: every backend that can run",
    )
    parser.add_argument(
        "--compile",
        type=several_of("off", "blocks"),
        default=None,
        help="off, blocks: the layers by torch.compile (default: off on a CPU, blocks on CUDA)",
    )
    parser.add_argument(
        "--graphs",
        type=several_of("off", "micro_step"),
        default=["off"],
        help="micro_step: forward and backward as one CUDA graph",
    )
    parser.add_argument(
        "--kinds",
        type=several_of(*KINDS),
        default=[*KINDS],
        help=f"of transformers' batches: {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--hf-attention", default="sdpa", help="best: flash_attention_2 where it is installed"
    )
    parser.add_argument(
        "--hf-compile",
        choices=("on", "off"),
        default="off",
        help=(
            "on: transformers compiled as well, its own way in version 4, layer by layer in"
            " version 5"
        ),
    )
    parser.add_argument("--hf-batch", type=count, default=8, help="documents of a padded batch")
    parser.add_argument("--batches", type=count, default=4, help="micro-batches of a round")
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="after attention; transformers has none"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also where our first line's step goes: the twenty largest",
    )


def ask(args: argparse.Namespace, report: Report) -> None:
    """A table for each precision."""
    device = torch.device(args.device)
    config = config_of(args.shape, dropout=args.dropout)
    if args.row_tokens < args.length:
        raise ConfigError(
            f"--row-tokens {args.row_tokens} is below --length {args.length}: a row must hold the"
            " longest document."
        )
    if "micro_step" in args.graphs and device.type != "cuda":
        raise ConfigError(
            "--graphs micro_step is for --device cuda: it is CUDA's graphs that save launches."
            " Leave it out."
        )
    if args.hf_compile == "on" and device.type != "cuda":
        raise ConfigError(
            "--hf-compile on is for --device cuda: on a CPU transformers switches it off. Leave it"
            " out."
        )
    if "micro_step" in args.graphs and args.batches < 2:
        raise ConfigError(
            f"--graphs micro_step with --batches {args.batches}: a graph that always repeats its"
            " first micro-batch would not be found out. Use 2 or more."
        )
    if not 0.0 <= args.dropout < 1.0:
        raise ConfigError(f"--dropout {args.dropout:g} must lie in [0, 1).")
    compiling = args.compile or ["blocks" if device.type == "cuda" else "off"]
    # by tokens of a micro-batch: no precision, backend, compiler or graph has a say in them
    truths: dict[int, Truth] = {}
    for precision in args.precision or [usual_precision(device)]:
        autocast = forward_context(precision, device)
        sides: dict[str, Ours | Theirs] = {}
        too_large: list[str] = []
        off: dict[str, str] = {}

        # every way of ours; one that the device has no room for is reported, and left out
        attentions = backends_of(args.attention, device, config, precision)
        for rows, attention, compiled, graphs in itertools.product(
            args.rows, attentions, compiling, args.graphs
        ):
            batches = [
                make_batch(
                    vocab_size=config.vocab_size,
                    longest=args.length,
                    row_tokens=args.row_tokens,
                    rows=rows,
                    number=i,
                )
                for i in range(args.batches)
            ]
            what = f"ours, {rows * args.row_tokens:,} tokens, {attention}"
            make = functools.partial(
                Ours,
                config,
                batches,
                attention=attention,
                compiled=compiled,
                graphs=graphs,
                device=device,
                autocast=autocast,
                fp8=precision == "fp8",
            )
            judge = functools.partial(judged, config, batches, device=device, known=truths)
            if (made := checked(make, judge, precision=precision, bounds=SAME_GRADIENT)) is None:
                too_large.append(what)
            else:
                name = f"ours, {rows * args.row_tokens:,} tokens, {made[0].how}"
                sides[name], off[name] = made
        if not sides:
            raise UserError(
                f"{', '.join(too_large)}: out of memory. Needed: fewer --rows or a smaller --shape."
                " Nothing was timed."
            )
        first = next(iter(sides))

        # transformers has no layers in 8 bits
        if args.against == "hf" and precision != "fp8":
            ours = sides[first]
            assert isinstance(ours, Ours)
            batches = ours.all_batches
            attention, kinds = hf_attention(args.hf_attention), args.kinds
            # it leaves padding out by itself, and takes no mask of documents
            if attention.startswith("flash"):
                kinds = [k for k in kinds if k != "packed"]
            for kind in kinds:
                theirs = functools.partial(
                    Theirs,
                    kind,
                    config,
                    batches,
                    attention=attention,
                    batch_documents=args.hf_batch,
                    device=device,
                    autocast=autocast,
                    compiled=args.hf_compile == "on",
                )
                judge = functools.partial(judged, config, batches, device=device, known=truths)
                peer = checked(theirs, judge, precision=precision, bounds=PEER_GRADIENT)
                if peer is None:
                    too_large.append(f"transformers {kind}")
                else:
                    name = f"{peer[0].name}, {peer[0].how}"
                    sides[name], off[name] = peer

        # sides in turn, since what else the machine does then hits all of them
        timed = in_turn(
            {name: side_round(side) for name, side in sides.items()},
            rounds=args.rounds,
            device=device,
        )
        _tell(
            report,
            args,
            config,
            sides,
            timed,
            precision=precision,
            device=device,
            off=off,
            too_large=too_large,
        )
        if args.profile:
            profiled = sides[first]
            assert isinstance(profiled, Ours)
            tell_profile(
                report,
                profiled,
                device=device,
                title=f"{args.shape}, {args.length:,}, {precision}: {first}",
            )


def checked(
    make: Callable[[], Ours | Theirs],
    judge: Callable[[], Truth],
    *,
    precision: str,
    bounds: dict[str, float],
) -> tuple[Ours | Theirs, str] | None:
    """A side and how far it is off, or None where the device has no room for it: nothing half-made stays beside the others.

    Raises UserError.
    """
    try:
        side = make()
        said = check_same(side, judge(), what=side.name, precision=precision, bounds=bounds)
        side.step(0)
        return side, said
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # here: in the except the error still holds the side
    return None


class Ours:
    """Packed documents, predicted positions only."""

    def __init__(
        self,
        config: ModernBertConfig,
        batches: list[TokenBatch],
        *,
        attention: str,
        compiled: str,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager],
        graphs: str = "off",
        fp8: bool = False,
    ) -> None:
        self.model = first_model(config, attention=attention).to(device)
        if fp8:
            self.model.fp8_blocks_()
        if compiled == "blocks":
            self.model.compile_blocks_()
        self.terms_of = self._terms_of
        if graphs == "micro_step":
            self.terms_of = GraphedForward(self.model, self._terms_of)
        self.optimizer = StableAdamW(
            decay_groups(self.model, weight_decay=1e-5), StableAdamWConfig(), lr=1e-4, max_lr=1e-3
        )
        self.all_batches, self.batches = batches, [b.to(device) for b in batches]
        self.tokens, self.autocast = [b.tokens for b in batches], autocast
        with autocast():
            self.how = self.model.attention_reason(device).split(":")[0] + (
                ", compiled layers" if compiled == "blocks" else ""
            )
            self.how += ", one graph" if graphs == "micro_step" else ""
        self.name = self.how

    def _terms_of(self, batch: TokenBatch) -> dict[str, LossTerm]:
        return {MLM: mlm_loss(self.model, batch)}

    def loss(self, number: int) -> torch.Tensor:
        """Mean over the predicted positions."""
        batch = self.batches[number]
        with self.autocast():
            return self.terms_of(batch)[MLM].total / batch.counts[MLM]

    def step(self, number: int) -> None:
        """One update."""
        self.loss(number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def held_bytes(side: Ours | Theirs) -> int:
    """What a side keeps on a CUDA device from round to round: weights, optimizer state, a graph's pool."""
    kept = [
        *side.model.parameters(),
        *side.model.buffers(),
        *(
            x
            for state in side.optimizer.state.values()
            for x in state.values()
            if isinstance(x, torch.Tensor)
        ),
    ]
    # once for each storage, which tied weights and views share
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept if x.is_cuda}
    return sum(own.values()) + getattr(getattr(side, "terms_of", None), "pool_bytes", 0)


def side_round(side: Ours | Theirs) -> Callable[[], None]:
    """A step for each micro-batch."""

    def do() -> None:
        for number in range(len(side.tokens)):
            side.step(number)

    return do


def usual_precision(device: torch.device) -> Precision:
    """autocast where the device has units for bf16."""
    return "autocast" if computes_bf16(device) else "fp32"


def forward_context(
    precision: str, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager]:
    """What a forward runs in."""
    return lambda: (
        torch.autocast(device.type, dtype=torch.bfloat16)
        if precision != "fp32"
        else contextlib.nullcontext()
    )


def backends_of(
    words: list[str], device: torch.device, config: ModernBertConfig, precision: str
) -> list[str]:
    """`all` becomes the backends that can run here, but for the judge and, on CUDA, the CPU's route: of each of its thirty shapes
    a micro-batch cuDNN would make a plan."""
    if words != ["all"]:
        return words
    left_out = ("sdpa", "tiles") if device.type == "cuda" else ("sdpa",)
    situation = AttentionRequest(
        device=device,
        head_width=config.head_width,
        training=True,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
    )
    return [
        name
        for name, backend in BACKENDS.items()
        if name not in left_out and backend.why_not(situation) is None
    ] or ["sdpa"]


def hf_attention(word: str) -> str:
    """transformers' own word."""
    if word != "best":
        return word
    if importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "sdpa"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a micro-batch gives."""

    loss: float
    gradients: dict[str, torch.Tensor]  # fp64, on the host


def judged(
    config: ModernBertConfig,
    batches: list[TokenBatch],
    *,
    device: torch.device,
    known: dict[int, Truth],
) -> Truth:
    """The last micro-batch with the plainest code there is, in fp32: an attention call a document, nothing compiled; the layers
    are computed again on the way back, for their memory. Asked once for each size of micro-batch.
    """
    size = len(batches[-1].ids_T)
    if size in known:
        return known[size]
    side = Ours(
        config,
        batches[-1:],
        attention="sdpa",
        compiled="off",
        device=device,
        autocast=contextlib.nullcontext,
    )
    side.model.recompute_blocks_()
    known[size] = taken(side)
    return known[size]


def taken(side: Ours | Theirs) -> Truth:
    """Of the last micro-batch, after another one if there is one: a graph that does not look at its batch gives the first's.
    Leaves no gradient behind."""
    if len(side.tokens) > 1:
        side.loss(0).backward()
        side.optimizer.zero_grad(set_to_none=True)
    loss = side.loss(-1)
    loss.backward()
    gradients = {
        name: p.grad.double().cpu()
        for name, p in side.model.named_parameters()
        if p.grad is not None
    }
    side.optimizer.zero_grad(set_to_none=True)
    return Truth(loss=loss.item(), gradients=gradients)


def check_same(
    side: Ours | Theirs, truth: Truth, *, what: str, precision: str, bounds: dict[str, float]
) -> str:
    """The same weights, documents and masks give the same loss and gradients, or nothing is timed: how far they are off.

    Raises UserError.
    """
    found = taken(side)
    # `not <=`, so that a loss that is NaN is refused, too
    if not abs(found.loss - truth.loss) <= (bound := SAME_LOSS[precision]) * abs(truth.loss):
        raise UserError(
            f"the loss is {found.loss:.6f} with {what} and {truth.loss:.6f} in fp32 with attention"
            f" sdpa; needed: equal within {bound:g}. Nothing was timed."
        )
    # the largest over all tensors; NaN counts as infinite
    off, name = max(
        (
            (found.gradients[name] - wanted)
            .norm()
            .div(wanted.norm())
            .nan_to_num(nan=torch.inf)
            .item(),
            name,
        )
        for name, wanted in truth.gradients.items()
    )
    if not off <= (bound := bounds[precision]):
        raise UserError(
            f"the gradient of {name} is {off:.1e} off with {what}, beside fp32 with attention sdpa;"
            f" needed: at most {bound:g}. Nothing was timed."
        )
    return f"loss {abs(found.loss / truth.loss - 1):.0e}, gradients {off:.0e} at most ({name})"


def _tell(
    report: Report,
    args: argparse.Namespace,
    config: ModernBertConfig,
    sides: dict[str, Ours | Theirs],
    timed: dict[str, Timed],
    *,
    precision: str,
    device: torch.device,
    off: dict[str, str],
    too_large: list[str],
) -> None:
    peak, on_gpu = bf16_peak(device), device.type == "cuda"
    rows, figures = [], {}
    batches: Sequence[TokenBatch] = ()
    for name, side in sides.items():  # ours is first
        memory = timed[name].peak_bytes + held_bytes(side)
        if isinstance(side, Ours):
            batches = side.all_batches
        # what the model needs for a token of these documents, whoever computes it
        flops = statistics.mean(
            config.train_flops(lengths=document_lengths(b), targets=b.counts) / b.tokens
            for b in batches
        )
        per_second, took = sum(side.tokens) / timed[name].median, timed[name]
        tflops = per_second * flops / 1e12
        figures[name] = {
            "tokens_per_second": per_second,
            "spread": took.spread,
            "seconds": [*took.seconds],
            "tokens": sum(side.tokens),
            "cpu_seconds": [*took.cpu_seconds],
            "tflops_per_second": tflops,
            "mfu": tflops * 1e12 / peak if peak else None,
            "peak_bytes": memory,
        }
        rows.append(
            [name, f"{per_second:,.0f}", f"{took.spread:.0%}", f"{tflops:.3g}"]
            + (
                [f"{tflops * 1e12 / peak:.1%}" if peak else "?", f"{memory / 2**30:.1f}"]
                if on_gpu
                else []
            )
        )
    first, *_ = sides
    peers = [n for n in sides if isinstance(sides[n], Theirs)]
    ratios = {n: paired_ratio(timed[first], timed[n]) for n in peers}
    count = config.parameter_counts().total
    report.add(
        f"Training steps: {args.shape} ({count / 1e6:.1f} M), documents up to {args.length:,},"
        f" {precision}",
        head=["", "tokens/s", "spread", "TFLOP/s", *(["of bf16 peak", "GiB"] if on_gpu else [])],
        rows=rows,
        notes=[
            f"our first line is {ratio_text(r)} times as fast as {n}"
            + ("" if on_gpu else f"; {cpu_ratio(timed[first], timed[n]):.2f} by CPU time")
            for n, r in ratios.items()
        ]
        + [
            f"checked: from the same weights, off the plainest code in fp32: {n}: {said}"
            for n, said in off.items()
        ]
        + [f"{args.rounds} rounds of {args.batches} micro-batches in turn, median"]
        + [f"{what}: out of memory" for what in too_large],
        figures={
            "sides": figures,
            "ratios": ratios,
            "asked": {k: v for k, v in vars(args).items() if k != "json"},
        },
    )


def tell_profile(report: Report, side: Ours, *, device: torch.device, title: str) -> None:
    """The twenty operations or kernels that take longest, and their share of all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        side.step(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def own(event: Any) -> float:
        return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total

    # on CUDA the kernels alone: operators, and ranges that somebody named (torch an optimizer's step), have their time, too
    events = [
        e
        for e in profile.key_averages()
        if device.type != "cuda"
        or e.device_type != torch.autograd.DeviceType.CPU
        and not e.is_user_annotation
    ]
    whole = sum(map(own, events)) or 1.0
    largest = sorted(events, key=own, reverse=True)[:20]
    report.add(
        f"Where a step goes: {title}",
        head=["", "ms", "share", "calls"],
        rows=[
            [e.key[:90], f"{own(e) / 1e3:.2f}", f"{own(e) / whole:.1%}", str(e.count)]
            for e in largest
        ],
        figures=[
            {"name": e.key, "ms": own(e) / 1e3, "share": own(e) / whole, "calls": e.count}
            for e in largest
        ],
    )
