"""The end of a run names commands that can be pasted, with its own paths."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from encoder.base.dist import World
from encoder.runs.config import read_run
from encoder.train.hints import how_to_go_on, what_comes_next
from launch.tessera import VERBS
from tests.unit.tools.test_report import RUN


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN.format(name="a", phase="main"))
    return read_run(tmp_path / "run.yaml")


def commands_of(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line[6:].split("   ")[0]) for line in lines]


def test_a_finished_run_names_its_page_its_export_and_a_question(run):
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, mlp="geglu"))
    found = commands_of(what_comes_next(run, Path("my runs/it's")))
    assert [words[1] for words in found] == ["report", "export", "fill-mask"]
    assert all(words[0] == "tessera" and words[1] in VERBS for words in found)
    assert found[1][2:] == ["my runs/it's", "my runs/it's-hf"] and found[2][2] == "my runs/it's-hf"


def test_a_model_that_hugging_face_cannot_be_gets_another_next_step(run):
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, norm="rmsnorm"))
    found = commands_of(what_comes_next(run, Path("runs/a")))
    assert [words[1:] for words in found] == [
        ["report", "runs/a"],
        ["average", "runs/a", "--out", "runs/a-weights"],
    ]


def test_a_stopped_run_says_how_it_goes_on_with_as_many_ranks():
    alone = World(rank=0, size=1, local_rank=0, local_size=1)
    assert how_to_go_on(Path("runs/a"), alone).endswith("tessera pretrain runs/a/run.yaml")
    two = dataclasses.replace(alone, size=2, local_size=2)
    assert (
        "torchrun --standalone --nproc-per-node 2 -m launch.pretrain runs/a/run.yaml"
        in how_to_go_on(Path("runs/a"), two)
    )
    nodes = dataclasses.replace(alone, size=16, local_size=8)
    assert (
        how_to_go_on(Path("runs/a"), nodes)
        == "the same command goes on from here, on any number of ranks"
    )
