"""The doctor on real ranks that call themselves nodes: a sound job, slow links, damaged sums, silent ranks, mistakes."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.log import speak_on
from encoder.tools.doctor.doctor import Doctor
from encoder.tools.doctor.links import SUM_SECONDS
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks, start_ranks, wait_for

RUN = """
name: doctored
out: {out}
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {source}, name: a}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
optimizer: {{}}
phases: [{{name: one, tokens: 2K, max_tokens_per_document: 32, batch_tokens: 512, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 1K}}
loader: {{workers: 0}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    return prepared(tmp_path)


def prepared(folder: Path) -> Path:
    """With shards and a run file."""
    folder.mkdir(exist_ok=True)
    write_source(folder / "a", random_documents(40, seed=1, longest=60), vocab_size=64)
    (folder / "run.yaml").write_text(RUN.format(out=folder / "out", source=folder / "a"))
    return folder


# (ranks, what is wrong): in each somebody is waited for until the wait is over
WAITING = {
    "stuck": (4, {"stuck": 2, "wait_seconds": 14.0, "sum_seconds": 3.0}),
    "absent": (3, {"absent": 1, "wait_seconds": 12.0}),
    "absent_first": (2, {"absent": 0, "wait_seconds": 8.0}),
    "own_folder_of_three": (3, {"own_folder": 2, "wait_seconds": 12.0}),
    "own_folder_of_two": (2, {"own_folder": 1, "wait_seconds": 12.0}),
}


@pytest.fixture(scope="module")
def waited(tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """Each job's folder and results; they wait side by side, for one after the other takes a minute."""
    root = tmp_path_factory.mktemp("waiting")
    began = time.monotonic()
    jobs = {}
    for name, (ranks, wrong) in WAITING.items():
        folder = prepared(root / name)
        jobs[name] = folder, start_ranks(examine, ranks, folder=str(folder), **wrong)
    found = {
        name: (folder, wait_for(ranks, timeout_seconds=100.0))
        for name, (folder, ranks) in jobs.items()
    }
    assert time.monotonic() - began < 100
    return found


def examine(
    world: World,
    *,
    folder: str,
    slow: int = -1,
    damaged: int = -1,
    absent: int = -1,
    own_folder: int = -1,
    stuck: int = -1,
    per_node: int = 1,
    wait_seconds: float = 20.0,
    sum_seconds: float = SUM_SECONDS,
    overrides: tuple[str, ...] = (),
) -> dict:
    """Each rank is a node of its own. `slow` takes 400 times as long to send, `damaged` sends other bytes, `absent` never comes,
    `own_folder` has another run file, `stuck` never ends its first sum. Each node has `per_node` ranks, the last one what is left.

    What a link takes is told, not measured: beside other work a good node of this machine is slow at times.
    """
    seconds = itertools.count(step=0.4 if world.rank == slow else 0.001)

    def inject_fault(sent: torch.Tensor) -> None:
        if world.rank == damaged:
            sent[-1] += 1
        if world.rank == stuck:
            time.sleep(1000)

    nodes = -(-world.size // per_node)
    local_size = min(per_node, world.size - world.rank // per_node * per_node)
    tasks = ",".join(str(min(per_node, world.size - node * per_node)) for node in range(nodes))
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": f"node[1-{nodes}]",
        "SLURMD_NODENAME": f"node{world.rank // per_node + 1}",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
    }
    if world.rank == absent:
        return {}
    if world.rank == own_folder:
        os.makedirs(f"{folder}/other", exist_ok=True)
    # the tests' own store has the first
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    words = [f"out={folder}/other"] if world.rank == own_folder else []
    speak_on(world.first)
    here = World(
        rank=world.rank, size=world.size, local_rank=world.rank % per_node, local_size=local_size
    )
    doctor = Doctor(
        world=here,
        env=env,
        report=Path(folder) / "report",
        inject_fault=inject_fault,
        clock=lambda: next(seconds),
        wait_seconds=wait_seconds,
        sum_seconds=sum_seconds,
        message_bytes=2**18,
    )
    code = doctor.examine(f"{folder}/run.yaml", [*overrides, *words])
    return {
        "code": code,
        "nodes": doctor.findings.nodes,
        "mistakes": doctor.findings.mistakes,
        "rows": dict(doctor.findings.rows),
    }


def report_of(folder: Path, node: str) -> dict:
    return json.loads((folder / "report" / f"{node}.json").read_text())


def test_a_sound_job_is_fine_on_every_rank_and_leaves_nothing_in_the_run_folder(folder):
    first, second = run_ranks(examine, 2, folder=str(folder))
    assert (first["code"], second["code"]) == (0, 0)
    assert {
        "versions",
        "run file",
        "shards",
        "devices",
        "memory",
        "run folder",
        "fit",
        "links",
        "all-reduce",
    } == set(first["rows"])
    assert "2 nodes" in first["rows"]["run folder"] and first["rows"]["all-reduce"].startswith(
        "exact"
    )
    assert not (folder / "out").exists() and (folder / "report" / "bad_nodes").read_text() == ""
    assert [report_of(folder, n)["stage"] for n in ("node1", "node2")] == ["ended", "ended"]


def test_the_node_whose_links_are_slow_is_named_and_no_other(folder):
    results = run_ranks(examine, 4, folder=str(folder), slow=2)
    assert [r["code"] for r in results] == [4] * 4
    assert list(results[0]["nodes"]) == ["node3"] and "GB/s, where" in results[0]["nodes"]["node3"]
    # 256 KiB, sent once, in 0.4 s
    assert f"{2**18 / 0.4 / 1e9:.3g} GB/s" in results[0]["nodes"]["node3"]
    assert (folder / "report" / "bad_nodes").read_text() == "node3\n"
    assert list(report_of(folder, "node1")["verdict"]["nodes"]) == ["node3"]


def test_the_node_that_damages_what_it_sends_is_named(folder):
    results = run_ranks(examine, 3, folder=str(folder), damaged=1)
    assert [r["code"] for r in results] == [4] * 3
    assert (
        list(results[0]["nodes"]) == ["node2"] and "a sum is wrong" in results[0]["nodes"]["node2"]
    )


@pytest.mark.matrix
def test_a_node_that_falls_silent_among_the_links_is_named_and_hangs_nobody(waited):
    _, results = waited["stuck"]
    assert [r["code"] for r in results] == [4] * 4
    assert list(results[0]["nodes"]) == ["node3"] and "no answer" in results[0]["nodes"]["node3"]


def test_nodes_with_different_numbers_of_ranks_are_fine(folder):
    results = run_ranks(examine, 3, folder=str(folder), per_node=2)
    assert [r["code"] for r in results] == [0] * 3
    assert "2 nodes" in results[0]["rows"]["run folder"] and results[0]["rows"]["links"].startswith(
        "1 pair of nodes"
    )
    assert "over 3 ranks" in results[0]["rows"]["all-reduce"]


def test_ranks_of_one_node_are_measured_all_at_once(folder):
    results = run_ranks(examine, 2, folder=str(folder), per_node=2)
    assert [r["code"] for r in results] == [0] * 2
    assert "links" not in results[0]["rows"] and results[0]["rows"]["all-reduce"].startswith(
        "exact"
    )
    results = run_ranks(examine, 2, folder=str(folder), per_node=2, damaged=1)
    assert [r["code"] for r in results] == [5] * 2 and "a sum is wrong" in results[0]["nodes"][
        "node1"
    ]


@pytest.mark.matrix
def test_a_rank_that_never_comes_is_named_by_its_node_within_the_wait(waited):
    _, results = waited["absent"]
    assert (results[0]["code"], results[2]["code"]) == (4, 4) and list(results[0]["nodes"]) == [
        "node2"
    ]
    assert "rank 1 of node2 did not come" in results[0]["nodes"]["node2"]


@pytest.mark.matrix
def test_without_rank_zero_the_others_name_its_node(waited):
    folder, results = waited["absent_first"]
    assert results[1]["code"] == 4 and (folder / "report" / "bad_nodes").read_text() == "node1\n"


@pytest.mark.matrix
def test_of_three_nodes_one_with_another_run_file_is_a_bad_node_of_two_it_is_a_mistake(waited):
    _, three = waited["own_folder_of_three"]
    assert [r["code"] for r in three] == [4] * 3 and list(three[0]["nodes"]) == ["node3"]
    _, two = waited["own_folder_of_two"]
    assert [r["code"] for r in two] == [2] * 2 and "settings of node" in two[0]["mistakes"][0]


def test_a_run_that_does_not_fit_its_ranks_is_a_mistake_before_any_link_is_measured(folder):
    results = run_ranks(examine, 2, folder=str(folder), overrides=["phases.0.batch_tokens=64"])
    assert [r["code"] for r in results] == [2, 2] and "links" not in results[0]["rows"]
    assert (
        "2 ranks, but the largest step (phase one) has 1 rows of 64 tokens"
        in results[0]["mistakes"][0]
    )
