"""Loaders and windows for tests from a flat list of settings, where one is changed at a time."""

from __future__ import annotations

from typing import Any

from encoder.base.batch import TokenBatch
from encoder.base.world import World
from encoder.data.assembly import Dealing
from encoder.data.loader import DataPosition, Loader, WorkerSettings, evaluation_batches
from encoder.data.windows import DataOrder, RowGeometry, Windows

ORDER = (
    "weights",
    "seed",
    "phase",
    "window_documents",
    "lanes",
    "shuffle_shards",
    "piece_order",
    "left_out",
)
GEOMETRY = ("row_tokens", "max_tokens_per_document", "join")


def loader_with(sources, *, workers=0, prefetch_windows=0, start=None, **settings) -> Loader:
    """A loader; by default of one source, one rank, at the beginning of the first phase."""
    settings = {"weights": [1.0] * len(sources), "seed": 1, "phase": 0, **settings}
    order = DataOrder(**_taken(settings, ORDER))
    geometry = RowGeometry(**_taken(settings, GEOMETRY))
    dealing = _dealing(settings)
    return Loader(
        sources,
        order=order,
        geometry=geometry,
        dealing=dealing,
        workers=WorkerSettings(processes=workers, prefetch_windows=prefetch_windows),
        start=start or DataPosition(),
        **settings,
    )


def windows_with(sources, **settings) -> Windows:
    """The windows of a phase; by default of the first, each source of the same weight."""
    settings = {"weights": [1.0] * len(sources), "seed": 1, "phase": 0, **settings}
    order = DataOrder(**_taken(settings, ORDER))
    geometry = RowGeometry(**_taken(settings, GEOMETRY))
    return Windows(sources, order=order, geometry=geometry, **settings)


def held_out_with(source, **settings) -> list[TokenBatch]:
    """The held-out batches of a source."""
    geometry = RowGeometry(**_taken(settings, GEOMETRY))
    dealing = _dealing(settings)
    return evaluation_batches(source=source, geometry=geometry, dealing=dealing, **settings)


def _dealing(settings: dict[str, Any]) -> Dealing:
    return Dealing(
        world=World(rank=settings.pop("rank", 0), size=settings.pop("world_size", 1)),
        micro_batch_rows=settings.pop("micro_batch_rows", 1),
        static_shapes=settings.pop("static_shapes", False),
        shape_step=settings.pop("shape_step", 1),
    )


def _taken(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """These settings, which are then no longer among the others."""
    return {name: settings.pop(name) for name in names if name in settings}
