"""What to do when a run has ended, as commands that can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from encoder.base.command import as_typed
from encoder.base.dist import World
from encoder.models.hf.catalog import export_blocker
from encoder.runs.config import RunConfig
from encoder.runs.folder import RUN_FILE


def what_comes_next(run: RunConfig, folder: Path) -> list[str]:
    """Lines for the end of a run: its page, its export, and a question to the exported model.

        next: tessera report runs/small                   its page, report.html
              tessera export runs/small runs/small-hf     a Hugging Face folder, proven
              tessera fill-mask runs/small-hf 'It is a [MASK].'

    A model that Hugging Face has no word for becomes a weights folder instead.
    """
    beside = folder.with_name(f"{folder.name}-hf")
    commands = [(as_typed("report", folder), "its curves and results, as a page")]
    if export_blocker(run.model):
        weights = folder.with_name(f"{folder.name}-weights")
        commands.append((as_typed("average", folder, "--out", weights), "its weights, as a folder"))
    else:
        commands += [
            (as_typed("export", folder, beside), "a Hugging Face folder with a model card"),
            (as_typed("fill-mask", beside, "It is a [MASK]."), "what it answers"),
        ]
    width = max(len(command) for command, _ in commands)
    first = ["next: ", *["      "] * (len(commands) - 1)]
    return [f"{mark}{c:<{width}}   {why}" for mark, (c, why) in zip(first, commands, strict=True)]


def how_to_go_on(folder: Path, world: World, *, verb: str = "pretrain") -> str:
    """How a run that was stopped goes on: by the command that started it, or by its own run file.

    folder: of the run
    world: this rank among the others
    verb: that starts such a run; its file in launch has the same name
    """
    same = "the same command goes on from here"
    run_file = folder / RUN_FILE
    if world.size == 1:
        return f"{same}, and so does: {as_typed(verb, run_file)}"
    if world.size == world.local_size:
        ranks = ["torchrun", "--standalone", "--nproc-per-node", str(world.size)]
        typed = shlex.join([*ranks, "-m", f"launch.{verb}", str(run_file)])
        return f"{same}, and so does: {typed}"
    return f"{same}, on any number of ranks"
