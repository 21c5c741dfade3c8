"""How fast a run will be on a cluster, before it is there: seconds a step from FLOP, bytes, and shares of the peaks.

    micro-batch    model FLOP / (peak x product share)  +  what layers read and write / (memory rate x memory share)
    update         bytes of weights, gradients, moments on a rank / (memory rate x memory share)
    communication  bytes a rank sends in a step / link rate, less what is sent during the backward pass (communication.py)

A number that nobody measured on the machine in question is an assumption, and the forecast carries its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from encoder.base.errors import ConfigError, nearest
from encoder.base.units import short_count, short_seconds
from encoder.engine.zero.config import sends_during_backward
from encoder.runs.config import RunConfig
from encoder.runs.phases import Stretch
from encoder.tools.plan.communication import HOP_SECONDS, Traffic, waiting_seconds
from encoder.tools.plan.fit import share_of_rows
from encoder.train.meters import BF16_PEAKS


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the device of one rank does. Rates per second; shares 0 to 1 of what training reaches of them."""

    name: str
    flops: float  # peak of the matrix products in bf16
    # and in fp32, without TF32: torch does not use it unless it is told to
    fp32_flops: float
    memory_bytes_per_second: float
    memory_bytes: float  # that it has
    link_bytes_per_second: float  # of a rank to the others of its machine, each way
    devices_a_machine: int = 8
    product_share: float = 0.6  # matrix products and attention, of `flops`
    memory_share: float = 0.8
    assumed: tuple[str, ...] = ()  # numbers above that were not measured

    def peak(self, precision: str) -> float:
        """FLOP per second at most: fp32 computes without the units for bf16, fp64 at half of that or less."""
        return {"fp32": self.fp32_flops, "fp64": self.fp32_flops / 2}.get(precision, self.flops)


# data sheets: name, fp32 FLOP/s, memory bytes/s, memory, link each way (NVLink; L40S: PCIe 4)
_SHEETS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 19.5e12, 2.039e12, 80e9, 300e9),
    "h100": ("NVIDIA H100 80GB HBM3", 67e12, 3.35e12, 80e9, 450e9),
    "h200": ("NVIDIA H200", 67e12, 4.8e12, 141e9, 450e9),
    "b200": ("NVIDIA B200", 80e12, 8e12, 180e9, 900e9),
    "l40s": ("NVIDIA L40S", 91.6e12, 864e9, 48e9, 32e9),
}
GPUS = tuple(_SHEETS)
BETWEEN_MACHINES = 50e9  # a 400 Gb/s card a GPU
# read and written for each element: gradient, master, two moments, in several passes
UPDATE_BYTES = 60
LAYER_PASSES = 4  # what a layer keeps is written, read again, and its gradient too
# launched for each layer, forward and backward: 52 (base) to 64 (17m) counted, compiled
MICRO_STEP_KERNELS = 60
KERNEL_SECONDS = 4e-6  # to launch one: small models wait for it


def gpu(word: str, *, precision: str = "autocast") -> Machine:
    """A GPU by its short name, with the shares that we assume of its peak in a precision (auto: in bf16). Raises ConfigError."""
    if word not in _SHEETS:
        raise ConfigError(f"--gpu {word} is unknown. {nearest(word, [*GPUS])}")
    name, fp32_flops, rate, size, link = _SHEETS[word]
    machine = Machine(
        name=name,
        flops=BF16_PEAKS[name],
        fp32_flops=fp32_flops,
        memory_bytes_per_second=rate,
        memory_bytes=size,
        link_bytes_per_second=link,
    )
    return replace(
        machine,
        assumed=(
            (
                f"{machine.product_share:.0%} of {machine.peak(precision) / 1e12:,.3g} TFLOP/s in"
                " matrix products and attention"
            ),
            f"{machine.memory_share:.0%} of {rate / 1e12:.2f} TB/s",
            f"a kernel is launched in {1e6 * KERNEL_SECONDS:.0f} us",
        ),
    )


# an idle machine: 0 to 2 % and 1.1 to 1.3 seen
BUSY_SHARE, BUSY_SPREAD = 0.1, 2.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a short run of the same model on this machine took, on one rank."""

    # model FLOP of forward and backward, by max_tokens_per_document
    flops_per_second: dict[int, float]
    update_seconds: float
    data_seconds_per_token: float
    base_bytes: int  # the process with everything imported and no model
    peak_bytes: int  # the process while it trained
    text: str  # what it was made on
    clock: str = "wall clock"
    # steps of several micro-batches that were timed, all lengths together
    rounds: int = 0
    spread: float = 1.0  # the slowest of them over the fastest, of one length
    # of the time that threads could have computed, they waited for a core
    waited_share: float | None = None
    wall_over_cpu: float | None = None  # wall time over CPU time a thread

    @property
    def by_cpu_time(self) -> bool:
        """Whether other work on the machine does not count."""
        return self.clock.startswith("CPU")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is to be computed, and by how many."""

    stretches: Sequence[Stretch]
    flops_per_token: Sequence[float]  # model FLOP, a number a phase
    ranks: int  # that share a step's rows
    padded: bool = True  # whether micro-batches have one shape, as on a GPU


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of a whole run."""

    tokens: int
    computing_seconds: float
    update_seconds: float
    communication_seconds: float
    data_seconds: float
    bytes_a_step: float  # that a rank sends, in the longest step
    link_seconds: float  # that they take, in that step
    hidden_share: float  # of them, beside computing
    assumed: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of training; evaluation, saves and starts come on top."""
        return (
            self.computing_seconds
            + self.update_seconds
            + self.communication_seconds
            + self.data_seconds
        )

    @property
    def tokens_per_second(self) -> float:
        """All ranks together, without padding."""
        return self.tokens / self.seconds


def forecast(
    run: RunConfig,
    *,
    steps: Steps,
    parameters: int,
    largest: int,
    machine: Machine | None = None,
    probe: Probe | None = None,
    interconnect: float | None = None,
) -> Forecast:
    """How long the steps take on ranks of a machine, or of the one that was probed.

    run: its engine, model and loader decide; `auto` means what it means on the machine (memory.on_machine)
    steps: that are taken
    parameters: trained numbers
    largest: of them, those of the largest matrix
    machine: a GPU by its published numbers; else
    probe: what was measured here
    interconnect: bytes a second of a rank to the others, each way
    """
    ranks = steps.ranks
    assert (machine is None) != (probe is None), "one of them"
    assumed = list(machine.assumed if machine else ())
    link = _link(interconnect, machine, ranks, assumed)
    if probe is not None:
        update = probe.update_seconds
    else:
        assert machine is not None
        # from ZeRO 1 on a rank updates its share alone
        own = parameters / (ranks if run.engine.zero_stage else 1)
        reached = machine.memory_bytes_per_second * machine.memory_share
        update = own * UPDATE_BYTES / reached
    parts = {"computing": 0.0, "update": 0.0, "communication": 0.0, "data": 0.0}
    most_bytes = most_link = hidden = 0.0
    for stretch in steps.stretches:
        # the rank that has most rows: the others wait for it
        phase = run.phases[stretch.phase]
        share = share_of_rows(
            stretch.rows,
            ranks=ranks,
            micro_batch_rows=run.loader.micro_batch_rows,
            padded=steps.padded,
        )
        micro_batches = share.micro_batches
        tokens = stretch.tokens / stretch.rows * share.rows
        flops = tokens * steps.flops_per_token[stretch.phase]
        traffic = traffic_of(
            run,
            parameters=parameters,
            largest=largest,
            ranks=ranks,
            micro_batches=micro_batches,
        )
        if probe is not None:
            computing = flops / probe.flops_per_second[phase.max_tokens_per_document]
            waiting = tokens * probe.data_seconds_per_token
        else:
            assert machine is not None
            computing = _computing_seconds(
                run, machine, tokens=tokens, flops=flops, micro_batches=micro_batches
            )
            waiting = 0.0  # a GPU's rows are made by other processes meanwhile
        # as if all of it were sent behind the passes, and as it is
        alone, beside = (
            waiting_seconds(sent, computing=computing, bytes_per_second=link)
            for sent in (replace(traffic, sends=False), traffic)
        )
        if traffic.total > most_bytes:
            most_bytes, most_link = traffic.total, alone
            hidden = 1 - beside / alone
        seconds_of_step = {
            "computing": computing,
            "update": update,
            "communication": beside,
            "data": waiting,
        }
        for name, seconds in seconds_of_step.items():
            parts[name] += stretch.steps * seconds
    return Forecast(
        tokens=sum(s.steps * s.tokens for s in steps.stretches),
        bytes_a_step=most_bytes,
        link_seconds=most_link,
        hidden_share=hidden,
        assumed=tuple(assumed),
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
    )


def traffic_of(
    run: RunConfig, *, parameters: int, largest: int, ranks: int, micro_batches: int
) -> Traffic:
    """What a rank sends in a step of a run.

    As counted on two ranks (tests/process/test_communication.py), but for the gathers of stage 3: a small model's weights are all
    below DeepSpeed's threshold and stay.

    run: its engine decides
    parameters: trained numbers
    largest: of them, those of the largest matrix
    ranks: that share a step
    micro_batches: of a rank's step
    """
    return Traffic.of(
        stage=run.engine.zero_stage,
        precision=run.engine.precision,
        parameters=parameters,
        largest=largest,
        ranks=ranks,
        micro_batches=micro_batches,
        sends=sends_during_backward(run.engine, stage=run.engine.zero_stage, ranks=ranks),
        looks_ahead=run.engine.overlap == "weights",
    )


def forecast_lines(
    found: Forecast, *, ranks: int, machine: Machine | None, probe: Probe | None
) -> list[str]:
    """For the plan."""
    whole = found.seconds
    shares = ", ".join(
        f"{name} {seconds / whole:.1%}"
        for name, seconds in (
            ("computing", found.computing_seconds),
            ("update", found.update_seconds),
            ("communication", found.communication_seconds),
            ("data", found.data_seconds),
        )
        if seconds
    )
    if machine is not None:
        where = f"{ranks} x {machine.name}"
    else:
        assert probe is not None
        where = probe.text
    lines = [
        (
            f"speed          about {short_count(round(found.tokens_per_second))} tokens/s on"
            f" {where}, {short_count(round(found.tokens_per_second / ranks))} a rank"
        ),
        (
            f"time           about {short_seconds(whole)} ({whole / 3600:,.2f} h;"
            f" {ranks * whole / 3600:,.1f} rank-hours): {shares}"
        ),
    ]
    if probe and probe.rounds:
        lines += _probe_lines(probe, whole)
    if ranks > 1:
        lines.append(
            f"communication  up to {found.bytes_a_step / 1e9:,.3g} GB sent by a rank in a step:"
            f" {1e3 * found.link_seconds:,.3g} ms, {found.hidden_share:.0%} of them beside computing"
        )
    title = "assumed, not measured"
    for text in found.assumed:
        lines.append(f"{title:<23}{text}")
        title = ""
    return lines


def _probe_lines(probe: Probe, seconds: float) -> list[str]:
    """By which clock, how often, and whether the machine was busy with other work.

    seconds: that the run takes by the probe's clock
    """
    both = ""
    if probe.wall_over_cpu:
        both = f"; wall time {probe.wall_over_cpu:.2f} times the CPU time of a thread"
    lines = [
        f"measured       by {probe.clock}, {probe.rounds} rounds, the faster half of them; the"
        f" slowest took {probe.spread:.2f} times the fastest{both}"
    ]
    waited = probe.waited_share or 0.0
    is_waiting = waited >= BUSY_SHARE
    if not is_waiting and probe.spread < BUSY_SPREAD:
        return lines
    why = "the rounds differ widely"
    if is_waiting:
        why = f"threads waited {waited:.0%} of their time for a core"
    busy = f"               the machine is busy with other work ({why})"
    if probe.by_cpu_time and probe.wall_over_cpu:
        now = short_seconds(seconds * probe.wall_over_cpu)
        lines.append(f"{busy}: the time above is that of an idle one; as busy as now about {now}.")
        return lines
    # 0.02: where threads waited almost all the time, no more than 50 times is promised
    times = "several times"
    if is_waiting:
        times = f"about {1 / max(0.02, 1 - waited):.1f} times"
    lines.append(f"{busy}: alone the run may be {times} as fast. Measure again when it is idle.")
    return lines


def _computing_seconds(
    run: RunConfig, machine: Machine, *, tokens: float, flops: float, micro_batches: int
) -> float:
    m, width = run.model, {"fp32": 4, "fp64": 8}.get(run.engine.precision, 2)
    # layers computed again do a third more, of both
    again = 4 / 3 if run.engine.activation_checkpointing == "blocks" else 1.0
    moved = tokens * m.num_hidden_layers * m.activation_width * width * LAYER_PASSES
    busy = again * (
        flops / (machine.peak(run.engine.precision) * machine.product_share)
        + moved / (machine.memory_bytes_per_second * machine.memory_share)
    )
    # a small model waits for its kernels to be launched, a large one for the device
    return max(busy, micro_batches * m.num_hidden_layers * MICRO_STEP_KERNELS * KERNEL_SECONDS)


def _link(
    interconnect: float | None, machine: Machine | None, ranks: int, assumed: list[str]
) -> float:
    if interconnect is not None or ranks == 1:
        return interconnect or math.inf
    if machine is not None and ranks <= machine.devices_a_machine:
        rate = machine.link_bytes_per_second
        where = f"{ranks} in one machine"
    else:
        rate = BETWEEN_MACHINES
        where = "over several machines"
    assumed.append(
        f"{rate / 1e9:,.0f} GB/s of a rank to the others, {where}; --interconnect says another"
    )
    assumed.append(f"{1e6 * HOP_SECONDS:.0f} us from one rank to the next")
    return rate
