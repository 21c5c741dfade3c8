"""A few steps of a run's own model, engine and data in a process of its own: what a plan is calibrated by.

python -m encoder.tools.plan.probe RUN.yaml [key=value ...]      prints one line of JSON
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil
import torch

from encoder.base.batch import counts_of
from encoder.base.command import run_command
from encoder.base.dist import World, join
from encoder.base.errors import UserError
from encoder.base.units import counted
from encoder.data.loader import DataPosition
from encoder.engine.precision import precision_on
from encoder.runs.config import RunConfig, read_run, with_engine
from encoder.runs.facts import check_data
from encoder.runs.objective_models import read_objective_models
from encoder.tools.plan.forecast import Probe
from encoder.train.meters import document_lengths

ROUNDS, SECONDS_A_PHASE = 7, 40.0
# micro-batches of the two kinds of steps: their difference is the micro-batch, the rest the update
FEW, MANY = (
    1,
    3,
)


# of a micro-batch's time by its share of the FLOP, that the difference of the two kinds of steps is at least: beyond is noise
LEAST_SHARE = 0.25


class Clock:
    """Wall clock and CPU time of this process's threads, and how long these stood ready without a core."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._delay = (
            time.perf_counter(),
            time.process_time(),
            _waited_for_cores(),
        )

    @property
    def wall_seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu

    @property
    def waited_share(self) -> float | None:
        """Of the time that threads could have computed, 0 to 1; None where the system does not say."""
        delay = _waited_for_cores()
        if delay is None or self._delay is None:
            return None

        waited = max(0.0, delay - self._delay)
        return waited / max(1e-9, waited + self.cpu_seconds)


def _waited_for_cores() -> float | None:
    """Seconds that all threads of this process were ready to run and did not (Linux, Documentation/scheduler/sched-stats)."""
    total = 0.0
    try:
        for thread in os.listdir("/proc/self/task"):
            with (
                contextlib.suppress(FileNotFoundError, ProcessLookupError),
                open(f"/proc/self/task/{thread}/schedstat") as file,
            ):
                total += int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return total or None


def rate_of(
    few: Sequence[tuple[float, float]], many: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """(model FLOP a second of micro-batches, seconds of an update) from the (FLOP, seconds) of steps of few and of many of them.

    Of each kind the faster half counts: neighbours make steps slower and never faster.
    """
    (few_flops, few_seconds), (many_flops, many_seconds) = (
        _faster_half(steps) for steps in (few, many)
    )

    # the difference of the steps is `more` work; a floor keeps noise from making it free
    more = many_flops - few_flops
    seconds = max(many_seconds - few_seconds, LEAST_SHARE * many_seconds * more / many_flops)
    rate = more / seconds
    # the update is what a step of few takes beyond its micro-batches
    return rate, max(0.0, few_seconds - few_flops / rate)


def _faster_half(steps: Sequence[tuple[float, float]]) -> tuple[float, float]:
    # by seconds a FLOP: batches differ in their work
    fast = sorted(steps, key=lambda step: step[1] / step[0])[: (len(steps) + 1) // 2]
    flops, seconds = zip(*fast, strict=True)
    return statistics.median(flops), statistics.median(seconds)


def probe(path: str, overrides: Sequence[str]) -> Probe:
    """In a new process. Raises UserError with what that process said."""
    # the allocator's setting is that of launch/pretrain.py
    done = subprocess.run(
        [sys.executable, "-m", "encoder.tools.plan.probe", path, *overrides],
        encoding="utf-8",
        errors="replace",
        capture_output=True,
        env={"THP_MEM_ALLOC_ENABLE": "1", **os.environ},
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1].removeprefix(
            "error: "
        )
        raise UserError(f"--measure: {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Probe(
        **{
            **found,
            # keys of JSON are text
            "flops_per_second": {
                int(length): rate for length, rate in found["flops_per_second"].items()
            },
        }
    )


def measure(run: RunConfig) -> Probe:
    """On one rank, in this process, which has trained nothing before."""
    from encoder.engine.engine import start_engine
    from encoder.engine.zero.config import import_deepspeed
    from encoder.train import build

    world = World()
    device = build.choose_device(run, world)
    run = with_engine(run, precision=precision_on(run.engine.precision, device))
    # on one thread of a CPU its own time: neighbours, who may be gone tomorrow, do not count
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    facts = check_data(run)
    import_deepspeed(device)
    join(world, device=device)
    base = psutil.Process().memory_info().rss
    stored = read_objective_models(run, facts, hashed=False)
    shapes = {name: model.config for name, model in stored.items()}
    models = build.make_objective_models(run, stored, device)
    objective = build.make_objective(run, facts, run.phases[0], models=models)
    engine = start_engine(
        build.make_model(run),
        objective=objective,
        config=run.engine,
        optimizer=run.optimizer,
        world=world,
        device=device,
    )
    rates, updates, waits, spreads, peak, rounds = {}, [], [], [], 0, 0
    stopwatch = Clock()
    for phase in run.phases:
        # phases of one length cost the same
        if phase.max_tokens_per_document in rates:
            continue
        many = dataclasses.replace(
            phase,
            batch_tokens=MANY * run.loader.micro_batch_rows * run.data.row_tokens,
            batch_warmup=None,
        )
        with build.make_loader(
            dataclasses.replace(run, phases=tuple(many if p is phase else p for p in run.phases)),
            facts,
            world,
            device,
            many,
            DataPosition(),
        ) as loader:
            times: dict[int, list[tuple[float, float]]] = {FEW: [], MANY: []}
            began = time.monotonic()
            for number in range(ROUNDS + 1):
                # in turn, so that a busy moment meets both kinds
                for count in (FEW, MANY):
                    asked = clock()
                    data = loader.next_step()
                    waited = clock() - asked
                    # a step of few is a part of the same batch as one of many
                    some = data.micro_batches[:count]
                    flops = sum(
                        run.objective.train_flops(
                            run.model, shapes, lengths=document_lengths(b), targets=b.counts
                        )
                        for b in some
                    )
                    counts = counts_of(some)
                    started = clock()
                    engine.step(some, counts=counts, lr=1e-6, max_lr=1e-3)
                    took = clock() - started
                    if number and any(counts.values()):  # the first of each is a warm-up
                        times[count].append((flops, took))
                        waits.append(waited / data.tokens)
                    peak = max(peak, psutil.Process().memory_info().rss)
                # at least three timed rounds, however slow
                if number >= 3 and time.monotonic() - began > SECONDS_A_PHASE:
                    break
        if not (times[FEW] and times[MANY]):
            raise UserError(
                f"the steps of phase {phase.name} that were to be timed have no masked token. Raise"
                " its mask share, or loader.micro_batch_rows."
            )
        rates[phase.max_tokens_per_document], update = rate_of(times[FEW], times[MANY])
        updates.append(update)
        pace = [seconds / flops for flops, seconds in times[MANY]]
        spreads.append(max(pace) / min(pace))
        rounds += len(pace)
    threads = torch.get_num_threads()
    text = f"this {device.type}, {counted(threads, 'thread')}, as probed"
    on_cpu = device.type == "cpu"
    return Probe(
        flops_per_second=rates,
        update_seconds=statistics.median(updates),
        data_seconds_per_token=statistics.median(waits),
        base_bytes=base,
        peak_bytes=peak,
        text=text,
        clock="CPU time, as there is one thread" if alone else "wall clock",
        rounds=rounds,
        spread=max(spreads),
        waited_share=stopwatch.waited_share if on_cpu else None,
        wall_over_cpu=(
            stopwatch.wall_seconds / max(1e-9, stopwatch.cpu_seconds / threads) if on_cpu else None
        ),
    )


def _main(argv: Sequence[str]) -> None:
    print(json.dumps(dataclasses.asdict(measure(read_run(argv[0], argv[1:])))), flush=True)


if __name__ == "__main__":
    code = run_command(lambda: _main(sys.argv[1:]))
    sys.stdout.flush()
    # gloo's thread frees its last tensor while the interpreter ends, which sometimes aborts
    os._exit(code)
