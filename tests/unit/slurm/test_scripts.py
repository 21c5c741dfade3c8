"""The job scripts with stand-ins for SLURM's commands: what they find, what they refuse, what they start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.ranks import ROOT

SCRIPTS = {
    "pretrain": ["run.yaml"],
    "check": ["run.yaml"],
    "prep_array": ["prep.yaml"],
    "export": ["run", "hf"],
    "sweep_array": ["sweep.yaml"],
}
SCONTROL = """#!/bin/sh
case "$*" in
    *"show job 7") printf 'JobId=7 JobName=x\\n   JobState=RUNNING\\n   Command=%s\\n   WorkDir=/\\n' "$SHOWN_COMMAND" ;;
    *"--oneliner show job"*) echo "JobId=7 JobState=RUNNING Restarts=0" ;;
esac
"""
SRUN = """#!/bin/sh
printf '%s\\n' "$@" >"$STEPS/$$.step"
exit ${SRUN_CODE:-0}
"""


class Spool:
    """A repository of the job scripts alone, in a folder with white space in its name; jobs run copies of them, as SLURM does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "my slurm" / "slurm" / "the repository"
        shutil.copytree(
            ROOT / "slurm", self.home / "slurm", ignore=shutil.ignore_patterns("__pycache__")
        )
        (self.home / "launch").mkdir()
        for name in ("pretrain", "doctor"):
            (self.home / "launch" / f"{name}.py").write_text("")
        for name in ("bin", "elsewhere", "steps"):
            (folder / name).mkdir()
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "elsewhere" / "run.yaml").write_text("out: run\n")

    def run(self, name: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        copy = shutil.copy(self.home / "slurm" / f"{name}.sbatch", self.folder / "slurm_script")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TESSERA_", "SLURM_"))}
        shown = f"{self.home}/slurm/{name}.sbatch {' '.join(words or SCRIPTS[name])}"
        env = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "STEPS": str(self.folder / "steps"),
            "SHOWN_COMMAND": shown,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_CPUS_PER_NODE": "8(x2)",
            "SLURM_JOB_END_TIME": "99999999999",
            "TESSERA_PYTHON": sys.executable,
            "TESSERA_TRIES": "1",
            **env,
        }
        return subprocess.run(
            ["bash", str(copy), *(words or SCRIPTS[name])],
            cwd=self.folder / "elsewhere",
            text=True,
            capture_output=True,
            env={**clean, **env},
        )

    def refused(self, name: str, *words: str, **env: str) -> str:
        done = self.run(name, *words, **env)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        ), done.stderr
        assert not self.steps()
        return done.stderr

    def steps(self) -> list[list[str]]:
        """The words of each srun."""
        return [path.read_text().splitlines() for path in sorted((self.folder / "steps").iterdir())]


@pytest.fixture
def spool(tmp_path) -> Spool:
    return Spool(tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_finds_the_repository_that_its_script_was_submitted_from(spool, name):
    done = spool.run(name)
    programs = {"prep_array": "data_prep", "export": "export_hf.py", "sweep_array": "sweep.py"}
    program = programs.get(name, "doctor.py")
    [step] = [step for step in spool.steps() if any(program in word for word in step)]
    if name != "prep_array":
        assert f"{spool.home}/launch/{program}" in step, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_repository_that_is_not_there_is_refused(spool, name):
    assert f"TESSERA_HOME is {spool.folder}, which is not the repository" in spool.refused(
        name, TESSERA_HOME=str(spool.folder)
    )
    said = spool.refused(name, SHOWN_COMMAND="/copy.sbatch", SLURM_SUBMIT_DIR=str(spool.folder))
    assert "the repository is not where the job was submitted from" in said
    (spool.home / "launch" / "pretrain.py").unlink()
    assert "where no launch/pretrain.py is" in spool.refused(name)


def test_the_lines_that_find_the_repository_are_the_same_in_every_script():
    blocks = set()
    for name in SCRIPTS:
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        end = '. "$TESSERA_HOME/slurm/common.sh"\n'
        blocks.add(
            text[text.index("set -u\n") : text.index(end) + len(end)].replace(
                f"slurm/{name}.sbatch", "slurm/NAME.sbatch"
            )
        )
    assert len(blocks) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_env_file_may_use_variables_that_are_not_set_and_the_script_may_not(spool, name):
    env_file = spool.folder / "my env.sh"
    env_file.write_text(
        'export FROM_MODULE="$NOT_SET_ANYWHERE" && case $- in *u*) echo "set -u in env.sh" >&2 ;;'
        " esac\n"
    )
    done = spool.run(name, TESSERA_ENV=str(env_file))
    assert (
        spool.steps()
        and "NOT_SET_ANYWHERE" not in done.stderr
        and "set -u in env.sh" not in done.stderr
    ), done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_env_file_that_is_not_there_is_refused(spool, name):
    assert "TESSERA_ENV is /none, which is no file" in spool.refused(name, TESSERA_ENV="/none")


def test_words_that_mean_nothing_are_refused(spool):
    assert "TESSERA_LAUNCHER is srum. Needed: srun or deepspeed." in spool.refused(
        "pretrain", TESSERA_LAUNCHER="srum"
    )
    for name in ("pretrain", "check"):
        assert "TESSERA_PREFLIGHT_SECONDS is 5m." in spool.refused(
            name, TESSERA_PREFLIGHT_SECONDS="5m"
        )
        assert "ranks a node: two." in spool.refused(name, TESSERA_RANKS_PER_NODE="two")


@pytest.mark.parametrize("code, exits", [(0, 0), (2, 2), (4, 0), (5, 5), (1, 1)])
def test_a_check_fails_for_mistakes_and_where_no_node_is_left(spool, code, exits):
    assert spool.run("check", SRUN_CODE=str(code)).returncode == exits


@pytest.mark.parametrize("name", ["check", "pretrain"])
def test_a_look_at_the_nodes_that_runs_out_of_time_says_what_gives_it_more(spool, name):
    (spool.folder / "bin" / "srun").write_text("#!/bin/sh\nexec sleep 60\n")
    done = spool.run(name, TESSERA_PREFLIGHT_SECONDS="1")
    assert "TESSERA_PREFLIGHT_SECONDS" in done.stderr and "the step" not in done.stderr, done.stderr
    if name == "check":
        assert done.returncode == 124 and done.stderr.count("\n") == 1
    else:
        ends = [
            json.loads(line)
            for line in (
                (spool.folder / "elsewhere" / "run" / "slurm" / "7.jsonl").read_text().splitlines()
            )
        ]
        assert ends[-1]["cause"] == "crash"
        # the seconds are measured: a busy machine may need two
        said = r"was not done after \d+ s, TESSERA_PREFLIGHT_SECONDS gives it 1:"
        assert re.search(said, ends[-1]["why"]), ends[-1]["why"]


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "3",
}


@pytest.mark.parametrize("name", ["prep_array", "sweep_array"])
def test_a_task_of_an_array_takes_its_part(spool, name):
    spool.run(name, **ARRAY)
    assert spool.steps()[0][-2:] == ["--part", "2/3"]
    assert (
        "TESSERA_PARTS=N" in Spool.run(spool, name, **{**ARRAY, "SLURM_ARRAY_TASK_MIN": "2"}).stderr
    )


@pytest.mark.parametrize("code, tries", [(0, 1), (1, 3), (2, 1), (143, 1)])
def test_a_sweep_is_tried_again_only_where_a_process_died(spool, code, tries):
    done = spool.run("sweep_array", TESSERA_TRIES="3", SRUN_CODE=str(code))
    assert (done.returncode, len(spool.steps())) == (code, tries)
    assert all("--part" not in step for step in spool.steps())
