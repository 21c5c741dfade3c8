"""Before the first step of a run: the data and the folder are looked at, the engine started, the newest checkpoint loaded."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encoder.base.agreement import all_ranks_agree
from encoder.base.dist import World
from encoder.base.errors import CheckpointError
from encoder.base.log import say, warn_once
from encoder.base.units import Progress, counted, short_count
from encoder.engine.checkpoint.folder import committed_folders
from encoder.engine.checkpoint.read import claim_incarnation, load_checkpoint, newest_checkpoint
from encoder.engine.engine import Engine, start_engine
from encoder.engine.precision import computes_bf16
from encoder.runs.folder import CHECKPOINTS, LEDGER
from encoder.runs.lock import RunLock, lock_folder
from encoder.train import build
from encoder.train.course import Course, RunSettings, SavedWeights

# relative; the same weights on other ranks, threads or kernels differ by rounding only: 1e-6 in fp32, 1e-4 where bf16 is in it
FINGERPRINT_TOLERANCE = {"fp64": 1e-5, "fp32": 1e-5, "autocast": 2e-3, "bf16": 2e-3}


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a run stands on when its first step comes."""

    engine: Engine
    incarnation: int
    progress: Progress
    resumed: bool
    last_evaluation: dict[str, float | None]  # of the checkpoint
    bad_steps: dict[str, Any]  # of the checkpoint, for the judge of steps
    lock: RunLock | None  # of the folder, on rank zero


def start_run(
    course: Course, world: World, device: torch.device, held: contextlib.ExitStack
) -> Started:
    """Everything before the first step; an error on one rank ends all of them here.

    course: what the run trains on
    world, device: of this rank
    held: keeps the folder's lock
    """
    run = course.run
    folder = Path(run.out)
    lock: RunLock | None = None
    course.prepare(fresh=not committed_folders(folder / CHECKPOINTS))

    # one start at a time; the other ranks wait here for rank zero's lock
    with all_ranks_agree(world):
        if world.first:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(lock_folder(folder))

    objective = course.make_objective()
    model = course.make_model()
    engine = start_engine(
        model,
        objective=objective,
        config=run.engine,
        optimizer=run.optimizer,
        world=world,
        device=device,
        factors=course.factors(model),
    )
    if build.compiles(run, device):
        engine.module.compile_blocks_()

    # its own checkpoint, or what the course starts from
    extra: dict[str, Any] = {}
    found = newest_checkpoint(folder / CHECKPOINTS)
    if found is not None:
        with all_ranks_agree(world):
            course.check_same(found)
        progress, extra = load_verified(found, course, engine, device)
    else:
        progress = course.set_first_weights(engine)
    course.take_up(extra)
    # from here on an older start of this run cannot save any more
    incarnation = claim_incarnation(folder, world)

    _say_header(course, world, device, engine, progress, found)
    for line in course.origin_lines():
        say(line)
    return Started(
        engine=engine,
        incarnation=incarnation,
        progress=progress,
        resumed=found is not None,
        last_evaluation=extra.get("last_held_out", {}),
        bad_steps=extra.get("bad_steps", {}),
        lock=lock,
    )


def _say_header(
    course: Course,
    world: World,
    device: torch.device,
    engine: Engine,
    progress: Progress,
    found: Path | None,
) -> None:
    run = course.run
    in_8_bits = ""
    if run.engine.fp8 == "layers":
        in_8_bits = ", layers in 8 bits"
    say(
        f"{run.name}: {short_count(engine.parameter_count)} parameters,"
        f" {counted(world.size, 'rank')} on {device.type}"
        f" ({counted(torch.get_num_threads(), 'thread')} each), ZeRO-{run.engine.zero_stage},"
        f" {run.engine.precision}{in_8_bits}, {course.amount}, run folder {run.out}"
    )
    say(f"attention: {'; '.join(_how_layers_run(run, device, engine))}")
    if run.engine.precision in ("bf16", "autocast") and not computes_bf16(device):
        say(
            f"precision {run.engine.precision} on a {device.type} without units for bf16: up to 30"
            " times as slow as fp32"
        )
    for line in course.warnings():
        warn_once(line)
    if stays := course.export_text:
        say(f"export: {stays}")
    ledger = Path(run.out) / LEDGER
    if found is not None:
        say(
            f"resumed from {found.name}: step {progress.step}, {short_count(progress.tokens)}"
            f" tokens, ledger {progress.ledger_hash}"
        )
    elif ledger.exists() and ledger.stat().st_size:
        say(
            "no checkpoint is there: from the first step again, held to the ledger of the start"
            " before"
        )


def _how_layers_run(run: RunSettings, device: torch.device, engine: Engine) -> list[str]:
    # under autocast a kernel meets bf16, whatever the weights are
    with engine.forward_mode():
        texts = [engine.module.attention_reason(device)]
    if build.compiles(run, device):
        texts.append("layers compiled")
    if run.engine.activation_checkpointing == "blocks":
        texts.append("layers computed again in the backward")
    if run.engine.graphs == "micro_step":
        texts.append("micro-steps as CUDA graphs")
    return texts


def fingerprint(course: SavedWeights, engine: Engine, device: torch.device) -> float:
    """The mean loss on the fixed batch, by which a load is known to be what was saved."""
    batch = course.fingerprint_batch(engine.objective)
    found = engine.evaluate([batch.to(device)])
    return sum(term.sum / term.count for term in found.values())


def load_verified(
    found: Path, course: SavedWeights, engine: Engine, device: torch.device
) -> tuple[Progress, dict[str, Any]]:
    """A checkpoint of a course into the engine; verified against the loss that was saved with it."""
    progress, extra = load_checkpoint(found, engine)
    engine.module.set_phase_(course.model_at(progress))

    # both losses carry the rounding of their precision, so the wider tolerance holds
    loss, recorded = fingerprint(course, engine, device), extra["fingerprint_loss"]
    tolerance = max(
        FINGERPRINT_TOLERANCE[word]
        for word in (engine.config.precision, extra["fingerprint_precision"])
    )
    # `not <=`: a loss that is nan fails as well
    if not abs(loss - recorded) <= tolerance * abs(recorded):
        raise CheckpointError(
            f"{found}: the loss of the fixed batch is {loss:.8f}, {recorded:.8f} was recorded at"
            " save. The weights did not come back as they went; remove this folder to use the one"
            " before."
        )
    return progress, extra
