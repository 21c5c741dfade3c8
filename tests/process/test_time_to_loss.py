"""tessera bench time-to-loss: both sides are judged by the same masks; a judge unlike the run's own loss tells nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import command, time_to_loss
from benchmarks.command import bench
from benchmarks.judge import Point, seconds_to
from benchmarks.time_to_loss import against, drawn_documents, tell
from benchmarks.trainer import grouped
from encoder.base.errors import UserError
from encoder.runs.config import read_run
from launch.bench import main
from tests.helpers.shards import random_documents, write_source

RUN = """
name: tiny
seed: 3
data: {{sources: [{{path: {shards}/a/train, weight: 0.75}}, {{path: {shards}/b/train, weight: 0.25}}], row_tokens: 64}}
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2,
         num_attention_heads: 2, max_position_embeddings: 64}}
phases:
  - {{tokens: 4000, max_tokens_per_document: 64, batch_tokens: 256, lr: 1.0e-3}}
  - {{tokens: 1000, max_tokens_per_document: 32, batch_tokens: 256, lr: 1.0e-3}}
evaluation: {{sources: [{{path: {shards}/held_out/train}}], rows: 8}}
loader: {{workers: 0, micro_batch_rows: 4}}
checkpoints: {{every_tokens: 1000}}
"""


@pytest.fixture
def run_file(tmp_path) -> Path:
    for number, name in enumerate(("a", "b", "held_out")):
        documents = random_documents(200, seed=number)
        write_source(tmp_path / "shards" / name / "train", documents, frame="both_ends")
    path = tmp_path / "tiny.yaml"
    path.write_text(RUN.format(shards=tmp_path / "shards"))
    return path


@pytest.fixture(autouse=True)
def memory_is_given_back(monkeypatch):
    """Other tests measure memory in this process."""
    monkeypatch.setattr(command.freed_memory, "keep", lambda: True)


def asked(run_file: Path, *words: str) -> list[str]:
    here = run_file.parent
    out = ["--work", str(here / "work"), "--json", str(here / "out.json"), "--points", "2"]
    return ["time-to-loss", str(run_file), *words, "--device", "cpu", "--threads", "1", *out]


def test_both_sides_are_judged_alike_and_what_is_done_is_not_done_again(
    run_file, capsys, monkeypatch
):
    # as a launcher, or a test before, leaves them
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = ["--peer-lr", "1e-3", "--peer-precision", "fp32", "--ours", "engine.precision=fp32"]
    curve = run_file.parent / "curve.png"
    assert main(asked(run_file, *words, "--curve", str(curve))) == 0
    first = json.loads((run_file.parent / "out.json").read_text())["tables"]
    (table,) = first
    ours, trainer = table["figures"].values()
    assert any("checked: ours engine.precision=fp32, seed 1" in note for note in table["notes"])
    for side in (ours, trainer):
        points = side["points"]["1"]
        assert [point["seconds"] for point in points] == sorted(p["seconds"] for p in points)
        # random text: no model is far from knowing nothing
        assert all(3.0 < point["loss"] < 5.0 for point in points)
    # both have read as many tokens, to a batch of each phase
    assert ours["points"]["1"][-1]["tokens"] == pytest.approx(5000, abs=512)
    assert trainer["points"]["1"][-1]["tokens"] == pytest.approx(5000, abs=256)
    assert trainer["times_as_fast"] == [1.0]
    assert curve.read_bytes().startswith(b"\x89PNG")

    # kept: the second time nothing is trained
    monkeypatch.setattr(time_to_loss, "_run", lambda *_, **__: pytest.fail("trained again"))
    assert main(asked(run_file, *words)) == 0
    again = json.loads((run_file.parent / "out.json").read_text())["tables"]
    assert again[0]["figures"] == table["figures"]
    capsys.readouterr()

    # another rate in the file is another side, and leaves what is there
    before = {path.name for path in (run_file.parent / "work").iterdir()}
    run_file.write_text(run_file.read_text().replace("lr: 1.0e-3", "lr: 2.0e-3"))
    asked_for = []
    monkeypatch.setattr(time_to_loss, "_run", lambda command, *_, **__: asked_for.append(command))
    with pytest.raises(UserError):
        bench(asked(run_file, *words))
    assert len(asked_for) == 1 and before <= {p.name for p in (run_file.parent / "work").iterdir()}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--ours", "ranks=two"], "ranks=two; needed: a number"),
        (["--ours", "optimizer.nam=muon"], "optimizer.nam"),
        (["evaluation=null"], "has no held-out text"),
        (["objective.whole_words=true"], "objective whole_words: the Trainer's collator masks"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(
    run_file, words, said, capsys, monkeypatch
):
    monkeypatch.setattr(time_to_loss, "_run", lambda *_, **__: pytest.fail("trained"))
    assert main(asked(run_file, *words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_judge_who_finds_another_loss_than_the_run_reports_nothing(run_file, capsys, monkeypatch):
    monkeypatch.setattr(time_to_loss.Judge, "loss_of", lambda *_: 1.0)
    assert main(asked(run_file, "--peer-lr", "1e-3")) == 2
    assert "the judge found a held-out loss of 1.00000" in capsys.readouterr().err
    assert not (run_file.parent / "out.json").exists()


def test_a_side_that_fails_is_told_with_its_last_line(tmp_path):
    failing = [sys.executable, "-c", "print('first'); raise SystemExit('no room left')"]
    with pytest.raises(UserError, match="exit code 1: no room left"):
        time_to_loss._run(failing, tmp_path, threads=1)


def test_a_rate_that_diverged_is_not_the_best_peer():
    point = Point(tokens=1, seconds=1.0, loss=4.0)
    found = {
        "wild": {1: [replace(point, loss=float("nan"))]},
        "calm": {1: [point]},
        "ours": {1: [replace(point, seconds=0.5)]},
    }
    rows = []
    report = SimpleNamespace(add=lambda _title, **table: rows.append(table))
    tell(report, found, peers=["wild", "calm"], checks=[])
    assert rows[0]["notes"] == ["best peer: calm"]
    assert rows[0]["figures"]["ours"]["times_as_fast"] == [pytest.approx(2.0)]


def test_blocks_are_the_documents_end_to_end_and_have_the_shares_of_the_mixture(run_file):
    run = read_run(run_file)
    documents = drawn_documents(run, seed=1, tokens=sum(p.tokens for p in run.phases))
    blocks = grouped(documents, tokens=64)
    assert np.array_equal(blocks.ravel(), np.concatenate(documents)[: blocks.size])
    assert sum(len(document) for document in documents) == pytest.approx(5000, abs=128)
    known = {document.astype(np.int64).tobytes() for document in random_documents(200, seed=0)}
    of_a = [len(d) for d in documents if d.astype(np.int64).tobytes() in known]
    assert sum(of_a) == pytest.approx(3750, abs=64)
    assert not np.array_equal(
        blocks,
        grouped(drawn_documents(run, seed=2, tokens=sum(p.tokens for p in run.phases)), tokens=64),
    )


def test_the_seconds_to_a_loss_lie_on_the_line_between_two_points():
    points = [
        Point(tokens=1, seconds=10.0, loss=6.0),
        Point(tokens=2, seconds=20.0, loss=4.0),
    ]
    assert seconds_to(points, 5.0) == pytest.approx(15.0)
    assert seconds_to(points, 6.5) == 10.0
    assert seconds_to(points, 3.9) is None
    slower = [Point(tokens=2, seconds=60.0, loss=5.0)]
    assert against({1: slower}, {1: points}) == ([pytest.approx(15.0)], [pytest.approx(4.0)])
    assert against({1: points}, {1: slower}) == ([None], [None])
