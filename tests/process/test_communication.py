"""What a plan says a rank sends in a step is what its collectives move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from encoder.base.dist import World
from encoder.engine.engine import EngineConfig, start_engine
from encoder.optim.stable_adamw import StableAdamWConfig
from encoder.runs.config import read_run
from encoder.tools.plan.forecast import traffic_of
from tests.process.ranks import run_ranks
from tests.process.tiny import micro_batch, mlm_objective, tiny_model

# by ring: of n bytes, with N ranks, (N - 1) / N times n is sent by each; an all-reduce is a reduce-scatter and an all-gather.
# name -> how often, and which argument is the whole
PASSES = {
    "all_reduce": (2, 0),
    "reduce": (1, 0),
    "reduce_scatter_tensor": (1, 1),
    "reduce_scatter": (1, 1),
    "reduce_scatter_fn": (1, 1),
    "all_gather_into_tensor": (1, 0),
    "all_gather": (1, 0),
    "allgather_fn": (1, 0),
    "all_gather_coalesced": (1, 0),
}


@contextlib.contextmanager
def sent(world: World) -> Iterator[dict[str, float]]:
    """Bytes by collective, of tensors of more than 2 KB: what agrees on losses and norms is less."""
    import deepspeed.comm
    import deepspeed.comm.comm

    found: dict[str, float] = {}
    inside = []  # DeepSpeed's call torch's: the outermost counts
    with contextlib.ExitStack() as patches:
        for module in (deepspeed.comm, deepspeed.comm.comm, dist):
            for name, (passes, at) in PASSES.items():
                plain = getattr(module, name, None)
                if plain is None:
                    continue

                def counted(*args, _plain=plain, _name=name, _passes=passes, _at=at, **named):
                    if inside:
                        return _plain(*args, **named)
                    whole = [*args, *named.values()][_at]
                    size = sum(t.nbytes for t in whole) if isinstance(whole, list) else whole.nbytes
                    if size > 2048:
                        found[_name] = (
                            found.get(_name, 0.0) + _passes * size * (world.size - 1) / world.size
                        )
                    inside.append(_name)
                    try:
                        return _plain(*args, **named)
                    finally:
                        inside.pop()

                patches.enter_context(mock.patch.object(module, name, counted))
        yield found


def moved(world: World, *, stage: int) -> list[dict[str, float]]:
    """In steps of one and of three micro-batches."""
    with torch.device("meta" if stage == 3 else "cpu"):
        model = tiny_model()
    engine = start_engine(
        model,
        objective=mlm_objective(),
        config=EngineConfig(zero_stage=stage, precision="fp32"),
        optimizer=StableAdamWConfig(),
        world=world,
        device=torch.device("cpu"),
    )
    results = []
    for count in (1, 3):
        rows = [[world.rank + 2 * i] for i in range(count)]
        some = [micro_batch(1, r) for r in rows]
        masked = torch.tensor([sum(b.counts["mlm"] for b in some)])
        dist.all_reduce(masked)
        with sent(world) as found:
            engine.step(some, counts={"mlm": int(masked)}, lr=1e-3, max_lr=1e-3)
        results.append({**found, "parameters": engine.parameter_count})
    return results


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_counts_what_is_sent(stage):
    """Within 10 %: what DeepSpeed pads, and small tensors, are not counted."""
    run = read_run("configs/pretrain/tiny_cpu.yaml", [f"engine.zero_stage={stage}"])
    for found, micro_batches in zip(counted := run_ranks(moved, 2, stage=stage)[0], (1, 3)):
        planned = traffic_of(
            run, parameters=found["parameters"], largest=1, ranks=2, micro_batches=micro_batches
        ).total
        parameters = found.pop("parameters")
        if (
            stage == 3
        ):  # weights as small as these stay on every rank, so only gradients are sent as in a large model
            planned -= micro_batches * 2 * parameters * 4 / 2
            found = {"reduce_scatter_tensor": found["reduce_scatter_tensor"]}
        assert sum(found.values()) == pytest.approx(planned, rel=0.1), (counted, planned)
