"""A run worked out without starting it: phases, steps, curves, micro-batches and memory, as text."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from encoder.base.dist import World
from encoder.base.errors import ModelError, ShardError
from encoder.base.hub import parse_hub_name
from encoder.base.units import short_bytes, short_count
from encoder.data.shard_format import INDEX, read_card, read_lengths
from encoder.data.shards import read_samples_per_shard
from encoder.data.windows import cut
from encoder.engine.precision import precision_on
from encoder.engine.zero.config import BUCKET_ELEMENTS
from encoder.models.catalog import build_model
from encoder.models.hf.catalog import export_blocker
from encoder.nn.loss import PIECE_POSITIONS
from encoder.optim.catalog import state_elements
from encoder.runs.branch import find_parent
from encoder.runs.checks import check_settings, hints_of
from encoder.runs.config import PhaseConfig, RunConfig, SourceConfig, with_engine
from encoder.runs.defaults import slow_precision_text, warnings_of
from encoder.runs.epochs import count_repeats, many_epochs_text, repeats_text
from encoder.runs.filling import FILL, fill_rows
from encoder.runs.initial import check_same_shape, read_fitting
from encoder.runs.phases import PlannedSteps, planned_steps
from encoder.runs.weights import model_facts
from encoder.tools.plan.activations import count_kept
from encoder.tools.plan.forecast import Machine, Probe, forecast, forecast_lines
from encoder.train.build import compiles

LOOKED_AT = 100_000  # documents of a source whose lengths tell the work: the mean is good to a few in a thousand
CUDA_SHARE = 0.92  # the rest is CUDA's context, NCCL's buffers and gaps between tensors: assumed
# of what plain layers keep, by engine.fp8; found: large 0.87, base 0.92 to 0.97, 17m 1.00 to 1.04, base in FP8 0.78 (docs/log.md)
COMPILED_SHARE = {"off": 0.94, "layers": 0.78}
QUICKLY_READ_BYTES = 2**22  # of an index
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    bucket: int  # of gradients on their way to their owner
    offloaded: int  # in the machine's memory

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.bucket


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run asks of its machines."""

    parameters: int
    decayed: int  # of them, with weight decay
    memory: Memory  # of one rank
    checkpoint_bytes: int  # of one: masters and what the optimizer keeps, in fp32


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """Model FLOP of a phase, forward and backward, and the shard folders whose lengths were not at hand."""

    flops: float
    unknown: tuple[str, ...]


def plan_text(
    run: RunConfig,
    *,
    ranks: int,
    steps: PlannedSteps | None = None,
    machine: Machine | None = None,
    probe: Probe | None = None,
    interconnect: float | None = None,
) -> str:
    """The plan for people; `steps` where they were worked out already. With a machine or a probe also how fast it will be;
    interconnect: bytes a second of a rank to the others.

    Raises UserError where the run cannot be; what is not there yet is only said.
    """
    asked, run = run.engine.precision, on_machine(run, machine)
    needs = count_needs(run, ranks=ranks)
    count, decayed, memory = needs.parameters, needs.decayed, needs.memory
    begun_mistakes, fillings = check_settings(run), [fill_rows(run, phase) for phase in run.phases]
    steps = steps or planned_steps(run, fills=[f.fill if f else FILL for f in fillings])
    lines = [
        f"{run.name}   seed {run.seed}   run folder {run.out}",
        "",
        (
            f"model       {count:,} parameters ({count - decayed:,} without weight decay),"
            f" {run.model.num_hidden_layers} layers, hidden {run.model.hidden_size}, vocabulary"
            f" {run.model.vocab_size:,}"
        ),
        (
            f"engine      ZeRO-{run.engine.zero_stage}, {_precision_text(run, asked, machine)},"
            f" {ranks} rank{'s' * (ranks > 1)}, micro-batches of {run.loader.micro_batch_rows}"
            f" row{'s' * (run.loader.micro_batch_rows > 1)} ="
            f" {run.loader.micro_batch_rows * run.data.row_tokens:,} tokens"
        ),
        f"optimizer   {run.optimizer.text}, decay {_decay_text(run)}",
        f"weights     {_weights_text(run)}",
        *([f"export      {stays}"] if (stays := export_blocker(run.model)) else []),
        *(f"{'data' if i == 0 else '':<12}{line}" for i, line in enumerate(_data_lines(run))),
        *_epochs_lines(run),
        *(f"{'default' if i == 0 else '':<12}{d.text}" for i, d in enumerate(run.derived)),
        *(
            f"{'warning' if i == 0 else '':<12}{line}"
            for i, line in enumerate(
                [
                    *begun_mistakes,
                    *_warnings(run, machine),
                    *hints_of(run, ranks=ranks, fillings=fillings),
                ]
            )
        ),
        "",
        (
            f"{'phase':<12}{'tokens':>9}{'length':>8}{_phase_columns(run)}{'steps':>10} "
            f" {'batch tokens':<18}{'micro-batches':<15} learning rate"
        ),
    ]
    for index, phase in enumerate(run.phases):
        lines.append(_phase_row(run, phase, steps, index, ranks))
    works = [phase_work(run, phase) for phase in run.phases]
    shown = [steps[i] for i in _spread(len(steps))]
    highest = max(steps.peak_lr(index) for index in range(len(run.phases)))
    largest = max(s.tokens for s in steps.stretches)
    lines += [
        (
            f"{'all':<12}{short_count(sum(p.tokens for p in run.phases)):>9}{'':>8}{'':>9}{len(steps):>10,}"
        ),
        "",
        f"learning rate  {_spark([s.lr for s in shown], top=highest)}  0 to {highest:.2e}",
        (
            f"batch          {_spark([float(s.tokens) for s in shown], top=largest)}  up to"
            f" {short_count(largest)} tokens in rows that are {_fills_text(run, steps)} full"
        ),
        "",
        (
            f"memory a rank  about {short_bytes(memory.total)}: weights"
            f" {short_bytes(memory.weights)}, "
            f"gradients {short_bytes(memory.gradients)}, optimizer"
            f" {short_bytes(memory.optimizer)}, "
            f"activations {short_bytes(memory.activations)}"
            f"{f', a bucket of gradients {short_bytes(memory.bucket)}' if memory.bucket else ''}"
            f"{f'; in the machine {short_bytes(memory.offloaded)}' if memory.offloaded else ''}{_libraries_text(run, probe)}"
        ),
        *_fits_lines(run, memory, machine, probe, alone=count_needs(run, ranks=1).memory),
        (
            f"work           about {sum(w.flops for w in works):.3g} model FLOP"
            f" ({_lengths_text(run, works)})"
        ),
        (
            f"checkpoints    {short_bytes(needs.checkpoint_bytes)} each, every"
            f" {short_count(run.checkpoints.every_tokens)} tokens, {run.checkpoints.keep_last} kept"
            " and one for each end of a phase"
        ),
    ]
    if machine or probe:
        found = forecast(
            run,
            stretches=steps.stretches,
            flops_per_token=[w.flops / p.tokens for w, p in zip(works, run.phases)],
            parameters=count,
            ranks=ranks,
            machine=machine,
            probe=probe,
            interconnect=interconnect,
        )
        lines += forecast_lines(found, ranks=ranks, machine=machine, probe=probe)
    return "\n".join(lines)


def on_machine(run: RunConfig, machine: Machine | None) -> RunConfig:
    """The run with the precision that `auto` means on a GPU, or here."""
    return with_engine(
        run,
        precision=(
            "autocast"
            if machine and run.engine.precision == "auto"
            else precision_on(run.engine.precision, _device_here(run))
        ),
    )


def _device_here(run: RunConfig) -> torch.device:
    return torch.device("cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu")


def _precision_text(run: RunConfig, asked: str, machine: Machine | None) -> str:
    if asked != "auto":
        return run.engine.precision
    return (
        f"{run.engine.precision} (auto: what"
        f" {machine.name if machine else f'this {_device_here(run).type}'} is best at)"
    )


def _warnings(run: RunConfig, machine: Machine | None) -> list[str]:
    slow = slow_precision_text(run, on_cuda=machine is not None or _device_here(run).type == "cuda")
    return [*warnings_of(run), *([slow] if slow else [])]


def _libraries_text(run: RunConfig, probe: Probe | None) -> str:
    on_cpu = run.device == "cpu" or run.device == "auto" and not torch.cuda.is_available()
    return (
        "; torch and its libraries take about 0.8 GB beside it" if on_cpu and not probe else ""
    )  # 782 to 840 MB seen


def count_needs(run: RunConfig, *, ranks: int) -> Needs:
    """Counted from the model's shapes: no weight is made."""
    run = on_machine(run, None)
    with torch.device("meta"):
        model = build_model(run.model, attention="sdpa", seed=run.seed)
    count = sum(p.numel() for p in model.parameters())
    kept = state_elements(model, run.optimizer)
    return Needs(
        parameters=count,
        decayed=sum(p.numel() for p in model.parameters() if p.ndim > 1),
        memory=estimate_memory(
            run,
            parameters=count,
            largest=max(p.numel() for p in model.parameters()),
            optimizer_elements=kept,
            ranks=ranks,
        ),
        checkpoint_bytes=4 * (count + kept),
    )


def _fits_lines(
    run: RunConfig, memory: Memory, machine: Machine | None, probe: Probe | None, *, alone: Memory
) -> list[str]:
    """What a GPU has; or what the process will hold, by the probe of one rank, less what more ranks share."""
    if probe:
        held = probe.peak_bytes - alone.total - alone.offloaded + memory.total + memory.offloaded
        return [
            f"process        about {short_bytes(held)} resident: as probed on one rank"
            f" {short_bytes(probe.peak_bytes)}, of which {short_bytes(probe.base_bytes)} libraries"
        ]
    if machine is None:
        return []
    room = (
        f"{short_bytes(machine.memory_bytes)} of one {machine.name}, of which about"
        f" {CUDA_SHARE:.0%} can be used"
    )
    fits = memory.total <= CUDA_SHARE * machine.memory_bytes
    return [
        f"               {'fits' if fits else 'does NOT fit'} {room}"
        + (
            ""
            if fits
            else "; fewer loader.micro_batch_rows, or engine.activation_checkpointing: blocks"
        )
    ]


def phase_work(run: RunConfig, phase: PhaseConfig) -> PhaseWork:
    """From the lengths of the stored documents, cut as the phase cuts them; where there are none yet, from documents as
    long as they may be, which is the most it can be."""
    share, longest = run.mask_share_of(phase).mean, phase.max_tokens_per_document
    sources, unknown, flops = run.sources_of(phase), [], 0.0
    for source in sources:
        try:
            stored = read_lengths(source.folder, read_card(source.folder))
            some = np.asarray(stored[:: math.ceil(len(stored) / LOOKED_AT)])
            lengths = cut(0, np.arange(len(some)), some, longest).tokens_P
        except ShardError:
            lengths = np.array([longest])
            unknown.append(source.path)
        tokens = int(lengths.sum())
        one_token = run.model.train_flops(lengths=lengths, targets={"mlm": share * tokens}) / tokens
        flops += one_token * phase.tokens * source.weight / sum(s.weight for s in sources)
    return PhaseWork(flops=flops, unknown=tuple(unknown))


def _fills_text(run: RunConfig, steps: PlannedSteps) -> str:
    # tokens are whole: in the largest steps they tell it best
    largest = {s.phase: s for s in sorted(steps.stretches, key=lambda s: s.rows)}.values()
    fills = [s.tokens / (s.rows * run.data.row_tokens) for s in largest]
    low, high = f"{min(fills):.1%}", f"{max(fills):.1%}"
    return low if low == high else f"{low} to {high}"


def estimate_memory(
    run: RunConfig, *, parameters: int, largest: int, optimizer_elements: int, ranks: int
) -> Memory:
    """Bytes a rank needs for parameters, gradients, optimizer and one micro-batch's activations.

    ZeRO-1 splits the fp32 masters and the optimizer's own numbers over the ranks, ZeRO-2 the gradients, too, ZeRO-3 the weights
    (the largest matrix stands whole while it is used), too. DeepSpeed 0.19.8 copies masters from fp32 weights at stage 3 as well:
    it compares a device with its name. An offloaded optimizer has masters, its own numbers and the gradients in the machine's
    memory, at stage 3 the gradients twice.

    Activations are what autograd keeps of the layers (encoder.tools.plan.activations; where layers are computed again, of one
    layer, and each layer's input), and of the loss one piece of logits, which becomes its gradient, the decoder's weight in
    2 bytes, and its gradient before and after scaling. cuBLAS keeps 64 MiB to work in.
    Compiled layers are not counted: which tensors the compiler computes again is known only after compiling. They keep a measured
    share of what plain layers keep (COMPILED_SHARE). tests/unit/tools/test_plan.py has what torch's allocator counted.

    run: its engine, loader and model decide
    parameters: trained numbers
    largest: of them, those of the largest matrix
    optimizer_elements: numbers that the optimizer keeps beside the weights, over all ranks
    ranks: that share them
    """
    width = {"fp64": 8, "bf16": 2}.get(run.engine.precision, 4)
    master = 8 if run.engine.precision == "fp64" else 4
    m = run.model
    stage = run.engine.zero_stage
    optimizer_share, gradient_share, weight_share = (
        ranks if stage >= cut else 1 for cut in (1, 2, 3)
    )
    offloads = run.engine.offload_optimizer == "cpu"
    optimizer = master * ((stage > 0) * parameters + optimizer_elements) // optimizer_share
    gathered = largest if stage == 3 else 0
    tokens = run.loader.micro_batch_rows * run.data.row_tokens
    kept = 2 if run.engine.precision in ("bf16", "autocast") else width
    kind = "cpu" if run.device == "cpu" else "cuda"
    on_cpu = kind == "cpu"
    fp8 = run.engine.fp8
    counted = count_kept(
        m, precision=run.engine.precision, device=kind, fp8=fp8 == "layers", zero_3=stage == 3
    )
    outside = tokens * counted.outside_per_token
    layer = tokens * counted.layer_per_token
    if run.engine.activation_checkpointing == "blocks":
        layers = tokens * m.num_hidden_layers * m.hidden_size * width + layer + counted.layer_fixed
    else:
        share = COMPILED_SHARE[fp8] if kept == 2 and compiles(run, torch.device(kind)) else 1.0
        layers = m.num_hidden_layers * (share * layer + counted.layer_fixed)
    asked = tokens * max(run.mask_share_of(p).highest for p in run.phases)
    piece = min(asked, PIECE_POSITIONS[kind])
    loss = m.vocab_size * (kept * piece + (10 if kept == 2 else 8) * m.hidden_size)
    workspace = 0 if on_cpu else 64 * 2**20
    return Memory(
        weights=width * (parameters // weight_share + gathered),
        gradients=(4 if run.engine.precision == "bf16" else width) * parameters // gradient_share,
        optimizer=0 if offloads else optimizer,
        activations=int(outside + layers + loss) + workspace,
        bucket=0 if on_cpu or stage == 0 else 4 * BUCKET_ELEMENTS,  # a CPU maps what of it is used
        offloaded=(
            optimizer + master * (2 if stage == 3 else 1) * parameters // optimizer_share
            if offloads
            else 0
        ),
    )


def _phase_columns(run: RunConfig) -> str:
    return "".join(f"  {label}" for label in run.model_of(run.phases[0]).phase_texts)


def _phase_row(
    run: RunConfig, phase: PhaseConfig, steps: PlannedSteps, index: int, ranks: int
) -> str:
    own = steps.indices(index)
    first, last = steps[own[0]], steps[own[-1]]
    capacity = run.data.row_tokens
    batch = f"{short_count(first.rows * capacity)}" + (
        f" -> {short_count(last.rows * capacity)}" if first.rows != last.rows else ""
    )
    micro = [
        math.ceil(math.ceil(s.rows / ranks) / run.loader.micro_batch_rows) for s in (first, last)
    ]
    each = f"{micro[0]}" + (f" -> {micro[1]}" if micro[0] != micro[1] else "") + " a rank"
    if ranks > first.rows:
        each += f" ({ranks - first.rows} idle)"
    peak = steps.peak_lr(index)
    cells = "".join(
        f"{text:>{len(label) + 2}}" for label, text in run.model_of(phase).phase_texts.items()
    )
    middle = f" -> {peak:.2e}" if peak > max(first.lr, last.lr) * 1.0001 else ""
    return (
        f"{phase.name:<12}{short_count(phase.tokens):>9}{phase.max_tokens_per_document:>8,}"
        f"{cells}{len(own):>10,}  {batch:<18}{each:<15} {first.lr:.2e}{middle} -> {last.lr:.2e}"
    )


def _decay_text(run: RunConfig) -> str:
    own = [
        f"{p.name} {run.weight_decay_of(p):g}" + (f" at {p.max_lr:g}" if p.max_lr else "")
        for p in run.phases
        if p.weight_decay is not None or p.max_lr is not None
    ]
    return f"{run.optimizer.decay_text}{'; '.join(['', *own])}"


def _weights_text(run: RunConfig) -> str:
    if run.branch_from is not None and Path(run.branch_from).exists():
        return f"branched off {find_parent(run, World()).text}"
    if run.branch_from is not None:
        return f"branched off {run.branch_from} (not there yet)"
    if run.init_from is None:
        return f"drawn from seed {run.seed}"
    if name := parse_hub_name(run.init_from):
        try:
            there = model_facts(Path(run.init_from))
        except ModelError as error:  # a plan needs no network; the run says so when it starts
            return f"from {name} on the Hugging Face hub: {error}"
        check_same_shape(there, run, key="init_from", path=Path(run.init_from))
        return f"from {name} on the Hugging Face hub"
    if not Path(run.init_from).exists():
        return (
            f"from {run.init_from}, which is not there yet: tessera grow or tessera import makes it"
        )
    return f"from {run.init_from}: {read_fitting(run).origin}"


def _data_lines(run: RunConfig) -> list[str]:
    mixtures: dict[tuple[SourceConfig, ...], list[str]] = {}
    for phase in run.phases:
        mixtures.setdefault(run.sources_of(phase), []).append(phase.name)
    missing: dict[str, str] = {}
    lines = [f"rows of {run.data.row_tokens:,} tokens"]
    for sources, phases in mixtures.items():
        total, parts = sum(s.weight for s in sources), []
        for source in sources:
            try:
                card = read_card(source.folder)
                parts.append(
                    f"{source.name or card.source} {source.weight / total:.1%} of"
                    f" {short_count(card.tokens)} tokens"
                )
            except ShardError:
                parts.append(f"{source.name or source.path} {source.weight / total:.1%}")
                missing[source.path] = "fetched" if source.cache else "prepared"
        lines.append(f"{', '.join(phases)}: {', '.join(parts)}")
    lines += _order_lines(run)
    if missing:
        path, word = next(iter(missing.items()))
        lines.append(
            f"{path}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} not {word} yet"
        )
    return lines


def _order_lines(run: RunConfig) -> list[str]:
    """How local the order of documents is, of the sources that are not shuffled whole."""
    group, local = run.data.shuffle_shards, {}
    for source in (s for phase in run.phases for s in run.sources_of(phase)):
        with contextlib.suppress(ShardError, OSError):
            card, index = read_card(source.folder), source.folder / INDEX
            if index.stat().st_size > QUICKLY_READ_BYTES:  # a shard takes 0.7 KB
                shards = index.stat().st_size // 700
            else:
                shards = len(read_samples_per_shard(source.folder))
            shards //= run.data.lanes
            if shards > group:
                local[source.name or card.source] = (shards, card.documents)
    if not local:
        return []
    name, (shards, documents) = max(local.items(), key=lambda item: item[1][0])
    more = f" (and of {len(local) - 1} more)" if len(local) > 1 else ""
    return [
        f"order: {group} of {shards:,} shards of {name}{more} are read at a time,"
        f" {short_count(documents * group / shards)} of its {short_count(documents)} documents"
        " shuffled together; data.shuffle_shards sets how many"
    ]


def _epochs_lines(run: RunConfig) -> list[str]:
    repeats = count_repeats(run)
    many = many_epochs_text(repeats)
    return ([f"epochs      {repeats_text(repeats)}"] if repeats else []) + (
        [f"            warning: {many}"] if many else []
    )


def _spread(count: int, width: int = 60) -> list[int]:
    """Indices of the steps that a line of bars shows."""
    return [i * count // width for i in range(width)] if count > width else [*range(count)]


def _spark(values: list[float], *, top: float) -> str:
    return "".join(BARS[round(v / (top or 1.0) * (len(BARS) - 1))] for v in values)


def _lengths_text(run: RunConfig, works: list[PhaseWork]) -> str:
    unknown = sorted({path for w in works for path in w.unknown})
    if not unknown:
        return "documents as long as lengths.bin says, cut as the phases cut them"
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    others = {s.path for p in run.phases for s in run.sources_of(p)} != {*unknown}
    return (
        f"documents of {unknown[0]}{more} counted as long as they may be"
        f"{'; the others as long as lengths.bin says' if others else ''}"
    )
