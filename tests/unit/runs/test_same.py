"""A run folder that belongs to another run: the refusal names the difference, shortly, and the way that is supported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from encoder.base.errors import CheckpointError
from encoder.base.schema import brief, differences, to_yaml
from encoder.runs.config import read_run
from encoder.runs.same import check_same_run

MANY = "configs/pretrain/modernbert_base.yaml"  # 13 sources, three phases with other mixtures


def refusal(folder: Path, *overrides: str) -> str:
    """What a run is told that was begun in the folder and has these settings now."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(to_yaml(read_run(MANY, [f"out={folder}"])))
    with pytest.raises(CheckpointError) as error:
        check_same_run(read_run(MANY, [f"out={folder}", *overrides]), folder)
    assert len(str(error.value)) < 400, "a person reads it"
    return str(error.value)


LONGER = (
    "{name: more, tokens: 1B, max_tokens_per_document: 1024, batch_tokens: 4718592, lr: {schedule:"
    " constant, peak: 1e-4}}"
)


def test_more_phases_than_a_run_began_with_are_told_to_branch(tmp_path):
    phases = yaml.safe_load(to_yaml(read_run(MANY)))["phases"]
    said = refusal(tmp_path, f"phases={json.dumps([*phases, yaml.safe_load(LONGER)])}")
    assert (
        "phases.3 was not there, now {more, ...}." in said
        and f"branch_from: {tmp_path}, another name, out and seed" in said
    )


def test_more_tokens_than_a_run_began_with_are_told_to_branch(tmp_path):
    said = refusal(tmp_path, "phases.2.tokens=60B")
    assert (
        "phases.2.tokens was 50,000,000,000, now 60,000,000,000." in said and "branch_from" in said
    )


def test_a_changed_setting_shows_the_old_and_the_new_value_alone(tmp_path):
    said = refusal(tmp_path, "model.hidden_size=1536")
    assert "model.hidden_size was 768, now 1536." in said and said.endswith(
        "start anew with out=ANOTHER_FOLDER."
    )
    said = refusal(
        tmp_path, "seed=4", "optimizer.eps=1e-8", "objective.mask_share=0.2", "model.mlp=swiglu"
    )
    assert (
        "seed was 17, now 4 (also model.mlp, objective.mask_share and 1 more)." in said
        and "branch_from" not in said
    )


def test_a_list_that_lost_an_item_is_told_by_that_item(tmp_path):
    sources = [
        {"name": s.name, "path": s.path, "weight": s.weight} for s in read_run(MANY).data.sources
    ]
    said = refusal(tmp_path, f"data.sources={sources[:-1]}")
    assert "data.sources.12 was {stackexchange, ...}, now not there." in said


def test_differences_of_lists_are_told_by_item():
    assert differences({"a": [1, 2]}, {"a": [1, 2, 3]}) == [("a.2", None, 3)]
    assert differences([{"x": 1}, {"x": 2}], [{"x": 1}]) == [("1", {"x": 2}, None)]
    assert [brief(v) for v in ([1] * 500, {"a": 1}, None, 123456, "x" * 100)] == [
        "a list of 500",
        "a mapping",
        "not there",
        "123,456",
        "x" * 57 + "...",
    ]
