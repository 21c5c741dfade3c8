"""The doctor: what each rank finds out before a run's first step, compared, in under 30 s of a sound job.

    facts           versions, run file, shards, device, memory                  each rank by itself
    rendezvous      a store on rank zero; a rank that does not come is named
    run folder      one writes, all see it; all write, one sees it; room for two checkpoints
    links           an all-reduce of each pair of neighbouring nodes, then of all ranks
    verdict         0 fine, 2 a mistake in the input, 4 nodes to leave out, 5 all of them

No rank waits for another longer than `wait_seconds`. Nothing of the run is touched but its folder, which is made if it
is not there. A report folder gets NODE.json of each node, written before anything is waited for and again at the end, and
bad_nodes, one name a line.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder.base.command import as_user_error
from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.base.files import refuse_foreign, write_atomic, write_json
from encoder.base.log import say
from encoder.base.slurm import node_name, nodes_of_ranks
from encoder.base.units import short_seconds
from encoder.runs.checks import check_settings, hints_of
from encoder.runs.config import RunConfig, read_run
from encoder.runs.defaults import warnings_of
from encoder.runs.facts import check_data
from encoder.runs.same import check_same_data, check_same_run
from encoder.tools.doctor.facts import gather_facts, look_at_folder
from encoder.tools.doctor.links import SUM_SECONDS, Clock, FaultInjection, Links
from encoder.tools.doctor.rendezvous import RankTimeout, Rendezvous
from encoder.tools.doctor.verdict import (
    Findings,
    judge_all_reduce,
    judge_facts,
    judge_folder,
    judge_links,
)
from encoder.tools.plan.fit import fit_ranks
from encoder.tools.plan.memory import count_needs, device_here
from encoder.train import build

WAIT_SECONDS = 45.0  # a python of 1,000 nodes on a busy file system starts within that
BAD_NODES = "bad_nodes"
MEASURING_SHARE = 2 / 3  # of wait_seconds, that links may be measured


@dataclass(kw_only=True)
class Doctor:
    """One rank's part.

    report: the folder of NODE.json and bad_nodes
    message_bytes: of the all-reduces; default: by the device
    inject_fault: holds back or damages what this rank sends, in tests
    clock: what the speed of links is measured by
    sum_seconds: an all-reduce that takes longer counts as no answer
    """

    world: World
    env: Mapping[str, str]
    report: Path | None = None
    wait_seconds: float = WAIT_SECONDS
    message_bytes: int | None = None
    inject_fault: FaultInjection | None = None
    clock: Clock = time.perf_counter
    sum_seconds: float = SUM_SECONDS
    findings: Findings = field(default_factory=Findings)

    def examine(self, path: Path | str, overrides: Sequence[str]) -> int:
        """Looks, meets, judges; returns the exit code, the same on all ranks. Raises UserError where there is no place to meet."""
        began = time.monotonic()
        self.node = node_name(self.env)
        self.expected = nodes_of_ranks(
            self.env, size=self.world.size, local_size=self.world.local_size
        )
        # nobody leaves yet: a rank that cannot read the run file must be heard by rank zero
        run, facts = self._look(path, overrides)
        self._write_report("started", facts=facts)
        try:
            rendezvous = Rendezvous(self.world, wait_seconds=self.wait_seconds)
            rendezvous.publish("facts", facts)
            if self.world.first:
                verdict = self._lead(rendezvous, run)
            else:
                verdict = self._follow(rendezvous, run)
        except RankTimeout as error:
            return self._without_rank_zero(str(error))
        self._write_report("ended", facts=facts, verdict=verdict)
        if self.world.first:
            self._print_verdict(verdict, time.monotonic() - began)
        with contextlib.suppress(RankTimeout):
            rendezvous.leave()
        return verdict["exit_code"]

    def _look(
        self, path: Path | str, overrides: Sequence[str]
    ) -> tuple[RunConfig | None, dict[str, Any]]:
        try:
            run = read_run(path, overrides)
            return run, gather_facts(run, self.world, env=self.env)
        except (UserError, OSError) as error:
            return None, {
                "rank": self.world.rank,
                "local_rank": self.world.local_rank,
                "node": self.node,
                "folder": os.getcwd(),
                "error": str(as_user_error(error)),
            }

    def _lead(self, rendezvous: Rendezvous, run: RunConfig | None) -> dict[str, Any]:
        """Rank zero: asks for everything in turn, and judges."""
        found = self.findings
        facts = rendezvous.collect("facts")

        wrong = {
            fact["node"]: f"{fact['error']} Looked for from the folder {fact['folder']}"
            for fact in facts.values()
            if "error" in fact
        }

        found.exclude_or_mistake(wrong, of=len({fact["node"] for fact in facts.values()}))
        needs = None
        try:
            if run is not None:
                needs = count_needs(run, ranks=self.world.size)
        except UserError as error:
            found.mistakes.append(str(error))

        # the others wait for each word in turn: "folder" is said also where nothing is asked
        if run is None or needs is None:
            if not found.mistakes:
                found.mistakes.append(f"rank 0 on {self.node}: {wrong[self.node]}")
            rendezvous.broadcast("folder", None)
        else:
            whole = {rank: fact for rank, fact in facts.items() if "error" not in fact}
            judge_facts(found, whole, self.expected, needs=needs, came=set(facts))
            self._judge_run(run)

            # files of this doctor alone: those of an earlier one may still lie there
            nonce = secrets.token_hex(6)
            # one rank a node looks at the folder
            firsts = {rank: fact["node"] for rank, fact in whole.items() if fact["local_rank"] == 0}
            self._folder(rendezvous, run, nonce, needs.checkpoint_bytes, firsts)

        # links are measured only where nothing was wrong so far
        if rendezvous.broadcast("links", not found.exit_code and self.world.size > 1):
            assert run is not None, "who has no run has made a mistake"
            self._links(rendezvous, [facts[rank]["node"] for rank in range(self.world.size)], run)

        nodes = {
            facts[rank]["node"] if rank in facts else self.expected[rank]
            for rank in range(self.world.size)
        }
        verdict = {
            "exit_code": found.exit_code_of(nodes),
            "mistakes": found.mistakes,
            "nodes": found.nodes,
            "warnings": found.warnings,
            "rows": found.rows,
        }
        rendezvous.broadcast("verdict", verdict)
        return verdict

    def _follow(self, rendezvous: Rendezvous, run: RunConfig | None) -> dict[str, Any]:
        """Every other rank: answers in the same order."""
        asked = rendezvous.receive("folder")
        if asked is not None and self.world.local_rank == 0 and run is not None:
            # well within the time that rank zero waits for the answer
            wait_seconds = self.wait_seconds / 3
            seen = look_at_folder(
                Path(run.out), asked["nonce"], node=self.node, wait_seconds=wait_seconds
            )
            rendezvous.publish("shared", seen)
        if rendezvous.receive("links"):
            assert run is not None, (
                "rank zero goes on only where every rank could read the run file"
            )
            self._links(rendezvous, [], run)
        return rendezvous.receive("verdict")

    def _judge_run(self, run: RunConfig) -> None:
        """What rank zero can see alone of the run file, its data and its folder."""
        for check in (
            lambda: run.tracking.check_packages(),
            lambda: check_same_run(run, Path(run.out)),
            lambda: (
                None
                if self.findings.mistakes
                else check_same_data(run, check_data(run), Path(run.out))
            ),
        ):
            try:
                check()
            except (UserError, OSError) as error:
                self.findings.mistakes.append(str(as_user_error(error)))

        try:
            padded = build.has_static_shapes(run, device_here(run))
            fit = fit_ranks(run, ranks=self.world.size, padded=padded)
            self.findings.rows.append(("fit", fit.text))
            self.findings.warnings += fit.warnings
            self.findings.warnings += [
                *check_settings(run),
                *warnings_of(run),
                *hints_of(run, ranks=self.world.size),
            ]
        except UserError as error:
            self.findings.mistakes.append(str(error))

    def _folder(
        self,
        rendezvous: Rendezvous,
        run: RunConfig,
        nonce: str,
        checkpoint_bytes: int,
        firsts: Mapping[int, str],
    ) -> None:
        """`firsts`: the first rank of each node that is here, and the node."""
        folder = Path(run.out)
        with _made_if_absent(folder):
            mine = look_at_folder(folder, nonce, node=self.node, wait_seconds=0.0, first=True)
            # only now is rank zero's file there to be looked for
            rendezvous.broadcast("folder", {"nonce": nonce})
            rendezvous.publish("shared", mine)
            shared = {
                value["node"]: value
                for value in rendezvous.collect("shared", ranks=list(firsts)).values()
            }

            # and back: what a node wrote must be seen from here
            unseen = [
                node
                for node in shared
                if not shared[node].get("error")
                and not _appears(folder / f".doctor-{nonce}-{node}", self.wait_seconds / 3)
            ]

            for node in set(firsts.values()) - set(shared):
                self.findings.exclude(
                    node,
                    f"{node} fell silent while it looked at the run folder {folder}: its disk may"
                    " hang",
                )
            judge_folder(
                self.findings,
                shared,
                unseen,
                run.out,
                checkpoint_bytes=checkpoint_bytes,
                # kept ones, one being written, one a phase's end, less what stands already
                at_most=run.checkpoints.keep_last + 1 + len(run.phases) - _standing(folder),
            )
            with contextlib.suppress(OSError):
                for path in folder.glob(".doctor-*"):  # of doctors that were killed, too
                    path.unlink(missing_ok=True)

    def _links(self, rendezvous: Rendezvous, nodes: list[str], run: RunConfig) -> None:
        """All ranks: neighbouring nodes, then all at once. Rank zero judges; `nodes` are known to it alone."""
        first = self.world.first
        nodes = rendezvous.broadcast("nodes", nodes)
        links = Links(
            rendezvous.connect(),
            rank=self.world.rank,
            device=build.choose_device(run, self.world),
            message_bytes=self.message_bytes,
            inject_fault=self.inject_fault,
            clock=self.clock,
            sum_seconds=self.sum_seconds,
        )
        views: list[dict[str, Any]] = []

        # views holds what was seen until then, also where a link hangs
        # rank zero listens for wait_seconds: who waits in vain for a silent neighbour must have time
        # left to say so, or a good node is taken for a silent one
        measuring_seconds = MEASURING_SHARE * self.wait_seconds
        _within(measuring_seconds, lambda: links.neighbours(nodes, views))
        rendezvous.publish("links", list(views))
        if first:
            judge_links(self.findings, rendezvous.collect("links"), nodes)

        if rendezvous.broadcast("all", not self.findings.exit_code):
            result: list[dict[str, Any]] = []
            _within(measuring_seconds, lambda: result.append(links.all(self.world.size)))
            rendezvous.publish(
                "sum", result[0] if result else {"error": f"no sum in {measuring_seconds:.0f} s"}
            )
            if first:
                judge_all_reduce(self.findings, rendezvous.collect("sum"), nodes)

    def _without_rank_zero(self, why: str) -> int:
        """Who is left says so; nobody is there to judge anything else."""
        lost = self.expected[0]
        text = f"bad node {lost}: {why}"
        self._write_report("ended", verdict={"exit_code": 4, "nodes": {lost: why}})
        if self.world.local_rank == 0:
            print(text, flush=True)
            self._write_bad_nodes([lost])
        return 4

    def _print_verdict(self, verdict: Mapping[str, Any], seconds: float) -> None:
        """The table, then what is wrong, a line each."""
        self._write_bad_nodes(list(verdict["nodes"]))
        for name, text in verdict["rows"]:
            say(f"  {name:<12} {text}")
        for text in verdict["warnings"]:
            say(f"warning: {text}")
        for text in verdict["mistakes"]:
            say(f"error: {text.rstrip('.')}.")
        for node, why in verdict["nodes"].items():
            say(f"bad node {node}: {why.rstrip('.')}.")
        named = ", ".join(verdict["nodes"])
        words = {
            0: "fine",
            2: "the input must be mended first",
            4: f"to be left out: {named}",
            5: f"no node is left: {named}",
        }
        say(f"doctor: {words[verdict['exit_code']]} ({short_seconds(seconds)})")

    def _write_bad_nodes(self, nodes: Sequence[str]) -> None:
        if self.report is not None:
            # a word such as "ranks 8-15" is no name of a node
            names = [node for node in nodes if not re.fullmatch(r"ranks \d+-\d+", node)]
            write_atomic(self.report / BAD_NODES, "".join(f"{node}\n" for node in names))

    def _write_report(self, stage: str, **values: Any) -> None:
        if self.report is None or self.world.local_rank:
            return

        # a file of that name which no doctor wrote is not written over
        refuse_foreign(
            self.report / f"{self.node}.json", ours=lambda head: head.startswith(b'{\n "node": "')
        )
        refuse_foreign(
            self.report / BAD_NODES,
            ours=lambda head: re.fullmatch(rb"([\w.-]+\n)*", head) is not None,
        )
        self.report.mkdir(parents=True, exist_ok=True)
        stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        write_json(
            self.report / f"{self.node}.json",
            {"node": self.node, "stage": stage, "time": stamp, **values},
        )


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Does the work, or leaves it behind in its thread: a collective that hangs cannot be ended."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _appears(path: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _standing(folder: Path) -> int:
    """Checkpoints whose room is taken already."""
    from encoder.engine.checkpoint.folder import committed_folders
    from encoder.runs.folder import CHECKPOINTS

    return len(committed_folders(folder / CHECKPOINTS))


@contextlib.contextmanager
def _made_if_absent(folder: Path) -> Iterator[None]:
    """Makes a folder for the block; what was made and is empty at the end goes again."""
    # innermost first, the order in which empty folders can go
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.suppress(OSError):  # look_at_folder says why
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in absent:
                path.rmdir()
