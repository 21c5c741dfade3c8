"""slurm/submit.py with stand-ins for SLURM's commands: what it would submit, what it refuses, how a run stands."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.done import finish
from tests.helpers.prep import run as data_prep
from tests.helpers.prep import settings, texts, write_jsonl
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import ROOT
from tests.unit.launch.test_bad_input import RUN

SUBMIT = ROOT / "slurm" / "submit.py"
STAND_IN = "#!{python} -SE\nimport json, os, sys\nexec(open({code!r}).read())\n"
SBATCH = """
if any(word.startswith("--account=nobody") for word in sys.argv):
    sys.exit("sbatch: error: Batch job submission failed: Invalid account")
if any("export.sbatch" in word for word in sys.argv) and os.environ.get("REFUSE_EXPORT"):
    sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
log = os.environ["CALLS"]
number = 11 + (open(log).read().count(chr(10)) if os.path.exists(log) else 0)
if "SAYS" in os.environ:
    sys.exit(print(os.environ["SAYS"]))
kept = {k: v for k, v in os.environ.items() if k.startswith("TESSERA_")}
open(log, "a").write(json.dumps({"what": "sbatch", "words": sys.argv[1:], "env": kept, "id": str(number)}) + chr(10))
print(number)
"""
SINFO = """
rows = [f"node{i}|8|gpu:h100:4(S:0-1)|idle|gpu*|1-00:00:00" for i in (1, 2)] + ["big|64|(null)|idle|cpu|infinite"] + [
    f"node{i}|8|gpu:h100:4(S:0-1)|idle|long|7-00:00:00" for i in (1, 2)]
wanted = [w.partition("=")[2] for w in sys.argv if w.startswith("--partition=")]
if "--format=%P" in sys.argv:
    print("gpu*\\ncpu\\nlong")
else:
    print("\\n".join(r for r in rows if not wanted or r.split("|")[4].rstrip("*") in wanted[0].split(",")))
"""
OTHERS = {
    "squeue": (
        "sys.exit(os.environ['SILENT']) if 'SILENT' in os.environ else"
        " print(os.environ.get('QUEUED', ''))"
    ),
    "scancel": (
        """
open(os.environ["CALLS"], "a").write(json.dumps({"what": "scancel", "words": sys.argv[1:]}) + chr(10))"""
    ),
    "sacct": (
        "print(os.environ['SACCT']) if 'SACCT' in os.environ else sys.exit('Slurm accounting"
        " storage is disabled')"
    ),
    "scontrol": (
        """
open(os.environ["CALLS"], "a").write(json.dumps({"what": "scontrol", "words": sys.argv[1:]}) + chr(10))
if "SILENT" in os.environ:
    sys.exit("slurm_load_jobs error: " + os.environ["SILENT"])
print(os.environ["SHOWN"]) if "SHOWN" in os.environ else sys.exit("slurm_load_jobs error: Invalid job id specified")"""
    ),
}
AWAY = "Unable to contact slurm controller (connect failure)"


class Cluster:
    """Commands of its own on PATH, and what was asked of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, code in {"sbatch": SBATCH, "sinfo": SINFO, **OTHERS}.items():
            (folder / f"{name}.code").write_text(code)
            (folder / "bin" / name).write_text(
                STAND_IN.format(python=sys.executable, code=str(folder / f"{name}.code"))
            )
            (folder / "bin" / name).chmod(0o755)

    def run(
        self, *words: object, place: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """The command in this process: one of its own imports torch for 3 s."""
        argv = [str(word) for word in words]
        out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
        os.chdir(place or self.folder)
        try:
            with (
                mock.patch.dict(os.environ, self.env(**env), clear=True),
                mock.patch.object(sys, "argv", [str(SUBMIT), *argv]),
                redirect_stdout(out),
                redirect_stderr(err),
            ):
                code = runpy.run_path(str(SUBMIT))["command"](argv)
        except SystemExit as ending:
            code = ending.code
        finally:
            os.chdir(before)
        return subprocess.CompletedProcess(argv, code or 0, out.getvalue(), err.getvalue())

    def spawn(self, *words: object, stdout: int) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own, where what it writes to is in question."""
        return subprocess.run(
            [sys.executable, str(SUBMIT), *map(str, words)],
            cwd=self.folder,
            text=True,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=self.env(),
        )

    def env(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TESSERA_", "SLURM_"))}
        return {
            **clean,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "CALLS": str(self.folder / "calls"),
            **more,
        }

    def refused(self, *words: object, **env: str) -> str:
        done = self.run(*words, **env)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr + done.stdout
        assert done.stderr.count("\n") == 1, done.stderr
        assert not [c for c in self.calls() if c["what"] == "sbatch"]
        return done.stderr

    def calls(self) -> list[dict]:
        return (
            [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
            if (self.folder / "calls").exists()
            else []
        )


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture
def run_file(tmp_path) -> Path:
    source = write_source(tmp_path / "s" / "train", random_documents(20), vocab_size=64)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(out="runs/my run", source=source, vocab=64, batch=512))
    return path


def test_the_whole_chain_depends_each_job_on_the_one_before(cluster, run_file, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(3_000, longest=100))
    config = settings(tmp_path, shard_bytes=2**14)
    assert data_prep("prepare", config, "--part", "2/4") == 0
    done = cluster.run(
        run_file,
        "seed=2",
        "--nodes=2",
        "--gpus-per-node=4",
        "--cpus-per-task=2",
        "--time=12:00:00",
        "--partition=gpu",
        "--prep",
        config,
        "--prep-set",
        "processes=2",
        "--parts=4",
        "--export",
        "hf out",
        "--onnx",
        "--container-image=/images/t.sqsh",
        "--sbatch=--exclusive",
    )
    assert done.returncode == 0, done.stderr
    prep, merge, check, training, export = cluster.calls()
    scripts = [
        next(Path(w).name for w in c["words"] if w.endswith(".sbatch")) for c in cluster.calls()
    ]
    assert scripts == [
        "prep_array.sbatch",
        "prep_array.sbatch",
        "check.sbatch",
        "pretrain.sbatch",
        "export.sbatch",
    ]
    assert "--array=1,3-4" in prep["words"] and prep["env"]["TESSERA_PARTS"] == "4"
    assert prep["words"][-2:] == [str(config), "processes=2"]
    assert not any(w.startswith("--array") for w in merge["words"])
    for job, before in ((merge, prep), (check, merge), (training, check), (export, training)):
        assert {f"--dependency=afterok:{before['id']}", "--kill-on-invalid-dep=yes"} <= set(
            job["words"]
        )
    for word in ("--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=2"):
        assert word in training["words"] and word in check["words"]
    assert {"--time=12:00:00", "--partition=gpu", "--exclusive"} <= set(
        training["words"]
    ) and training["words"][-2:] == [str(run_file), "seed=2"]
    assert export["words"][-3:] == ["runs/my run", "hf out", "--onnx"]
    assert training["env"] == {
        "TESSERA_HOME": str(ROOT),
        "TESSERA_PYTHON": "python3",
        "TESSERA_SRUN_ARGS": "--container-image=/images/t.sqsh",
    }
    assert (tmp_path / "runs" / "my run" / "slurm").is_dir() and "model " in done.stdout
    assert any(w == f"--output={tmp_path}/runs/my run/slurm/%x-%j.out" for w in training["words"])


def test_several_jobs_go_on_after_one_another_however_the_one_before_ended(cluster, run_file):
    assert cluster.run(run_file, "--jobs=3", "--no-check", "--export=out").returncode == 0
    first, second, third, export = cluster.calls()
    assert not any(w.startswith("--dependency") for w in first["words"])
    assert (
        "--dependency=afterany:11" in second["words"]
        and "--dependency=afterany:12" in third["words"]
    )
    assert (
        all("--no-requeue" in c["words"] for c in (first, second, third))
        and "--dependency=afterok:13" in export["words"]
    )


def test_none_of_several_jobs_runs_after_a_check_that_failed(cluster, run_file):
    assert cluster.run(run_file, "--no-plan", "--jobs=3").returncode == 0
    check, first, second, third = cluster.calls()
    waits = [
        next(w for w in job["words"] if w.startswith("--dependency"))
        for job in (first, second, third)
    ]
    assert waits == [
        "--dependency=afterok:11",
        "--dependency=afterany:12,afterok:11",
        "--dependency=afterany:13,afterok:11",
    ]
    assert (
        all("--kill-on-invalid-dep=yes" in job["words"] for job in (first, second, third))
        and check["id"] == "11"
    )


def test_percent_signs_in_names_of_folders_are_no_patterns_of_sbatch(cluster, run_file, tmp_path):
    (tmp_path / "50%j").mkdir()
    done = cluster.run(run_file, "--no-plan", "out=runs/%x", place=tmp_path / "50%j")
    assert done.returncode == 0, done.stderr
    check, training = cluster.calls()
    assert f"--output={tmp_path}/50%%j/check-%j.out" in check["words"]
    assert f"--output={tmp_path}/50%%j/runs/%%x/slurm/%x-%j.out" in training["words"]


def test_an_answer_of_sbatch_that_is_no_job_id_is_refused(cluster, run_file, tmp_path):
    for says, shown in (("", "nothing"), ("Submitted batch job", "Submitted batch job")):
        assert f"sbatch gave no job id, but {shown}." in cluster.refused(
            run_file, "--no-plan", SAYS=says
        )
    assert (tmp_path / "runs" / "my run" / "slurm" / "submitted.jsonl").read_text() == ""
    assert cluster.run(run_file, "--no-plan", "--no-check", SAYS="21;cluster2").returncode == 0
    assert (
        json.loads((tmp_path / "runs" / "my run" / "slurm" / "submitted.jsonl").read_text())["job"]
        == "21"
    )


def test_an_env_file_that_is_not_there_is_refused_and_one_that_is_goes_along_as_a_whole_path(
    cluster, run_file, tmp_path
):
    assert "TESSERA_ENV is my_env.sh, which is no file here" in cluster.refused(
        run_file, "--no-plan", TESSERA_ENV="my_env.sh"
    )
    (tmp_path / "my_env.sh").write_text("")
    assert cluster.run(run_file, "--no-plan", TESSERA_ENV="my_env.sh").returncode == 0
    assert {job["env"]["TESSERA_ENV"] for job in cluster.calls()} == {str(tmp_path / "my_env.sh")}


def test_of_several_partitions_one_must_be_able_to_give_it_all(cluster, run_file):
    said = cluster.refused(
        run_file, "--no-plan", "--nodes=3", "--partition=gpu,long"
    )  # the same two nodes in both
    assert (
        "partition gpu has 2 of 3 nodes with 1 core; it has 2 nodes" in said
        and "partition long has 2 of 3" in said
    )
    assert "there is no partition gpuu. Known" in cluster.refused(
        run_file, "--no-plan", "--partition=gpu,gpuu"
    )
    assert (
        cluster.run(
            run_file, "--no-plan", "--nodes=2", "--partition=gpu,cpu", "--no-check"
        ).returncode
        == 0
    )
    said = cluster.run(run_file, "--no-plan", "out=b", "--time=2-00", "--partition=gpu").stderr
    assert "above the limit of partition gpu, 1-00:00:00" in said
    assert (
        cluster.run(
            run_file, "--no-plan", "out=b", "--time=2-00", "--partition=gpu,long"
        ).returncode
        == 0
    )


def test_a_reader_that_leaves_early_decides_nothing(cluster, run_file, tmp_path):
    for words, submits in (
        ([run_file, "--no-plan"], 2),
        ([run_file, "out=b", "--no-plan", "--dry-run"], 0),
        (["status", run_file], 0),
        (["--help"], 0),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        reads, writes = os.pipe()
        os.close(reads)  # as `| head` does once it has what it wants
        done = cluster.spawn(*words, stdout=writes)
        os.close(writes)
        assert (done.returncode, done.stderr) == (0, "") and len(
            [c for c in cluster.calls() if c["what"] == "sbatch"]
        ) == submits


def test_a_dry_run_prints_lines_and_scripts_and_submits_nothing(cluster, run_file, tmp_path):
    done = cluster.run(run_file, "--nodes=2", "--dry-run")
    assert done.returncode == 0 and not cluster.calls() and not (tmp_path / "runs").exists()
    assert (
        "--dependency=afterok:<check>" in done.stdout
        and "# ---- slurm/pretrain.sbatch\n#!/usr/bin/env bash" in done.stdout
    )
    assert "TESSERA_HOME=" in done.stdout and f"TESSERA_PYTHON={sys.executable}" in done.stdout


def test_what_cannot_fit_is_refused_before_anything_is_submitted(cluster, run_file, tmp_path):
    said = cluster.refused(run_file, "--nodes=2", "--gpus-per-node=4", "phases.0.batch_tokens=256")
    assert "8 ranks, but the largest step (phase a) has 4 rows" in said
    assert "partition gpu has 2 of 3 nodes with 1 core" in cluster.refused(run_file, "--nodes=3")
    assert "0 of 1 node with 8 cores and 8 GPUs" in cluster.refused(run_file, "--gpus-per-node=8")
    assert "there is no partition gpuu. Known: cpu, gpu, long." in cluster.refused(
        run_file, "--partition=gpuu"
    )
    assert "--time 2-00 is above the limit of partition gpu, 1-00:00:00" in cluster.refused(
        run_file, "--time=2-00"
    )
    assert "--time 5:00 is 5 minutes" in cluster.refused(run_file, "--time=5:00")
    assert "--nodes is 4-2" in cluster.refused(run_file, "--nodes=4-2")
    assert "Did you mean hidden_size?" in cluster.refused(run_file, "model.hiden_size=4")
    assert "does not exist; needed: a folder of shards" in cluster.refused(
        run_file, "data.sources.0.path=elsewhere"
    )
    assert "white space" in cluster.refused(run_file, "--container-image=my image")
    (tmp_path / "file").write_text("")
    assert "file" in cluster.refused(run_file, "out=file/run")
    assert "job 11 of this run is still queued or running" in _second(cluster, run_file)


def _second(cluster: Cluster, run_file: Path) -> str:
    assert cluster.run(run_file, "--no-check").returncode == 0
    (cluster.folder / "calls").unlink()
    return cluster.refused(run_file, QUEUED="11\n12")


def test_a_job_that_was_submitted_by_hand_is_seen_and_where_nobody_answers_nothing_is_submitted(
    cluster, run_file, tmp_path
):
    own = tmp_path / "runs" / "my run" / "slurm"
    own.mkdir(parents=True)
    (own / "34.jsonl").write_text('{"event": "start"}\n')
    assert "job 34 of this run is still queued or running" in cluster.refused(
        run_file, "--no-plan", QUEUED="33 33\n34 34"
    )
    said = cluster.refused(run_file, "--no-plan", SILENT=AWAY)
    assert (
        "nobody says whether job 34 of this run is still queued: squeue does not answer (Unable to"
        " contact" in said
    )
    torn = '{"time": 1.0, "job": "11", "ro'
    (own / "submitted.jsonl").write_text(torn + '{"time": 2.0, "job": "12", "role": "training"}\n')
    assert "job 12 of this run" in cluster.refused(run_file, "--no-plan", QUEUED="12 12")
    assert "job 11 of this run" in cluster.refused(
        run_file, "--no-plan", QUEUED="90 11"
    )  # its array
    assert cluster.run(run_file, "--no-plan", "--no-check").returncode == 0


def test_a_chain_that_is_refused_in_its_middle_leaves_no_job_behind(cluster, run_file):
    done = cluster.run(run_file, "--export=hf", REFUSE_EXPORT="1")
    assert (
        done.returncode == 2
        and done.stderr == "error: sbatch refused: QOSMaxSubmitJobPerUserLimit.\n"
    )
    assert cluster.calls()[-1] == {"what": "scancel", "words": ["11", "12"]}
    (cluster.folder / "calls").unlink()
    assert "Invalid account" in cluster.refused(run_file, "--account=nobody")


def test_shards_alone_are_submitted_once_and_what_is_merged_never_again(cluster, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(100))
    config = settings(tmp_path)
    assert cluster.run("--prep", config, "--parts=2").returncode == 0
    prep, merge = cluster.calls()
    assert "--array=1" in prep["words"]  # there is one segment, hence one part that has something
    assert f"--dependency=afterok:{prep['id']}" in merge["words"]
    assert data_prep("prepare", config) == 0
    (tmp_path / "calls").unlink()
    assert (
        "nothing to do" in cluster.run("--prep", config, "--parts=2").stdout and not cluster.calls()
    )


def write_run_folder(folder: Path, *, done: bool = False) -> Path:
    (folder / "slurm").mkdir(parents=True)
    (folder / "run.yaml").write_text(
        "name: r\nout: r\nphases: [{name: one, tokens: 1000}, {name: two, tokens: 1K}]\n"
    )
    ledger = [{"step": s, "phase": "one", "tokens_seen": 100 * s} for s in (1, 2, 3, 4, 5)]
    (folder / "ledger.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in ledger) + '{"step": 6, "to'
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "tokens_per_second": 10.0}) + "\n")
    jobs = [{"job": "7", "role": "check"}, {"job": "8", "role": "training"}]
    (folder / "slurm" / "submitted.jsonl").write_text(
        "".join(json.dumps(job) + "\n" for job in jobs)
    )
    own = [
        {"event": "start", "restart": 0, "nodes": "node[1-2]"},
        {
            "event": "end",
            "cause": "stopped",
            "why": "stopped by SIGUSR1",
            "decision": "requeue",
            "seconds": 50,
        },
        {"event": "start", "restart": 1, "nodes": "node[2-3]"},
        {
            "event": "end",
            "cause": "crash",
            "why": "rank 1 fell over",
            "decision": "stop",
            "seconds": 72,
        },
    ]
    torn = '{"event": "sta\n[1]\n'  # a kill in the middle of a line, and no record
    (folder / "slurm" / "8.jsonl").write_text(
        torn + "".join(json.dumps(line) + "\n" for line in own)
    )
    if done:
        finish(folder, step=ledger[-1]["step"], tokens=ledger[-1]["tokens_seen"], ledger=False)
        (folder / "ledger.jsonl").write_text(
            "".join(json.dumps({**line, "chain": "c" * 32}) + "\n" for line in ledger)
        )
    return folder


def status(cluster: Cluster, *words: object, **env: str) -> str:
    done = cluster.run("status", *words, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_reads_the_jobs_own_files_where_slurm_knows_nothing_any_more(cluster, tmp_path):
    said = status(cluster, write_run_folder(tmp_path / "r"))
    assert "7    check     gone" in said and "SLURM knows it no more" in said
    assert (
        "8    training  ended (stop)  1m12s  node[2-3]  crash, rank 1 fell over (before: 1 x saved"
        " before its limit)" in said
    )
    assert (
        "phase one, step 5, 500 of 2K tokens (25.0%), 10 tokens/s, 2m30s of training are left;"
        " nothing trains now" in said
    )


def test_status_passes_over_what_is_no_job(cluster, tmp_path):
    folder = write_run_folder(tmp_path / "r")
    before = status(cluster, folder)
    for name in ("²", "9" * 200, "notes"):
        (folder / "slurm" / f"{name}.jsonl").write_text('{"event": "start"}\n', encoding="utf-8")
    with open(folder / "slurm" / "submitted.jsonl", "a", encoding="utf-8") as file:
        for line in ({}, {"job": 9, "role": "check"}, {"job": "²", "role": "x"}, {"job": "9"}):
            file.write(json.dumps(line) + "\n")
    assert status(cluster, folder) == before


def test_status_takes_states_from_sacct_and_from_the_controller_first(cluster, tmp_path):
    folder = write_run_folder(tmp_path / "r")
    said = status(
        cluster, folder, SACCT="7|COMPLETED|0:0|00:00:09|node1\n8|FAILED|1:0|00:10:00|node[2-3]"
    )
    assert "7    check     COMPLETED  00:00:09  node1\n" in said
    assert "8    training  FAILED     00:10:00  node[2-3]  crash, rank" in said
    said = status(
        cluster,
        folder,
        SHOWN=(
            "JobId=8 JobState=RUNNING RunTime=00:01:00 StartTime=2026-11-26T10:00:00 "
            "NodeList=node[1-2] Reason=None ExitCode=0:0"
        ),
    )
    assert "RUNNING" in said and "done in 2m30s (" in said and "without stops" in said
    said = status(
        cluster,
        folder,
        SHOWN=(
            "JobId=8 JobState=PENDING RunTime=00:00:00 StartTime=Unknown NodeList= Reason=BeginTime"
            " ExitCode=0:0"
        ),
    )
    assert (
        "2m30s of training are left; it waits for its start" in said and "without stops" not in said
    )


def test_status_says_of_a_start_that_wrote_no_end_that_it_runs_or_was_killed(cluster, tmp_path):
    folder = write_run_folder(tmp_path / "r")
    own = (folder / "slurm" / "8.jsonl").read_text().splitlines()[2:]  # without what is torn
    (folder / "slurm" / "8.jsonl").write_text("\n".join(own[:3]) + "\n")
    shown = (
        "JobId=8 JobState={} RunTime=00:01:00 StartTime=2026-11-26T10:00:00 NodeList=node[2-3]"
        " Reason=None ExitCode=0:0"
    )
    assert "start 2 runs; before: 1 x saved before its limit" in status(
        cluster, folder, SHOWN=shown.format("RUNNING")
    )
    assert "start 2 was killed: it wrote no end; before: 1 x saved" in status(
        cluster, folder, SHOWN=shown.format("NODE_FAIL")
    )


def test_status_guesses_nothing_while_the_controller_does_not_answer(cluster, tmp_path):
    folder = write_run_folder(tmp_path / "r")
    record = folder / "slurm" / "8.jsonl"
    lines = record.read_text().splitlines()
    record.write_text("\n".join(lines[:5]) + "\n")  # the second start has written no end
    said = status(cluster, folder, SILENT=AWAY)
    assert (
        "8    training  unknown       node[2-3]  the controller does not answer\n" in said
        and "killed" not in said
    )
    assert f"warning: the controller does not answer (slurm_load_jobs error: {AWAY})" in said
    assert "2m30s of training are left; nobody says whether it trains now" in said
    assert (
        len([call for call in cluster.calls() if call["what"] == "scontrol"]) == 1
    )  # each takes its time
    assert "was killed: it wrote no end" in status(cluster, folder)
    record.write_text("\n".join(lines) + "\n")  # its own last word counts
    said = status(cluster, folder, SILENT=AWAY)
    assert "8    training  ended (stop)" in said and "nothing trains now" in said
    said = status(cluster, folder, SILENT=AWAY, SACCT="7|COMPLETED|0:0|00:00:09|node1")
    assert "7    check     COMPLETED" in said


def test_status_of_a_job_that_never_ran_or_was_cancelled_between_two_starts(cluster, tmp_path):
    folder = write_run_folder(tmp_path / "r")
    own = [
        {"event": "start", "restart": 0, "nodes": "node1"},
        {
            "event": "end",
            "cause": "crash",
            "why": "rank 1 fell over",
            "decision": "requeue",
            "seconds": 50,
        },
        {"event": "excluded", "nodes": ["node1"], "jobs": []},
    ]
    (folder / "slurm" / "8.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    shown = "JobId=8 JobState={} RunTime={} StartTime={} NodeList=(null) Reason=None ExitCode=0:0"
    said = status(cluster, folder, SHOWN=shown.format("CANCELLED", "20783-17:11:05", "Unknown"))
    assert (
        "8    training  CANCELLED              cancelled while it waited for its next start;"
        " before: 1 x crash\n" in said
    )
    assert "20783" not in said
    said = status(cluster, folder, SHOWN=shown.format("PENDING", "00:00:00", "2026-11-27T10:00:00"))
    assert "8    training  PENDING              crash, rank 1 fell over\n" in said
    assert "SLURM knows it no more while it waited for its next start; before: 1 x crash" in status(
        cluster, folder
    )
    refused = {
        "event": "refused",
        "why": "Requested operation is presently disabled",
        "decision": "submit_again",
    }
    (folder / "slurm" / "8.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (*own[:2], refused, own[2]))
    )
    said = status(cluster, folder)
    assert (
        "8    training  ended (submit_again)  50.0s  node1  crash, rank 1 fell over; SLURM did not"
        " requeue it: Requested" in said
    )


def test_status_of_a_run_file_names_its_folder_and_of_neither_says_what_is_needed(
    cluster, tmp_path
):
    write_run_folder(tmp_path / "r", done=True)
    (tmp_path / "run.yaml").write_text("name: r\nout: none\nphases: [{name: one, tokens: 1K}]\n")
    assert "r: done, 500 tokens, 5 steps" in status(
        cluster, tmp_path / "run.yaml", f"out={tmp_path / 'r'}"
    )
    assert "no step yet of 1K tokens" in status(cluster, tmp_path / "run.yaml")
    assert "is no run folder" in cluster.refused("status", tmp_path / "bin")


def test_help_comes_without_torch():
    script = (
        "import runpy, sys; path = sys.argv.pop(1)\ntry:\n    runpy.run_path(path,"
        " run_name='__main__')\nexcept SystemExit:\n    print('torch' in sys.modules)\n"
    )
    for words in (["--help"], ["status", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, str(SUBMIT), *words],
            capture_output=True,
            text=True,
        )
        assert done.stdout.rstrip().endswith("False"), done.stdout + done.stderr
