"""A run, or the preparation of its shards, as a chain of SLURM jobs.

    prep -> merge -> check -> training -> export        each started when the one before ended well

Nothing is submitted that cannot work: the run file is planned first, compared with the number of ranks, and the request
with what the cluster has. slurm/submit.py is the command.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encoder.base.command import CommandLine, count, place, run_command
from encoder.base.errors import ConfigError, UserError
from encoder.tools.cluster.commands import alive_jobs, check_cluster, minutes, node_range, run_words
from encoder.tools.cluster.outlet import Outlet
from encoder.tools.cluster.precheck import plan_first
from encoder.tools.cluster.status import main as status

# pretrain.sbatch asks for its signal 5 minutes before the limit; SLURM may send it one earlier
LEAST_MINUTES = 10
SUBMITTED = "submitted.jsonl"  # in RUN/slurm: one line a job


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sbatch line; `after` are the roles of this chain that must have ended, with SLURM's word for how."""

    role: str
    script: str
    words: tuple[str, ...]  # the script's own
    options: tuple[str, ...]  # sbatch's
    after: tuple[tuple[str, str], ...] = ()  # (afterok or afterany, role)
    env: dict[str, str] = field(default_factory=dict)

    home: Path = Path()  # where slurm/ is

    def command(self, ids: dict[str, str]) -> list[str]:
        """The whole line, once the jobs before it have their ids."""
        # SLURM ends a job whose condition can never come true, instead of keeping it for ever
        waits = [f"{how}:{ids[role]}" for how, role in self.after]
        depends = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
        return [
            "sbatch",
            "--parsable",
            *self.options,
            *depends,
            str(self.home / "slurm" / self.script),
            *self.words,
        ]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What the command gives to this room, which knows neither where it lies nor data preparation."""

    description: str  # of --help
    home: Path  # the project's folder, where slurm/ is
    # (CONFIG, overrides, parts): which are missing, as --array takes them; empty: merging is left; None: all is done
    missing_parts: Callable[[Path, list[str], int], str | None]


def submit(argv: list[str], chain: Chain) -> int:
    """Parses, checks, submits; returns the exit code. Standard output may be closed by its reader."""
    sys.stdout = Outlet(sys.stdout)
    try:
        return _main(argv, chain)
    finally:
        sys.stdout.flush()


def _main(argv: list[str], chain: Chain) -> int:
    if argv[:1] == ["status"]:
        return status(argv[1:])
    parser = _parser(chain.description)
    args = parser.parse_intermixed_args(argv)
    if args.run is None and args.prep is None:
        parser.error("nothing to submit. Needed: RUN.yaml, or --prep CONFIG")
    return run_command(
        lambda: _submit(args, chain), stopped="stopped; look at squeue --me for what was submitted"
    )


def _parser(description: str) -> CommandLine:
    parser = CommandLine(description=description)
    parser.add_argument("run", nargs="?", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings put over the file's"
    )
    job = parser.add_argument_group("the training job")
    job.add_argument(
        "--nodes", metavar="N", default="1", help="nodes, or from-to: as many as there are (1)"
    )
    job.add_argument(
        "--gpus-per-node",
        type=count,
        metavar="N",
        help="GPUs of a node, a rank each; leave it out for CPU only",
    )
    job.add_argument(
        "--tasks-per-node", type=count, metavar="N", help="ranks of a node without GPUs (1)"
    )
    job.add_argument("--cpus-per-task", type=count, metavar="N", help="cores of a rank")
    job.add_argument(
        "--time", metavar="T", help="time limit of a start, as sbatch takes it: 24:00:00, 2-00"
    )
    job.add_argument("--partition", metavar="P")
    job.add_argument("--account", metavar="A")
    job.add_argument("--qos", metavar="Q")
    job.add_argument(
        "--jobs",
        type=count,
        default=1,
        metavar="K",
        help="so many jobs after one another, that are not requeued",
    )
    job.add_argument("--container-image", metavar="IMAGE", help="for srun, with pyxis")
    job.add_argument("--container-mounts", metavar="A:B,C", help="for srun, with pyxis")
    job.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option, e.g. --sbatch=--exclusive",
    )
    chain = parser.add_argument_group("before and after it")
    chain.add_argument(
        "--prep", metavar="CONFIG", type=place, help="prepare the shards of this file first"
    )
    chain.add_argument(
        "--prep-set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting put over CONFIG's",
    )
    chain.add_argument(
        "--parts", type=count, default=1, metavar="N", help="tasks of the preparation (1)"
    )
    chain.add_argument(
        "--prep-cpus", type=count, metavar="N", help="cores of each (--cpus-per-task)"
    )
    chain.add_argument(
        "--no-check",
        action="store_true",
        help="no job that looks at the nodes first; the training does so, too",
    )
    chain.add_argument(
        "--export", metavar="OUT", type=place, help="write a Hugging Face folder at the end"
    )
    chain.add_argument(
        "--onnx", action="store_true", help="with --export: also OUT/onnx/model.onnx"
    )
    parser.add_argument(
        "--shards-elsewhere",
        action="store_true",
        help="the shards are seen by the compute nodes alone",
    )
    parser.add_argument(
        "--no-plan", action="store_true", help="torch is not on this machine: leave the plan out"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print commands and scripts, submit nothing"
    )
    return parser


def _submit(args: argparse.Namespace, chain: Chain) -> int:
    env = _environment(args, chain.home)
    fewest, most = node_range(args.nodes)
    per_node = args.gpus_per_node or args.tasks_per_node or 1
    folder = _run_folder(args) if args.run else None
    missing = chain.missing_parts(Path(args.prep), args.prep_set, args.parts) if args.prep else ""
    # the fewest nodes of a range are enough for SLURM to start the job
    check_cluster(
        nodes=fewest if args.run else 1,
        gpus=(args.gpus_per_node or 0) if args.run else 0,
        cpus=per_node * (args.cpus_per_task or 1),
        partition=args.partition,
        time_limit=args.time,
    )
    if folder is not None:
        if args.time and 0 < minutes(args.time) < LEAST_MINUTES:
            raise ConfigError(
                f"--time {args.time} is {minutes(args.time):g} minutes, but the training saves and"
                f" leaves 5 minutes before its limit. Needed: {LEAST_MINUTES} minutes or more."
            )
        if alive := alive_jobs(_record(folder)):
            if len(alive) == 1:
                who = f"job {alive[0]} of this run is"
            else:
                who = f"jobs {', '.join(alive)} of this run are"
            raise ConfigError(
                f"{who} still queued or running. Wait, or scancel {' '.join(alive)}; "
                "slurm/submit.py status says how it stands."
            )
        if not args.no_plan:
            plan_first(
                args.run,
                args.overrides,
                ranks=[n * per_node for n in dict.fromkeys((fewest, most))],
                shards_must_be_there=not (args.prep or args.shards_elsewhere),
            )

    jobs = _chain(args, folder, missing, env=env, home=chain.home)
    if not jobs:
        print("nothing to do: all parts are there, and merged")
        return 0
    if args.dry_run:
        return _show(jobs, chain.home)
    ids = _send(jobs, folder)
    print(f"{'job':<10}{'role':<12}after")
    for job in jobs:
        after = ", ".join(f"{ids[role]} ({how})" for how, role in job.after)
        print(f"{ids[job.role]:<10}{job.role:<12}{after or 'at once'}")
    if folder:
        print(
            f"output in {folder / 'slurm'}, until the check in {Path.cwd()}; how it stands:"
            f" slurm/submit.py status {folder}"
        )
    return 0


def _chain(
    args: argparse.Namespace,
    folder: Path | None,
    missing: str | None,
    *,
    env: dict[str, str],
    home: Path,
) -> list[Job]:
    """The jobs in order.

    args: of the command line
    folder: the run's; None: only shards are prepared
    missing: parts of the preparation, as sbatch's array; "": all are there, and are merged; None: all is done
    env: for the job scripts
    home: the clone that they run from
    """
    jobs = _Jobs(args, env=env, home=home)
    if args.prep:
        _add_prep(jobs, missing)
    if folder is None:
        return jobs.made

    # letters that SLURM and file systems take alike
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name)
    if not args.no_check:
        jobs.add(
            "check",
            "check.sbatch",
            [args.run, *args.overrides],
            *_shape(args),
            "--time=15",
            f"--job-name=check-{name}",
            f"--output={jobs.early}/check-%j.out",
        )
    late = _for_sbatch(folder.absolute() / "slurm")
    _add_trainings(jobs, name=name, output=late)
    if args.export:
        _add_export(jobs, folder, name=name, output=late)
    return jobs.made


class _Jobs:
    """The jobs of a chain so far; each waits for the one before it."""

    def __init__(self, args: argparse.Namespace, *, env: dict[str, str], home: Path) -> None:
        self.args = args
        self.made: list[Job] = []
        # what comes before the check writes where this was called: a run folder that is not
        # shared is found by the check alone
        self.early = _for_sbatch(Path.cwd())
        self._env, self._home = env, home

        # options of every job of the chain
        asked = {"partition": args.partition, "account": args.account, "qos": args.qos}
        self._common = [f"--{key}={value}" for key, value in asked.items() if value]
        self._common += args.sbatch

    def add(
        self,
        role: str,
        script: str,
        words: Sequence[str],
        *options: str,
        how: str = "afterok",
        also: str = "",
        **changes: str,
    ) -> None:
        """One more job.

        role: its name in the chain
        script, words: what is run, and its arguments
        options: of sbatch
        how: in which state the job before it must end
        also: the role of another job that must have ended well
        changes: of the environment
        """
        after: list[tuple[str, str]] = []
        if self.made:
            after.append((how, self.made[-1].role))
        if also:
            after.append(("afterok", also))
        self.made.append(
            Job(
                role=role,
                script=script,
                words=tuple(words),
                options=(*self._common, *options),
                after=tuple(after),
                env={**self._env, **changes},
                home=self._home,
            )
        )


def _for_sbatch(folder: Path) -> str:
    """A folder in --output, where sbatch fills in what follows a %."""
    return str(folder).replace("%", "%%")


def _cpus(number: int | None) -> list[str]:
    if not number:
        return []
    return [f"--cpus-per-task={number}"]


def _shape(args: argparse.Namespace) -> list[str]:
    """Nodes, ranks and GPUs of a training, and of its check."""
    per_node = args.gpus_per_node or args.tasks_per_node or 1
    shape = [f"--nodes={args.nodes}", f"--ntasks-per-node={per_node}"]
    if args.gpus_per_node:
        shape.append(f"--gpus-per-node={args.gpus_per_node}")
    return shape + _cpus(args.cpus_per_task)


def _add_prep(jobs: _Jobs, missing: str | None) -> None:
    args = jobs.args
    words = [args.prep, *args.prep_set]
    own = _cpus(args.prep_cpus or args.cpus_per_task)
    if missing:
        jobs.add(
            "prep",
            "prep_array.sbatch",
            words,
            f"--array={missing}",
            *own,
            f"--output={jobs.early}/prep-%A_%a.out",
            TESSERA_PARTS=str(args.parts),
        )
    # also where all parts are there and only merging is left
    if missing is not None:
        jobs.add(
            "merge",
            "prep_array.sbatch",
            words,
            "--job-name=merge",
            *own,
            f"--output={jobs.early}/merge-%j.out",
        )


def _add_trainings(jobs: _Jobs, *, name: str, output: str) -> None:
    args = jobs.args
    options = [*_shape(args), f"--job-name={name}"]
    if args.time:
        options.append(f"--time={args.time}")
    options.append(f"--output={output}/%x-%j.out")
    words = [args.run, *args.overrides]
    if args.jobs == 1:
        jobs.add("training", "pretrain.sbatch", words, *options)
        return

    options.insert(-1, "--no-requeue")
    # where the last job before training fails, none of several trainings may run
    early_end = ""
    if jobs.made:
        early_end = jobs.made[-1].role
    jobs.add("training-1", "pretrain.sbatch", words, *options)
    for number in range(2, args.jobs + 1):
        # however the training before it ended, this one goes on from there
        jobs.add(
            f"training-{number}",
            "pretrain.sbatch",
            words,
            *options,
            how="afterany",
            also=early_end,
        )


def _add_export(jobs: _Jobs, folder: Path, *, name: str, output: str) -> None:
    words = [str(folder), jobs.args.export]
    if jobs.args.onnx:
        words.append("--onnx")
    # one task on one node is enough for an export
    jobs.add(
        "export",
        "export.sbatch",
        words,
        f"--job-name=export-{name}",
        *_cpus(jobs.args.cpus_per_task),
        f"--output={output}/export-%j.out",
    )


def _environment(args: argparse.Namespace, home: Path) -> dict[str, str]:
    """What the job scripts read. Containers: their own python, and options for every srun."""
    env = {"TESSERA_HOME": str(home)}
    # options that every srun of the job scripts takes over
    extra = [
        f"--{key}={value}"
        for key, value in (
            ("container-image", args.container_image),
            ("container-mounts", args.container_mounts),
        )
        if value
    ]
    for word in extra:
        if re.search(r"\s", word):
            raise ConfigError(
                f"{word!r} has white space in it, which the job scripts would take for the next"
                " option. Rename it."
            )
    if extra:
        env["TESSERA_SRUN_ARGS"] = " ".join(
            [*filter(None, [os.environ.get("TESSERA_SRUN_ARGS")]), *extra]
        )
    own = os.environ.get("TESSERA_ENV")
    if own:
        if not Path(own).is_file():
            raise ConfigError(
                f"TESSERA_ENV is {own}, which is no file here. Needed: a copy of slurm/env.sh that"
                " the nodes see."
            )
        env["TESSERA_ENV"] = str(Path(own).absolute())

    # the Python that submits runs the jobs, too; a container has its own
    if "TESSERA_PYTHON" not in os.environ:
        env["TESSERA_PYTHON"] = "python3" if args.container_image else sys.executable
    return env


def _run_folder(args: argparse.Namespace) -> Path:
    from encoder.runs.short_forms import read_run_mapping, run_folder

    mapping = read_run_mapping(Path(args.run), args.overrides)
    out = run_folder(mapping)
    if out is None:
        raise ConfigError(f"{args.run} has no out. Needed: out: FOLDER, the run folder.")
    if "out" not in mapping:  # job.py, which needs no packages, reads it off the line
        args.overrides = [*args.overrides, f"out={out}"]
    return Path(out)


def _show(jobs: list[Job], home: Path) -> int:
    """What would be submitted: every line, then every script."""
    # no job has an id yet: <check> stands for that of the check
    ids = {job.role: f"<{job.role}>" for job in jobs}
    for job in jobs:
        words = [f"{key}={shlex.quote(value)}" for key, value in job.env.items()]
        line = " ".join(
            [*words, *(word if "<" in word else shlex.quote(word) for word in job.command(ids))]
        )
        print(f"# {job.role}\n{line}\n")
    for script in dict.fromkeys(job.script for job in jobs):
        print(f"# ---- slurm/{script}\n{(home / 'slurm' / script).read_text(encoding='utf-8')}")
    return 0


def _send(jobs: list[Job], folder: Path | None) -> dict[str, str]:
    """Submits all of them or none; returns the ids by role."""
    if folder:
        # SLURM makes no folder for its output
        (folder / "slurm").mkdir(parents=True, exist_ok=True)
    ids: dict[str, str] = {}
    try:
        with open(_record(folder) if folder else os.devnull, "a", encoding="utf-8") as record:
            for job in jobs:
                command = job.command(ids)
                said = run_words(command, env=job.env).strip()
                # ID, or ID;CLUSTER
                if not said.partition(";")[0].isdigit():
                    raise ConfigError(
                        f"sbatch gave no job id, but {said or 'nothing'}. Leave out what makes it"
                        " submit nothing."
                    )
                ids[job.role] = said.partition(";")[0]
                record.write(
                    json.dumps(
                        {
                            "time": round(time.time(), 3),
                            "job": ids[job.role],
                            "role": job.role,
                            "command": command,
                        }
                    )
                    + "\n"
                )
                record.flush()
    except (UserError, OSError):
        # all or none: what was submitted so far is taken back
        if ids:
            subprocess.run(["scancel", *ids.values()], check=False, capture_output=True)
        raise
    return ids


def _record(folder: Path) -> Path:
    return folder / "slurm" / SUBMITTED
