"""What sending gradients during the backward pass is worth: ranks in network namespaces of this machine, on a link slowed by tc.

    python -m benchmarks.overlap [--ranks 2,4] [--stages 0,1,2,3] [--shares 10,30,60] [--rounds 5] [--json FILE]

Needs root, `ip` and `tc` (Debian: iproute2). Each rank is one process in a namespace of its own, with one thread, behind a token
bucket filter in both directions. The link's rate is chosen so that a step that sends after its backward pass spends 10, 30 and 60 %
of its time on the link. Both kinds of steps are taken in turn.

    computing      a step on the unlimited link, sending after the backward pass
    communication  what such a step takes longer on the slow link
    ideal          the longer of the two
    model          what `tessera plan` would say of these seconds and bytes
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from benchmarks.options import several
from benchmarks.report import Report
from benchmarks.workload import SHAPES, config_of, make_batch
from encoder.base.batch import counts_of
from encoder.base.command import CommandLine, count, run_command
from encoder.base.dist import World, join, sum_over_ranks, world_from_env
from encoder.base.errors import UserError
from encoder.engine import overlap
from encoder.engine.engine import Engine, EngineConfig, start_engine
from encoder.models.catalog import build_model
from encoder.objectives.mlm import MaskedLanguageModel, MlmConfig
from encoder.optim.stable_adamw import StableAdamWConfig
from encoder.tools.plan.communication import Traffic, waiting_seconds

NAME = "tessera"  # of the bridge, and the start of all other names
NETWORK = "10.213.7"
BURST_BYTES = 128 * 1024
QUEUE_BYTES = 8 * 2**20
SEARCHES = 3  # runs that look for the rate of a share
Overlapping = Literal["reduction", "weights", "off"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the ranks train."""

    stage: int
    ranks: int
    shape: str
    row_tokens: int
    micro_batches: int
    buckets: int
    ahead: bool

    @property
    def during(self) -> Overlapping:
        """How gradients are sent during the backward pass."""
        return "weights" if self.ahead else "reduction"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, measures, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("--ranks", type=several(count), default=[2, 4])
    parser.add_argument("--stages", type=several(int), default=[0, 1, 2, 3])
    parser.add_argument("--shares", type=several(count), default=[10, 30, 60], help="per cent")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--row-tokens", type=count, default=2048, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=several(count), default=[1])
    parser.add_argument(
        "--buckets", type=several(count), default=[overlap.BUCKETS], help="of a model, about"
    )
    parser.add_argument(
        "--ahead", action="store_true", help="stage 3 gathers weights ahead (overlap: weights)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return run_command(lambda: work(Asked(**json.loads(args.worker))))
    return run_command(lambda: measure(args))


# the side that asks ---------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """A table for each number of ranks, of micro-batches and each bucket."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        raise UserError(
            "network namespaces need root, ip and tc. Run as root; on Debian: apt-get install"
            " iproute2."
        )
    command = " ".join(["python -m benchmarks.overlap", *sys.argv[1:]])
    report = Report(args.json, command=command, device=torch.device("cpu"))
    for ranks, micro_batches, buckets in itertools.product(
        args.ranks, args.micro_batches, args.buckets
    ):
        lines = []
        for stage in args.stages:
            asked = Asked(
                stage=stage,
                ranks=ranks,
                shape=args.shape,
                row_tokens=args.row_tokens,
                micro_batches=micro_batches,
                buckets=buckets,
                ahead=args.ahead and stage == 3,
            )
            lines += measure_stage(asked, shares=args.shares, rounds=args.rounds)
        add_table(report, asked, lines)


def measure_stage(asked: Asked, *, shares: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One line for each share of the link."""
    with network(asked.ranks), ranks_of(asked) as ranks:
        facts = ranks.ask("facts", 0)
        ranks.ask("both", 1)  # the first steps allocate and learn
        before = sent_bytes()
        computing = statistics.median(ranks.ask("off", rounds)["off"])
        a_step = (sent_bytes() - before) / rounds / asked.ranks
        lines = []
        for share in shares:
            wanted = share / (100 - share) * computing
            rate = a_step / wanted
            for _ in range(SEARCHES):
                limit(asked.ranks, rate)
                off = statistics.median(ranks.ask("off", 1)["off"])
                # the link may be worse used than by all bytes at its rate
                rate *= min(4.0, max(0.25, (off - computing) / wanted))
            limit(asked.ranks, rate)
            seconds = ranks.ask("both", rounds)
            limit(asked.ranks, None)
            lines.append(
                line_of(
                    asked,
                    facts=facts,
                    rate=rate,
                    computing=computing,
                    a_step=a_step,
                    seconds=seconds,
                )
            )
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return lines


def line_of(
    asked: Asked,
    *,
    facts: dict[str, Any],
    rate: float,
    computing: float,
    a_step: float,
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    """What is said of one share.

    asked: what was trained
    facts: of the model, from rank zero
    rate: of the link, bytes a second each way
    computing: seconds of a step on the unlimited link
    a_step: bytes that a rank sent in a step, headers included
    seconds: of the steps on the slow link, in turn
    """
    off, on = (statistics.median(seconds[kind]) for kind in ("off", "on"))
    communication = off - computing
    return {
        **vars(asked),
        **facts,
        "rate": rate,
        "computing": computing,
        "communication": communication,
        "share": communication / off,
        "bytes_a_step": a_step,
        "planned_bytes": traffic_of(asked, facts, "off").total,
        "off": off,
        "on": on,
        "ideal": max(computing, communication),
        "model": model_seconds(asked, facts, rate, computing, communication),
        "seconds": seconds,
    }


def model_seconds(
    asked: Asked, facts: dict[str, Any], rate: float, computing: float, communication: float
) -> float:
    """What the plan's model makes of these seconds of computing and of the link.

    asked, facts: as line_of
    rate: of the link
    computing: seconds of a step without the link
    communication: seconds of the link alone
    """
    behind = as_gloo(traffic_of(asked, facts, "off"), asked.stage)
    during = as_gloo(traffic_of(asked, facts, asked.during), asked.stage)
    carried = during.scaled(communication * rate / behind.total)
    waited = waiting_seconds(carried, computing=computing, bytes_per_second=rate, hop_seconds=0.0)
    return computing + waited


def traffic_of(asked: Asked, facts: dict[str, Any], how: str) -> Traffic:
    """What the plan counts of a step."""
    return Traffic.of(
        stage=asked.stage,
        precision="fp32",
        parameters=facts["parameters"],
        largest=facts["largest"],
        ranks=asked.ranks,
        micro_batches=asked.micro_batches,
        sends=how != "off",
        looks_ahead=how == "weights",
    )


def as_gloo(planned: Traffic, stage: int) -> Traffic:
    """Its reduce and its reduce-scatter first leave the sums on all ranks, or send them on to the owner: twice the plan's time."""
    if stage > 0:
        return replace(planned, gradients=2 * planned.gradients)
    return planned


def add_table(report: Report, asked: Asked, lines: list[dict[str, Any]]) -> None:
    """The lines of all stages that were asked the same."""
    head = ["stage", "link MB/s", "on the link", "computing", "after", "during", "model", "ideal"]
    rows = [
        [
            f"{line['stage']}{' ahead' if line['ahead'] else ''}",
            f"{line['rate'] / 1e6:.1f}",
            f"{line['share']:.0%}",
            f"{line['computing']:.2f}",
            f"{line['off']:.2f}",
            f"{line['on']:.2f}",
            f"{line['model']:.2f}",
            f"{line['ideal']:.2f}",
        ]
        for line in lines
    ]
    report.add(
        f"{asked.ranks} ranks, {asked.shape}, {asked.micro_batches} micro-batches of"
        f" {asked.row_tokens:,} tokens, {asked.buckets} buckets: seconds of a step",
        head=head,
        rows=rows,
        notes=["after and during: gradients are sent after the backward pass, and during it"],
        figures=lines,
    )


# the network ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def network(ranks: int) -> Iterator[None]:
    """A namespace a rank, all on one bridge."""
    remove()
    try:
        tell("ip", "link", "add", NAME, "type", "bridge")
        tell("ip", "link", "set", NAME, "up")
        for rank in range(ranks):
            space = f"{NAME}{rank}"
            there = f"{NAME}_r{rank}"
            tell("ip", "netns", "add", space)
            tell("ip", "link", "add", there, "type", "veth", "peer", "name", "eth0", "netns", space)
            tell("ip", "link", "set", there, "master", NAME, "up")
            inside(rank, "ip", "addr", "add", f"{NETWORK}.{rank + 1}/24", "dev", "eth0")
            inside(rank, "ip", "link", "set", "eth0", "up")
            inside(rank, "ip", "link", "set", "lo", "up")
        yield
    finally:
        remove()


def remove() -> None:
    """What an earlier run may have left, too."""
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in spaces.splitlines():
        name = line.split()[0]
        # its end of a pair of devices goes with it
        if name.startswith(NAME) and name[len(NAME) :].isdigit():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    subprocess.run(["ip", "link", "del", NAME], capture_output=True)


def limit(ranks: int, rate: float | None) -> None:
    """The rate of every rank's link, bytes a second each way; None: as fast as it goes."""
    for rank in range(ranks):
        for where, device in ((None, f"{NAME}_r{rank}"), (rank, "eth0")):
            if rate is None:
                words = ["tc", "qdisc", "del", "dev", device, "root"]
            else:
                burst = max(BURST_BYTES, int(rate / 100))
                words = ["tc", "qdisc", "replace", "dev", device, "root", "tbf"]
                words += ["rate", f"{int(8 * rate)}bit", "burst", f"{burst}"]
                words += ["limit", f"{QUEUE_BYTES}"]
            inside(where, *words)


def inside(rank: int | None, *words: str) -> None:
    """A command in a rank's namespace; None: in our own."""
    before = [] if rank is None else ["ip", "netns", "exec", f"{NAME}{rank}"]
    tell(*before, *words)


def tell(*words: str) -> None:
    """A command that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip()}")


def sent_bytes() -> int:
    """That all ranks have sent so far: what came in at the bridge."""
    devices = Path("/sys/class/net").glob(f"{NAME}_r*")
    return sum(int((device / "statistics/rx_bytes").read_text()) for device in devices)


# the ranks ------------------------------------------------------------------------------------------------------------


class Ranks:
    """Processes that take steps when they are told to."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def ask(self, what: str, rounds: int) -> Any:
        """What rank zero answers. Raises UserError where a rank has ended."""
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                cast(Any, process.stdin).write(f"{what} {rounds}\n")
                cast(Any, process.stdin).flush()
        answer = cast(Any, self._processes[0].stdout).readline()
        if not answer:
            raise UserError("a rank has ended; what it said stands above")
        return json.loads(answer)


@contextlib.contextmanager
def ranks_of(asked: Asked) -> Iterator[Ranks]:
    """One process in each namespace."""
    processes = []
    for rank in range(asked.ranks):
        env = {
            **os.environ,
            "RANK": f"{rank}",
            "WORLD_SIZE": f"{asked.ranks}",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": f"{NETWORK}.1",
            "MASTER_PORT": "29711",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        words = ["ip", "netns", "exec", f"{NAME}{rank}", sys.executable, "-m", "benchmarks.overlap"]
        words += ["--worker", json.dumps(vars(asked))]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(
            subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=out, text=True)
        )
    try:
        yield Ranks(processes)
    finally:
        for process in processes:
            # no more orders: it leaves
            cast(Any, process.stdin).close()
        for process in processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def work(asked: Asked) -> None:
    """A rank: makes two engines of one model and takes steps as told, until nobody tells."""
    torch.set_num_threads(1)
    # as asked, also where each rank's part becomes small
    if asked.buckets != overlap.BUCKETS:
        overlap.BUCKETS = asked.buckets
        overlap.PART_ELEMENTS = 1
    world = world_from_env()
    device = torch.device("cpu")
    join(world, device=device)
    engines = {
        "off": make_engine(asked, "off", world),
        "on": make_engine(asked, asked.during, world),
    }
    config = config_of(asked.shape, dropout=0.0)
    batches = [
        make_batch(
            vocab_size=config.vocab_size,
            longest=1024,
            row_tokens=asked.row_tokens,
            rows=1,
            number=world.rank + asked.ranks * i,
        )
        for i in range(asked.micro_batches)
    ]
    total = sum_over_ranks(torch.tensor([counts_of(batches)["mlm"]]))
    counts = {"mlm": int(total)}

    def step(kind: str) -> float:
        began = time.perf_counter()
        engines[kind].step(batches, counts=counts, lr=1e-4, max_lr=1e-3)
        return time.perf_counter() - began

    for line in sys.stdin:
        what, rounds = line.split()
        answer: dict[str, Any]
        if what == "facts":
            answer = facts_of(engines["off"])
        else:
            kinds = ("off", "on") if what == "both" else ("off",)
            answer = {kind: [] for kind in kinds}
            for _ in range(int(rounds)):
                for kind in kinds:
                    answer[kind].append(step(kind))
        if world.first:
            print(json.dumps(answer), flush=True)
    os._exit(0)


def make_engine(asked: Asked, how: Overlapping, world: World) -> Engine:
    """As a run has it."""
    config = config_of(asked.shape, dropout=0.0)
    with torch.device("meta" if asked.stage == 3 else "cpu"):
        model = build_model(config, attention="sdpa", seed=1)
    objective = MaskedLanguageModel(
        MlmConfig(), vocab_size=config.vocab_size, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3)
    )
    return start_engine(
        model,
        objective=objective,
        config=EngineConfig(zero_stage=cast(Any, asked.stage), precision="fp32", overlap=how),
        optimizer=StableAdamWConfig(),
        world=world,
        device=torch.device("cpu"),
    )


def facts_of(engine: Engine) -> dict[str, Any]:
    """Of the model, for the plan's model."""
    sizes = [shape.numel() for shape in map(torch.Size, engine.shapes.values())]
    return {"parameters": sum(sizes), "largest": max(sizes)}


if __name__ == "__main__":
    sys.exit(main())
