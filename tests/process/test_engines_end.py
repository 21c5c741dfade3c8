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


def gone_twice(world: World, *, stage: int) -> dict[str, Any]:
    """Whether two engines were gone once they were closed, and how many objects the second one left."""
    gone = [gone_after_closing(world, stage)]
    objects = len(gc.get_objects())
    gone.append(gone_after_closing(world, stage))
    return {"gone": gone, "more": len(gc.get_objects()) - objects}


def beside(world: World) -> dict[str, Any]:
    """The first of two engines trains on when the second has gone; and one that was always alone."""
    engine, spike = begin(world, zero_stage=3)
    losses = train(engine, spike, rows=2, steps=range(2))
    other_gone = gone_after_closing(world, 3)
    losses += train(engine, spike, rows=2, steps=range(2, 4))
    engine.close()
    return {"losses": losses, "gone": other_gone, "alone": stepped(world, 3, range(4))[1]}


@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(stage, marks=pytest.mark.matrix) for stage in (0, 1, 2))]
)
def test_nothing_of_an_engine_is_left_once_it_is_closed(stage):
    for found in run_ranks(gone_twice, 2, stage=stage):
        assert found["gone"] == [True, True]
        # an engine of two layers is 5,000 objects at stage 3
        assert found["more"] < 100


@pytest.mark.matrix
def test_an_engine_does_not_notice_that_another_came_and_went():
    for found in run_ranks(beside, 2):
        assert found["losses"] == found["alone"] and found["gone"]
