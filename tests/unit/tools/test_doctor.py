"""What the doctor makes of what it was told: who differs, which node bad links have in common, what SLURM's lists mean."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import ConfigError
from encoder.base.slurm import expand_hosts, nodes_of_ranks, tasks_per_node
from encoder.runs.config import read_run
from encoder.tools.doctor.facts import look_at_folder, matmul_error, memory_errors, sources_sha256
from encoder.tools.doctor.links import ring
from encoder.tools.doctor.rendezvous import Rendezvous
from encoder.tools.doctor.verdict import (
    Findings,
    judge_all_reduce,
    judge_facts,
    judge_folder,
    judge_links,
)
from encoder.tools.plan.memory import count_needs
from launch import doctor
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import ROOT
from tests.unit.launch.test_bad_input import RUN


@pytest.fixture
def run_file(tmp_path) -> Path:
    source = write_source(tmp_path / "s" / "train", random_documents(20), vocab_size=64)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(out=tmp_path / "run", source=source, vocab=64, batch=128))
    return path


def test_lists_of_nodes_and_tasks_are_those_that_slurm_means():
    assert expand_hosts("node[1,03-05],b") == ["node1", "node03", "node04", "node05", "b"]
    assert expand_hosts("r[1-2]n[08-09]-ib") == ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="no range"):
        expand_hosts("node[1-x]")
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "a[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
    }
    assert nodes_of_ranks(env, size=3, local_size=2) == ["a1", "a1", "a2"]
    assert nodes_of_ranks({}, size=3, local_size=2) == ["ranks 0-1", "ranks 0-1", "ranks 2-2"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_a_ring_has_every_pair_once_and_no_node_twice_in_a_round(count):
    rounds = ring([f"n{i}" for i in range(count)])
    pairs = Counter(frozenset(pair) for pairs in rounds for pair in pairs)
    assert set(pairs.values()) <= {1} and len(pairs) == {1: 0, 2: 1}.get(count, count)
    for pairs in rounds:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))


def judged(*pairs: float | str, count: int, silent: tuple[int, ...] = ()) -> Findings:
    """The findings of one rank on each of `count` nodes; pair i, of nodes i and i + 1, has so many GB/s, or an error."""
    found: dict[int, list[dict]] = {rank: [] for rank in range(count) if rank not in silent}
    for i, value in enumerate(pairs):
        ends = (i, (i + 1) % count)
        view = {"error": value} if isinstance(value, str) else {"gb_per_second": value}
        for rank in set(ends) & set(found):
            found[rank].append({"nodes": [f"n{end}" for end in ends], **view})
    findings = Findings()
    judge_links(findings, found, [f"n{rank}" for rank in range(count)])
    return findings


def test_a_node_is_named_when_it_is_slow_with_both_neighbours():
    assert list(judged(9, 1, 1, 9, 10, count=5).nodes) == ["n2"]
    assert list(judged(9, 1, 1, count=3).nodes) == ["n2"]
    assert judged(9, 4, 4, 9, 10, count=5).nodes == {}  # above a quarter of the fastest
    assert set(judged(10, 9, 0.5, 0.4, 0.6, 9, 9, 11, count=8).nodes) == {"n3", "n4"}


def test_one_bad_pair_of_nodes_that_are_fine_with_others_is_a_warning():
    for value, said in ((1, "1 GB/s, where the fastest pair has 10"), ("no answer", "no answer")):
        findings = judged(9, value, 9, 9, 10, count=5)
        assert findings.exit_code == 0 and findings.rows == []
        assert findings.warnings == [
            f"n1 with n2: {said}, though both are well linked to their other neighbours."
        ]


def test_a_pair_is_as_fast_as_its_slowest_rank_says():
    nodes = ["n0", "n1", "n1", "n2"]
    views = {
        rank: [{"nodes": ["n0", "n1"], "gb_per_second": speed}]
        for rank, speed in enumerate((8.0, 8.0, 0.001))
    }
    views[3] = [
        {"nodes": ["n1", "n2"], "gb_per_second": 8.0},
        {"nodes": ["n2", "n0"], "gb_per_second": 0.002},
    ]
    findings = Findings()
    judge_links(findings, views, nodes)
    assert list(findings.nodes) == ["n0"] and "0.001 GB/s" in findings.nodes["n0"]


def test_a_silent_node_is_named_and_its_neighbours_are_not():
    findings = judged("no answer", "no answer", 9, 9, 9, count=5, silent=(1,))
    assert findings.nodes == {"n1": "n1 fell silent while links were measured"}
    assert list(judged("no answer", count=2, silent=(1,)).nodes) == ["n1"]


@pytest.mark.parametrize("silent", [(), (2,)])
def test_a_slow_moment_beside_a_node_that_fails_names_the_failing_node_alone(silent):
    # n2 fails with n1 and n3; n1 was slow with n0, once
    findings = judged(1, "no answer", "no answer", 10, count=4, silent=silent)
    assert list(findings.nodes) == ["n2"]
    (warning,) = findings.warnings
    assert "n0 with n1: 1 GB/s" in warning and "measured once" in warning


def test_a_node_that_fails_with_one_neighbour_and_is_slow_with_the_other_is_named():
    assert list(judged(1, "no answer", 9, 10, 10, count=5).nodes) == ["n1"]


def test_a_job_whose_nodes_are_all_bad_has_an_exit_code_of_its_own():
    findings = judged(9, 1, 1, 9, 10, count=5)
    assert findings.exit_code_of({"n1", "n2"}) == 4 and findings.exit_code_of({"n2"}) == 5
    findings.mistakes.append("the run file")
    assert findings.exit_code_of({"n2"}) == 2 and Findings().exit_code_of({"n2"}) == 0


def device_of(rank: int, error: str = "", *, per_node: int = 1) -> dict:
    """What a rank says of itself where only its device may be wrong."""
    device = {"kind": "cuda", "seen": 8, **({"error": error} if error else {"free": 2**40})}
    return {
        "rank": rank,
        "local_rank": rank % per_node,
        "local_size": per_node,
        "node": f"n{rank // per_node}",
        "device": device,
        "gpus_allotted": "8",
        "versions": {"torch": "2"},
        "run_sha256": "a",
        "shards": {},
        "folder": "/",
        "memory": {"free": 2**40, "allowed": 0},
    }


def judged_devices(run_file: Path, *errors: str, per_node: int = 1) -> Findings:
    findings, needs = Findings(), count_needs(read_run(run_file), ranks=len(errors))
    facts = {rank: device_of(rank, error, per_node=per_node) for rank, error in enumerate(errors)}
    judge_facts(
        findings, facts, [fact["node"] for fact in facts.values()], came=set(facts), needs=needs
    )
    return findings


def test_a_device_that_fails_on_every_node_is_a_mistake_and_on_some_nodes_theirs(run_file):
    everywhere = judged_devices(
        run_file, "torch has no CUDA.", "torch has no CUDA.", "", "torch has no CUDA.", per_node=2
    )
    assert everywhere.exit_code == 2 and everywhere.mistakes == [
        "rank 0 of n0: torch has no CUDA (and so on every node)"
    ]
    assert not everywhere.nodes
    some = judged_devices(run_file, "", "the product is wrong", "the product is wrong")
    assert some.exit_code == 4 and some.nodes == {
        n: f"rank {n[1]} of {n}: the product is wrong" for n in ("n1", "n2")
    }
    alone = judged_devices(
        run_file, "the product is wrong"
    )  # of one node nobody knows: others may do better
    assert alone.exit_code == 4 and alone.exit_code_of({"n0"}) == 5


def test_a_port_that_is_none_is_refused_in_one_line(run_file, monkeypatch):
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "xx",
    }.items():
        monkeypatch.setenv(key, value)
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: MASTER_PORT is 'xx'; needed: a port from 1 to 65535")
    for port in ("0", "70000", "-1"):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(
            ConfigError, match=f"MASTER_PORT is '{port}'; needed: a port from 1 to 65535"
        ):
            Rendezvous(World(rank=0, size=2), wait_seconds=1.0)


def test_of_two_nodes_with_a_bad_link_both_are_named():
    for value in (0.001, "a sum is wrong"):
        findings = judged(value, count=2)
        assert set(findings.nodes) == {"n0", "n1"}
        assert findings.nodes["n1"].endswith("cannot tell which of the two is at fault")


def test_a_single_node_has_no_links_and_is_fine():
    findings = Findings()
    judge_links(findings, {0: [], 1: []}, ["n0", "n0"])
    assert (findings.nodes, findings.warnings, findings.rows) == ({}, [], [])


def test_what_most_nodes_have_is_right_and_half_of_them_is_a_mistake():
    findings = Findings()
    three = {"a": {"torch": "2.11"}, "b": {"torch": "2.10"}, "c": {"torch": "2.11"}}
    assert not findings.check_equal("versions", three, advice="x")
    assert findings.exit_code == 4 and "torch 2.10 where others have 2.11" in findings.nodes["b"]
    halved = Findings()
    halved.check_equal("versions", {"a": {"torch": "2.11"}, "b": {"torch": "2.10"}}, advice="x")
    assert halved.exit_code == 2 and not halved.nodes


def test_a_run_folder_on_a_disk_of_each_node_is_a_mistake_and_on_one_node_without_the_disk_a_bad_node():
    fine, blind = (
        {"seen": True, "place": "", "free": 10**9},
        {
            "seen": False,
            "place": "the folder is",
            "free": 0,
        },
    )
    for shared, code in (
        ({"a": fine, "b": blind}, 2),
        ({"a": fine, "b": blind, "c": fine}, 4),
        ({"a": fine, "b": fine}, 0),
    ):
        findings = Findings()
        judge_folder(findings, shared, [], "runs/x", checkpoint_bytes=10**6)
        assert findings.exit_code == code
    findings = Findings()
    judge_folder(findings, {"a": fine}, [], "runs/x", checkpoint_bytes=10**9)
    assert "953.7 MiB free; needed: 1.9 GiB, two checkpoints" in findings.mistakes[0]
    for at_most, said in (
        (3, "two checkpoints take 572.2 MiB"),
        (4, "the 4 still to stand at once 1.1 GiB: NOT enough to the end"),
    ):
        findings = Findings()
        judge_folder(
            findings, {"a": fine}, [], "runs/x", checkpoint_bytes=3 * 10**8, at_most=at_most
        )
        assert findings.exit_code == 0 and findings.rows[0][1].endswith(said)


def test_a_wrong_sum_names_its_node_and_on_all_of_several_nodes_is_a_mistake():
    fine, wrong = {"gb_per_second": 1.0}, {"error": "the sum over all ranks is wrong"}
    for found, code in (
        ({0: fine, 1: wrong}, 4),
        ({0: wrong, 1: wrong}, 2),
        ({0: fine}, 4),
        ({0: fine, 1: fine}, 0),
    ):
        findings = Findings()
        judge_all_reduce(findings, found, ["a", "b"])
        assert findings.exit_code == code and list(findings.nodes) == (["b"] if code == 4 else [])
    alone = Findings()
    judge_all_reduce(alone, {0: wrong, 1: wrong}, ["a", "a"])
    assert alone.exit_code_of({"a"}) == 5


def test_a_folder_is_seen_only_when_the_first_rank_has_written_there(tmp_path):
    assert not look_at_folder(tmp_path, "n", node="b", wait_seconds=0.0)["seen"]
    assert "error" not in look_at_folder(tmp_path, "n", node="a", wait_seconds=0.0, first=True)
    seen = look_at_folder(tmp_path, "n", node="b", wait_seconds=0.0)
    assert seen["seen"] and seen["free"] > 0 and (tmp_path / ".doctor-n-b").exists()
    assert (
        look_at_folder(tmp_path / "new" / "run", "n", node="a", wait_seconds=0.0, first=True)[
            "free"
        ]
        > 0
    )
    assert (
        "Not a directory"
        in look_at_folder(tmp_path / ".doctor-n", "n", node="a", wait_seconds=0.0, first=True)[
            "error"
        ]
    )


def test_products_are_right_on_this_device_and_memory_errors_are_read_off_nvidia_smi():
    assert matmul_error(torch.device("cpu")) < 1e-5
    assert (
        memory_errors("0, 0\n1, [N/A]\n2, 3\n")
        == "GPU 2: 3 uncorrected memory errors since it was last reset"
    )


def test_sources_have_another_name_after_any_change(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "a.py").write_text("x = 1\n")
    before = sources_sha256(tmp_path)
    (tmp_path / "encoder" / "a.py").write_text("x = 2\n")
    assert sources_sha256(tmp_path) != before


def test_by_hand_on_one_rank_it_says_what_it_saw(run_file, tmp_path, capsys):
    assert doctor.main([str(run_file), "--report", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert (
        "doctor: fine" in said
        and "two checkpoints take" in said
        and not (tmp_path / "run").exists()
    )


def test_mistakes_by_hand_are_said_with_exit_code_2(run_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, text in (
        (["model.hiden_size=8"], "Did you mean hidden_size?"),
        ([f"out={tmp_path}/file/x"], "cannot write into"),
        (["data.sources.0.path=shards/none"], "shards/none does not exist"),
        (
            ["engine.fp8=layers", "engine.precision=bf16", "model.intermediate_size=24"],
            "needed: multiples of 16",
        ),
    ):
        assert doctor.main([str(run_file), *words]) == 2
        assert text in capsys.readouterr().out
    assert (
        f"Looked for from the folder {os.getcwd()}"
        in (doctor.main(["nowhere.yaml"]), capsys.readouterr().out)[1]
    )


def test_the_sources_that_nodes_compare_are_those_of_this_program(tmp_path):
    """A module that moves to another depth must not make every node's sources the hash of nothing."""
    assert sources_sha256() != sources_sha256(tmp_path)
