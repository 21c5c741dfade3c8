"""What a sweep would train, and how long here: rows are read and encoded, a few micro-batches timed, nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from encoder.base.dist import World
from encoder.base.units import counted, short_count, short_seconds
from encoder.data.examples import ExampleDealing, in_order
from encoder.finetune.prepare import Prepared, prepare, read_start
from encoder.finetune.sweeps.board import Board
from encoder.finetune.sweeps.points import Point, Sweep
from encoder.models.with_task import build_task_model
from encoder.objectives.text_tasks import TERM
from encoder.train import build

TIMED_SECONDS = 2.0
# a forward and a backward against a forward: evaluations have no backward
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class PointForecast:
    """One point."""

    steps: int
    tokens: int  # trained
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Rows that were read, and how fast a model of their task is here."""

    prepared: Prepared
    tokens_per_second: float


def forecast_text(sweeps: Sequence[Sweep], *, parallel: int) -> str:
    """Of all sweeps, for people. Raises UserError for rows that cannot be used.

    sweeps: each behind the one that it comes after
    parallel: processes at a time
    """
    lines: list[str] = []
    seconds = 0.0
    board = Board(sweeps)
    for sweep in sweeps:
        told, own = _sweep_lines(sweep, board)
        lines += told
        seconds += own
    share = f" in {parallel} processes" if parallel > 1 else ""
    lines.append(
        f"about {short_seconds(seconds / parallel)}{share} on this machine: forwards and backwards,"
        " evaluations too; updates and starts are not counted"
    )
    return "\n".join(lines)


def _sweep_lines(sweep: Sweep, board: Board) -> tuple[list[str], float]:
    points = sweep.points()
    done = sum(board.is_done(point) for point in points)
    fresh = len(sweep.config.confirm_seeds)
    lines = [
        f"{sweep.name}: {counted(len(points), 'point')}, {len(sweep.settings)} settings x"
        f" {counted(len(sweep.seeds), 'seed')}, {done} done; then {fresh} of the chosen setting",
    ]
    known: dict[str, _Measured] = {}
    seconds, longest = 0.0, 0.0
    for setting in sweep.settings:
        own = [point for point in points if point.setting == setting]
        found = _forecast(sweep, own[0], known)
        left = sum(not board.is_done(point) for point in own)
        seconds += left * found.seconds
        longest = max(longest, found.seconds)
        lines.append(
            f"    {setting.text}: {found.steps:,} steps, {short_count(found.tokens)} tokens,"
            f" {short_seconds(found.seconds)} a point, {left} to be trained"
        )
    return lines, seconds + fresh * longest


def _forecast(sweep: Sweep, point: Point, known: dict[str, _Measured]) -> PointForecast:
    """Of a point; rows that another one had are not read again."""
    task = sweep.task(point, start_from=_first_start(sweep))
    key = repr((task.data, task.task, task.start_from, task.dropout))
    if key not in known:
        prepared = prepare(task, read_start(task))
        rate = _tokens_per_second(prepared)
        known[key] = _Measured(prepared=prepared, tokens_per_second=rate)
    prepared = known[key].prepared
    train = prepared.train
    steps = math.ceil(len(train) / task.batch_examples) * task.epochs
    tokens = len(train.ids_A) * task.epochs
    asked = sum(len(asked.examples.ids_A) for asked in (*prepared.dev,))
    evaluations = 1 + math.ceil(task.epochs / task.evaluate.every_epochs)
    last = sum(len(asked.examples.ids_A) for asked in prepared.test)
    forwards = (asked * evaluations + last) * FORWARD_SHARE
    return PointForecast(
        steps=steps,
        tokens=tokens,
        seconds=(tokens + forwards) / known[key].tokens_per_second,
    )


def _first_start(sweep: Sweep) -> str | None:
    """A model of the same shape as what points start from: that of the first sweep before."""
    if sweep.after is None:
        return None
    return _first_start(sweep.after) or sweep.after.base.start_from


def _tokens_per_second(prepared: Prepared) -> float:
    """Of forwards and backwards of the first micro-batches, without an update, with drawn weights."""
    task = prepared.task
    device = build.choose_device(task, World())
    model = build_task_model(
        task.model,
        prepared.head,
        attention=task.attention,
        seed=0,
    ).to(device)
    dealing = ExampleDealing(world=World(), micro_batch_tokens=task.loader.micro_batch_tokens)
    batches = [
        made.batch.to(device) for made in in_order(prepared.train, term=TERM, dealing=dealing)[:8]
    ]
    done, began, tokens = 0, 0.0, 0
    # the first one is no measure: kernels are looked for, memory is taken
    while done == 0 or time.perf_counter() - began < TIMED_SECONDS:
        batch = batches[done % len(batches)]
        (loss,) = prepared.objective.loss(model, batch).values()
        loss.total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if done == 0:
            began = time.perf_counter()
        else:
            tokens += batch.tokens
        done += 1
    return tokens / (time.perf_counter() - began)
