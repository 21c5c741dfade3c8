"""SLURM's commands as functions, always as lists of words; what they answer, as plain values."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from encoder.base.errors import ConfigError, UserError
from encoder.base.units import counted

ANSWER_SECONDS = 60.0
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
    "REVOKED",
)


def run_words(command: list[str], *, env: dict[str, str] | None = None) -> str:
    """Runs it and returns what it printed. Raises UserError with what it said."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not on this machine. Run this on a login node of a SLURM cluster, "
            "or with --dry-run."
        ) from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(
            f"{command[0]} refused:"
            f" {re.sub('^sbatch: error: ', '', said) or f'exit code {done.returncode}'}."
        )
    return done.stdout


class NoAnswer(Exception):
    """A command of SLURM's failed; its text is what it said."""


class NotHere(NoAnswer):
    """The command is not on this machine."""


def ask(command: list[str]) -> str:
    """What it printed. Raises NoAnswer."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=ANSWER_SECONDS,
        )
    except FileNotFoundError as error:
        raise NotHere(f"{command[0]} is not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{command[0]} said nothing for {ANSWER_SECONDS:.0f} s") from error
    except OSError as error:
        raise NoAnswer(f"{command[0]}: {error.strerror or error}") from error
    if done.returncode:
        raise NoAnswer(
            " ".join((done.stderr or done.stdout).split())
            or f"{command[0]} ended with exit code {done.returncode}"
        )
    return done.stdout


def quiet(command: list[str]) -> str:
    """What it printed, empty where it failed or is not here."""
    try:
        return ask(command)
    except NoAnswer:
        return ""


def show_job(job_id: str) -> list[dict[str, str]]:
    """What the controller knows of a job, one for each task of an array; nothing once it has forgotten it. Raises NoAnswer."""
    try:
        lines = ask(["scontrol", "--oneliner", "show", "job", job_id]).splitlines()
    except NoAnswer as why:
        if "Invalid job id" in str(why):  # any other failure says nothing of the job
            return []
        raise
    return list(map(_settings_in, lines))


def alive_jobs(record: Path) -> list[str]:
    """The ids of earlier submissions of a run that have not ended; none on a machine without squeue. Raises UserError where
    nobody can say."""
    text = ""
    if record.exists():
        text = record.read_text(encoding="utf-8", errors="replace")
    ids = re.findall(r'"job": "(\d+)"', text)  # also beside torn lines
    # and those submitted by hand
    ids += sorted(path.stem for path in record.parent.glob("*.jsonl") if path.stem.isdigit())
    if not ids:
        return []
    try:
        # tasks of an array, and the array
        queued = ask(["squeue", "--noheader", "--me", "--format=%A %F"]).split()
    except NotHere:
        return []
    except NoAnswer as why:
        raise UserError(
            f"nobody says whether job {ids[-1]} of this run is still queued: squeue does not answer"
            f" ({why}). Submit again when it does."
        ) from why
    return [job for job in dict.fromkeys(ids) if job in queued]


def node_range(text: str) -> tuple[int, int]:
    """'4' -> 4, 4 and '2-4' -> 2, 4. Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ConfigError(f"--nodes is {text}; needed: a number such as 4, or a range such as 2-4.")
    return int(match[1]), int(match[2] or match[1])


def check_cluster(
    *, nodes: int, gpus: int, cpus: int, partition: str | None, time_limit: str | None
) -> None:
    """Whether the partition could ever give that: SLURM lets what it cannot give wait for ever. Says nothing where sinfo is silent.

    Raises ConfigError."""
    asked = [
        "sinfo",
        "--noheader",
        "--Node",
        "--format=%N|%c|%G|%T|%P|%l",
        *([f"--partition={partition}"] if partition else []),
    ]
    rows = [row.split("|") for row in quiet(asked).splitlines() if row.count("|") == 5]
    # sinfo marks the default partition with a star
    if partition is None:
        rows = [row for row in rows if row[4].endswith("*")] or rows  # the default one
    # a node may be in several; a job runs in one of them
    by_partition: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        by_partition.setdefault(row[4].rstrip("*"), {})[row[0]] = row
    if partition:
        known = {p.strip("* ") for p in quiet(["sinfo", "--noheader", "--format=%P"]).split()}
        wrong = [name for name in partition.split(",") if name not in known]
        if known and wrong:
            raise ConfigError(
                f"there is no partition {', '.join(wrong)}. Known: {', '.join(sorted(known))}."
            )
    lacks = [
        _lack(name, list(of.values()), nodes=nodes, gpus=gpus, cpus=cpus, time_limit=time_limit)
        for name, of in by_partition.items()
    ]
    if lacks and all(lacks):
        raise ConfigError(f"{'; '.join(lacks)}. Ask for less, or name another --partition.")


def _lack(
    partition: str,
    rows: list[list[str]],
    *,
    nodes: int,
    gpus: int,
    cpus: int,
    time_limit: str | None,
) -> str:
    """What a partition of these nodes could never give, or nothing."""
    fit = [
        row
        for row in rows
        # sinfo writes 64+ for nodes of a group that differ
        if int(re.sub(r"\D", "", row[1]) or 0) >= cpus and count_gpus(row[2]) >= gpus
    ]
    if len(fit) < nodes:
        wish = f"{counted(nodes, 'node')} with {counted(cpus, 'core')}"
        if gpus:
            wish += f" and {counted(gpus, 'GPU')}"
        cores = max(int(re.sub(r"\D", "", row[1]) or 0) for row in rows)
        best = f"{cores} cores and {max(count_gpus(row[2]) for row in rows)} GPUs"
        return (
            f"partition {partition} has {len(fit)} of {wish}; it has {len(rows)} nodes, of at most"
            f" {best}"
        )

    limit, wanted = minutes(rows[0][5]), minutes(time_limit or "")
    if limit and wanted and wanted > limit:
        return (
            f"--time {time_limit} is above the limit of partition {partition}, {rows[0][5]}: the"
            " job would wait for ever (the training saves before its limit, and goes on in its"
            " next start)"
        )
    return ""


def count_gpus(gres: str) -> int:
    """'gpu:h100:8(S:0-1),nvme:1' -> 8."""
    return sum(int(match) for match in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def minutes(text: str) -> float:
    """A time of SLURM's in minutes: 90, 90:00, 24:00:00, 2-12, 2-12:30:00; 0 for none or no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        return 0.0
    # behind days come hours; without days: minutes, minutes:seconds or hours:minutes:seconds
    days, *rest = match.groups()
    a, b, c = (int(word or 0) for word in rest)
    if days is not None:
        return 1440 * int(days) + 60 * a + b + c / 60
    if rest[2] is not None:
        return 60 * a + b + c / 60
    return a + b / 60


def _settings_in(line: str) -> dict[str, str]:
    """The NAME=value words of a line of scontrol."""
    pairs = (word.split("=", 1) for word in line.split() if "=" in word)
    return {name: value for name, value in pairs}
