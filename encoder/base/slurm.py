"""What SLURM's variables say: the names of a job's nodes, and which rank is on which of them."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Mapping

from encoder.base.errors import ConfigError

# one entry of a list: commas inside brackets are its own
_NAME = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")


def expand_hosts(text: str) -> list[str]:
    """'node[1,03-05],b' -> node1, node03, node04, node05, b: what `scontrol show hostnames` prints. Raises ConfigError."""
    hosts: list[str] = []
    for name in _NAME.findall(text):
        parts = re.split(r"\[([^\]]*)\]", name)  # text, ranges, text, ranges, ..., text
        # every second part is a list of ranges: all combinations, the last range fastest
        choices = [
            [part] if i % 2 == 0 else _numbers(part, of=text) for i, part in enumerate(parts)
        ]
        hosts += ["".join(word) for word in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str, *, of: str) -> list[str]:
    found: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", one)
        if not match:
            raise ConfigError(
                f"{of!r} is no list of nodes: {one!r} in it is no range. Needed: such as"
                " node[1,3-5]."
            )
        first, last = match[1], match[2] or match[1]
        # leading zeros are kept: 03-05 is 03, 04, 05
        found += [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """'2(x3),1' -> 2, 2, 2, 1, as SLURM_TASKS_PER_NODE counts tasks."""
    counts: list[int] = []
    for one in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", one)
        if not match:
            raise ConfigError(f"{text!r} is no count of tasks per node. Needed: such as 2(x3),1.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def nodes_of_ranks(env: Mapping[str, str], *, size: int, local_size: int) -> list[str]:
    """The node of each rank as the step was dealt out (block by block), by name under srun, else 'ranks 0-3' and so on."""
    names = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    tasks = tasks_per_node(
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "0"
    )

    # names count only where they account for every rank of this very step
    if len(names) == len(tasks) and sum(tasks) == size and "SLURM_STEP_ID" in env:
        repeated = map(itertools.repeat, names, tasks)
        return list(itertools.chain.from_iterable(repeated))
    first = [rank // local_size * local_size for rank in range(size)]
    return [f"ranks {rank}-{min(rank + local_size, size) - 1}" for rank in first]


def node_name(env: Mapping[str, str]) -> str:
    """This node as SLURM calls it, else its host name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()
