"""A few steps of a run's own model, engine and data in a process of its own: what a plan is calibrated by.

    python -m encoder.train.probe RUN.yaml [key=value ...]      prints one line of JSON
"""

from __future__ import annotations

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

from encoder.base.command import run_command
from encoder.base.dist import World, join
from encoder.base.errors import UserError
from encoder.engine.precision import precision_on
from encoder.models.flops import train_flops
from encoder.train.config import RunConfig, read_run, with_engine
from encoder.train.forecast import Probe
from encoder.train.meters import document_lengths

ROUNDS, SECONDS_A_PHASE = 7, 40.0
FEW, MANY = 1, 3               # micro-batches of the two kinds of steps: their difference is the micro-batch, the rest the update


def probe(path: str, overrides: Sequence[str]) -> Probe:
    """In a new process. Raises UserError with what that process said."""
    done = subprocess.run([sys.executable, "-m", "encoder.train.probe", path, *overrides], text=True, capture_output=True,
                          env={"THP_MEM_ALLOC_ENABLE": "1", **os.environ})       # as launch/pretrain.py has it
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1].removeprefix("error: ")
        raise UserError(f"--measure: {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Probe(**{**found, "flops_per_second": {int(length): rate for length, rate in found["flops_per_second"].items()}})


def measure(run: RunConfig) -> Probe:
    """On one rank, in this process, which has trained nothing before."""
    from encoder.engine.engine import start_engine
    from encoder.engine.zero_config import import_deepspeed
    from encoder.train import build

    world = World()
    device = build.choose_device(run, world)
    run = with_engine(run, precision=precision_on(run.engine.precision, device))
    # on one thread of a CPU its own time: neighbours, who may be gone tomorrow, do not count
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    facts = build.check_data(run)
    import_deepspeed(device)
    join(world, device=device)
    base = psutil.Process().memory_info().rss
    engine = start_engine(build.make_model(run), config=run.engine, optimizer=run.optimizer, world=world, device=device)
    rates, updates, waits, peak = {}, [], [], 0
    for phase in run.phases:
        if phase.max_tokens_per_document in rates:
            continue
        many = dataclasses.replace(phase, batch_tokens=MANY * run.loader.micro_batch_rows * run.data.row_tokens, batch_warmup=None)
        with build.make_loader(dataclasses.replace(run, phases=tuple(many if p is phase else p for p in run.phases)), facts, world,
                               device, many, build.DataPosition()) as loader:
            times, began = {FEW: [], MANY: []}, time.monotonic()
            for number in range(ROUNDS + 1):
                for count in (FEW, MANY):
                    asked = clock()
                    data = loader.next_step()
                    waited = clock() - asked
                    some = data.micro_batches[:count]
                    flops = sum(train_flops(run.model, lengths=document_lengths(b), masked_tokens=b.masked_tokens)
                                for b in some)
                    started = clock()
                    engine.step(some, masked_tokens=sum(b.masked_tokens for b in some), lr=1e-6, max_lr=1e-3)
                    took = clock() - started
                    if number:           # the first of each is a warm-up
                        times[count].append((flops, took))
                        waits.append(waited / data.tokens)
                    peak = max(peak, psutil.Process().memory_info().rss)
                if number >= 3 and time.monotonic() - began > SECONDS_A_PHASE:
                    break
        few, several = ([statistics.median(column) for column in zip(*times[count])] for count in (FEW, MANY))
        rates[phase.max_tokens_per_document] = rate = (several[0] - few[0]) / max(several[1] - few[1], 1e-9)
        updates.append(max(0.0, few[1] - few[0] / rate))
    threads = torch.get_num_threads()
    text = f"this {device.type}, {threads} thread{'s' * (threads > 1)}, as probed{', by CPU time' * alone}"
    return Probe(flops_per_second=rates, update_seconds=statistics.median(updates),
                 data_seconds_per_token=statistics.median(waits), base_bytes=base, peak_bytes=peak, text=text)


def _main(argv: Sequence[str]) -> None:
    print(json.dumps(dataclasses.asdict(measure(read_run(argv[0], argv[1:])))), flush=True)


if __name__ == "__main__":
    code = run_command(lambda: _main(sys.argv[1:]))
    sys.stdout.flush()
    os._exit(code)        # gloo's thread frees its last tensor while the interpreter ends, which sometimes aborts
