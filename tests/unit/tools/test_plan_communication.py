"""What the link adds to a step, against a link that sends bucket by bucket; and what is promised of 64 GPUs."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from encoder.base.errors import ConfigError
from encoder.engine.zero.config import EngineConfig, overlap_on, sends_during_backward
from encoder.runs.config import read_run
from encoder.runs.phases import Stretch
from encoder.tools.plan.communication import BACKWARD_SHARE, Traffic, waiting_seconds
from encoder.tools.plan.forecast import Steps, forecast, gpu
from encoder.tools.plan.memory import count_needs, on_machine
from encoder.tools.plan.plan import plan_text
from encoder.tools.plan.work import phase_work
from tests.reference.sending import waited_seconds

LINK = 1e9


def traffic(stage: int, *, ranks: int = 2, micro_batches: int = 1, largest: int = 0) -> Traffic:
    return Traffic.of(
        stage=stage,
        precision="fp32",
        parameters=10**9,
        largest=largest,
        ranks=ranks,
        micro_batches=micro_batches,
    )


@pytest.mark.parametrize(
    "stage, micro_batches, last, computing",
    list(itertools.product([0, 1, 2], [1, 3], [0.05, 0.4], [0.5, 3.0, 30.0])),
)
def test_the_closed_form_is_a_link_that_sends_bucket_by_bucket(
    stage, micro_batches, last, computing
):
    """Within a few buckets' time, of 500."""
    some = traffic(stage, micro_batches=micro_batches, largest=int(last * 10**9))
    reduction = some.gradients / LINK
    each = computing / micro_batches
    slow = waited_seconds(
        forward=(1 - BACKWARD_SHARE) * each,
        backward=BACKWARD_SHARE * each,
        micro_batches=micro_batches,
        every_backward=stage == 2,
        buckets=500,
        reduction=reduction,
        last=last,
    )
    found = waiting_seconds(some, computing=computing, bytes_per_second=LINK, hop_seconds=0.0)
    behind = some.weights / LINK
    assert found - behind == pytest.approx(slow, abs=reduction / 100)


def test_nothing_is_hidden_where_gradients_are_sent_behind_the_backward_pass():
    some = traffic(1, micro_batches=3)
    behind = replace(some, sends=False)
    found = waiting_seconds(behind, computing=9.0, bytes_per_second=LINK)
    assert found == pytest.approx(some.total / LINK + some.hops * 5e-6)


def test_weights_of_stage_three_are_waited_for_in_every_pass():
    """Half of 4 GB for the forward and for the backward pass of two micro-batches: 8 s."""
    some = traffic(3, micro_batches=2)
    found = waiting_seconds(some, computing=1e6, bytes_per_second=LINK, hop_seconds=0.0)
    assert found == pytest.approx(8.0 + some.last * some.gradients / LINK)


def test_a_bucket_grows_with_the_ranks_so_that_hops_do_not_outweigh_bytes():
    for ranks in (2, 8, 64, 512):
        some = traffic(1, ranks=ranks)
        assert some.hops * 5e-6 < 1.2 * some.gradients / 50e9 or ranks > 64
    # 512 ranks: 30 buckets once around the ring
    assert traffic(1, ranks=512).hops == 30 * 511


@pytest.mark.parametrize(
    "settings, stage, ranks, sends",
    [
        ({}, 1, 2, True),
        ({}, 1, 1, False),
        ({"overlap": "off"}, 1, 2, False),
        ({"graphs": "micro_step"}, 1, 2, False),
        ({"offload_optimizer": "cpu"}, 2, 2, False),
        ({"precision": "bf16"}, 1, 2, False),
        ({"precision": "bf16"}, 2, 2, True),
    ],
)
def test_what_stays_behind_the_backward_pass(settings, stage, ranks, sends):
    told = EngineConfig(zero_stage=stage, **settings)
    config = replace(told, overlap=overlap_on(told.overlap, cuda=False))
    assert sends_during_backward(config, stage=stage, ranks=ranks) is sends


def test_on_cuda_gradients_stay_behind_the_backward_pass_unless_asked():
    for word, sends in (("auto", False), ("reduction", True)):
        told = EngineConfig(zero_stage=2, overlap=word)
        config = replace(told, overlap=overlap_on(told.overlap, cuda=True))
        assert sends_during_backward(config, stage=2, ranks=2) is sends


@pytest.mark.parametrize("name, micro_batch_rows", [("base", 9), ("base", 3), ("large", 3)])
def test_64_gpus_keep_nine_tenths_of_one_nodes_rate(name, micro_batch_rows):
    """4.7 M tokens a step, 50 GB/s a GPU, NVLink inside of the node. Sent behind the backward pass, base would not."""
    rates = {
        (ranks, overlap): rate_of(name, ranks, micro_batch_rows, overlap)
        for ranks in (8, 64)
        for overlap in ("reduction", "off")
    }
    assert rates[64, "reduction"] > 0.9 * rates[8, "reduction"]
    assert rates[64, "reduction"] > rates[64, "off"]
    if name == "base":
        assert rates[64, "off"] < 0.9 * rates[8, "off"]


def rate_of(name: str, ranks: int, micro_batch_rows: int, overlap: str) -> float:
    """Tokens a second of a rank."""
    run = read_run(
        f"configs/pretrain/modernbert_{name}.yaml",
        [
            "data.row_tokens=8192",
            f"loader.micro_batch_rows={micro_batch_rows}",
            f"engine.overlap={overlap}",
        ],
    )
    machine = gpu("h100")
    run = on_machine(run, machine)
    needs = count_needs(run, ranks=ranks)
    phase = run.phases[0]
    stretch = Stretch(phase=0, first_step=1, first_tokens=0, rows=576, tokens=576 * 8192, steps=1)
    flops = phase_work(run, phase).flops / phase.tokens
    found = forecast(
        run,
        steps=Steps(stretches=[stretch], flops_per_token=[flops], ranks=ranks),
        parameters=needs.parameters,
        largest=needs.largest,
        machine=machine,
        interconnect=50e9 if ranks > 8 else None,
    )
    return found.tokens_per_second / ranks


@pytest.mark.parametrize("word, hides", [("auto", False), ("reduction", True)])
def test_the_plan_says_how_much_of_the_link_is_hidden(word, hides):
    run = read_run("configs/pretrain/modernbert_base.yaml", [f"engine.overlap={word}"])
    text = plan_text(run, ranks=8, machine=gpu("h100"))
    line = next(line for line in text.splitlines() if line.startswith("communication"))
    found = re.search(r"GB sent by a rank in a step: .* ms, (\d+)% of them beside computing", line)
    assert found and (int(found[1]) > 0) is hides
    assert "5 us from one rank to the next" in text


def test_a_word_for_overlap_that_is_unknown_is_refused():
    with pytest.raises(ConfigError, match="engine.overlap"):
        read_run("configs/pretrain/tiny_cpu.yaml", ["engine.overlap=prefetch"])
    with pytest.raises(ConfigError, match="overlap weights with zero_stage 2: only stage 3"):
        EngineConfig(zero_stage=2, overlap="weights")


def test_a_look_ahead_gathers_once_beside_the_forward_pass():
    """2 GB at 1 GB/s beside 1 s of forward: a second is left to wait, and the last bucket; kept until the backward pass."""
    some = Traffic.of(
        stage=3,
        precision="fp32",
        parameters=10**9,
        largest=0,
        ranks=2,
        micro_batches=1,
        looks_ahead=True,
    )
    found = waiting_seconds(some, computing=3.0, bytes_per_second=LINK, hop_seconds=0.0)
    assert some.gathered == 2e9 and found == pytest.approx(1.0 + 2.0 * some.last)
