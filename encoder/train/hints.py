"""What to do when a run has ended, as commands that can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from encoder.base.command import as_typed
from encoder.base.dist import World
from encoder.models.catalog import networks_of
from encoder.models.contract import ModelConfig
from encoder.models.hf.catalog import bridge_of, export_blocker
from encoder.models.hf.use import FILL_MASK
from encoder.runs.config import RunConfig
from encoder.runs.folder import RUN_FILE


def what_comes_next(run: RunConfig, folder: Path) -> list[str]:
    """Lines for the end of a run: its page, its export, and a question to the exported model.

        next: tessera report runs/small                   its page, report.html
              tessera export runs/small runs/small-hf     a Hugging Face folder, proven
              tessera fill-mask runs/small-hf 'It is a [MASK].'

    A model that Hugging Face has no word for becomes a weights folder instead. A class without fill-mask is not asked.
    """
    beside = folder.with_name(f"{folder.name}-hf")
    commands = [(as_typed("report", folder), "its curves and results, as a page")]
    if export_blocker(run.model):
        weights = folder.with_name(f"{folder.name}-weights")
        commands.append((as_typed("average", folder, "--out", weights), "its weights, as a folder"))
    else:
        commands.append(
            (as_typed("export", folder, beside), "a Hugging Face folder with a model card")
        )
        if _fills_masks(run.model):
            asked = as_typed("fill-mask", beside, "It is a [MASK].")
            commands.append((asked, "what it answers"))
    width = max(len(command) for command, _ in commands)
    first = ["next: ", *["      "] * (len(commands) - 1)]
    return [f"{mark}{c:<{width}}   {why}" for mark, (c, why) in zip(first, commands, strict=True)]


def _fills_masks(config: ModelConfig) -> bool:
    """Whether the exported model, of several networks the one that is used afterwards, is of a class for masked tokens."""
    used = next(iter(networks_of(config).values()), config)
    bridge = bridge_of(used)
    return bridge is not None and bridge.use(used).pipeline_tag == FILL_MASK


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
