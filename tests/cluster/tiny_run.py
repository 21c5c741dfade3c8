"""The tiny run of three phases that the cluster's tests train, interrupt and compare with the same run on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.runs.folder import EVENTS, LEDGER, read_jsonl
from encoder.tools.report.report import verify_ledger
from tests.cluster.bed import ROOT, Bed, wait_until
from tests.helpers.shards import random_documents, write_source
from tests.process.test_one_curve import distance

PRETRAIN = ROOT / "slurm" / "pretrain.sbatch"
RUN = """
name: cluster
out: {root}/alone
seed: 3
device: cpu
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a, name: a}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
optimizer: {{}}
phases:
  - {{name: one, tokens: {tokens}, max_tokens_per_document: 32, batch_tokens: 512,
     batch_warmup: {{from_tokens: 256, over_tokens: 2K}}, lr: {{schedule: wsd, peak: 1e-3, warmup_tokens: 500}}}}
  - {{name: two, tokens: {tokens}, max_tokens_per_document: 64, batch_tokens: 512, model: {{global_rope_theta: 160000}},
     lr: {{schedule: constant, peak: 1e-3}}}}
  - {{name: three, tokens: {tokens}, max_tokens_per_document: 64, batch_tokens: 512, lr: {{schedule: one_minus_sqrt, peak: 1e-3}}}}
checkpoints: {{every_tokens: {every_tokens}, keep_last: 2}}
engine: {{zero_stage: 1, precision: fp32}}
loader: {{workers: 0}}
"""


def write_run(root: Path, *, tokens: str, every_tokens: str) -> Path:
    """Shards and run file in `root`; each phase has `tokens`."""
    write_source(root / "a", random_documents(120, seed=1, longest=60), vocab_size=64)
    path = root / "run.yaml"
    path.write_text(RUN.format(root=root, tokens=tokens, every_tokens=every_tokens))
    return path


def train_alone(run_file: Path, out: Path) -> None:
    """The uninterrupted run: one rank, no Slurm."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), str(run_file), f"out={out}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def submit(
    bed: Bed,
    run_file: Path,
    out: Path,
    *sbatch: str,
    overrides: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> str:
    """Submits pretrain.sbatch with the run file, its output beside the run folder; the job's id."""
    return bed.sbatch(
        *sbatch,
        f"--output={out}-%j.log",
        PRETRAIN,
        run_file,
        f"out={out}",
        *overrides,
        env={"TESSERA_PYTHON": sys.executable, "TESSERA_PREFLIGHT": "0", **(env or {})},
        cwd=out.parent,
    )


def last_step(out: Path) -> int:
    """The last step in the ledger."""
    lines = read_jsonl(out / LEDGER)
    return lines[-1]["step"] if lines else 0


def starts(out: Path) -> list[dict[str, Any]]:
    """The run's own starts and resumes."""
    return [e for e in read_jsonl(out / EVENTS) if e["event"] in ("start", "resume")]


def wait_for_start(out: Path, number: int, *, steps: int = 5, seconds: float = 120.0) -> int:
    """Waits until the run's start of that number (1, 2, ...) has done some steps that are new; the last step."""

    def new_steps() -> int:
        begun = starts(out)
        return (
            last_step(out)
            if len(begun) >= number and last_step(out) >= begun[number - 1]["step"] + steps
            else 0
        )

    return wait_until(
        new_steps, seconds=seconds, what=f"start {number} of {out.name} to make steps"
    )


def record(out: Path, job: str) -> list[dict[str, Any]]:
    """What the job wrote down."""
    return [json.loads(line) for line in (out / "slurm" / f"{job}.jsonl").read_text().splitlines()]


def assert_same(out: Path, alone: Path) -> None:
    """Ledger equal line by line, its chain unbroken to done.json; parameters equal but for the order of sums in fp32."""
    assert read_jsonl(out / LEDGER) == read_jsonl(alone / LEDGER)
    assert verify_ledger(out) == last_step(alone) and (out / "done.json").exists()
    a, b = (read_weights(newest_checkpoint(folder / "checkpoints")) for folder in (out, alone))
    assert distance(a, b) < 1e-5
