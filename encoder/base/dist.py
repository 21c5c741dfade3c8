"""Who am I: rank, world and meeting place from torchrun, deepspeed or SLURM, and the process group for them."""

from __future__ import annotations

import datetime
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from encoder.base.errors import ConfigError, PassingError
from encoder.base.slurm import expand_hosts, tasks_per_node


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Rank zero speaks and writes what is written once."""
        return self.rank == 0


def world_from_env(env: Mapping[str, str] | None = None) -> World:
    """Rank and size from RANK/WORLD_SIZE (torchrun, deepspeed), else from srun's own variables, else one rank.

    Raises ConfigError for values that no launcher gives.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        local_size = _whole(env, "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE", 1)
        world = World(rank=_whole(env, "RANK"), size=_whole(env, "WORLD_SIZE"), local_rank=_whole(env, "LOCAL_RANK", 0),
                      local_size=local_size)
    # SLURM_PROCID alone is also set in the batch script itself; SLURM_STEP_ID only inside srun
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _slurm_tasks(env) > 1:
        world = World(rank=_whole(env, "SLURM_PROCID"), size=_slurm_tasks(env), local_rank=_whole(env, "SLURM_LOCALID", 0),
                      local_size=_slurm_local_size(env))
    else:
        return World()
    if world.rank >= world.size:
        raise ConfigError(f"the environment says rank {world.rank} of {world.size}; needed: ranks from 0 to below their number. "
                          "Start with srun, deepspeed or torchrun, or mend RANK and WORLD_SIZE, or unset them.")
    return world


def _whole(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; needed: a whole number, as srun, deepspeed and torchrun set it. Mend or unset it.")
    return int(text)


def _slurm_tasks(env: Mapping[str, str]) -> int:
    # the step's own count first: SLURM_NTASKS may be the job's, where srun ran with --ntasks-per-node alone
    return _whole(env, "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS", 1)


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks on this node. SLURM_NTASKS_PER_NODE, which is there only where it was asked for, says what was asked for."""
    counts, node = env.get("SLURM_STEP_TASKS_PER_NODE"), _whole(env, "SLURM_NODEID", 0)
    return tasks_per_node(counts)[node] if counts else int(env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0])


def meeting_place(env: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Host and port where the ranks of a SLURM step meet: rank zero's node, which is the step's first; None outside a step.

    The port follows from job, restart and step, so that jobs that share a node, and ranks that an unplugged node still runs, do
    not meet one another. It lies in 15000 to 31999, below the ports that Linux gives to connections.
    """
    env = os.environ if env is None else env
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes or "SLURM_STEP_ID" not in env:
        return None
    job, restart, step = (int(env.get(f"SLURM_{key}") or "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return expand_hosts(nodes)[0], 15000 + (job * 97 + restart * 11 + step) % 17000


def device_index(world: World, *, visible: int, env: Mapping[str, str] | None = None) -> int:
    """Which of the `visible` GPUs is this rank's: its own one where SLURM binds GPUs to tasks, else that of its local rank.

    Raises ConfigError where ranks would share a GPU.
    """
    env = os.environ if env is None else env
    if world.local_rank < visible and world.local_size <= visible:
        return world.local_rank
    # --gpus-per-task and --gpu-bind let a task see some of the node's GPUs alone, numbered from 0
    on_node = int(env.get("SLURM_GPUS_ON_NODE") or "0")
    if "SLURM_STEP_ID" in env and on_node >= world.local_size and visible and world.local_size % visible == 0:
        return world.local_rank % visible
    raise ConfigError(f"{world.local_size} ranks on {socket.gethostname()}, but rank {world.rank} sees {visible} "
                      f"GPU{'s' * (visible != 1)}. Needed: one GPU for each rank. Start fewer ranks a node, or ask for more GPUs.")


def join(world: World, *, device: torch.device, timeout_seconds: float = 600.0) -> bool:
    """Start torch.distributed for this world (gloo on CPU, nccl on CUDA); one rank needs no address and no port.

    False if it runs already: whoever started it ends it. Raises ConfigError without an address.
    """
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if "MASTER_ADDR" not in os.environ:
        place = meeting_place()
        if place is None:
            raise ConfigError(f"{world.size} ranks but no MASTER_ADDR. Start with srun, deepspeed or torchrun, "
                              "or set MASTER_ADDR and MASTER_PORT.")
        os.environ.update(MASTER_ADDR=place[0], MASTER_PORT=os.environ.get("MASTER_PORT") or str(place[1]))
    # libraries that look for torchrun's names (deepspeed, streaming) find them whoever started us
    local_rank = device.index if device.type == "cuda" and device.index is not None else world.local_rank     # deepspeed's device
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local_rank),
                      LOCAL_WORLD_SIZE=str(world.local_size), LOCAL_SIZE=str(world.local_size))
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']} port {os.environ.get('MASTER_PORT')}"
        raise PassingError(f"the {world.size} ranks cannot meet at {place} ({' '.join(str(error).split())[:150]}). If another "
                          "program has the port, give another: deepspeed --master_port 29511 ...") from error
    return True


def leave() -> None:
    """End torch.distributed, if it runs."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends a process that had joined, without the interpreter's own ending; call it last, when all files are closed.

    Gloo's threads let go of their last tensors on their own time, and the interpreter aborts a thread that does so
    while it ends: "terminate called without an active exception", exit code 134, in 2 of 50 runs on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def collective_device() -> torch.device:
    """Where collectives take their tensors: on the GPU under nccl."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The tensor summed in place over all ranks, wherever it lies; int64 wraps, which is exact for hashes."""
    return _reduce_over_ranks(values, dist.ReduceOp.SUM)


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum over all ranks, in place."""
    return _reduce_over_ranks(values, dist.ReduceOp.MAX)


def _reduce_over_ranks(values: torch.Tensor, op: dist.ReduceOp) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        there = values.to(collective_device())       # the tensor itself where it lies there
        dist.all_reduce(there, op=op)
        if there is not values:
            values.copy_(there)
    return values


def rank_and_size() -> tuple[int, int]:
    """This process among those that have joined; (0, 1) before."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's table int64 [rows, K], by rank; ranks may have different numbers of rows."""
    rank, size = rank_and_size()
    counts = rows.new_zeros(size)
    counts[rank] = len(rows)
    tables = rows.new_zeros(size, int(sum_over_ranks(counts).max()), rows.shape[1])
    tables[rank, :len(rows)] = rows
    return [table[:count] for table, count in zip(sum_over_ranks(tables), counts.tolist())]


def exchange(chunks: Sequence[torch.Tensor], *, receive: Sequence[int]) -> list[torch.Tensor]:
    """Sends the 1-d chunks[r] to rank r; gives back what each rank r sent here, receive[r] elements."""
    if len(chunks) == 1:
        return list(chunks)
    sent = torch.cat(list(chunks)).to(collective_device())
    received = sent.new_empty(sum(receive))
    dist.all_to_all_single(received, sent, list(receive), [len(chunk) for chunk in chunks])
    return list(received.to(chunks[0].device).split(list(receive)))


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

