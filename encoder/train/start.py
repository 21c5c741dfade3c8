"""Before the first step of a run: the data and the folder are looked at, the engine started, the newest checkpoint loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from encoder.base.agreement import all_ranks_agree
from encoder.base.dist import World
from encoder.base.errors import CheckpointError
from encoder.base.log import say, warn_once
from encoder.base.units import Progress, counted, short_count
from encoder.data.shards import Source
from encoder.engine.checkpoint.folder import committed_folders
from encoder.engine.checkpoint.read import claim_incarnation, load_checkpoint, newest_checkpoint
from encoder.engine.engine import Engine, start_engine
from encoder.engine.precision import computes_bf16
from encoder.models.hf.catalog import export_blocker
from encoder.runs.branch import find_parent
from encoder.runs.checks import hints_of
from encoder.runs.config import RunConfig
from encoder.runs.defaults import slow_precision_text, warnings_of
from encoder.runs.facts import DataFacts
from encoder.runs.folder import CHECKPOINTS, LEDGER, RUN_FILE
from encoder.runs.initial import InitialWeights
from encoder.runs.lock import RunLock, lock_folder
from encoder.runs.objective_models import AskedModel
from encoder.runs.phases import phase_of_weights
from encoder.runs.same import check_same_content, check_same_settings
from encoder.train import build
from encoder.train.quarantine import Quarantine

# relative; the same weights on other ranks, threads or kernels differ by rounding only: 1e-6 in fp32, 1e-4 where bf16 is in it
FINGERPRINT_TOLERANCE = {"fp64": 1e-5, "fp32": 1e-5, "autocast": 2e-3, "bf16": 2e-3}


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a run stands on when its first step comes."""

    engine: Engine
    incarnation: int
    progress: Progress
    entropy: float | None  # unigram entropy of the held-out text, on rank zero
    resumed: bool
    last_held_out: dict[str, float | None]  # of the checkpoint
    # of the weights of init_from, also when resumed; on rank zero
    init_sha256: str | None
    parent: dict[str, Any] | None  # what branch_from named, also when resumed
    bad_steps: dict[str, Any]  # of the checkpoint, for the judge of steps
    quarantine: Quarantine
    lock: RunLock | None  # of the folder, on rank zero
    # of the weights of the models that the objective asks, by setting; on rank zero
    objective_sha256: dict[str, str] = field(default_factory=dict)


def start_run(
    run: RunConfig,
    facts: DataFacts,
    world: World,
    device: torch.device,
    held: contextlib.ExitStack,
    initial: InitialWeights | None,
    mistakes: Sequence[str] = (),
    asked: Mapping[str, AskedModel] | None = None,
) -> Started:
    """Everything before the first step; `held` keeps the folder's lock. An error on one rank ends all of them here.

    `initial`: what init_from names; its weights are taken into the engine unless a checkpoint is there, and let go.
    `mistakes`: of the settings of a run that has begun, to be said.
    `asked`: the models that the objective asks; their weights go to the device, and are let go here.
    """
    asked = asked or {}
    folder = Path(run.out)
    entropy: float | None = None
    lock: RunLock | None = None

    # rank zero alone looks at files; sizes do not count where damaged shards are left out
    with all_ranks_agree(world):
        sources: list[Source] = []
        for phase in run.phases:
            sources += build.open_mixture(run.sources_of(phase))
        if world.first:
            for source in sources:
                source.check_files(sizes=run.loader.on_bad_shard == "stop")
            entropy = build.held_out_entropy(run, facts)

    # a parent is looked for once: a run that has a checkpoint goes on from that
    fresh = not committed_folders(folder / CHECKPOINTS)
    parent = find_parent(run, world, facts=facts) if run.branch_from and fresh else None

    # one start at a time; the other ranks wait here for rank zero's lock
    with all_ranks_agree(world):
        if world.first:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(lock_folder(folder))

    models = build.make_objective_models(run, asked, device)
    objective = build.make_objective(run, facts, run.phases[0], models=models)
    engine = start_engine(
        build.make_model(run),
        objective=objective,
        config=run.engine,
        optimizer=run.optimizer,
        world=world,
        device=device,
    )
    if build.compiles(run, device):
        engine.module.compile_blocks_()

    # the first that is there: its own checkpoint, the parent's of a branch, init_from's weights;
    # else the weights stay those of the seed
    progress = Progress()
    extra: dict[str, Any] = {}
    found = newest_checkpoint(folder / CHECKPOINTS)
    if found is not None:
        with all_ranks_agree(world):
            check_same_settings(run, found / RUN_FILE, of=str(found))
            check_same_content(run, facts, found, asked=asked, first=world.first)
        progress, extra = load_verified(found, run, engine, device)
    elif parent:
        load_verified(parent.checkpoint, parent.run, engine, device)
        # weights and optimizer state are the parent's, and its ledger's chain goes on;
        # step and tokens begin at zero
        progress, extra = (
            Progress(ledger_hash=parent.progress.ledger_hash),
            {"parent": parent.record},
        )
    elif run.init_from or run.branch_from:
        assert initial, f"{folder} had a checkpoint a moment ago"
        engine.set_masters(lambda name, _shape: initial.weights[name])
        initial.weights.clear()  # 1.6 GB of the large model, on every rank
    # from here on an older start of this run cannot save any more
    incarnation = claim_incarnation(folder, world)

    _say_header(run, world, device, engine, progress, found, mistakes)
    if initial:
        for line in initial.lines:
            say(line)
    elif parent:
        say(f"branched off {parent.text}")
    for model in asked.values():
        for line in model.lines:
            say(line)
    return Started(
        engine=engine,
        incarnation=incarnation,
        progress=progress,
        entropy=entropy,
        resumed=found is not None,
        last_held_out=extra.get("last_held_out", {}),
        init_sha256=initial.sha256 if initial else extra.get("init_sha256"),
        parent=extra.get("parent"),
        bad_steps=extra.get("bad_steps", {}),
        quarantine=Quarantine(folder, extra.get("quarantine", [])),
        lock=lock,
        objective_sha256={name: m.sha256 for name, m in asked.items() if m.sha256},
    )


def _say_header(
    run: RunConfig,
    world: World,
    device: torch.device,
    engine: Engine,
    progress: Progress,
    found: Path | None,
    mistakes: Sequence[str],
) -> None:
    tokens = sum(phase.tokens for phase in run.phases)
    in_8_bits = ""
    if run.engine.fp8 == "layers":
        in_8_bits = ", layers in 8 bits"
    say(
        f"{run.name}: {short_count(engine.parameter_count)} parameters,"
        f" {counted(world.size, 'rank')} on {device.type}"
        f" ({counted(torch.get_num_threads(), 'thread')} each), ZeRO-{run.engine.zero_stage},"
        f" {run.engine.precision}{in_8_bits}, {short_count(tokens)} tokens in"
        f" {counted(len(run.phases), 'phase')}, run folder {run.out}"
    )
    say(f"attention: {'; '.join(_how_layers_run(run, device, engine))}")
    if run.engine.precision in ("bf16", "autocast") and not computes_bf16(device):
        say(
            f"precision {run.engine.precision} on a {device.type} without units for bf16: up to 30"
            " times as slow as fp32"
        )
    for line in (
        *mistakes,
        *warnings_of(run),
        *(hints_of(run, ranks=world.size) if world.first else ()),
    ):
        warn_once(line)
    if (
        device.type == "cuda"
        and computes_bf16(device)
        and (slow := slow_precision_text(run, on_cuda=True))
    ):
        warn_once(slow)
    if stays := export_blocker(run.model):
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


def _how_layers_run(run: RunConfig, device: torch.device, engine: Engine) -> list[str]:
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


def fingerprint(run: RunConfig, engine: Engine, device: torch.device) -> float:
    """The mean loss on the fixed batch, by which a load is known to be what was saved."""
    batch = build.fingerprint_batch(run, engine.objective)
    found = engine.evaluate([batch.to(device)])
    return sum(term.sum / term.count for term in found.values())


def load_verified(
    found: Path, run: RunConfig, engine: Engine, device: torch.device
) -> tuple[Progress, dict[str, Any]]:
    """A checkpoint of `run` into the engine; verified against the loss that was saved with it."""
    progress, extra = load_checkpoint(found, engine)
    # under the thetas that the loss was recorded with
    engine.module.set_phase_(run.phases[phase_of_weights(progress)].model)

    # both losses carry the rounding of their precision, so the wider tolerance holds
    loss, recorded = fingerprint(run, engine, device), extra["fingerprint_loss"]
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
