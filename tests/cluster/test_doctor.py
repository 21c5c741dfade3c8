"""The doctor on nodes of their own: one whose network is slow is named, left out by the job, and the run is trained without it."""

from __future__ import annotations

import re
import sys

import pytest

from tests.cluster.bed import ROOT, Bed
from tests.cluster.tiny_run import assert_same, record, starts, submit, train_alone, write_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SLOW = (
    "root",
    "tbf",
    "rate",
    "50mbit",
    "burst",
    "64kb",
    "latency",
    "400ms",
)  # what it sends; the others 1 Gbit/s and more


@pytest.fixture
def slow_node(bed: Bed):
    """node3 with a cable that has worked loose."""
    device = re.findall(
        r"^\d+: (?!lo)(\w+)", bed.host("exec", "node3", "ip", "-o", "link"), re.MULTILINE
    )[0]
    bed.host("exec", "node3", "tc", "qdisc", "add", "dev", device, *SLOW)
    yield "node3"
    bed.host("exec", "node3", "tc", "qdisc", "del", "dev", device, "root")


def test_the_node_with_the_slow_network_is_named_on_four_nodes_in_under_30_s(
    bed: Bed, slow_node, tmp_path
):
    run = write_run(tmp_path, tokens="8K", every_tokens="4K")
    job = bed.sbatch(
        "--nodes=4",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/check.log",
        ROOT / "slurm" / "check.sbatch",
        run,
        "--report",
        tmp_path / "report",
        env={"TESSERA_PYTHON": sys.executable},
        cwd=tmp_path,
    )
    assert bed.wait_for_end(job, seconds=120) == "COMPLETED"  # the training leaves it out itself
    said = (tmp_path / "check.log").read_text()
    print(said)
    assert (
        f"to be left out: {slow_node} (" in said
        and f"bad node {slow_node}: {slow_node} with node" in said
    )
    assert (tmp_path / "report" / "bad_nodes").read_text() == f"{slow_node}\n"
    assert float(re.search(r"left out: node3 \(([\d.]+)s\)", said)[1]) < 30


def test_a_training_goes_on_without_the_node_that_the_doctor_names(bed: Bed, slow_node, tmp_path):
    run = write_run(tmp_path, tokens="8K", every_tokens="4K")
    out, alone = tmp_path / "three_nodes", tmp_path / "alone"
    job = submit(bed, run, out, "--nodes=3", "--ntasks-per-node=1", env={"TESSERA_PREFLIGHT": "1"})
    train_alone(run, alone)
    state = bed.wait_for_end(job, seconds=250)
    log = (tmp_path / f"three_nodes-{job}.log").read_text()
    assert state == "COMPLETED", log[-3000:]
    print(log)
    events = record(out, job)
    assert next(e for e in events if e["event"] == "excluded")["nodes"] == [slow_node]
    assert [e["nodes"] for e in events if e["event"] == "start"][-1] == "node[1-2,4]"
    assert [s["ranks"] for s in starts(out)] == [3]  # nothing was trained with it
    assert_same(out, alone)
