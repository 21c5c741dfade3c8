"""A command writes over what it wrote itself, and over nothing else."""

from __future__ import annotations

import json

import pytest

from data_prep.cli import main as data_prep
from encoder.base.errors import UserError
from encoder.base.world import World
from encoder.tools.doctor.doctor import Doctor
from tests.helpers.shards import random_documents, write_source

FOREIGN = "my own notes\n"


@pytest.mark.parametrize("kind", ["train", "modernbert", "from-hf"])
def test_a_tokenizer_is_not_written_over_a_file_of_somebody_else(tmp_path, capsys, kind):
    write_source(tmp_path / "a", random_documents(5, seed=1, longest=20), vocab_size=64)
    (tmp_path / "text.txt").write_text("some text " * 50, encoding="utf-8")
    out = tmp_path / "notes.json"
    out.write_text(FOREIGN, encoding="utf-8")
    words = {
        "train": ["--files", str(tmp_path / "text.txt"), "--vocab-size", "270"],
        "modernbert": [],
        "from-hf": [str(tmp_path / "a" / "tokenizer.json")],
    }[kind]
    assert data_prep(["tokenizer", kind, *words, "--out", str(out)]) == 2
    assert "this command did not write it" in capsys.readouterr().err and out.read_text() == FOREIGN


def test_a_tokenizer_is_written_again_over_its_own_file(tmp_path):
    (tmp_path / "text.txt").write_text("some text and other words " * 50, encoding="utf-8")
    words = [
        "tokenizer",
        "train",
        "--files",
        str(tmp_path / "text.txt"),
        "--vocab-size",
        "264",
        "--out",
        str(tmp_path / "t.json"),
    ]
    assert data_prep(words) == 0 and data_prep(words) == 0
    copy = ["tokenizer", "from-hf", str(tmp_path / "t.json"), "--out", str(tmp_path / "copy.json")]
    assert data_prep(copy) == 0 and data_prep(copy) == 0


@pytest.mark.parametrize("name", ["code.jsonl", "prose.jsonl", "manifest.json"])
def test_a_corpus_is_not_written_over_a_file_of_somebody_else(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("data_prep.environment_corpus._files", lambda: [])
    (tmp_path / name).write_text(FOREIGN, encoding="utf-8")
    assert data_prep(["environment-corpus", "--out", str(tmp_path), "--size-mb", "1"]) == 2
    assert (
        "this command did not write it" in capsys.readouterr().err
        and (tmp_path / name).read_text() == FOREIGN
    )


@pytest.mark.parametrize("name", ["node7.json", "bad_nodes"])
def test_a_doctor_report_is_not_written_over_a_file_of_somebody_else(tmp_path, name):
    doctor = Doctor(world=World(), env={}, report=tmp_path)
    doctor.node = "node7"
    (tmp_path / name).write_text(json.dumps({"mine": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="did not write it"):
        doctor._write_report("started")
    assert json.loads((tmp_path / name).read_text()) == {"mine": 1}
    (tmp_path / name).unlink()
    for _ in range(2):
        doctor._write_report("started")
        doctor._write_bad_nodes(["node7", "node-8"])
