"""`submit.py status`: each job of a run with its state and how it ended, what was trained, how fast, and when it will be done.

States come from the controller, which forgets ended jobs after minutes; then from sacct, where the cluster has it; then from
what the job itself wrote down (RUN/slurm/JOBID.jsonl, see job.py), which also has the cause that SLURM does not know. While the
controller does not answer, a job that wrote no last word is "unknown": it may well run.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.command import CommandLine, run_command
from encoder.base.done import is_done
from encoder.base.errors import ConfigError
from encoder.base.job_log import records, whole_records
from encoder.base.schema import read_mapping
from encoder.base.units import parse_tokens, short_count, short_seconds
from encoder.base.untrusted import number_in_name
from encoder.runs.short_forms import read_run_mapping, run_folder
from encoder.tools.cluster.commands import ENDED, NoAnswer, NotHere, quiet, show_job

# the words of job.py, where they do not speak for themselves
CAUSES = {
    "stopped": "saved before its limit",
    "ended": "requeued, preempted or cancelled",
    "bad_nodes": "bad nodes",
    "taken_over": "taken over",
}
UNKNOWN, NO_CONTROLLER = "unknown", "the controller does not answer"
TAIL_BYTES = 2**16  # of a ledger or of metrics: some hundred lines


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job, or all tasks of an array, as people want to see it."""

    job: str
    role: str
    state: str
    ran: str = ""
    nodes: str = ""
    ended: str = ""  # how, in words

    @property
    def alive(self) -> bool | None:
        """None where nobody can say."""
        if self.state == UNKNOWN:
            return None
        return not self.state.startswith((*ENDED, "ended", "gone"))


def main(argv: list[str]) -> int:
    """Parses, prints, returns the exit code."""
    prog = None
    if Path(sys.argv[0]).name == "submit.py":
        prog = "submit.py status"
    parser = CommandLine(prog=prog, description=__doc__)
    parser.add_argument(
        "run",
        metavar="RUN.yaml|RUN_FOLDER",
        help="the run file (with its overrides), or the run folder",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings put over the file's"
    )
    args = parser.parse_args(argv)
    return run_command(lambda: print_status(Path(args.run), args.overrides))


def print_status(given: Path, overrides: list[str]) -> None:
    """The table of jobs, then the run. Raises UserError."""
    folder, settings = _folder_of(given, overrides)
    jobs, silence = states(folder)
    if jobs:
        rows = [
            ("job", "role", "state", "ran", "nodes", "how it ended"),
            *((j.job, j.role, j.state, j.ran, j.nodes, j.ended) for j in jobs),
        ]
        *widths, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            words = [word.ljust(width) for word, width in zip(row, widths)]
            print("  ".join([*words, row[-1]]).rstrip())
    else:
        print(f"no job of {folder} is known (no {folder / 'slurm'})")
    if silence:
        print(f"warning: {silence}")

    # True: queued or running, False: ended, None: nobody can say
    training = [job for job in jobs if job.role.startswith("training")]
    trains = {job.alive for job in training}
    if any(job.alive and not job.state.startswith("PENDING") for job in training):
        stands = ""
    elif True in trains:
        stands = "it waits for its start"
    else:
        if None in trains:
            stands = "nobody says whether it trains now"
        else:
            stands = "nothing trains now"
    print(progress_text(folder, settings, stands=stands, now=time.time()))
    if any((folder / "wandb").glob("offline-run-*")):
        print(
            "wandb, from a machine with internet: wandb sync"
            f" {shlex.quote(str(folder))}/wandb/offline-run-*"
        )


def states(folder: Path) -> tuple[list[JobState], str]:
    """Of every job that was submitted for the run, or that trained it, oldest first; and why the controller did not answer."""
    submitted = {
        line["job"]: line
        for line in records(folder / "slurm" / "submitted.jsonl")
        if _is_job(line.get("job")) and isinstance(line.get("role"), str)
    }
    # what sbatch alone started is known by what it wrote, RUN/slurm/JOBID.jsonl
    by_hand = [
        p.stem
        for p in (folder / "slurm").glob("*.jsonl")
        if _is_job(p.stem) and p.stem not in submitted
    ]
    ids = sorted([*submitted, *by_hand], key=int)
    # one question to the accounting for all jobs
    known = _from_sacct(ids)
    found, silence = [], ""
    for job in ids:
        role = "training"
        if job in submitted:
            role = submitted[job]["role"]
        written = _story(records(folder / "slurm" / f"{job}.jsonl"))
        shown: list[dict[str, str]] | None = None
        if not silence:  # each question to a controller that is away takes its time
            try:
                shown = show_job(job)
            except NoAnswer as why:
                silence = str(why) if isinstance(why, NotHere) else f"{NO_CONTROLLER} ({why})"
        found.append(_state(job, role, written, shown, known.get(job, []), silence=silence))
    return found, silence


def _is_job(text: Any) -> bool:
    """Whether a name on disk, or a value in a file, is the number of a job."""
    return isinstance(text, str) and number_in_name(text) is not None


def _story(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Starts and ends alone; a requeue that SLURM refused is part of the end that asked for it."""
    story: list[dict[str, Any]] = []
    for event in written:
        if event["event"] in ("start", "end"):
            story.append(event)
        elif event["event"] == "refused" and story and story[-1]["event"] == "end":
            why = f"{story[-1]['why']}; SLURM did not requeue it: {event['why']}"
            story[-1] = {**story[-1], "decision": event["decision"], "why": why}
    return story


def _state(
    job: str,
    role: str,
    written: list[dict[str, Any]],
    shown: list[dict[str, str]] | None,
    kept: list[dict[str, str]],
    *,
    silence: str,
) -> JobState:
    """`shown`: what the controller says, nothing of a job that it has forgotten, None where it does not answer."""
    # the controller's word, or else the accounting's
    tasks = [
        {
            "state": task.get("JobState", "?"),
            "ran": _ran(task),
            "nodes": task.get("NodeList", ""),
            "code": task.get("ExitCode", ""),
            "reason": task.get("Reason", "None"),
        }
        for task in shown or ()
    ] or kept
    if not tasks:
        return _without_slurm(job, role, written, silence=silence if shown is None else "")
    counts = Counter(task["state"] for task in tasks)
    state = ", ".join(f"{n} {word}" for word, n in counts.most_common())
    if len(tasks) == 1:
        state = tasks[0]["state"]
    ended = _cause(written, state=state)
    waiting = next(
        (
            task["reason"]
            for task in tasks
            if task["state"] == "PENDING" and task["reason"] != "None"
        ),
        "",
    )
    # of an array, the first task that failed
    failed = next((f"exit code {task['code']}" for task in tasks if task["state"] == "FAILED"), "")
    return JobState(
        job=job,
        role=role,
        state=state,
        ran=max((t["ran"] for t in tasks), key=len),
        nodes=", ".join(
            dict.fromkeys(
                t["nodes"] for t in tasks if t["nodes"] not in ("", "(null)", "None assigned")
            )
        ),
        ended=ended or failed or (f"waits: {waiting}" if waiting else ""),
    )


def _without_slurm(job: str, role: str, written: list[dict[str, Any]], *, silence: str) -> JobState:
    """From what the job wrote alone: SLURM has forgotten it, or nobody answers (`silence`)."""
    last = {}
    if written:
        last = written[-1]
    nodes = next((event["nodes"] for event in reversed(written) if event["event"] == "start"), "")
    # of its own accord; after the others SLURM may have started it again
    if last.get("decision") in ("finish", "stop", "submit_again") or (
        last.get("decision") == "leave" and not silence
    ):
        return JobState(
            job=job,
            role=role,
            state=f"ended ({last['decision']})",
            nodes=nodes,
            ended=_cause(written, state="ended"),
            ran=short_seconds(last["seconds"]),
        )
    if silence:
        return JobState(
            job=job, role=role, state=UNKNOWN, nodes=nodes, ended=silence.split(" (")[0]
        )
    return JobState(
        job=job,
        role=role,
        state="gone",
        nodes=nodes,
        ended=_cause(written, state="gone") or "SLURM knows it no more",
    )


def _ran(task: dict[str, str]) -> str:
    """Of a job that never started SLURM reckons from 1970, and of one that waits it shows when it may start."""
    started = re.match(r"\d{4}-", task.get("StartTime", "")) and task.get("JobState") != "PENDING"
    if started:
        return task.get("RunTime", "").replace("00:00:00", "")
    return ""


def _cause(written: list[dict[str, Any]], *, state: str) -> str:
    """What the job wrote down of its ends: one of each start, the last one in full. `state`: SLURM's word, ended, or gone."""
    ends = [e for e in written if e["event"] == "end"]
    counts = Counter(CAUSES.get(e["cause"], e["cause"]) for e in ends)
    over = state.startswith((*ENDED, "ended", "gone"))
    # the last start wrote no end: it runs, or it was killed
    if written and written[-1]["event"] != "end":
        killed = over or state == "PENDING"
        if not ends and not killed:
            return ""
        now = f"start {written[-1]['restart'] + 1} runs"
        if killed:
            now = f"start {written[-1]['restart'] + 1} was killed: it wrote no end"
        if ends:
            return f"{now}; before: {_counted(counts)}"
        return now
    if not ends:
        return ""

    last = ends[-1]
    if over and last["decision"] == "requeue":
        if state == "gone":
            how = "SLURM knows it no more"
        else:
            how = state.lower()
        return f"{how} while it waited for its next start; before: {_counted(counts)}"
    # the last one is told in full, so it is not counted again
    counts[CAUSES.get(last["cause"], last["cause"])] -= 1
    before = ""
    if +counts:
        before = f" (before: {_counted(+counts)})"
    if last["cause"] == "done":
        return f"done{before}"
    return f"{last['cause']}, {last['why']}{before}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} x {what}" for what, n in counts.items())


def _from_sacct(ids: list[str]) -> dict[str, list[dict[str, str]]]:
    """The last run of each job or task, as the accounting has it."""
    if not ids:
        return {}
    fields = "JobID,State,ExitCode,Elapsed,NodeList"
    found: dict[str, dict[str, dict[str, str]]] = {}
    asked = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={','.join(ids)}",
        f"--format={fields}",
    ]
    for line in quiet(asked).splitlines():
        words = line.split("|")
        if len(words) == 5:
            # JOB or JOB_TASK: the tasks of an array are gathered under their job
            name, state, code, ran, nodes = words
            found.setdefault(name.split("_")[0].split(".")[0], {})[name] = {
                "state": state.split(" ")[0],
                "ran": ran,
                "nodes": nodes,
                "code": code,
                "reason": "None",
            }
    return {job: list(tasks.values()) for job, tasks in found.items()}


def progress_text(folder: Path, settings: dict[str, Any], *, stands: str, now: float) -> str:
    """What was trained of how much, how fast, and when it ends if it goes on like that; `stands` says why it may not go on."""
    total = sum(parse_tokens(phase["tokens"]) for phase in settings.get("phases", []))
    last = next(
        (line for line in reversed(_tail(folder / "ledger.jsonl")) if "tokens_seen" in line), None
    )
    done, problem = is_done(folder)
    if problem:
        print(f"warning: {problem}", file=sys.stderr)
    if done:
        tokens, steps = (last["tokens_seen"], last["step"]) if last else (total, 0)
        return f"{folder}: done, {short_count(tokens)} tokens, {steps:,} steps"
    if last is None:
        return f"{folder}: no step yet of {short_count(total)} tokens"
    done = last["tokens_seen"]
    text = (
        f"{folder}: phase {last['phase']}, step {last['step']:,}, {short_count(done)} of "
        f"{short_count(total)} tokens ({done / max(1, total):.1%})"
    )

    speeds = [
        line["tokens_per_second"]
        for line in _tail(folder / "metrics.jsonl")
        if line.get("tokens_per_second")
    ]
    speed = 0.0
    if speeds:
        speed = speeds[-1]
    if not speed:
        return text

    # at the last step's speed, without the time between starts
    left = max(0, total - done) / speed
    ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + left))
    if stands:
        then = f"{short_seconds(left)} of training are left; {stands}"
    else:
        then = f"done in {short_seconds(left)} ({ends}) without stops"
    return f"{text}, {short_count(speed)} tokens/s, {then}"


def _folder_of(given: Path, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """The run folder, and its settings: those it was started with, or the run file's."""
    if given.is_dir():
        if not (given / "run.yaml").exists() and not (given / "slurm").exists():
            raise ConfigError(
                f"{given} is no run folder: it has no run.yaml. Needed: a run file, or the `out` of"
                " one."
            )
        return given, read_mapping(given / "run.yaml") if (given / "run.yaml").exists() else {}
    settings = read_run_mapping(given, overrides)
    folder = run_folder(settings)
    if folder is None:
        raise ConfigError(f"{given} has no out. Needed: a run file, or a run folder.")
    return Path(folder), settings


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file that may have a million."""
    if not path.exists():
        return []
    with open(path, "rb") as f:
        # the first line is torn by the seek, and the last may be: whole_records leaves both out
        f.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = f.read().split(b"\n")
    return whole_records(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
