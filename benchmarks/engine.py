"""What DeepSpeed costs: a whole step of the engine at each ZeRO stage, on one rank, beside the same step without it.

    python launch/bench.py engine [--shape tiny] [--stages 0,1,2,3] [--micro-batches 1,4]

The plain side is the model, autograd's own accumulation and our StableAdamW on the same micro-batches; what a stage takes longer is
hooks, copies into buckets and flat tensors, norms and bookkeeping (with several ranks also communication, which is not here). First
two steps of each stage must leave the plain side's weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Literal, cast

import torch

from benchmarks.options import several, several_of
from benchmarks.report import Report
from benchmarks.step import forward_context, usual_precision
from benchmarks.timing import in_turn, paired_ratio, ratio_text
from benchmarks.workload import SHAPES, config_of, make_batch
from encoder.base.batch import TokenBatch
from encoder.base.command import count
from encoder.base.dist import World, join, leave
from encoder.base.errors import UserError
from encoder.engine.precision import Precision
from encoder.models.modernbert import ModernBertForMaskedLM
from encoder.objectives.mlm import MaskedLanguageModel, MlmConfig, mlm_loss
from encoder.optim.groups import decay_groups
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig

QUICK = dict(shape="tiny", row_tokens=256, length=128, micro_batches=[2])
RULE = StableAdamWConfig(weight_decay=1e-5)
LR, MAX_LR = 1e-4, 1e-3
SAME_WEIGHTS = {"fp32": 1e-5, "autocast": 1e-3}  # after two steps, relative L2


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--length", type=count, default=1024, help="longest document, in tokens")
    parser.add_argument("--row-tokens", type=count, default=1024)
    parser.add_argument(
        "--stages", type=several_of("0", "1", "2", "3"), default=["0", "1", "2", "3"]
    )
    parser.add_argument(
        "--micro-batches",
        type=several(count),
        default=[1, 4],
        help="of a step; several: a table each",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "autocast"),
        default=None,
        help="default: autocast where the device has units for bf16, else fp32",
    )


def ask(args: argparse.Namespace, report: Report) -> None:
    """A table for each number of micro-batches."""
    device = torch.device(args.device)
    started = join(World(), device=device)
    try:
        _tables(args, report, device)
    finally:
        if started:
            leave()


def _tables(args: argparse.Namespace, report: Report, device: torch.device) -> None:
    precision: Precision = args.precision or usual_precision(device)
    for number in args.micro_batches:
        config = config_of(args.shape, dropout=0.0)
        batches = [
            make_batch(
                vocab_size=config.vocab_size,
                longest=args.length,
                row_tokens=args.row_tokens,
                rows=1,
                number=i,
            ).to(device)
            for i in range(number)
        ]
        plain = Plain(args.shape, batches, precision=precision, device=device)
        sides: dict[str, Callable[[], None]] = {"without DeepSpeed": plain.step}
        off = {}
        # each stage is checked against the plain side before anything is timed
        for stage in map(int, args.stages):
            name = f"ZeRO stage {stage}"
            sides[name], off[name] = engine_side(
                args.shape, batches, stage=stage, precision=precision, device=device
            )
        timed = in_turn(sides, rounds=args.rounds, device=device)
        first = timed["without DeepSpeed"]
        report.add(
            f"A step of {number} micro-batches of {args.row_tokens:,} tokens: {args.shape}, one"
            f" rank, {precision}",
            head=["", "ms", "spread", "times the first's", "CPU ms", "above the first's"],
            rows=[
                [
                    name,
                    f"{1e3 * took.median:.1f}",
                    f"{took.spread:.0%}",
                    ratio_text(paired_ratio(first, took)),
                    f"{1e3 * statistics.median(took.cpu_seconds):.1f}",
                    (
                        f"{1e3 * statistics.median(a - b for a, b in zip(took.cpu_seconds, first.cpu_seconds)):.1f}"
                    ),
                ]
                for name, took in timed.items()
            ],
            notes=[
                f"checked: after two steps the weights of stage {name[-1]} are {how_far:.0e} off"
                for name, how_far in off.items()
            ],
            figures={
                name: {"seconds": [*took.seconds], "cpu_seconds": [*took.cpu_seconds]}
                for name, took in timed.items()
            },
        )


class Plain:
    """The step as a loop."""

    def __init__(
        self, shape: str, batches: list[TokenBatch], *, precision: str, device: torch.device
    ) -> None:
        self.model = ModernBertForMaskedLM(config_of(shape, dropout=0.0), seed=1).to(device)
        self.optimizer = StableAdamW(
            decay_groups(self.model, weight_decay=RULE.weight_decay), RULE, lr=LR, max_lr=MAX_LR
        )
        self.batches, self.context = batches, forward_context(precision, device)
        # one denominator for the whole step, so that the update is that of one batch
        self.masked = sum(b.counts["mlm"] for b in batches)

    def step(self) -> None:
        """One update."""
        for batch in self.batches:
            with self.context():
                loss = mlm_loss(self.model, batch)
            (loss.total / self.masked).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def engine_side(
    shape: str, batches: list[TokenBatch], *, stage: int, precision: Precision, device: torch.device
) -> tuple[Callable[[], None], float]:
    """A stage's step, and how far off the plain side's its weights are after two. Raises UserError."""
    from encoder.engine.engine import EngineConfig, start_engine

    # stage 3 takes a model without weights; the engine draws them
    with torch.device("meta" if stage == 3 else "cpu"):
        model = ModernBertForMaskedLM(config_of(shape, dropout=0.0), seed=1)
    engine = start_engine(
        model,
        objective=_objective(model.config.vocab_size),
        optimizer=RULE,
        world=World(),
        device=device,
        config=EngineConfig(zero_stage=cast(Literal[0, 1, 2, 3], stage), precision=precision),
    )
    masked = sum(b.counts["mlm"] for b in batches)

    def step() -> None:
        engine.step(batches, counts={"mlm": masked}, lr=LR, max_lr=MAX_LR)

    plain = Plain(shape, batches, precision=precision, device=device)
    for _ in range(2):
        step()
        plain.step()
    # relative L2 over all weights: |ours - plain| / |plain|
    wanted, far, whole = dict(plain.model.named_parameters()), 0.0, 0.0
    for piece in engine.pieces():
        other = (
            wanted[piece.name]
            .detach()
            .reshape(-1)[piece.start : piece.start + piece.master.numel()]
        )
        far += float((piece.master - other).double().square().sum())
        whole += float(other.double().square().sum())
    off = (far / whole) ** 0.5
    if not off <= (bound := SAME_WEIGHTS[precision]):
        raise UserError(
            f"two steps at ZeRO stage {stage} leave weights {off:.1e} off those without DeepSpeed;"
            f" needed: at most {bound:g}. Nothing was timed."
        )
    return step, off


def _objective(vocab_size: int) -> MaskedLanguageModel:
    """Masked language modelling; only its loss is asked for."""
    return MaskedLanguageModel(
        MlmConfig(), vocab_size=vocab_size, mask_id=0, pad_id=0, special_ids=(0,)
    )
