"""Ends that must not be answered by starting again, input that cannot be right, and ranks that must not save any more."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from encoder.engine.checkpoint.folder import committed_folders
from tests.cluster.bed import Bed, wait_until
from tests.cluster.test_interrupted import Disturbed, kill_rank, rank_pids
from tests.cluster.tiny_run import (
    PRETRAIN,
    assert_same,
    last_step,
    record,
    starts,
    submit,
    train_alone,
    write_run,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def log_of(out: Path, job: str) -> str:
    return Path(f"{out}-{job}.log").read_text()


def test_ranks_of_an_unplugged_node_cannot_save_over_the_run_that_was_started_again(
    bed: Bed, tmp_path, capsys
):
    run = write_run(tmp_path, tokens="30K", every_tokens="8K")
    out, alone = tmp_path / "fenced", tmp_path / "alone"
    it = Disturbed(bed, out)
    it.job = submit(bed, run, out, "--nodes=1", "--ntasks-per-node=2")
    it.wait_for_progress()
    [lost] = it.nodes()
    pids = rank_pids(bed, lost)
    assert len(pids) == 2
    # frozen, so that they are in the middle of the run when the other start has taken over, however long that takes
    bed.host("exec", lost, "kill", "-STOP", *pids)
    bed.host("unplug", lost)
    step, began = last_step(out), time.monotonic()
    try:
        theirs = set(committed_folders(out / "checkpoints"))
        wait_until(lambda: len(starts(out)) == 2, seconds=120, what="the second start")
        bed.host("exec", lost, "kill", "-CONT", *pids)
        wait_until(lambda: last_step(out) > step, seconds=60, what="a new step")
        seconds = time.monotonic() - began
        train_alone(run, alone)
        wait_until(
            lambda: "start 1 of the run" in log_of(out, it.job),
            seconds=60,
            what="the first start to be refused",
        )
        assert bed.wait_for_end(it.job, seconds=120) == "COMPLETED", log_of(out, it.job)[-3000:]
    finally:
        bed.host("plug", lost)
    with capsys.disabled():
        print(
            f"\nseconds from the network of the batch host cut to the first new step: {seconds:.1f}"
        )
    assert "but start 2 has taken over. This one saves nothing more" in log_of(out, it.job)
    assert "start 0 of this job still lives on" in log_of(out, it.job)  # it held the folder's lock
    of_the_first = {
        path for path in committed_folders(out / "checkpoints") if path.name.endswith("-i0001")
    }
    assert of_the_first <= theirs
    assert [s["start"] for s in starts(out)] == [1, 2]
    assert [
        line["restart"] for line in record(out, it.job) if line.get("decision") == "requeue"
    ] == []
    assert_same(out, alone)


def test_a_crash_loop_stops_with_a_report(bed: Bed, tmp_path):
    run = write_run(tmp_path, tokens="400K", every_tokens="8K")
    never = tmp_path / "never"
    broken = tmp_path / "python"  # the ranks' Python alone: nothing of the run is ever reached
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    hopeless = submit(
        bed,
        run,
        never,
        "--nodes=1",
        env={"TESSERA_PYTHON": str(broken), "TESSERA_BATCH_PYTHON": sys.executable},
    )
    it = Disturbed(bed, tmp_path / "loop")
    it.job = submit(bed, run, it.out, "--nodes=1", env={"TESSERA_MAX_CRASHES": "1"})
    it.when("the first crash", lambda: kill_rank(bed, it.nodes()[0]))
    it.wait_for_progress()
    kill_rank(bed, it.nodes()[0])
    assert bed.wait_for_end(it.job, seconds=60) == "FAILED"
    ends = [line for line in record(it.out, it.job) if line["event"] == "end"]
    assert [(e["cause"], e["decision"]) for e in ends] == [("crash", "requeue"), ("crash", "stop")]
    assert ends[1]["tokens"] > ends[0]["tokens"]
    report = (it.out / "slurm" / f"{it.job}-report.txt").read_text()
    assert "crash 2 of this job, 1 are allowed" in report and "crash 2 of this job" in log_of(
        it.out, it.job
    )

    assert bed.wait_for_end(hopeless, seconds=60) == "FAILED"
    ends = [line for line in record(never, hopeless) if line["event"] == "end"]
    assert [(e["cause"], e["decision"]) for e in ends] == [("crash", "requeue"), ("crash", "stop")]
    assert "nothing was committed since" in (never / "slurm" / f"{hopeless}-report.txt").read_text()


@pytest.mark.parametrize(
    "case, needle",
    [
        ("a run file that is not there", "cannot be read"),
        ("a run folder that cannot be made", "Needed: a run folder"),
        ("a copy of the script", "the repository is not where"),
        ("no run file", "no run file"),
        ("an env file that is not there", "no file"),
    ],
)
def test_what_cannot_be_right_is_said_in_one_line_before_any_rank_starts(
    bed: Bed, tmp_path, case, needle
):
    run = write_run(tmp_path, tokens="8K", every_tokens="8K")
    script, args, env = PRETRAIN, [str(run), f"out={tmp_path}/out"], {}
    if case.startswith("a run file"):
        args[0] = "run.yaml"  # relative, and the job starts elsewhere
    elif case.startswith("a run folder"):
        args[1] = f"out={run}/out"
    elif case.startswith("a copy"):
        script = Path(shutil.copy(PRETRAIN, tmp_path / "copy.sbatch"))
    elif case.startswith("no run"):
        args = []
    else:
        env = {"TESSERA_ENV": f"{tmp_path}/nowhere.sh"}
    (tmp_path / "elsewhere").mkdir()
    job = bed.sbatch(
        "--nodes=2",
        f"--output={tmp_path}/log",
        script,
        *args,
        cwd=tmp_path / "elsewhere",
        env={"TESSERA_PYTHON": sys.executable, **env},
    )
    assert bed.wait_for_end(job, seconds=30) == "FAILED"
    assert bed.job(job)["ExitCode"] == "2:0"
    said = (tmp_path / "log").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1 and needle in said, said
    assert not (tmp_path / "out").exists() and last_step(tmp_path / "out") == 0


def test_what_the_nodes_cannot_do_is_said_by_the_preflight_and_no_rank_trains(bed: Bed, tmp_path):
    run = write_run(tmp_path, tokens="8K", every_tokens="8K")
    here, too_much = tmp_path / "here", tmp_path / "too_much"
    wanted = {"TESSERA_PREFLIGHT": "1"}
    apart = submit(
        bed, run, here, "--nodes=2", overrides=("out=/dev/shm/apart",), env=wanted
    )  # each node has its own
    cuda = submit(
        bed, run, too_much, "--nodes=2", "--gpus-per-node=1", overrides=("device=cuda",), env=wanted
    )
    for out, job, needle, why in (
        (here, apart, "node2 does not see what rank 0 writes", "no requeue can mend that"),
        (too_much, cuda, "torch sees no CUDA device", "no requeue can mend that"),
    ):
        assert bed.wait_for_end(job, seconds=120) == "FAILED", log_of(out, job)
        said = log_of(out, job)
        assert needle in said and why in said.splitlines()[-1], said
        assert starts(out) == []
    assert [line["event"] for line in record(too_much, cuda)] == ["start", "preflight", "end"]
