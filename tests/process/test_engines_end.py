"""Engines one after another, and one while another trains: what is closed is gone, and what goes on does not notice."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from encoder.base.dist import World
from encoder.engine.engine import Engine
from tests.process.engine_cases import begin, train
from tests.process.ranks import run_ranks

STAGES = (0, 1, 2, 3)


def stepped(world: World, stage: int, steps: range = range(2)) -> tuple[Engine, list[float]]:
    engine, spike = begin(world, zero_stage=stage)
    return engine, train(engine, spike, rows=2, steps=steps)


def gone_after_closing(world: World, stage: int) -> bool:
    """Whether nothing of an engine that has made steps is left once it is closed."""
    engine, _ = stepped(world, stage)
    weight = next(engine.module.parameters())
    parts = [weakref.ref(part) for part in (engine, engine._ds, engine.module, weight)]
    engine.close()
    del engine, weight
    gc.collect()
    return not any(part() for part in parts)


def ended(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in STAGES:
        gone = [gone_after_closing(world, stage)]
        objects = len(gc.get_objects())
        gone.append(gone_after_closing(world, stage))
        found[str(stage)] = {"gone": gone, "more": len(gc.get_objects()) - objects}

    # the first of two engines trains on when the second has gone
    engine, spike = begin(world, zero_stage=3)
    losses = train(engine, spike, rows=2, steps=range(2))
    other_gone = gone_after_closing(world, 3)
    losses += train(engine, spike, rows=2, steps=range(2, 4))
    found["beside"] = {"losses": losses, "gone": other_gone}
    engine.close()
    found["alone"] = stepped(world, 3, range(4))[1]
    return found


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_ranks(ended, 2)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_of_an_engine_is_left_once_it_is_closed(seen, stage):
    found = seen[str(stage)]
    assert found["gone"] == [True, True]
    # an engine of two layers is 5,000 objects at stage 3
    assert found["more"] < 100


def test_an_engine_does_not_notice_that_another_came_and_went(seen):
    assert seen["beside"]["losses"] == seen["alone"] and seen["beside"]["gone"]
