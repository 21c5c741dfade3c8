"""Where a run begins that branches off another one: `branch_from`, a checkpoint with its optimizer state.

    parent   stable ----------o-----------o------------o
                              |           |
    branches                  decay       extension ----- decay

A branch is a run like any other: its own run file, folder, phases, schedules and data order begin at zero. From the parent it
has the weights, the optimizer's moments and the number of its steps, and the chain of its ledger goes on from the parent's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.agreement import all_ranks_agree
from encoder.base.dist import World
from encoder.base.errors import CheckpointError, ConfigError
from encoder.base.files import meant_beside
from encoder.base.units import Progress, short_count
from encoder.data.shard_format import TOKENIZER
from encoder.engine.checkpoint.folder import COMMITTED, damage
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.runs.config import RunConfig
from encoder.runs.facts import DataFacts
from encoder.runs.folder import CHECKPOINTS, RUN_FILE
from encoder.runs.initial import check_same_shape
from encoder.runs.vocabulary import edits_of
from encoder.runs.weights import read_saved_run


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A checkpoint that a run branches off, checked to fit."""

    checkpoint: Path
    run: RunConfig  # that saved it
    progress: Progress
    seeds: tuple[int, ...]  # of that run and of those it branched off itself

    @property
    def record(self) -> dict[str, Any]:
        """What the branch writes down: in its ledger's first line, its events and its checkpoints."""
        return {
            "run": self.run.name,
            "checkpoint": str(self.checkpoint),
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "ledger_hash": self.progress.ledger_hash,
            "seeds": list(self.seeds),
        }

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"run {self.run.name}, checkpoint {self.checkpoint.name}: step {self.progress.step:,}, "
            f"{short_count(self.progress.tokens)} tokens, with its optimizer state"
        )


def find_parent(run: RunConfig, world: World, *, facts: DataFacts | None = None) -> Parent:
    """The checkpoint `run.branch_from` names, or the newest of the run folder it names; called on every rank.

    Without `facts` (a plan) the tokenizer is not looked at. Raises CheckpointError, ConfigError, ModelError.
    """
    assert run.branch_from, "only a branch has a parent"
    path = Path(run.branch_from)
    is_checkpoint = (path / COMMITTED).is_file()
    if not is_checkpoint and not (path / CHECKPOINTS).is_dir():
        found = "is no checkpoint and no run folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"branch_from {path} {found}; needed: a run folder or one of its checkpoints, whose"
            f" optimizer state the run goes on with. Weights alone: init_from.{meant_beside(path, folders=True)}"
        )
    checkpoint: Path | None = path
    if not is_checkpoint:
        checkpoint = newest_checkpoint(path / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(
            f"branch_from {path} holds no checkpoint yet; needed: a run that has saved one."
        )
    # newest_checkpoint has looked for damage; of a named one rank zero does it here
    with all_ranks_agree(world):
        if is_checkpoint and world.first and (problem := damage(checkpoint)):
            raise CheckpointError(f"{problem} Branch off another checkpoint.")
        return _fitting(checkpoint, run, facts)


def _fitting(checkpoint: Path, run: RunConfig, facts: DataFacts | None) -> Parent:
    parent, (progress, extra) = read_saved_run(checkpoint / RUN_FILE), read_progress(checkpoint)
    check_same_shape(parent.model, run, key="branch_from", path=checkpoint)
    if type(parent.optimizer) is not type(run.optimizer):
        raise ConfigError(
            f"branch_from {checkpoint} has the state of {parent.optimizer.rule}, the run's"
            f" optimizer is {run.optimizer.rule}. Use the same, or take the weights alone:"
            " init_from."
        )

    # of the parent, its parent, and so on
    seeds = (parent.seed, *(extra.get("parent") or {}).get("seeds", ()))
    if run.seed in seeds:
        raise ConfigError(
            f"seed {run.seed} is that of a run which this one branches off: each phase would read"
            " documents in the order, and mask them, as its phase of the same number did. Use"
            f" another, for example {max(seeds) + 1}."
        )

    if facts and (tokenizer := checkpoint.parent.parent / TOKENIZER).is_file():
        edits_of(tokenizer, facts.tokenizer_json, None)
    return Parent(checkpoint=checkpoint, run=parent, progress=progress, seeds=seeds)
