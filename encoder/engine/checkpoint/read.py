"""Checkpoints that cannot be wrong: by parameter name and range, committed last, verified on load, fenced by incarnation.

    RUN/incarnations/0001, 0002, ...     one empty file per start of the run; only the newest may commit or delete
    RUN/checkpoints/tokens0000001234567-i0002/
        rank00000.safetensors ...        slices of parameters: masters and optimizer state
        state.json                       shapes by name, optimizer steps, ranks and ZeRO stage of the save
        progress.json  run.yaml  environment.json
        MANIFEST.json                    size and SHA-256 of every file above
        COMMITTED                        written last, the SHA-256 of the manifest: a folder without it does not exist
        MILESTONE                        only where retention must keep the folder; holds the milestone's name

While it is written a folder is called `.NAME.part`. Any number of ranks and any ZeRO stage reads every save.
How a save is made stands in checkpoint_save.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from encoder.base.agreement import run_on_all_ranks
from encoder.base.dist import World, sum_over_ranks
from encoder.base.errors import CheckpointError, ConfigError
from encoder.base.log import warn_once
from encoder.base.schema import from_mapping
from encoder.base.units import Progress
from encoder.base.untrusted import read_json
from encoder.engine.checkpoint.folder import (
    FORMAT,
    claim_next,
    committed_folders,
    damage,
    folder_name,
)
from encoder.engine.checkpoint.tensors import StretchReader
from encoder.engine.engine import Engine


def claim_incarnation(run_folder: Path, world: World) -> int:
    """The number of this start of the run; from now on older starts can neither commit nor delete. Raises CheckpointError."""
    # stays zero on all ranks but the first, so the sum is its number
    claimed = torch.zeros(1, dtype=torch.int64)
    run_on_all_ranks(
        (lambda: claimed.fill_(claim_next(run_folder))) if world.first else None,
        doing=f"cannot claim a start of the run in {run_folder}",
    )
    return int(sum_over_ranks(claimed))


def newest_checkpoint(root: Path, *, fits: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """The last committed folder whose files are what its manifest says; None if there was never one.

    Only those that `fits` count. With ranks joined, rank zero reads and all get its answer.
    A damaged folder is named and the one before it taken.
    Raises CheckpointError if there are checkpoints but none is whole.
    """
    folders = committed_folders(root)
    # stays zero on all ranks but the first, so the sum is its choice; incarnation 0: none
    names = torch.zeros(2, dtype=torch.int64)  # tokens, incarnation

    def choose() -> None:
        problem = None
        for folder in reversed(folders):
            problem = damage(folder)
            if problem is None and not fits(folder):
                continue
            if problem is None:
                tokens, incarnation = folder.name.removeprefix("tokens").split("-i")
                names.copy_(torch.tensor([int(tokens), int(incarnation)]))
                return
            warn_once(
                f"{problem} Checkpoint {folder.name} is left out, the one before it is tried."
            )

        # none was chosen, and the oldest is damaged as well
        if problem:
            raise CheckpointError(
                f"none of the {len(folders)} checkpoints in {root} is whole: {problem} "
                "Start anew with another out."
            )

    first = not dist.is_initialized() or dist.get_rank() == 0
    run_on_all_ranks(choose if first else None, doing=f"cannot read the checkpoints in {root}")
    tokens, incarnation = sum_over_ranks(names).tolist()
    if incarnation:
        return root / folder_name(tokens=tokens, incarnation=incarnation)
    return None


def load_checkpoint(folder: Path, engine: Engine) -> tuple[Progress, dict[str, Any]]:
    """Reads a checkpoint into an engine of any rank count and ZeRO stage; gives back (progress, extra).

    Called on every rank. Raises CheckpointError on all ranks if it is damaged or belongs to another model.
    """
    state: dict[str, Any] = {}

    def load() -> None:
        state.update(_read_state(folder))
        _check_same_model(folder, saved=state["shapes"], ours=engine.shapes)
        with StretchReader(folder) as reader:
            for piece in engine.pieces():
                for kind, tensor in piece.tensors.items():
                    reader.copy_into(tensor, name=piece.name, start=piece.start, kind=kind)
        state["progress"], state["extra"] = read_progress(folder)

    # what follows is a collective: only after every rank has read all of its pieces
    run_on_all_ranks(
        load,
        doing=f"cannot read checkpoint {folder}",
        then="Remove this folder to use the one before it.",
    )
    engine.state_was_loaded(optimizer_steps=state["optimizer_steps"])
    return state["progress"], state["extra"]


def read_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Where the run stood, and the `extra` of the save. Raises CheckpointError."""
    path = folder / "progress.json"
    saved = _read_json(path)
    if not isinstance(saved.get("progress"), dict) or not isinstance(saved.get("extra"), dict):
        raise CheckpointError(f"{path} has no progress or no extra. Use another checkpoint.")
    try:
        return from_mapping(Progress, saved["progress"], where=str(folder)), saved["extra"]
    except ConfigError as error:
        raise CheckpointError(f"{error} Use another checkpoint.") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The whole master weights by name (fp32, or fp64 of an fp64 run) on the CPU; for one process. Raises CheckpointError."""
    weights: dict[str, torch.Tensor] = {}
    try:
        with StretchReader(folder) as reader:
            for name, shape in _read_state(folder)["shapes"].items():
                # before memory is taken for what a file only claims
                reader.check_whole(name, math.prod(shape))
                weights[name] = torch.empty(shape, dtype=reader.dtype)
                reader.copy_into(weights[name].view(-1), name=name, start=0, kind="master")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read checkpoint {folder}: {error}. Use another one."
        ) from error
    return weights


def _check_same_model(
    folder: Path, *, saved: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]
) -> None:
    for name in [*ours, *saved]:
        if saved.get(name) != ours.get(name):
            there, here = (
                " x ".join(map(str, s[name])) if name in s else "absent" for s in (saved, ours)
            )
            raise CheckpointError(
                f"{folder} is of another model: {name} is {there} there, {here} here. "
                "Use the model of its run.yaml, or another out."
            )


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    state = _read_json(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {ascii(state.get('format'))[:40]}; this version reads format"
            f" {FORMAT}."
        )

    # the file may come from anywhere; by type() true is no number
    shapes, steps = state.get("shapes"), state.get("optimizer_steps")
    if (
        not isinstance(shapes, dict)
        or not all(map(_is_shape, shapes.values()))
        or type(steps) is not int
        or steps < 0
    ):
        raise CheckpointError(
            f"{path} has no shapes of parameters or no optimizer_steps. Use another checkpoint."
        )
    return {**state, "shapes": {name: tuple(shape) for name, shape in shapes.items()}}


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**40 for size in value
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, root=dict, error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Use another checkpoint.") from error
