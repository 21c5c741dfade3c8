"""pretrain.sbatch on two nodes: what the ranks are told, by srun and by the deepspeed command, and what they train."""

from __future__ import annotations

import json
import time

import pytest

from encoder.base.dist import device_index, meeting_place, world_from_env
from tests.cluster.bed import Bed, wait_until
from tests.cluster.test_interrupted import rank_pids
from tests.cluster.tiny_run import (
    assert_same,
    record,
    starts,
    submit,
    train_alone,
    wait_for_start,
    write_run,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def test_two_nodes_with_two_ranks_each_train_what_one_machine_trains(bed: Bed, tmp_path, capsys):
    run = write_run(tmp_path, tokens="8K", every_tokens="4K")
    out, alone = tmp_path / "two_nodes", tmp_path / "alone"
    job = submit(
        bed,
        run,
        out,
        "--nodes=2",
        "--gpus-per-node=2",
        env={"TESSERA_PREFLIGHT": "1", "TESSERA_SRUN_ARGS": "--label"},
    )
    train_alone(run, alone)
    assert bed.wait_for_end(job, seconds=200) == "COMPLETED", (
        tmp_path / f"two_nodes-{job}.log"
    ).read_text()[-3000:]
    assert_same(out, alone)
    assert [s["ranks"] for s in starts(out)] == [4]
    lines = record(out, job)
    assert (lines[0]["event"], lines[0]["ranks"], lines[0]["nodes"]) == ("start", 4, "node[1-2]")
    assert (lines[1]["event"], lines[1]["code"], lines[1]["bad_nodes"]) == ("preflight", 0, [])
    assert (lines[-1]["cause"], lines[-1]["decision"]) == ("done", "finish")
    said = (tmp_path / f"two_nodes-{job}.log").read_text()
    # srun got its --label, rank zero alone speaks, and a log is no terminal
    assert "\n0: done: " in said and "\n1: " not in said and "\x1b" not in said
    with capsys.disabled():
        print(
            f"\npreflight of 2 nodes with 2 ranks: {lines[1]['seconds']:.0f} s; training:"
            f" {lines[-1]['seconds']:.0f} s"
        )


@pytest.mark.slow  # three processes deep, each of which imports deepspeed
def test_the_deepspeed_command_stays_available(bed: Bed, tmp_path):
    run = write_run(tmp_path, tokens="30K", every_tokens="8K")
    out, alone = tmp_path / "launched", tmp_path / "alone"
    job = submit(
        bed, run, out, "--nodes=2", "--gpus-per-node=2", env={"TESSERA_LAUNCHER": "deepspeed"}
    )
    wait_for_start(out, 1)
    bed.slurm("scancel", "--batch", "--signal=USR1", job)
    train_alone(run, alone)
    assert bed.wait_for_end(job, seconds=200) == "COMPLETED", (
        tmp_path / f"launched-{job}.log"
    ).read_text()[-3000:]
    ends = [line for line in record(out, job) if line["event"] == "end"]
    assert [(e["cause"], e["decision"]) for e in ends] == [
        ("stopped", "requeue"),
        ("done", "finish"),
    ] and ends[0]["step"] > 0
    assert [s["ranks"] for s in starts(out)] == [4, 4]
    assert_same(out, alone)


@pytest.mark.parametrize(
    "options, index",
    [
        (["--gpus-per-node=2", "--ntasks-per-node=2"], [0, 1]),
        (["--ntasks-per-node=2", "--gpus-per-task=1"], [0, 0]),
    ],
)
def test_ranks_find_their_place_in_what_slurm_says_with_and_without_bound_gpus(
    bed: Bed, options, index
):
    # a line of less than 1,024 bytes, at which srun cuts
    say = (
        "import json, os; words = ('STEP', 'PROCID', 'LOCALID', 'NODEID', 'NTASKS', 'GPUS_ON',"
        " 'JOB_ID', 'CUDA'); print(json.dumps({k: v for k, v in os.environ.items() if any(w in k"
        " for w in words)}))"
    )
    said = bed.slurm("srun", "--nodes=2", *options, "python3", "-c", say)
    tasks = {int(env["SLURM_PROCID"]): env for env in map(json.loads, said.splitlines())}
    worlds = [world_from_env(tasks[rank]) for rank in range(4)]
    assert [(w.rank, w.size, w.local_rank, w.local_size) for w in worlds] == [
        (r, 4, r % 2, 2) for r in range(4)
    ]
    assert {meeting_place(env) for env in tasks.values()} == {("node1", meeting_place(tasks[0])[1])}
    seen = [len(tasks[rank]["CUDA_VISIBLE_DEVICES"].split(",")) for rank in range(4)]
    assert [
        device_index(world, visible=seen[world.rank], env=tasks[world.rank]) for world in worlds
    ] == 2 * index


def test_ranks_that_hang_when_the_limit_comes_do_not_keep_the_job_from_its_requeue(
    bed: Bed, tmp_path
):
    run = write_run(tmp_path, tokens="100K", every_tokens="8K")
    out = tmp_path / "hung"
    job = submit(bed, run, out, "--nodes=1", "--time=20", env={"TESSERA_SPARE_SECONDS": "1200"})
    wait_for_start(out, 1)
    bed.host("exec", "node1", "kill", "-STOP", *rank_pids(bed, "node1"))
    bed.slurm("scancel", "--batch", "--signal=USR1", job)
    began = time.monotonic()
    wait_until(lambda: bed.job(job)["Restarts"] == "1", seconds=60, what="the requeue")
    assert time.monotonic() - began > 15  # what they have at least
    [end] = [line for line in record(out, job) if line["event"] == "end"]
    assert (end["cause"], end["decision"]) == ("stopped", "requeue")
