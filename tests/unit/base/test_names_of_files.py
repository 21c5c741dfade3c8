"""Folders whose names are not UTF-8 hold a run, an export and shards like any other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data_prep.tokenization import TextEncoder
from encoder.base.dist import World
from encoder.base.errors import ConfigError
from encoder.base.files import atomic_folder, native_path, write_atomic
from encoder.base.paths import expand_path
from encoder.base.schema import parse_yaml, read_mapping, to_yaml
from encoder.engine.checkpoint.tensors import StretchReader, write_tensors
from encoder.models.stored import read_stored, write_stored
from encoder.tools.notebook import open_shards
from encoder.train.watchdog import Watchdog
from launch.fill_mask import answers
from tests.helpers.hf import exported, stored, write_tokenizer_json
from tests.helpers.prep import run, settings, texts, write_jsonl


@pytest.fixture
def folder(tmp_path) -> Path:
    """Its name has a byte that no UTF-8 has, as a disk of the 1990s, or a Latin-1 locale, writes an e with an accent."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    path.mkdir()
    return path


def letters(folder: Path) -> Path:
    """A tokenizer.json in the folder; the library's own writer knows UTF-8 alone."""
    return write_tokenizer_json(folder.parent / "t.json").rename(folder / "letters.json")


def test_native_code_gets_a_name_that_it_can_read(folder):
    (folder / "a").write_text("content")
    with native_path(folder / "a") as name, native_path(folder) as here:
        assert name.isascii() and Path(name).read_text() == "content"
        assert os.listdir(here) == ["a"]
    assert not os.path.exists(name)
    with native_path(folder.parent) as name:
        assert name == str(folder.parent)


def test_a_checkpoint_in_such_a_folder_is_read_back(folder):
    write_tensors(folder / "rank00000.safetensors", {"w@0/master": torch.arange(6.0)})
    target = torch.zeros(4)
    with StretchReader(folder) as reader:
        reader.copy_into(target, name="w", start=1, kind="master")
    assert target.tolist() == [1, 2, 3, 4]


def test_weights_and_an_export_in_such_a_folder_are_read_back(folder):
    tokenizer_json, model = letters(folder), stored()
    write_stored(model, folder / "weights")
    again = read_stored(folder / "weights").weights
    assert all(torch.equal(again[name], w) for name, w in model.weights.items())
    exported(tokenizer_json, folder / "hf", model)
    (answer,) = answers(folder / "hf", ["a[MASK]"], top=2)
    assert len(answer["masks"][0]) == 2


def test_an_export_may_have_such_a_name_itself(folder):
    """Its card shows the folder in snippets."""
    exported(write_tokenizer_json(folder.parent / "t.json"), folder, stored())
    assert "caf\\udce9" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_error_that_names_such_a_file_is_written_down(folder):
    watchdog = Watchdog(folder, World(), hang_minutes=None)
    watchdog._write_first(f"rank 0 failed: {folder}/a is damaged.", "all of it")
    assert watchdog._first().endswith("caf\\udce9/a is damaged.")


@pytest.mark.parametrize("name", ["tokenizers", "fastokens"])
def test_a_tokenizer_in_such_a_folder_encodes(folder, name):
    if name == "fastokens":
        pytest.importorskip("fastokens")
    ids, lengths = TextEncoder(letters(folder), name).encode(["ab", "c"])
    assert len(ids) == 3 and lengths.tolist() == [2, 1]


def test_shards_in_such_a_folder_are_made_and_reported(folder, capfd):
    write_jsonl(folder / "a.jsonl", texts(30))
    config = settings(folder.parent / "plain", root="x", out="x")
    # as YAML writes such a name: "caf\\udce9"
    places = {"root": folder, "out": folder / "shards", "tokenizer": folder / "t.json"}
    words = [config, *(f"{key}={json.dumps(str(path))}" for key, path in places.items())]
    (folder / "t.json").write_bytes((config.parent / "tokenizer.json").read_bytes())
    assert run("prepare", *words) == 0
    shards = folder / "shards" / "a" / "train"
    assert run("report", shards, "--out", folder / "page") == 0 == run("verify", shards)
    assert open_shards(str(shards)).decode(0)
    assert "Traceback" not in capfd.readouterr().err


def test_texts_in_files_of_such_names_are_prepared(folder, monkeypatch, capfd):
    config = settings(folder, [{"name": "a", "format": "jsonl", "files": ["*.jsonl"]}])
    write_jsonl(folder / "b.jsonl", texts(30))
    (folder / "b.jsonl").rename(folder / os.fsdecode(b"\xe9t\xe9.jsonl"))
    words = [config, "root=.", "out=shards", "tokenizer=tokenizer.json"]
    monkeypatch.chdir(folder)
    assert run("prepare", *words) == 0 == run("prepare", *words)
    assert run("verify", "shards") == 0
    assert run("prepare", *words, "--again", "on_error=skip") == 0
    said = capfd.readouterr()
    assert "Nothing to do" in said.out and "Traceback" not in said.err


def test_settings_with_such_a_path_are_written_and_read_again(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    written = to_yaml({"out": expand_path("~/run")})
    write_atomic(folder / "run.yaml", written)
    assert read_mapping(folder / "run.yaml") == {"out": f"{folder}/run"}
    with pytest.raises(ConfigError, match="cannot be read as text"):
        parse_yaml('out: "\\ud800"', where="a file")  # half of a character, in no name


def test_a_leftover_with_a_number_that_no_process_has_is_removed(folder):
    with atomic_folder(folder / "out", mark="a") as part:
        (part / "a").touch()
        left = part.with_name(part.name.replace(str(os.getpid()), "9" * 30))
        left.mkdir()
    with atomic_folder(folder / "out", mark="a") as part:
        assert not left.exists()
        (part / "a").touch()
