"""A run worked out without starting it: phases, steps, curves, micro-batches and memory, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from encoder.base.dist import World
from encoder.base.errors import ModelError
from encoder.base.hub import parse_hub_name
from encoder.base.units import counted, short_bytes, short_count
from encoder.models.catalog import networks_of
from encoder.models.contract import ModelConfig
from encoder.models.hf.catalog import export_blocker
from encoder.runs.branch import find_parent
from encoder.runs.checks import check_settings, hints_of
from encoder.runs.config import PhaseConfig, RunConfig
from encoder.runs.defaults import slow_precision_text, warnings_of
from encoder.runs.filling import FILL, fill_rows
from encoder.runs.initial import check_same_shape, read_fitting
from encoder.runs.objective_models import plan_texts
from encoder.runs.phases import PlannedSteps, planned_steps
from encoder.runs.weights import model_facts
from encoder.tools.plan.data import data_lines, epochs_lines
from encoder.tools.plan.fit import idle_warnings
from encoder.tools.plan.forecast import Machine, Probe, Steps, forecast, forecast_lines
from encoder.tools.plan.memory import (
    Memory,
    Needs,
    ProbeMemory,
    count_needs,
    device_here,
    on_machine,
)
from encoder.tools.plan.work import PhaseWork, phase_work, works_text
from encoder.train.build import has_static_shapes

# the rest is CUDA's context, NCCL's buffers and gaps between tensors: assumed
CUDA_SHARE = 0.92
BARS = " ▁▂▃▄▅▆▇█"
BARS_A_LINE = 60


def plan_text(
    run: RunConfig,
    *,
    ranks: int,
    steps: PlannedSteps | None = None,
    machine: Machine | None = None,
    probe: Probe | None = None,
    interconnect: float | None = None,
) -> str:
    """The plan for people. With a machine or a probe also how fast it will be.

    run: what is planned
    ranks: that train
    steps: of all phases, where they were worked out already
    machine: a GPU by its published numbers
    probe: what was measured here
    interconnect: bytes a second of a rank to the others

    Raises UserError where the run cannot be; what is not there yet is only said.
    """
    # what `auto` means depends on the machine, the plan's or this one
    asked_precision = run.engine.precision
    run = on_machine(run, machine)
    needs = count_needs(run, ranks=ranks)
    mistakes = check_settings(run)
    fillings = [fill_rows(run, phase) for phase in run.phases]
    if steps is None:
        fills = [filling.fill if filling else FILL for filling in fillings]
        steps = planned_steps(run, fills=fills)

    padded = has_static_shapes(run, _device(run, machine))
    warnings = [
        *mistakes,
        *_warnings(run, machine),
        *hints_of(run, ranks=ranks, fillings=fillings),
        *idle_warnings(run, ranks=ranks, padded=padded),
    ]
    works = [phase_work(run, phase) for phase in run.phases]

    precision = _precision_text(run, asked_precision, machine)
    lines = [
        f"{run.name}   seed {run.seed}   run folder {run.out}",
        "",
        *_settings_lines(run, needs, precision=precision, ranks=ranks),
        *_under("data", data_lines(run)),
        *epochs_lines(run),
        *_under("default", [default.text for default in run.derived]),
        *_under("warning", warnings),
        "",
        *_phase_table(run, steps, ranks=ranks),
        "",
        *_curve_lines(run, steps),
        "",
        *_memory_lines(run, needs.memory, machine=machine, probe=probe),
        _work_line(run, works),
        _checkpoint_line(run, needs),
    ]
    if machine or probe:
        speed = forecast(
            run,
            steps=Steps(
                stretches=steps.stretches,
                flops_per_token=[
                    w.flops / p.tokens for w, p in zip(works, run.phases, strict=True)
                ],
                ranks=ranks,
                padded=padded,
            ),
            parameters=needs.parameters,
            largest=needs.largest,
            machine=machine,
            probe=probe,
            interconnect=interconnect,
        )
        lines += forecast_lines(speed, ranks=ranks, machine=machine, probe=probe)
    return "\n".join(lines)


def _under(title: str, texts: Sequence[str]) -> list[str]:
    """Lines of a column of their own, the title beside the first."""
    titles = [title] + [""] * len(texts)
    return [f"{name:<12}{text}" for name, text in zip(titles, texts, strict=False)]


def _settings_lines(run: RunConfig, needs: Needs, *, precision: str, ranks: int) -> list[str]:
    model = run.model
    rows = run.loader.micro_batch_rows
    lines = [
        f"model       {needs.parameters:,} parameters"
        f" ({needs.parameters - needs.decayed:,} without weight decay),"
        f" {model.num_hidden_layers} layers, hidden {model.hidden_size},"
        f" vocabulary {model.vocab_size:,}",
        *_under("networks", [_network_text(*item) for item in networks_of(model).items()]),
        f"engine      ZeRO-{run.engine.zero_stage}, {precision}, {counted(ranks, 'rank')},"
        f" micro-batches of {counted(rows, 'row')} = {rows * run.data.row_tokens:,} tokens",
        f"optimizer   {run.optimizer.text}, decay {_decay_text(run)}",
        f"weights     {_weights_text(run)}",
        *(f"{name:<12}{text}" for name, text in plan_texts(run).items()),
    ]
    if blocker := export_blocker(model):
        lines.append(f"export      {blocker}")
    return lines


def _network_text(name: str, network: ModelConfig) -> str:
    """`generator 4,620,026 parameters, 12 layers of 64, ...`; an embedding that both have is counted in both."""
    return f"{name} {network.parameter_counts().total:,} parameters, {network.shape_text}"


def _phase_table(run: RunConfig, steps: PlannedSteps, *, ranks: int) -> list[str]:
    labels = run.model_of(run.phases[0]).phase_texts
    columns = "".join(f"  {label}" for label in labels)
    head = (
        f"{'phase':<12}{'tokens':>9}{'length':>8}{columns}{'steps':>10}"
        f"  {'batch tokens':<18}{'micro-batches':<15} learning rate"
    )
    rows = [_phase_row(run, phase, steps, index, ranks) for index, phase in enumerate(run.phases)]
    tokens = sum(phase.tokens for phase in run.phases)
    last = f"{'all':<12}{short_count(tokens):>9}{'':>8}{'':>9}{len(steps):>10,}"
    return [head, *rows, last]


def _phase_row(
    run: RunConfig, phase: PhaseConfig, steps: PlannedSteps, index: int, ranks: int
) -> str:
    """A phase's line: what it begins with -> what it ends with.

    run, phase: whose line
    steps: of all phases
    index: of the phase
    ranks: that share a step's rows
    """
    own = steps.indices(index)
    first = steps[own[0]]
    last = steps[own[-1]]
    capacity = run.data.row_tokens
    batch = _from_to(short_count(first.rows * capacity), short_count(last.rows * capacity))

    micro_batches = [
        # rows of the rank that has most, in micro-batches
        math.ceil(math.ceil(step.rows / ranks) / run.loader.micro_batch_rows)
        for step in (first, last)
    ]
    each = f"{_from_to(*map(str, micro_batches))} a rank"
    if ranks > first.rows:
        each += f" ({ranks - first.rows} idle)"

    peak = steps.peak_lr(index)
    # 1.0001: a peak that an end reaches but for rounding is not shown twice
    above_ends = peak > max(first.lr, last.lr) * 1.0001
    middle = ""
    if above_ends:
        middle = f" -> {peak:.2e}"
    texts = run.model_of(phase).phase_texts
    cells = "".join(f"{text:>{len(label) + 2}}" for label, text in texts.items())
    return (
        f"{phase.name:<12}{short_count(phase.tokens):>9}{phase.max_tokens_per_document:>8,}"
        f"{cells}{len(own):>10,}  {batch:<18}{each:<15} {first.lr:.2e}{middle} -> {last.lr:.2e}"
    )


def _from_to(first: str, last: str) -> str:
    if first == last:
        return first
    return f"{first} -> {last}"


def _curve_lines(run: RunConfig, steps: PlannedSteps) -> list[str]:
    """Learning rate and batch over the run, as bars."""
    shown = [steps[index] for index in _spread(len(steps))]
    highest = max(steps.peak_lr(index) for index in range(len(run.phases)))
    largest = max(stretch.tokens for stretch in steps.stretches)
    rates = _spark([step.lr for step in shown], top=highest)
    batches = _spark([float(step.tokens) for step in shown], top=largest)
    return [
        f"learning rate  {rates}  0 to {highest:.2e}",
        f"batch          {batches}  up to {short_count(largest)} tokens in rows that are"
        f" {_fills_text(run, steps)} full",
    ]


def _memory_lines(
    run: RunConfig, memory: Memory, *, machine: Machine | None, probe: Probe | None
) -> list[str]:
    parts = [
        f"weights {short_bytes(memory.weights)}",
        f"gradients {short_bytes(memory.gradients)}",
        f"optimizer {short_bytes(memory.optimizer)}",
        f"activations {short_bytes(memory.activations)}",
    ]
    parts += [f"{name} {short_bytes(size)}" for name, size in memory.asked.items()]
    if memory.bucket:
        parts.append(f"a bucket of gradients {short_bytes(memory.bucket)}")
    text = f"memory a rank  about {short_bytes(memory.in_step)}: {', '.join(parts)}"
    if memory.offloaded:
        text += f"; in the machine {short_bytes(memory.offloaded)}"
    # a probe measured it; a GPU's memory is not the machine's
    on_cpu = run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available())
    if on_cpu and not probe:
        # 782 to 840 MB seen
        text += "; torch and its libraries take about 0.8 GB beside it"
    lines = [text]
    if memory.probe:
        lines.append(_probe_line(memory, memory.probe))
    return [*lines, *_fits_lines(run, memory, machine, probe)]


def _probe_line(memory: Memory, copy: ProbeMemory) -> str:
    """What a probe that fine-tunes takes at most, and what of it is the copy's."""
    parts = [
        f"weights {short_bytes(copy.weights)}",
        f"gradients {short_bytes(copy.gradients)}",
        f"optimizer {short_bytes(copy.optimizer)}",
        f"activations {short_bytes(copy.activations)}",
    ]
    if copy.bucket:
        parts.append(f"a bucket {short_bytes(copy.bucket)}")
    in_machine = copy.start + copy.offloaded
    return (
        f"in a probe     about {short_bytes(memory.held + copy.total)} while evaluation.probes"
        f" fine-tunes a copy, without the run's activations: {', '.join(parts)};"
        f" {short_bytes(in_machine)} in the machine before its first step"
    )


def _fits_lines(
    run: RunConfig, memory: Memory, machine: Machine | None, probe: Probe | None
) -> list[str]:
    """What a GPU has; or what the process will hold, by the probe of one rank, less what more ranks share."""
    if probe:
        alone = count_needs(run, ranks=1).memory
        # what the process held beyond what is counted: torch, its libraries, the allocator's rest
        # its steps alone were probed, no probe of evaluation
        libraries = probe.peak_bytes - alone.in_step - alone.offloaded
        held = libraries + memory.total + memory.offloaded
        if memory.probe:
            held += memory.probe.offloaded
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
    if memory.total <= CUDA_SHARE * machine.memory_bytes:
        return [f"               fits {room}"]
    return [
        f"               does NOT fit {room}; fewer loader.micro_batch_rows, or"
        " engine.activation_checkpointing: blocks"
    ]


def _work_line(run: RunConfig, works: Sequence[PhaseWork]) -> str:
    flops = sum(work.flops for work in works)
    return f"work           about {flops:.3g} model FLOP ({works_text(run, works)})"


def _checkpoint_line(run: RunConfig, needs: Needs) -> str:
    settings = run.checkpoints
    return (
        f"checkpoints    {short_bytes(needs.checkpoint_bytes)} each, every"
        f" {short_count(settings.every_tokens)} tokens, {settings.keep_last} kept and one for each"
        " end of a phase"
    )


def _precision_text(run: RunConfig, asked: str, machine: Machine | None) -> str:
    if asked != "auto":
        return run.engine.precision
    where = f"this {device_here(run).type}"
    if machine:
        where = machine.name
    return f"{run.engine.precision} (auto: what {where} is best at)"


def _device(run: RunConfig, machine: Machine | None) -> torch.device:
    """What a machine of the plan trains on: its GPU, or what is here."""
    return torch.device("cuda") if machine else device_here(run)


def _warnings(run: RunConfig, machine: Machine | None) -> list[str]:
    slow = slow_precision_text(run, on_cuda=_device(run, machine).type == "cuda")
    return [*warnings_of(run), *([slow] if slow else [])]


def _fills_text(run: RunConfig, steps: PlannedSteps) -> str:
    # tokens are whole: the largest step of a phase tells best how full its rows are
    by_rows = sorted(steps.stretches, key=lambda stretch: stretch.rows)
    largest = {stretch.phase: stretch for stretch in by_rows}
    fills = [s.tokens / (s.rows * run.data.row_tokens) for s in largest.values()]
    low = f"{min(fills):.1%}"
    high = f"{max(fills):.1%}"
    if low == high:
        return low
    return f"{low} to {high}"


def _decay_text(run: RunConfig) -> str:
    # phases that have one of their own come behind
    texts = [run.optimizer.decay_text]
    for phase in run.phases:
        if phase.weight_decay is None and phase.max_lr is None:
            continue
        text = f"{phase.name} {run.weight_decay_of(phase):g}"
        texts.append(f"{text} at {phase.max_lr:g}" if phase.max_lr else text)
    return "; ".join(texts)


def _weights_text(run: RunConfig) -> str:
    if run.branch_from is not None and Path(run.branch_from).exists():
        return f"branched off {find_parent(run, World()).text}"
    if run.branch_from is not None:
        return f"branched off {run.branch_from} (not there yet)"
    if run.init_embeddings:
        return (
            f"drawn from seed {run.seed}; rows of tokens from their neighbours in up"
            f" to {short_count(run.init_embeddings.tokens)} tokens"
            + (", which attention passes on" if run.init_embeddings.mimetic else "")
        )
    if run.init_from is None:
        return f"drawn from seed {run.seed}"
    if name := parse_hub_name(run.init_from):
        try:
            there = model_facts(Path(run.init_from))
        except ModelError as error:
            # a plan needs no network; the run says so when it starts
            return f"from {name} on the Hugging Face hub: {error}"
        check_same_shape(there, run, key="init_from", path=Path(run.init_from))
        return f"from {name} on the Hugging Face hub"
    if not Path(run.init_from).exists():
        return (
            f"from {run.init_from}, which is not there yet: tessera import, tessera grow or tessera"
            " shrink makes it"
        )
    return f"from {run.init_from}: {read_fitting(run).origin}"


def _spread(count: int) -> Sequence[int]:
    """Indices of the steps that a line of bars shows."""
    if count <= BARS_A_LINE:
        return range(count)
    return [index * count // BARS_A_LINE for index in range(BARS_A_LINE)]


def _spark(values: list[float], *, top: float) -> str:
    # 0 to 1 of the highest; a run at rate 0 has no highest
    heights = [value / (top or 1.0) for value in values]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
