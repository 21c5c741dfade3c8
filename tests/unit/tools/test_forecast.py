"""A forecast by hand: FLOP over rates, bytes over links, and what was assumed stands beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from encoder.base.errors import ConfigError
from encoder.runs.config import read_run
from encoder.runs.phases import Stretch
from encoder.tools.plan.communication import HOP_SECONDS
from encoder.tools.plan.forecast import (
    KERNEL_SECONDS,
    MICRO_STEP_KERNELS,
    UPDATE_BYTES,
    Machine,
    Probe,
    Steps,
    forecast,
    forecast_lines,
    gpu,
    traffic_of,
)
from encoder.tools.plan.plan import plan_text
from encoder.tools.plan.probe import Clock, rate_of
from launch.plan import main

TINY = "tests/helpers/three_phases.yaml"
MACHINE = Machine(
    name="one of ours",
    flops=1e12,
    fp32_flops=1e12,
    memory_bytes_per_second=1e15,
    memory_bytes=8e9,
    link_bytes_per_second=1e9,
    product_share=0.5,
    memory_share=1.0,
)


def steps(rows: int = 8, count: int = 3) -> list[Stretch]:
    return [
        Stretch(phase=0, first_step=1, first_tokens=0, rows=rows, tokens=rows * 500, steps=count)
    ]


def of(run, *, ranks: int = 2, **named):
    work = Steps(stretches=steps(), flops_per_token=[1e9, 1e9, 1e9], ranks=ranks)
    sizes = {"parameters": 10**6, "largest": 10**5}
    return forecast(run, **{"steps": work, **sizes, "machine": MACHINE, **named})


def test_three_steps_by_hand():
    """4,000 tokens of 1 GFLOP on two ranks at 0.5 TFLOP/s: 4 s a step. Sent: half of 4 MB of gradients, in 8 buckets, the
    last of which comes when the backward pass is over, and half of 4 MB of weights."""
    found = of(read_run(TINY, ["engine.zero_stage=1", "engine.overlap=reduction"]))
    assert found.tokens == 12_000 and found.computing_seconds == pytest.approx(12.0, rel=1e-3)
    reduction, last = 2e6 / 1e9 + 8 * HOP_SECONDS, 2**17 / 10**6
    assert found.communication_seconds == pytest.approx(3 * (2e6 / 1e9 + last * reduction))
    assert found.bytes_a_step == 4e6 and found.link_seconds == pytest.approx(2e-3 + reduction)
    assert found.hidden_share == pytest.approx((1 - last) * reduction / (2e-3 + reduction))
    assert found.update_seconds == pytest.approx(3 * 10**6 / 2 * UPDATE_BYTES / 1e15)
    assert found.tokens_per_second == pytest.approx(12_000 / found.seconds)
    assert [a for a in found.assumed if "1 GB/s" in a and "2 in one machine" in a]


def test_a_measured_link_is_not_assumed_and_one_rank_sends_nothing():
    run = read_run(TINY, ["engine.zero_stage=1", "engine.overlap=reduction"])
    told = of(run, interconnect=2e9)
    reduction, last = 2e6 / 2e9 + 8 * HOP_SECONDS, 2**17 / 10**6
    assert told.communication_seconds == pytest.approx(3 * (2e6 / 2e9 + last * reduction))
    assert not told.assumed
    assert of(run, ranks=1).bytes_a_step == 0 and of(run, ranks=1).communication_seconds == 0


def test_small_models_wait_for_their_kernels():
    run = read_run(TINY, ["loader.micro_batch_rows=2"])
    fast = replace(MACHINE, flops=1e30, fp32_flops=1e30)
    layers, micro_batches = run.model.num_hidden_layers, 2  # 4 rows a rank, two in a micro-batch
    seconds = 3 * micro_batches * layers * MICRO_STEP_KERNELS * KERNEL_SECONDS
    assert of(run, machine=fast).computing_seconds == pytest.approx(seconds)


def test_a_probe_counts_its_own_rates_of_each_length_and_the_time_for_data():
    run = read_run(TINY)
    probe = Probe(
        flops_per_second={128: 2e9, 512: 1e9},
        update_seconds=0.5,
        data_seconds_per_token=1e-3,
        base_bytes=1,
        peak_bytes=2,
        text="",
    )
    found = of(run, machine=None, probe=probe, ranks=1)
    assert (
        found.computing_seconds == pytest.approx(12_000 * 1e9 / 2e9) and found.update_seconds == 1.5
    )
    assert found.data_seconds == pytest.approx(12.0) and not found.assumed


@pytest.mark.parametrize(
    "stage, one, three", [(0, 4e6, 4e6), (1, 4e6, 4e6), (2, 4e6, 8e6), (3, 6e6, 18e6)]
)
def test_stages_two_and_three_send_after_every_micro_batch(stage, one, three):
    run = read_run(TINY, [f"engine.zero_stage={stage}"])
    assert [
        traffic_of(run, parameters=10**6, largest=1, ranks=2, micro_batches=n).total for n in (1, 3)
    ] == [one, three]


def test_the_plan_of_a_published_recipe_names_what_it_assumes():
    text = plan_text(
        read_run("configs/pretrain/modernbert_base.yaml"), ranks=8, machine=gpu("h100")
    )
    speed = next(line for line in text.splitlines() if line.startswith("speed"))
    assert "tokens/s on 8 x NVIDIA H100 80GB HBM3" in speed
    for said in (
        "assumed, not measured  60% of 989 TFLOP/s",
        "450 GB/s of a rank to the others",
        "fits 74.5 GiB",
    ):
        assert said in text
    large = read_run("configs/pretrain/modernbert_base.yaml", ["loader.micro_batch_rows=24"])
    text = plan_text(large, ranks=8, machine=gpu("h100"))
    assert "does NOT fit" in text


def test_unknown_gpus_and_rates_without_effect_are_one_line(capsys):
    with pytest.raises(ConfigError, match="--gpu h10 is unknown. Did you mean h100"):
        gpu("h10")
    assert main([TINY, "--gpu", "h10"]) == 2
    for words in (
        ["--interconnect", "50"],
        ["--gpu", "h100", "--measure"],
        ["--gpu", "h100", "--interconnect", "0"],
    ):
        with pytest.raises(SystemExit) as left:
            main([TINY, *words])
        assert left.value.code == 2


def test_a_probe_survives_a_busy_machine_and_says_that_it_is_one():
    """Micro-batches of 1 GFLOP at 1 GFLOP/s and an update of 0.5 s; neighbours make two rounds in three slower."""
    few = [(1e9, 1.5 * slow) for slow in (1.0, 9.0, 1.02, 4.0, 1.01, 3.0)]
    many = [(3e9, 3.5 * slow) for slow in (3.0, 1.0, 1.02, 1.01, 14.0, 2.0)]
    rate, update = rate_of(few, many)
    assert rate == pytest.approx(1e9, rel=0.05) and update == pytest.approx(0.5, abs=0.05)
    rate, update = rate_of(
        [(1e9, 9.0)] * 4, [(3e9, 3.5)] * 4
    )  # nonsense: no step of three is faster than one of one
    assert 0 < rate <= 4 * 3e9 / 3.5 and update >= 0

    made = dict(
        flops_per_second={128: 2e9, 512: 1e9},
        update_seconds=0.5,
        data_seconds_per_token=1e-3,
        base_bytes=1,
        peak_bytes=2,
        text="this cpu, 2 threads, as probed",
        rounds=14,
        wall_over_cpu=1.1,
    )
    run = read_run(TINY)

    def lines(**more):
        probe = Probe(**made, **more)
        return "\n".join(
            forecast_lines(
                of(run, machine=None, probe=probe, ranks=1), ranks=1, machine=None, probe=probe
            )
        )

    assert "measured       by wall clock, 14 rounds" in lines(
        spread=1.2, waited_share=0.01
    ) and "busy" not in lines(spread=1.2)
    assert "threads waited 55% of their time for a core" in lines(spread=1.2, waited_share=0.55)
    assert "the rounds differ widely" in lines(spread=3.0)
    busy = lines(spread=1.2, waited_share=0.55, clock="CPU time, as there is one thread")
    assert "the time above is that of an idle one; as busy as now about" in busy
    assert "times as fast" not in busy


def test_threads_that_wait_for_a_core_are_seen():
    clock, loud = (
        Clock(),
        [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(2 * os.cpu_count())
        ],
    )
    try:
        time.sleep(0.5)
        end = time.perf_counter() + 1.5
        while time.perf_counter() < end:
            pass
        share = clock.waited_share
        assert share is None or share > 0.1
        assert clock.wall_seconds > 1.9 and 0 < clock.cpu_seconds < clock.wall_seconds
    finally:
        for process in loud:
            process.kill()
            process.wait()
