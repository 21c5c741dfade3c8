"""slurm/submit.py on a real cluster: from text to an exported model in one line; what cannot work is not submitted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.bed import ROOT, Bed
from tests.cluster.tiny_run import record, starts, wait_for_start
from tests.unit.prep_helpers import run as data_prep
from tests.unit.prep_helpers import settings, texts, write_jsonl

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


def submit(bed: Bed, folder: Path, *words: object, code: int = 0) -> str:
    """From a login node, in the folder of the run file; what it said."""
    done = subprocess.run([sys.executable, str(ROOT / "slurm" / "submit.py"), *map(str, words)], cwd=folder, text=True,
                          capture_output=True, env={**bed.env, "HOME": os.environ.get("HOME", "/root")})
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
    said = submit(bed, tmp_path, "run.yaml", "--nodes=2", "--tasks-per-node=2", "--prep=prep.yaml", "--parts=3", "--export=hf")
    jobs = jobs_of(said)
    assert list(jobs) == ["prep", "merge", "check", "training", "export"]
    assert "is still queued or running" in submit(bed, tmp_path, "run.yaml", code=2)
    state = bed.wait_for_end(jobs["export"], seconds=300)
    logs = "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(tmp_path.rglob("*.out")))
    assert state == "COMPLETED", logs
    check = (tmp_path / f"check-{jobs['check']}.out").read_text()
    assert "doctor: fine" in check and "2 nodes" in check and "links" in check and "all-reduce" in check
    assert record(tmp_path / "runs" / "chain", jobs["training"])[-1]["cause"] == "done"
    assert (tmp_path / "hf" / "config.json").exists()
    stands = submit(bed, tmp_path, "status", "run.yaml")
    assert len(re.findall(r"^\d+ +\S+ +(?:\d )?COMPLETED", stands, re.MULTILINE)) == 5 and "runs/chain: done, " in stands
    print(said + stands + check)


def test_what_cannot_work_is_said_before_a_node_is_taken(bed: Bed, run_file, tmp_path):
    assert "does not exist; needed: a folder of shards" in submit(bed, tmp_path, "run.yaml", code=2)
    words = ("run.yaml", "--prep=prep.yaml")
    assert f"has {bed.nodes} of {bed.nodes + 1} nodes" in submit(bed, tmp_path, *words, f"--nodes={bed.nodes + 1}", code=2)
    assert "and 3 GPUs" in submit(bed, tmp_path, *words, "--gpus-per-node=3", code=2)
    assert "9 ranks, but the largest step" in submit(bed, tmp_path, *words, "--nodes=3", "--tasks-per-node=3", code=2)
    assert bed.slurm("squeue", "-h", "-o", "%i") == "" and not (tmp_path / "runs").exists()


def test_a_check_that_finds_a_mistake_ends_the_chain_before_the_training(bed: Bed, run_file, tmp_path):
    """The run folder lies in /dev/shm, which every node has for itself."""
    out = Path(f"/dev/shm/{tmp_path.name}")
    try:
        jobs = jobs_of(submit(bed, tmp_path, "run.yaml", f"out={out}", "--nodes=2", "--prep=prep.yaml"))
        assert bed.wait_for_end(jobs["check"], seconds=120) == "FAILED"
        assert bed.wait_for_end(jobs["training"], seconds=30) == "CANCELLED"
        assert "node2 does not see what rank 0 writes into the run folder" in (tmp_path / f"check-{jobs['check']}.out").read_text()
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_of_several_jobs_the_next_goes_on_where_the_one_before_was_cancelled(bed: Bed, run_file, tmp_path):
    """As in a centre that forbids requeueing: three jobs, the first of them cancelled in its middle."""
    assert data_prep("prepare", tmp_path / "prep.yaml") == 0
    longer = ("phases.0.tokens=60K", "phases.1.tokens=20K", "checkpoints.every_tokens=8K")
    jobs = jobs_of(submit(bed, tmp_path, "run.yaml", *longer, "--nodes=2", "--jobs=3", "--no-check"))
    out = tmp_path / "runs" / "chain"
    wait_for_start(out, 1, steps=30)
    bed.slurm("scancel", jobs["training-1"])
    assert bed.wait_for_end(jobs["training-1"], seconds=60) == "CANCELLED"
    assert bed.wait_for_end(jobs["training-2"], seconds=200) == "COMPLETED"
    assert bed.wait_for_end(jobs["training-3"], seconds=60) == "COMPLETED"
    assert [s["event"] for s in starts(out)] == ["start", "resume"] and starts(out)[1]["step"] >= 10
    assert record(out, jobs["training-3"])[-1]["why"] == "the run was done before this job began"
    stands = submit(bed, tmp_path, "status", "run.yaml")
    assert re.search(rf"{jobs['training-1']} +training-1 +CANCELLED", stands) and "runs/chain: done, " in stands
