"""slurm/submit.py on a real cluster: from text to an exported model in one line; what cannot work is not submitted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.bed import ROOT, Bed, wait_until
from tests.cluster.tiny_run import record, starts, wait_for_start
from tests.helpers.prep import run as data_prep
from tests.helpers.prep import settings, texts, write_jsonl

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

RUN = """
name: chain
out: runs/chain
seed: 3
device: cpu
model: {{system: modernbert, vocab_size: 320, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {shards}/a/train, name: a}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
optimizer: {{}}
phases:
  - {{name: one, tokens: 4K, max_tokens_per_document: 32, batch_tokens: 512, lr: {{schedule: constant, peak: 1e-3}}}}
  - {{name: two, tokens: 4K, max_tokens_per_document: 64, batch_tokens: 512, lr: {{schedule: constant, peak: 1e-3}}}}
checkpoints: {{every_tokens: 4K, keep_last: 2}}
loader: {{workers: 0}}
"""


def submit(
    bed: Bed, folder: Path, *words: object, code: int = 0, env: dict[str, str] | None = None
) -> str:
    """From a login node, in the folder of the run file; what it said."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "slurm" / "submit.py"), *map(str, words)],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**bed.env, "HOME": os.environ.get("HOME", "/root"), **(env or {})},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def jobs_of(said: str) -> dict[str, str]:
    """Role -> job."""
    return {role: job for job, role in re.findall(r"^(\d+) +(\S+)", said, re.MULTILINE)}


@pytest.fixture
def run_file(tmp_path) -> Path:
    write_jsonl(tmp_path / "a.jsonl", texts(3_000, longest=100))
    settings(tmp_path, shard_bytes=2**14)
    (tmp_path / "run.yaml").write_text(RUN.format(shards=tmp_path / "shards"))
    return tmp_path / "run.yaml"


def test_one_line_leads_from_text_to_an_exported_model(bed: Bed, run_file, tmp_path):
    said = submit(
        bed,
        tmp_path,
        "run.yaml",
        "--nodes=2",
        "--tasks-per-node=2",
        "--prep=prep.yaml",
        "--parts=3",
        "--export=hf",
    )
    jobs = jobs_of(said)
    assert list(jobs) == ["prep", "merge", "check", "training", "export"]
    assert "still queued or running" in submit(bed, tmp_path, "run.yaml", code=2)
    state = bed.wait_for_end(jobs["export"], seconds=300)
    logs = "\n".join(
        f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(tmp_path.rglob("*.out"))
    )
    assert state == "COMPLETED", logs
    check = (tmp_path / f"check-{jobs['check']}.out").read_text()
    assert (
        "doctor: fine" in check
        and "2 nodes" in check
        and "links" in check
        and "all-reduce" in check
    )
    assert record(tmp_path / "runs" / "chain", jobs["training"])[-1]["cause"] == "done"
    assert (tmp_path / "hf" / "config.json").exists()
    stands = submit(bed, tmp_path, "status", "run.yaml")
    assert (
        len(re.findall(r"^\d+ +\S+ +(?:\d )?COMPLETED", stands, re.MULTILINE)) == 5
        and "runs/chain: done, " in stands
    )
    print(said + stands + check)


def test_what_cannot_work_is_said_before_a_node_is_taken(bed: Bed, run_file, tmp_path):
    assert "does not exist; needed: a folder of shards" in submit(bed, tmp_path, "run.yaml", code=2)
    words = ("run.yaml", "--prep=prep.yaml")
    assert f"has {bed.nodes} of {bed.nodes + 1} nodes" in submit(
        bed, tmp_path, *words, f"--nodes={bed.nodes + 1}", code=2
    )
    assert "and 3 GPUs" in submit(bed, tmp_path, *words, "--gpus-per-node=3", code=2)
    assert "9 ranks, but the largest step" in submit(
        bed, tmp_path, *words, "--nodes=3", "--tasks-per-node=3", code=2
    )
    assert bed.slurm("squeue", "-h", "-o", "%i") == "" and not (tmp_path / "runs").exists()


def test_a_check_that_finds_a_mistake_ends_the_chain_before_the_training(
    bed: Bed, run_file, tmp_path
):
    """The run folder lies in /dev/shm, which every node has for itself."""
    out = Path(f"/dev/shm/{tmp_path.name}")
    assert data_prep("prepare", tmp_path / "prep.yaml") == 0
    try:
        jobs = jobs_of(submit(bed, tmp_path, "run.yaml", f"out={out}", "--nodes=2"))
        assert bed.wait_for_end(jobs["check"], seconds=120) == "FAILED"
        assert bed.wait_for_end(jobs["training"], seconds=30) == "CANCELLED"
        assert (
            "node2 does not see what rank 0 writes into the run folder"
            in (tmp_path / f"check-{jobs['check']}.out").read_text()
        )
        stands = submit(bed, tmp_path, "status", "run.yaml", f"out={out}")
        assert re.search(rf"^{jobs['training']} +training +CANCELLED$", stands, re.MULTILINE), (
            stands
        )  # it never ran
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_of_several_jobs_the_next_goes_on_where_the_one_before_was_cancelled(
    bed: Bed, run_file, tmp_path
):
    """As in a centre that forbids requeueing: three jobs, the first of them cancelled in its middle."""
    assert data_prep("prepare", tmp_path / "prep.yaml") == 0
    longer = ("phases.0.tokens=60K", "phases.1.tokens=20K", "checkpoints.every_tokens=8K")
    words = ("run.yaml", *longer, "--nodes=2", "--jobs=3", "--no-check")
    jobs = jobs_of(submit(bed, tmp_path, *words, env={"TESSERA_PREFLIGHT": "0"}))
    out = tmp_path / "runs" / "chain"
    wait_for_start(out, 1, steps=30)
    bed.slurm("scancel", jobs["training-1"])
    assert bed.wait_for_end(jobs["training-1"], seconds=60) == "CANCELLED"
    assert bed.wait_for_end(jobs["training-2"], seconds=200) == "COMPLETED"
    assert bed.wait_for_end(jobs["training-3"], seconds=60) == "COMPLETED"
    assert [s["event"] for s in starts(out)] == ["start", "resume"] and starts(out)[1]["step"] >= 10
    assert record(out, jobs["training-3"])[-1]["why"] == "the run was done before this job began"
    stands = submit(bed, tmp_path, "status", "run.yaml")
    assert (
        re.search(rf"{jobs['training-1']} +training-1 +CANCELLED", stands)
        and "runs/chain: done, " in stands
    )


def job_that_notes_its_start(bed: Bed, folder: Path, then: str, *sbatch: str) -> str:
    """A job that is no training, but writes the record of one; it runs when this returns."""
    script = folder / "stand_in.sh"
    script.write_text(
        f"#!/bin/sh\n{sys.executable} {ROOT}/slurm/job.py begin run.yaml --ranks 1\n{then}\n"
    )
    job = bed.sbatch("--nodes=1", f"--output={folder}/%j.out", *sbatch, script, cwd=folder)
    wait_until(
        lambda: (folder / "runs" / "chain" / "slurm" / f"{job}.jsonl").exists(),
        seconds=30,
        what="the record of the job",
    )
    return job


def test_of_a_running_job_nothing_is_guessed_while_the_controller_is_away(
    bed: Bed, run_file, tmp_path
):
    job = job_that_notes_its_start(bed, tmp_path, "sleep 120")
    assert re.search(
        rf"^{job} +training +RUNNING", submit(bed, tmp_path, "status", "run.yaml"), re.MULTILINE
    )
    bed.host("stop-daemon", "controller")
    stands = submit(bed, tmp_path, "status", "run.yaml")
    assert re.search(
        rf"^{job} +training +unknown +node\d +the controller does not answer$", stands, re.MULTILINE
    ), stands
    assert (
        "warning: the controller does not answer (slurm_load_jobs error: Unable to contact"
        in stands
    )
    assert f"whether job {job} of this run is still queued" in submit(
        bed, tmp_path, "run.yaml", code=2
    )


def test_a_bad_node_is_left_out_of_the_job_that_is_queued_behind(bed: Bed, run_file, tmp_path):
    slurm = tmp_path / "runs" / "chain" / "slurm"
    first = job_that_notes_its_start(
        bed,
        tmp_path,
        f"""
        report={slurm}/$SLURM_JOB_ID-r0-preflight
        mkdir $report && echo $SLURMD_NODENAME >$report/bad_nodes && echo {{}} >$report/$SLURMD_NODENAME.json
        while [ ! -e {slurm}/submitted.jsonl ]; do sleep 0.1; done
        exec {sys.executable} {ROOT}/slurm/job.py preflight runs/chain --code 5""",
        "--no-requeue",
    )
    [bad] = bed.slurm("scontrol", "show", "hostnames", bed.job(first)["NodeList"]).split()
    second = bed.sbatch(
        "--nodes=4", f"--dependency=afterany:{first}", "--output=/dev/null", "--wrap=true"
    )  # all nodes
    text = "".join(
        json.dumps({"job": job, "role": f"training-{number}"}) + "\n"
        for number, job in enumerate((first, second), 1)
    )
    (tmp_path / "submitted").write_text(text)
    (tmp_path / "submitted").rename(slurm / "submitted.jsonl")
    assert bed.wait_for_end(first, seconds=30) == "FAILED"
    assert bed.job(second)["ExcNodeList"] == bad and bed.job(second)["JobState"] == "PENDING"
    lines = record(tmp_path / "runs" / "chain", first)
    assert [line["event"] for line in lines] == [
        "start",
        "preflight",
        "end",
        "refused",
        "excluded",
    ], lines
    assert f"job {second} goes on without {bad}" in (tmp_path / f"{first}.out").read_text()
    assert bed.job(first)["ExitCode"] == "75:0"
