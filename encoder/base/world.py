"""Who am I, and where do the ranks meet: from the variables of torchrun, deepspeed or SLURM. Knows nothing of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from encoder.base.errors import ConfigError
from encoder.base.slurm import expand_hosts, tasks_per_node


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # the variable that says how many ranks there are
    said_by: str = field(default="", compare=False)

    @property
    def first(self) -> bool:
        """Rank zero speaks and writes what is written once."""
        return self.rank == 0


def world_from_env(env: Mapping[str, str] = os.environ) -> World:
    """Rank and size from RANK/WORLD_SIZE (torchrun, deepspeed), else from srun's own variables, else one rank.

    Raises ConfigError for values that no launcher gives.
    """
    # launchers before SLURM: torchrun inside srun has a rank for each
    # process, srun one for each node
    if "RANK" in env and "WORLD_SIZE" in env:
        local_size = _whole(env, "LOCAL_SIZE", 1)
        if env.get("LOCAL_WORLD_SIZE"):
            local_size = _whole(env, "LOCAL_WORLD_SIZE")
        world = World(
            rank=_whole(env, "RANK"),
            size=_whole(env, "WORLD_SIZE"),
            local_rank=_whole(env, "LOCAL_RANK", 0),
            local_size=local_size,
            said_by="WORLD_SIZE",
        )
    # SLURM_PROCID alone is also set in the batch script itself; SLURM_STEP_ID only inside srun
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _slurm_tasks(env) > 1:
        world = World(
            rank=_whole(env, "SLURM_PROCID"),
            size=_slurm_tasks(env),
            local_rank=_whole(env, "SLURM_LOCALID", 0),
            local_size=_slurm_local_size(env),
            said_by=_slurm_tasks_variable(env),
        )
    else:
        return World()

    if world.rank >= world.size:
        raise ConfigError(
            f"the environment says rank {world.rank} of {world.size}; needed: ranks from 0 to below"
            " their number. Start with srun, deepspeed or torchrun, or mend RANK and WORLD_SIZE,"
            " or unset them."
        )
    return world


# what launchers say, and what encoder.base.dist says for libraries that look for it
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@contextmanager
def alone() -> Iterator[None]:
    """No word of a launcher in the environment: of LOCAL_RANK alone accelerate takes this process for one of several."""
    found = {name: os.environ.pop(name) for name in _LAUNCHERS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


def _whole(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name} is {text!r}; needed: a whole number, as srun, deepspeed and torchrun set it."
            " Mend or unset it."
        )
    return int(text)


def _slurm_tasks(env: Mapping[str, str]) -> int:
    return _whole(env, _slurm_tasks_variable(env), 1)


def _slurm_tasks_variable(env: Mapping[str, str]) -> str:
    # the step's own count first: SLURM_NTASKS may be the job's, where srun ran
    # with --ntasks-per-node alone
    if env.get("SLURM_STEP_NUM_TASKS"):
        return "SLURM_STEP_NUM_TASKS"
    return "SLURM_NTASKS"


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks on this node. SLURM_NTASKS_PER_NODE, which is there only where it was asked for, says what was asked for."""
    counts, node = env.get("SLURM_STEP_TASKS_PER_NODE"), _whole(env, "SLURM_NODEID", 0)
    if counts:
        return tasks_per_node(counts)[node]
    return int(env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0])


def meeting_place(env: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Host and port where the ranks of a SLURM step meet: rank zero's node, which is the step's first; None outside a step.

    The port follows from job, restart and step, so that jobs that share a node, and ranks that an unplugged node still runs, do
    not meet one another. It lies in 15000 to 31999, below the ports that Linux gives to connections.
    """
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes or "SLURM_STEP_ID" not in env:
        return None
    job, restart, step = (
        int(env.get(f"SLURM_{key}") or "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID")
    )
    return expand_hosts(nodes)[0], 15000 + (job * 97 + restart * 11 + step) % 17000


@dataclass(frozen=True, kw_only=True)
class MeetingPlace:
    """Where rank zero waits for the others."""

    host: str
    port: int
    said_by: str  # which variables said so


def meeting_address(world: World, env: Mapping[str, str] = os.environ) -> MeetingPlace:
    """The meeting place of several ranks, by MASTER_ADDR and MASTER_PORT, else by SLURM's step. Raises ConfigError."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    step_host, step_port = meeting_place(env) or ("", 0)

    if not host and not step_host:
        raise ConfigError(
            f"{world.size} ranks but no MASTER_ADDR. Start with srun, deepspeed or torchrun, "
            "or set MASTER_ADDR and MASTER_PORT."
        )
    if not port and not step_host:
        raise ConfigError(
            f"{world.size} ranks and MASTER_ADDR {host}, but no MASTER_PORT. Set it to a port that"
            " is free on rank zero's machine, the same on all ranks, such as 29500."
        )
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port[:9]) < 65536):
        raise ConfigError(
            f"MASTER_PORT is {port[:80]!r}; needed: a port from 1 to 65535 that is free on rank"
            " zero's machine, the same on all ranks. Mend it, such as 29500, or unset it and start"
            " with deepspeed or torchrun."
        )

    said_by = [name for name, said in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if said] or [
        "SLURM_STEP_NODELIST"
    ]
    return MeetingPlace(
        host=host or step_host,
        port=int(port) if port else step_port,
        said_by=" and ".join(said_by),
    )
