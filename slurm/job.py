#!/usr/bin/env python3
"""What a training job writes down, and what it decides when its step ends; called by pretrain.sbatch on the job's first node.

    job.py begin RUN.yaml [key=value ...]                      prints the run folder; exit code 3: the run is done already
    job.py preflight FOLDER --code C [--signal S] --seconds T  what the preflight found; exit code 0: go on
    job.py end FOLDER --code C [--signal S] --seconds T        why the training step ended, and what follows; exit code 4: requeued
    job.py signalled FOLDER NAME                               a signal that the batch script got
    job.py signal-ranks SIGNAL                                 on each node, where a launcher stands between SLURM and the ranks

It needs Python 3.8 and nothing else, so that it runs outside of containers. RUN/slurm/JOBID.jsonl holds one line an event, all with

    time (seconds since 1970), job (its id), restart (0, 1, ...), event

    start      name, partition, nodes (as SLURM writes them), node_count, ranks, run_file, overrides, restart_after: how the
               start before ended ("" on the first; "killed" where it wrote no end: node lost, preempted, requeued by hand),
               step and tokens: what was committed by then
    signal     signal: USR1 before the time limit (TERM stands in the end's line alone, for there is little time then)
    preflight  code, seconds, bad_nodes
    excluded   nodes: left out of the job's next starts; jobs: those that wait for it in the queue (submit.py --jobs), which leave
               them out as well
    end        cause, why (a sentence), decision, code (srun's, which proves nothing), seconds (of the step), step and tokens
               (committed), crashes (so far in this job), signal; once for each start, before a requeue that may end this process
    refused    why, decision (submit_again): what SLURM answered where the end before it asked for a requeue in vain

    cause      done         RUN/done.json is there, the only proof of success
               stopped      saved and left before the time limit, or by a signal that the batch script passed on
               ended        SLURM ended the job: cancelled, preempted, requeued by hand, or its limit came without a warning
               crash        anything else that ended the step, the preflight included
               mistake      the input cannot be right, however often it is tried; `why` has the line that the run said
               bad_nodes    the preflight found nodes that must not be used
               taken_over   a newer start of the same job is running: this one is the rest of a node that was cut off
    decision   finish | requeue | stop (with RUN/slurm/JOBID-report.txt) | leave (SLURM or the user has decided already)
               submit_again (SLURM does not requeue this job: the next one, or the same sbatch line, goes on)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# Python alone, as this file
from encoder.base.done import is_done  # noqa: E402
from encoder.base.errors import ConfigError  # noqa: E402
from encoder.base.job_log import records  # noqa: E402
from encoder.base.paths import expand_path  # noqa: E402

# exit codes: 0 is also "go on with the training step"; 75 is EX_TEMPFAIL, submit it again
GO, FAILED, MISTAKE, DONE_ALREADY, REQUEUED, NOT_DONE, ENDED = 0, 1, 2, 3, 4, 75, 143
OUT_OF_TIME = 124  # timeout's exit code
# per job: crashes, starts in a row that commit nothing, nodes left out
LIMITS = {"TESSERA_MAX_CRASHES": 3, "TESSERA_MAX_IDLE_STARTS": 3, "TESSERA_MAX_BAD_NODES": 8}
CONTROLLER_SECONDS = 900.0  # a controller that is being restarted is waited for
SUBMITTED = "submitted.jsonl"  # submit.py's: job, role
CHECKPOINT = re.compile(r"tokens([0-9]{13,18})-i([0-9]{4,18})")


class Mistake(Exception):
    """Found, needed, what to do: one line on standard error, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Parses, acts, returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    begin_verb = verbs.add_parser("begin")
    begin_verb.add_argument("run")
    begin_verb.add_argument("overrides", nargs="*")
    begin_verb.add_argument("--ranks", type=int, required=True)
    for name in ("preflight", "end"):
        verb = verbs.add_parser(name)
        verb.add_argument("folder", type=Path)
        verb.add_argument("--code", type=int, required=True)
        verb.add_argument("--signal", default="")
        verb.add_argument("--seconds", type=float, default=0.0)
    verb = verbs.add_parser("signalled")
    verb.add_argument("folder", type=Path)
    verb.add_argument("name")
    verbs.add_parser("signal-ranks").add_argument("signal", choices=["USR1", "TERM"])
    args = parser.parse_args(argv)
    try:
        if args.verb == "begin":
            return begin(args.run, args.overrides, ranks=args.ranks)
        if args.verb == "signalled":
            Job(args.folder).write("signal", signal=args.name)
            return GO
        if args.verb == "signal-ranks":
            return signal_ranks(getattr(signal, f"SIG{args.signal}"))
        job = Job(args.folder)
        return (preflight if args.verb == "preflight" else end)(
            job, code=args.code, signalled=args.signal, seconds=args.seconds
        )
    except (Mistake, ConfigError) as mistake:
        return complain(str(mistake))
    except UnicodeEncodeError as error:
        return complain(
            f"the locale's encoding, {error.encoding}, has no letters for {error.object[:200]!a}."
            " Set LC_ALL=C.UTF-8, or name another folder with out=FOLDER."
        )
    except OSError as error:
        place = f"{os.fspath(error.filename)}: " if error.filename else ""
        return complain(
            f"{place}{error.strerror or error}. Needed: a run folder that can be read and written,"
            " with room. Mend it, or set another out=FOLDER."
        )


class Job:
    """This start of a SLURM job, and what its starts have written in the run folder."""

    def __init__(self, folder: Path) -> None:
        env = os.environ
        if not env.get("SLURM_JOB_ID"):
            raise Mistake("SLURM_JOB_ID is not set; needed: a job of SLURM. Submit it with sbatch.")
        self.folder, self.id, self.restart = (
            folder,
            env["SLURM_JOB_ID"],
            int(env.get("SLURM_RESTART_COUNT") or "0"),
        )
        self.own = folder / "slurm"
        self.record = self.own / f"{self.id}.jsonl"

    @property
    def preflight_folder(self) -> Path:
        """Where the preflight of this start writes a file a node."""
        return self.own / f"{self.id}-r{self.restart}-preflight"

    @property
    def mistake_file(self) -> Path:
        """Where a rank of this start writes the mistake it met: its exit code does not get through srun."""
        return self.own / f"{self.id}-r{self.restart}-mistake.txt"

    def events(self) -> list[dict[str, Any]]:
        """All lines so far, of all starts."""
        return [line for line in records(self.record) if isinstance(line.get("event"), str)]

    def write(self, event: str, **values: Any) -> None:
        """One line, durable: the job may be ended in the next moment."""
        line = json.dumps(
            {
                "time": round(time.time(), 3),
                "job": self.id,
                "restart": self.restart,
                "event": event,
                **values,
            }
        )
        handle = os.open(self.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # a kill in the middle of a line
            torn = os.fstat(handle).st_size and not self.record.read_bytes().endswith(b"\n")
            left = b"\n" * bool(torn) + line.encode() + b"\n"
            while left:  # a disk that is all but full takes a part of it
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        except OSError as error:  # of a handle, which has no name
            raise OSError(error.errno, error.strerror, str(self.record)) from error
        finally:
            os.close(handle)

    def committed(self) -> tuple[int, int]:
        """Step and tokens of the newest checkpoint; (0, 0) before the first."""
        found = []
        # a folder without COMMITTED is no checkpoint yet
        for path in (self.folder / "checkpoints").glob("tokens*"):
            match = CHECKPOINT.fullmatch(path.name)
            if match and (path / "COMMITTED").exists():
                found.append((int(match[2]), int(match[1]), path))
        if not found:
            return 0, 0
        # of the newest start, by its incarnation; in it the one with the most tokens
        _, tokens, path = max(found)
        try:
            return (
                int(
                    json.loads((path / "progress.json").read_text(encoding="utf-8"))["progress"][
                        "step"
                    ]
                ),
                tokens,
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return 0, tokens


def counts_as_done(folder: Path) -> bool:
    """Whether the run is finished; a done.json that does not count is said on standard error."""
    done, problem = is_done(folder)
    if problem:
        print(f"warning: {problem}", file=sys.stderr)
    return done


# --- before the step --------------------------------------------------------------------------------------------------------


def begin(run_file: str, overrides: list[str], *, ranks: int) -> int:
    """Prints the run folder, makes its slurm folder and notes the start. Raises Mistake."""
    folder = run_folder(run_file, overrides)
    for name in LIMITS:
        limit(name)  # refused now, not when it is needed
    job = Job(folder)
    job.own.mkdir(parents=True, exist_ok=True)

    # a start that wrote no end was killed
    before = [e for e in job.events() if e["event"] in ("start", "end")]
    after = "" if not before else before[-1]["cause"] if before[-1]["event"] == "end" else "killed"
    step, tokens = job.committed()
    env = os.environ
    job.write(
        "start",
        name=env.get("SLURM_JOB_NAME", ""),
        partition=env.get("SLURM_JOB_PARTITION", ""),
        nodes=env.get("SLURM_JOB_NODELIST", ""),
        node_count=int(env.get("SLURM_JOB_NUM_NODES") or "1"),
        ranks=ranks,
        run_file=run_file,
        overrides=overrides,
        restart_after=after,
        step=step,
        tokens=tokens,
    )
    # the bytes of its name, whatever the locale: the job script hands them back
    os.write(sys.stdout.fileno(), os.fsencode(folder) + b"\n")
    if counts_as_done(folder):
        job.write(
            "end",
            cause="done",
            why="the run was done before this job began",
            decision="finish",
            code=0,
            seconds=0.0,
            step=step,
            tokens=tokens,
            crashes=0,
            signal="",
        )
        return DONE_ALREADY
    return GO


def run_folder(run_file: str, overrides: list[str]) -> Path:
    """`out` of the run file, or of the last override of it. Raises Mistake.

    Reads that one line and no YAML: the job's first node may have no packages outside of the container.
    """
    here = (
        f"The job runs in {os.getcwd()}; give a path from there, a whole path, or sbatch"
        " --chdir=FOLDER."
    )
    try:
        text = Path(run_file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Mistake(
            f"the run file {run_file} cannot be read ({getattr(error, 'strerror', None) or error})."
            f" {here}"
        ) from error
    # an override wins over the file, and the last of several
    found = [o.removeprefix("out=") for o in overrides if o.startswith("out=")]
    lines = (
        list(re.finditer(r"^out[ \t]*:(?:[ \t]+(.*?))?[ \t]*(?:[ \t]#.*)?$", text, re.MULTILINE))
        if not found
        else []
    )
    if lines:
        # what is indented below it YAML takes for more of the value
        below = re.match(r"(?:[ \t]*(?:#.*)?\r?\n)*[ \t]+([^\s#].*)", text[lines[-1].end() + 1 :])
        if below:
            raise Mistake(
                f"{run_file} has an out that goes on in the next line: {below[1].strip()}. Needed:"
                " `out: FOLDER` in one line, or give out=FOLDER."
            )
        found = [lines[-1][1] or ""]
    value = found[-1].strip() if found else ""
    if value[:1] in "\"'" and value[:1] == value[-1:]:
        value = value[1:-1]
    # YAML might read another name
    if not value or value[0] in "{[&*|>!%@`\"'" or re.search(r"""['"\\]|: | #""", value):
        raise Mistake(
            f"{run_file} has no line `out: FOLDER` with a plain name, but {value or 'none'}. Add"
            " it, or give out=FOLDER."
        )
    return Path(expand_path(value))


def preflight(job: Job, *, code: int, signalled: str, seconds: float) -> int:
    """Goes on, or ends this start: a mistake stops the job, bad nodes are left out of its next start."""
    # neither a mistake nor a signal is a node's fault
    bad = []
    if code not in (0, MISTAKE) and not signalled:
        bad = sorted(read_bad_nodes(job))
    job.write("preflight", code=code, seconds=seconds, bad_nodes=bad)
    if code == 0 and not signalled:
        return GO
    # a mistake that no rank wrote down itself
    if code == MISTAKE and not signalled and not job.mistake_file.exists():
        write_text(job.mistake_file, f"{named_mistake(job)}\n")
    silent = f"the preflight ended with exit code {code} and without a word"
    if code == OUT_OF_TIME:
        allowed = os.environ.get("TESSERA_PREFLIGHT_SECONDS") or "300"
        silent = (
            f"the preflight was not done after {seconds:.0f} s, TESSERA_PREFLIGHT_SECONDS gives it"
            f" {allowed}: give it more, or see in the job's output where it stood"
        )
    return end(job, code=code, signalled=signalled, seconds=seconds, bad_nodes=bad, silent=silent)


def named_mistake(job: Job) -> str:
    """The first mistake in the verdict that the preflight wrote on each node; of a run file that cannot be read there is none."""
    for path in sorted(job.preflight_folder.glob("*.json")):
        try:
            mistakes = json.loads(path.read_text(encoding="utf-8"))["verdict"]["mistakes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if mistakes:
            return f"the preflight: {mistakes[0]}"
    return "the preflight refused the run; its lines are in the job's output"


def read_bad_nodes(job: Job) -> set[str]:
    """The nodes that the preflight names, and those from which nothing was heard."""
    named, heard = (
        job.preflight_folder / "bad_nodes",
        {p.stem for p in job.preflight_folder.glob("*.json")},
    )
    bad = set()
    if named.exists():
        bad = set(named.read_text(encoding="utf-8").split())
    # silence of all is no node's fault
    return bad | (set(node_names()) - heard if heard else set())


# --- when a step has ended -----------------------------------------------------------------------------------------------------


def end(
    job: Job,
    *,
    code: int,
    signalled: str,
    seconds: float,
    bad_nodes: list[str] | None = None,
    silent: str = "",
) -> int:
    """Notes why the step ended and what follows, and does it; returns the batch script's exit code.

    `silent`: why it crashed, where no rank left a word."""
    # a requeue ends this job; what it calls inherits this
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cause, why = cause_of_end(
        job,
        code=code,
        signalled=signalled,
        bad_nodes=bad_nodes or [],
        silent=silent or f"the step ended with exit code {code} and without a word",
    )
    step, tokens = job.committed()
    crashes = [e for e in job.events() if e["event"] == "end" and e["cause"] == "crash"]
    decision, reason = decide(
        job, cause=cause, tokens=tokens, crashes=crashes, bad_nodes=bad_nodes or []
    )
    facts = dict(
        cause=cause,
        code=code,
        seconds=seconds,
        step=step,
        tokens=tokens,
        signal=signalled,
        crashes=len(crashes) + (cause == "crash"),
    )
    # before a requeue: SLURM may end this process at once
    whole = why
    if reason:
        whole = f"{why}; {reason}"
    job.write("end", **facts, decision=decision, why=whole)
    if decision == "requeue":
        refused = requeue(job, leave_out=bad_nodes or [])
        if not refused:
            say(f"{why}; requeued: it goes on from step {step}, {tokens:,} tokens")
            return REQUEUED
        job.write("refused", why=refused, decision="submit_again")
        after = leave_out_of_next_jobs(job, bad_nodes) if bad_nodes else []
        goes_on = (
            f"job {', '.join(after)} goes on without {', '.join(bad_nodes or [])}"
            if after
            else ("submit it again, it goes on from there")
        )
        decision, reason = "submit_again", f"SLURM did not requeue the job ({refused}): {goes_on}"
    if decision == "finish":
        say(f"done: {tokens:,} tokens, step {step}")
        return GO
    if decision == "stop":
        report = write_report(job, why=why, reason=reason)
        return complain(
            f"{why}; {reason}. Report: {report}", code=MISTAKE if cause == "mistake" else FAILED
        )
    whole = why
    if reason:
        whole = f"{why}; {reason}"
    say(f"{whole}; committed: step {step}, {tokens:,} tokens")
    return NOT_DONE if decision == "submit_again" else ENDED


def cause_of_end(
    job: Job, *, code: int, signalled: str, bad_nodes: list[str], silent: str
) -> tuple[str, str]:
    """The word and the sentence."""
    # in this order: what is proven, what SLURM decided, what a rank or the preflight wrote.
    # A crash is what nothing else explains
    if counts_as_done(job.folder):
        return "done", "the run is done"
    if signalled == "TERM":
        return "ended", "SLURM ended the job (scancel, preemption, requeue or its time limit)"
    state = job_state(job.id)
    if state.get("Restarts", str(job.restart)) != str(job.restart):
        return (
            "taken_over",
            f"start {state['Restarts']} of this job has taken over from start {job.restart}",
        )
    if state.get("JobState", "RUNNING") != "RUNNING":
        return "ended", f"SLURM has ended the job: {state['JobState']}"
    if job.mistake_file.exists():
        return "mistake", job.mistake_file.read_text(encoding="utf-8").strip()
    if bad_nodes:
        return "bad_nodes", f"the preflight failed on {', '.join(bad_nodes)}"
    if signalled:
        return "stopped", f"stopped by SIG{signalled} before the time limit"
    stopped = stopped_by_itself(job)
    if stopped:
        return "stopped", stopped
    return "crash", first_error(job) or silent


def decide(
    job: Job, *, cause: str, tokens: int, crashes: list[dict[str, Any]], bad_nodes: list[str]
) -> tuple[str, str]:
    """finish, requeue, stop or leave; and why, where it is not plain."""
    if cause in ("done", "ended", "taken_over"):
        return ("finish" if cause == "done" else "leave"), ""
    if cause == "mistake":
        return "stop", "no requeue can mend that"
    if cause == "bad_nodes":
        before: set[str] = set()
        for event in job.events():
            if event["event"] == "excluded":
                before.update(event["nodes"])
        out = before | set(bad_nodes)
        here = node_names()
        # one node alone may be bad once
        if set(here) <= set(bad_nodes) and (before or len(here) > 1):
            return (
                "stop",
                (
                    "all nodes of the job failed, so other nodes would do no better: look for what"
                    " they share"
                ),
            )
        allowed = limit("TESSERA_MAX_BAD_NODES")
        if len(out) > allowed:
            return (
                "stop",
                (
                    f"that makes {len(out)} nodes, {allowed} are allowed (TESSERA_MAX_BAD_NODES):"
                    " look for what they share"
                ),
            )
        return "requeue", ""
    if cause == "stopped":
        idle, allowed = (
            starts_without_progress(job, tokens=tokens),
            limit("TESSERA_MAX_IDLE_STARTS"),
        )
        if idle >= allowed:
            return (
                "stop",
                (
                    f"{idle} starts in a row committed nothing: the time limit is too short for a"
                    " start and a step"
                ),
            )
        return "requeue", ""
    # a crash, from here on
    allowed = limit("TESSERA_MAX_CRASHES")
    # without progress since the last crash it would crash there again
    if crashes and tokens <= crashes[-1]["tokens"]:
        return (
            "stop",
            f"it crashed before, and nothing was committed since: {tokens:,} tokens then and now",
        )
    if len(crashes) >= allowed:
        return (
            "stop",
            (
                f"that is crash {len(crashes) + 1} of this job, {allowed} are allowed"
                " (TESSERA_MAX_CRASHES)"
            ),
        )
    return "requeue", ""


def limit(name: str) -> int:
    """One of LIMITS, or what the environment says instead."""
    text = os.environ.get(name) or str(LIMITS[name])
    if not re.fullmatch("[0-9]{1,9}", text):
        raise Mistake(f"{name} is {text[:40]}; needed: a whole number.")
    return int(text)


def starts_without_progress(job: Job, *, tokens: int) -> int:
    """How many of the job's last starts, this one included, began with what is committed now."""
    begun = [e["tokens"] for e in job.events() if e["event"] == "start"]
    count = 0
    # committed tokens only grow, so no start before that one counts
    for at in reversed(begun):
        if at < tokens:
            break
        count += 1
    return count


def stopped_by_itself(job: Job) -> str:
    """What the run's own last event says, where this start saved and left by a signal or its time limit."""
    events = job.folder / "events.jsonl"
    began = max(
        (e["time"] for e in job.events() if e["event"] == "start" and e["restart"] == job.restart),
        default=0.0,
    )
    # an event of an earlier start says nothing about this one
    if not events.exists() or events.stat().st_mtime < began:
        return ""
    try:
        last = json.loads(events.read_bytes().rstrip(b"\n").rsplit(b"\n", 1)[-1])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(last, dict) or last.get("event") != "stopped":
        return ""
    by = last.get("limit") or f"signal {last.get('signal')}"
    return f"stopped by {by} after step {last.get('step')}"


def first_error(job: Job) -> str:
    """The line that a rank of this start left in RUN/errors or RUN/hangs."""
    began = max(
        (e["time"] for e in job.events() if e["event"] == "start" and e["restart"] == job.restart),
        default=0.0,
    )
    written = [*(job.folder / "errors").glob("*.txt"), *(job.folder / "hangs").glob("*.txt")]
    files = [p for p in written if p.stat().st_mtime >= began]
    if not files:
        return ""
    return (
        # the first to fail; the others failed because of it
        min(files, key=lambda p: p.stat().st_mtime)
        .read_text(encoding="utf-8", errors="replace")
        .split("\n", 1)[0][:400]
    )


def write_report(job: Job, *, why: str, reason: str) -> Path:
    """What happened in this job, for people; returns its path."""
    path = job.own / f"{job.id}-report.txt"
    lines = [f"Job {job.id} stopped: {reason}.", f"Last: {why}", "", "Its starts:"]
    for event in job.events():
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        if event["event"] == "start":
            lines.append(
                f"  {clock}  start {event['restart']} on {event['nodes']}, {event['ranks']} ranks, "
                f"from step {event['step']}, {event['tokens']:,} tokens"
            )
        elif event["event"] == "end":
            lines.append(
                f"  {clock}  {event['cause']} after {event['seconds']:.0f} s, committed: step"
                f" {event['step']}, {event['tokens']:,} tokens: {event['why']}"
            )
        elif event["event"] == "excluded":
            lines.append(f"  {clock}  left out from now on: {', '.join(event['nodes'])}")
        elif event["event"] == "refused":
            lines.append(f"  {clock}  SLURM did not requeue the job: {event['why']}")
    lines += [
        "",
        (
            "The first errors of the ranks are in errors/, stacks of a hang in hangs/, all output"
            " in the job's own file."
        ),
        "After mending it, the same sbatch line goes on from the newest checkpoint.",
    ]
    write_text(path, "\n".join(lines) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """The file; where the disk is full, the error says which one."""
    try:
        # a name of a file that is not UTF-8, as \udce9
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- SLURM -----------------------------------------------------------------------------------------------------------------------


def job_state(job_id: str) -> dict[str, str]:
    """What the controller says of a job: JobState, Restarts, ExcNodeList, ...; waits for a controller that does not answer."""
    answer = ask("scontrol", "--oneliner", "show", "job", job_id)
    return dict(word.partition("=")[::2] for word in answer.stdout.split() if "=" in word)


def node_names() -> list[str]:
    """The nodes of this job."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    if re.search(r"[\[,]", nodes):
        return ask("scontrol", "show", "hostnames", nodes).stdout.split()
    return [nodes]


def requeue(job: Job, *, leave_out: list[str]) -> str:
    """Asks SLURM to start the job again, without some nodes; what it answered where it refused, else nothing."""
    # asked before the requeue, for the nodes that are left out already
    state = job_state(job.id) if leave_out else {}
    answer = ask("scontrol", "requeue", job.id)
    if answer.returncode:
        return " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
    if leave_out:
        # accepted of a job that is no longer running, so after the requeue; SLURM lets it start only after its credential's
        # time, 120 s, and gives this process KillWait, 30 s, to end
        for _ in range(50):
            refused = exclude(job.id, leave_out, state=state)
            if not refused:
                job.write("excluded", nodes=leave_out, jobs=[])
                break
            time.sleep(0.1)
        else:
            say(f"SLURM did not leave out {', '.join(leave_out)}: {refused}")
    return ""


def leave_out_of_next_jobs(job: Job, nodes: list[str]) -> list[str]:
    """Trainings of this run that are queued behind this job (submit.py --jobs) are not to be given the nodes; returns their ids."""
    after = []
    for line in records(job.own / SUBMITTED):
        # preparation and export may run there, and this job is not queued behind itself
        if not str(line.get("role", "")).startswith("training") or line.get("job") in (
            None,
            job.id,
        ):
            continue
        state = job_state(line["job"])
        if state.get("JobState") != "PENDING":
            continue
        refused = exclude(line["job"], nodes, state=state)
        if refused:
            say(f"SLURM did not leave {', '.join(nodes)} out of job {line['job']}: {refused}")
        else:
            after.append(line["job"])
    if after:
        job.write("excluded", nodes=nodes, jobs=after)
    return after


def exclude(job_id: str, nodes: list[str], *, state: dict[str, str]) -> str:
    """Adds nodes to those that a job in the given state leaves out; what SLURM answered where it refused, else nothing."""
    before = state.get("ExcNodeList", "(null)").replace("(null)", "")
    answer = ask(
        "scontrol",
        "update",
        f"JobId={job_id}",
        f"ExcNodeList={','.join(filter(None, [before, *nodes]))}",
    )
    return (
        (" ".join(answer.stderr.split()) or f"exit code {answer.returncode}")
        if answer.returncode
        else ""
    )


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of SLURM's; tries again while the controller does not answer."""
    end_at, wait_seconds = time.monotonic() + CONTROLLER_SECONDS, 1.0
    while True:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        # words of SLURM's commands while the controller is away
        silent = re.search(
            "contact slurm controller|timed out|Connection refused|Unable to establish",
            answer.stderr,
        )
        if not (answer.returncode and silent) or time.monotonic() > end_at:
            return answer
        time.sleep(wait_seconds)
        wait_seconds = min(30.0, 2 * wait_seconds)


def signal_ranks(number: int) -> int:
    """Signals the ranks of this job on this node: the processes to which a launcher gave RANK."""
    job_id = os.environ["SLURM_JOB_ID"]
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or folder.stat().st_uid != os.getuid():
                continue
            env = dict(
                word.partition(b"=")[::2] for word in (folder / "environ").read_bytes().split(b"\0")
            )
            command = (folder / "cmdline").read_bytes()
            # the launcher and its shell have the job's id as well, but no RANK
            if (
                env.get(b"SLURM_JOB_ID") == job_id.encode()
                and b"RANK" in env
                and b"launch/pretrain.py" in command
            ):
                os.kill(int(folder.name), number)
        except OSError:
            continue  # it has ended, or is not ours
    return 0


def say(line: str) -> None:
    """One line in the job's output."""
    print(f"job: {line}", file=sys.stderr, flush=True)


def complain(text: str, *, code: int = MISTAKE) -> int:
    """`error: TEXT` on standard error; returns the exit code."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
