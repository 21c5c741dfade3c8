"""pretrain.sbatch on two nodes, undisturbed, and with inputs that cannot be right."""

from __future__ import annotations

import pytest

from tests.cluster.bed import Bed
from tests.cluster.tiny_run import assert_same, record, starts, submit, train_alone, write_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_two_nodes_with_two_ranks_each_train_what_one_machine_trains(bed: Bed, tmp_path):
    run = write_run(tmp_path, tokens="8K", every_tokens="4K")
    out, alone = tmp_path / "two_nodes", tmp_path / "alone"
    job = submit(bed, run, out, "--nodes=2", "--gpus-per-node=2", env={"TESSERA_PREFLIGHT": "0"})
    train_alone(run, alone)
    assert bed.wait_for_end(job, seconds=200) == "COMPLETED", (tmp_path / f"two_nodes-{job}.log").read_text()[-3000:]
    assert_same(out, alone)
    assert [s["ranks"] for s in starts(out)] == [4]
    lines = record(out, job)
    assert (lines[0]["event"], lines[0]["ranks"], lines[0]["nodes"]) == ("start", 4, "node[1-2]")
    assert (lines[-1]["cause"], lines[-1]["decision"], lines[-1]["tokens"]) == ("done", "finish", lines[-1]["tokens"])
