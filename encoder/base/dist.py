"""The process group of the ranks: they meet, sum, exchange and leave."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from encoder.base.errors import ConfigError, PassingError, UserError
from encoder.base.log import print_line
from encoder.base.peers import CONNECT_SECONDS, peers_of_this_rank, watch_peers
from encoder.base.units import counted
from encoder.base.world import MeetingPlace, World, meeting_address, meeting_place, world_from_env

__all__ = ["World", "meeting_place", "world_from_env"]


def device_index(world: World, *, visible: int, env: Mapping[str, str] = os.environ) -> int:
    """Which of the `visible` GPUs is this rank's: its own one where SLURM binds GPUs to tasks, else that of its local rank.

    Raises ConfigError where ranks would share a GPU.
    """
    if world.local_rank < visible and world.local_size <= visible:
        return world.local_rank
    # --gpus-per-task and --gpu-bind let a task see some of the node's GPUs alone, numbered from 0
    on_node = int(env.get("SLURM_GPUS_ON_NODE") or "0")
    if (
        "SLURM_STEP_ID" in env
        and on_node >= world.local_size
        and visible
        and world.local_size % visible == 0
    ):
        return world.local_rank % visible
    raise ConfigError(
        f"{world.local_size} ranks on {socket.gethostname()}, but rank {world.rank} sees"
        f" {counted(visible, 'GPU')}. Needed: one GPU for each rank. Start fewer ranks a node, or"
        " ask for more GPUs."
    )


def join(world: World, *, device: torch.device, timeout_seconds: float = 600.0) -> bool:
    """Start torch.distributed for this world (gloo on CPU, nccl on CUDA); one rank needs no address and no port.

    False if it runs already: whoever started it ends it. Raises ConfigError without an address, PassingError where the
    ranks do not meet. From here on a rank whose peer is gone ends, wherever it stands (peers.py).
    """
    # a run of this process ended while others failed: the old group goes before the next
    if _met.peer_failed:
        _met.peer_failed = False
        leave()
    if dist.is_initialized():
        return False

    # libraries that look for torchrun's names (deepspeed, streaming) find them whoever started us.
    # LOCAL_RANK is the device that deepspeed takes
    local_rank = world.local_rank
    if device.type == "cuda" and device.index is not None:
        local_rank = device.index
    backend = "nccl" if device.type == "cuda" else "gloo"
    names = dict(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
        LOCAL_SIZE=str(world.local_size),
    )
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if world.size == 1:
        # a store in memory: no port is opened
        os.environ.update(names)
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return True

    place = meeting_address(world)
    os.environ.update(names, MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
    try:
        store = _meet(world, place, timeout_seconds=timeout_seconds)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    except (dist.DistError, TimeoutError) as error:
        raise PassingError(
            f"the {world.size} ranks cannot meet at {place.host} port {place.port}"
            f" ({' '.join(str(error).split())[:150]}). If another program has the port, give"
            " another: deepspeed --master_port 29511 ..."
        ) from error
    return True


@contextlib.contextmanager
def watched(world: World) -> Iterator[None]:
    """Watches the neighbours from the first moment on, before the ranks meet: until then nobody would miss a rank that dies.

    Does nothing on one rank, and where this process watches already or has joined.
    """
    if world.size == 1 or dist.is_initialized() or peers_of_this_rank():
        yield
        return
    peers = watch_peers(world, meeting_address(world))
    try:
        yield
    except UserError:
        # one that has not met the others leaves them: they are told, and do not wait for it
        peers.fail(2)
        raise
    finally:
        # once the ranks have met, the connections are the run's, and leave() closes them
        if not dist.is_initialized():
            peers.close()


@dataclass
class _Met:
    """What this process has met."""

    stores: dict[str, dist.Store] = field(default_factory=dict)  # by place
    times: int = 0  # how often it met others
    peer_failed: bool = False


_met = _Met()


def _meet(world: World, place: MeetingPlace, *, timeout_seconds: float) -> dist.Store:
    """The store that all ranks share, once all are there. Waits aloud; raises TimeoutError, DistError."""
    until = time.monotonic() + timeout_seconds
    peers = watch_peers(world, place)
    aloud = Aloud(
        f"{place.host} port {place.port} ({place.said_by})",
        said_by=world.said_by or "the caller",
        size=world.size,
    )

    store = _store(world, place, aloud, until=until)
    # runs in one process, one after the other, meet at the same place
    _met.times += 1
    store = dist.PrefixStore(
        f"tessera/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_met.times}", store
    )

    # rank zero publishes where it listens; the others wait for that, and connect
    if world.first:
        store.set("peers", peers.listen(place.host))
    else:
        while not store.check(["peers"]):
            aloud.wait("rank 0", until=until)
        try:
            peers.connect(store.get("peers").decode())
        except OSError as error:
            print_line(
                f"warning: rank {world.rank} has no line to rank 0 ({error.strerror or error}):"
                " that another rank is gone is noticed by the next collective alone",
                sys.stderr,
            )

    # a counter of the ranks that are here: add 0 only reads it
    arrived = store.add("arrived", 1)
    while world.first and arrived < world.size:
        aloud.wait(f"{world.size - arrived} of {world.size} ranks", until=until)
        arrived = store.add("arrived", 0)
    peers.all_have_met()
    return store


def _store(world: World, place: MeetingPlace, aloud: Aloud, *, until: float) -> dist.Store:
    """Rank zero opens the store, unless torchrun's agent has it; the others wait until it answers."""
    key = f"{place.host} {place.port}"
    if key in _met.stores:
        return _met.stores[key]

    opens = world.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not opens:
        # a plain connection first: TCPStore itself would wait in silence
        with contextlib.suppress(OSError):
            socket.create_connection((place.host, place.port), timeout=CONNECT_SECONDS).close()
            break
        aloud.wait("rank 0", until=until)

    # no rank waits inside of TCPStore for all to come: _meet counts them, and says who is missing
    left = datetime.timedelta(seconds=max(1.0, until - time.monotonic()))
    _met.stores[key] = dist.TCPStore(
        place.host,
        place.port,
        None,
        opens,
        timeout=left,
        wait_for_workers=False,
        multi_tenant=opens,
    )
    return _met.stores[key]


class Aloud:
    """Waits in short naps, and says for whom: after 10 s, and again after twice as long each time."""

    FIRST_SECONDS = 10.0

    def __init__(self, place: str, *, said_by: str, size: int) -> None:
        self._place, self._said_by, self._size = place, said_by, size
        self._began = time.monotonic()
        self._next = self.FIRST_SECONDS

    def wait(self, whom: str, *, until: float) -> None:
        """A nap of 0.1 s. Raises TimeoutError from `until` (time.monotonic) on."""
        waited = time.monotonic() - self._began
        if time.monotonic() > until:
            raise TimeoutError(f"{whom} did not come within {waited:.0f} s")
        if waited >= self._next:
            self._next *= 2
            print_line(
                f"waiting for {whom} since {waited:.0f} s, at {self._place}; that there are"
                f" {self._size} ranks says {self._said_by}. If they have not been started, end this"
                " with Ctrl-C; for one rank alone: RANK=0 WORLD_SIZE=1 before the command.",
                sys.stderr,
                survive=True,
            )
        time.sleep(0.1)


def leave(*, peer_failed: bool = False) -> None:
    """End torch.distributed, if it runs.

    peer_failed: other ranks may still wait for this one, and are to see it end, not leave in good order. So it stays until this
    process ends, or until its next `join`.
    """
    if peer_failed:
        _met.peer_failed = True
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    if peers := peers_of_this_rank():
        peers.close()


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
    if on_gpu:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The tensor summed in place over all ranks, wherever it lies; int64 wraps, which is exact for hashes."""
    return _reduce_over_ranks(values, dist.ReduceOp.SUM)


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum over all ranks, in place."""
    return _reduce_over_ranks(values, dist.ReduceOp.MAX)


def _reduce_over_ranks(values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        there = values.to(collective_device())  # the tensor itself where it lies there
        dist.all_reduce(there, op=op)
        if there is not values:
            values.copy_(there)
    return values


def rank_and_size() -> tuple[int, int]:
    """This process among those that have joined; (0, 1) before."""
    if dist.is_initialized():
        return (dist.get_rank(), dist.get_world_size())
    return (0, 1)


def gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's table int64 [rows, K], by rank; ranks may have different numbers of rows."""
    # collectives take equal shapes: each rank fills its own table, padded to the most rows, and
    # the sum over ranks is the tables of all
    rank, size = rank_and_size()
    counts = rows.new_zeros(size)
    counts[rank] = len(rows)
    tables = rows.new_zeros(size, int(sum_over_ranks(counts).max()), rows.shape[1])
    tables[rank, : len(rows)] = rows
    return [table[:count] for table, count in zip(sum_over_ranks(tables), counts.tolist())]


def exchange(chunks: Sequence[torch.Tensor], *, receive: Sequence[int]) -> list[torch.Tensor]:
    """Sends the 1-d chunks[r] to rank r; gives back what each rank r sent here, receive[r] elements."""
    if len(chunks) == 1:
        return list(chunks)

    sent = torch.cat(list(chunks)).to(collective_device())
    received = sent.new_empty(sum(receive))
    dist.all_to_all_single(received, sent, list(receive), [len(chunk) for chunk in chunks])
    return list(received.to(chunks[0].device).split(list(receive)))


def free_port(*, ranges: str = "/proc/sys/net/ipv4/ip_local_port_range") -> int:
    """A port of this machine that is free and that the kernel does not hand out by itself, where there are such.

    Until the caller opens it, only a program that names this very port can take it.

    ranges: the file in which Linux says which ports it hands out
    """
    # without the file: the least that systems hand out is 32768
    handed_out_from = 32768
    with contextlib.suppress(OSError, ValueError, IndexError):
        handed_out_from = int(Path(ranges).read_text(encoding="ascii").split()[0])
    others = range(10000, handed_out_from)
    drawn = random.SystemRandom().sample(others, min(100, len(others)))
    # 0: any port
    for port in [*drawn, 0]:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return int(s.getsockname()[1])
    raise PassingError("this machine has no free port")
