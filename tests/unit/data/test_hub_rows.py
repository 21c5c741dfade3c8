"""Splits of a dataset are read from copies on this machine and from the cache; a fake stands where the network would be."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import types
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from encoder.base.errors import ConfigError, UserError
from encoder.base.log import forget_warnings
from encoder.data import hub_rows
from encoder.data.hub_rows import HubConfig, read_split
from encoder.data.labelled import DataError, read_rows
from encoder.finetune.config import read_task
from encoder.finetune.course import FineTuning
from encoder.finetune.plan import plan_lines
from encoder.finetune.prepare import prepare, read_start
from encoder.finetune.stored import hub_rows_of
from launch import finetune
from tests.helpers.tasks import letter_rows, write_rows, write_task

COLUMNS = ["text", "label"]
CARD = """---
configs:
- config_name: letters
  data_files: [{split: train, path: letters/train-*}, {split: validation, path: letters/validation-*}]
---
"""
COMMITS = ["c0ffee" * 6 + "beef", "deed" * 10]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    forget_warnings()
    hub_rows._open.cache_clear()


def splits(*, count: int = 42) -> datasets.DatasetDict:
    """Letters and their classes, by number and with names."""
    classes = datasets.ClassLabel(names=["b", "a"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(letter_rows(number, seed=seed), features=features)
            for name, number, seed in (("train", count, 1), ("validation", 11, 2))
        }
    )


def write_copy(folder: Path, found: datasets.DatasetDict, *, card: bool = True) -> Path:
    """As `hf download --repo-type dataset` lays a dataset of one subset."""
    (folder / "letters").mkdir(parents=True)
    for name, rows in found.items():
        rows.to_parquet(folder / f"letters/{name}-00000-of-00001.parquet")
    if card:
        (folder / "README.md").write_text(CARD)
    return folder


def test_every_copy_of_a_dataset_gives_the_rows_of_its_file(tmp_path):
    found = splits()
    found.save_to_disk(tmp_path / "saved")
    found["train"].save_to_disk(tmp_path / "one")
    copy = write_copy(tmp_path / "copy", found)
    bare = write_copy(tmp_path / "bare", found, card=False)
    known = read_rows(copy / "letters/validation-00000-of-00001.parquet", COLUMNS)
    for source in (
        HubConfig(dataset=str(tmp_path / "saved")),
        HubConfig(dataset=str(tmp_path), folder="saved"),
        HubConfig(dataset=str(copy), config="letters"),
        HubConfig(dataset=str(bare), folder="letters"),
    ):
        source.check()
        rows = read_split(source, "validation", COLUMNS)
        assert rows.columns == known.columns and rows.numbers == known.numbers
        assert rows.classes == {"label": ("b", "a")}
        assert rows.place(1).endswith("validation row 2")
    assert len(read_split(HubConfig(dataset=str(tmp_path / "one")), "train", COLUMNS)) == 42


@pytest.mark.parametrize(
    ("change", "split", "columns", "said"),
    [
        ({}, "test", COLUMNS, "letters has no split test. Known: train, validation."),
        ({}, "validtion", COLUMNS, "Did you mean validation?"),
        ({}, "train", ["txt"], "letters train has no column txt. Did you mean text?"),
        (
            {"config": "leters"},
            "train",
            COLUMNS,
            "cannot be read: BuilderConfig 'leters' not found",
        ),
    ],
)
def test_what_a_dataset_lacks_is_named(tmp_path, change, split, columns, said):
    copy = write_copy(tmp_path / "copy", splits(count=2))
    source = HubConfig(**{"dataset": str(copy), "config": "letters", **change})
    with pytest.raises(DataError, match=re.escape(said)):
        read_split(source, split, columns)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset": "glue"}, "no folder here, and no name of the hub; needed: organisation/name"),
        ({"dataset": "{}", "revision": "main"}, "hub.revision has no effect"),
        ({"dataset": "o/d", "config": "a", "folder": "b"}, "both config and folder"),
    ],
)
def test_a_name_that_can_be_no_dataset_is_refused(tmp_path, settings, said):
    settings["dataset"] = settings["dataset"].format(tmp_path)
    with pytest.raises(ConfigError, match=said):
        HubConfig(**settings).check()


def test_without_a_way_to_the_hub_the_error_says_how_to_go_on():
    # the tests' own environment is offline, and the cache is empty
    source = HubConfig(dataset="someone/letters", config="letters", revision="v1")
    with pytest.raises(DataError) as told:
        read_split(source, "train", COLUMNS)
    assert "dataset someone/letters cannot be read: no network" in str(told.value)
    assert "hf download someone/letters --revision v1 --repo-type dataset" in str(told.value)
    assert str(told.value).endswith("set data.hub.dataset=FOLDER.")


def test_a_dataset_made_by_a_script_is_read_as_it_was_converted(monkeypatch):
    def refused(*_words, **_more):
        # the words of `datasets` 4 and 5
        raise RuntimeError("Dataset scripts are no longer supported, but found letters.py")

    monkeypatch.setattr(datasets, "load_dataset_builder", refused)
    with pytest.raises(DataError) as told:
        read_split(HubConfig(dataset="someone/letters", config="big"), "train", COLUMNS)
    assert str(told.value).endswith(
        "data.hub={dataset: someone/letters, folder: big, revision: refs/convert/parquet}."
    )


def in_cache(tmp_path: Path) -> str:
    """Lays letters in the cache of `datasets` as a dataset of the hub that was once fetched; its commit."""
    # files of the cache have the dataset's name
    copy = write_copy(tmp_path / "copies" / "letters", splits())
    builder = datasets.load_dataset_builder(str(copy), "letters")
    builder.download_and_prepare()
    prepared = Path(builder.cache_dir)
    target = tmp_path / "cache" / "someone___letters" / "letters" / "0.0.0" / COMMITS[0]
    target.parent.mkdir(parents=True)
    shutil.move(prepared, target)
    return COMMITS[0]


def test_what_was_fetched_once_is_read_without_a_network(tmp_path):
    commit = in_cache(tmp_path)
    source = HubConfig(dataset="someone/letters", config="letters", revision=commit)
    rows = read_split(source, "validation", COLUMNS)
    assert str(rows.path) == f"someone/letters@{commit} letters validation"
    assert rows.columns["text"] == [row["text"] for row in letter_rows(11, seed=2)]
    other = HubConfig(dataset="someone/letters", config="letters", revision=COMMITS[1])
    with pytest.raises(DataError, match=f"at {commit}, not at revision {COMMITS[1]}"):
        read_split(other, "train", COLUMNS)


class FakeBuilder:
    """As `datasets.load_dataset_builder` gives it of a dataset of the hub."""

    def __init__(self, found: datasets.DatasetDict, commit: str) -> None:
        self._found, self.hash = found, commit
        self.name, self.config = "parquet", types.SimpleNamespace(data_files=None)
        self.info = datasets.DatasetInfo(splits=datasets.SplitDict())

    def download_and_prepare(self) -> None:
        for name in self._found:
            self.info.splits.add(datasets.SplitInfo(name=name))

    def as_dataset(self, split: str) -> datasets.Dataset:
        return self._found[split]


def task_of_the_hub(root: Path, *overrides: str):
    path = write_task(root)
    return read_task(
        path,
        [
            "data.hub={dataset: someone/letters, config: letters, revision: v1}",
            "data.train=train",
            "data.dev.dev=validation",
            *overrides,
        ],
    )


def test_a_task_asks_the_hub_for_its_revision_and_says_the_commit(tmp_path, monkeypatch):
    asked = []

    def builder(*words, **more):
        asked.append((words, more))
        return FakeBuilder(splits(), COMMITS[0])

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    said = plan_lines(task_of_the_hub(tmp_path, "task.labels=null"))
    # once for all splits; nothing asks for code
    known = {"data_dir": None, "cache_dir": None, "revision": "v1"}
    assert asked == [(("someone/letters", "letters"), known)]
    # the classes are in the dataset's order, not sorted
    assert "letters: classify, 2 outputs: b, a" in said
    place = f"someone/letters@{COMMITS[0]} letters"
    assert f"rows of {place} train, {place} validation, {tmp_path}/more.jsonl" in said


def test_another_commit_with_other_rows_is_refused_by_its_name(tmp_path, monkeypatch):
    found = {
        "v1": FakeBuilder(splits(), COMMITS[0]),
        "v2": FakeBuilder(splits(count=41), COMMITS[1]),
    }
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_, revision, **__: found[revision]
    )

    def course(*overrides: str) -> FineTuning:
        import torch

        from encoder.base.world import World

        task = task_of_the_hub(tmp_path, *overrides)
        start = read_start(task)
        return FineTuning(
            prepare(task, start), world=World(), device=torch.device("cpu"), start=start
        )

    begun = course()
    saved = begun.to_plain()
    monkeypatch.setattr("encoder.finetune.checks.read_progress", lambda _: (None, saved))
    monkeypatch.setattr("encoder.finetune.course.check_same_settings", lambda *_, **__: None)
    monkeypatch.setattr("encoder.finetune.course.check_same_start", lambda *_: None)
    begun.check_same(tmp_path)
    # a card names the dataset; of a folder here it says nothing
    assert hub_rows_of(begun.run, saved) == f"someone/letters@{COMMITS[0]} letters train"
    here = read_task(tmp_path / "task.yaml", [f"data.hub.dataset={tmp_path}", "data.train=train"])
    assert hub_rows_of(here, {"rows_of": {"train": f"{tmp_path} train"}}) is None
    with pytest.raises(UserError) as told:
        course("data.hub.revision=v2").check_same(tmp_path)
    assert f"someone/letters@{COMMITS[1]} letters train gives examples of SHA-256" in str(
        told.value
    )
    assert f"of someone/letters@{COMMITS[0]} letters train. Put those" in str(told.value)


def test_a_split_that_is_not_there_ends_a_task_in_one_line(tmp_path, capsys):
    splits().save_to_disk(tmp_path / "saved")
    words = [str(write_task(tmp_path)), "--dry-run", f"data.hub.dataset={tmp_path}/saved"]
    assert finetune.main([*words, "data.train=train", "data.dev.dev=dev"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"error: {tmp_path}/saved has no split dev. Known: train, validation." in said
    assert finetune.main([*words, "data.train=train", "data.dev.dev=validation"]) == 0


def test_without_the_hub_a_revision_is_held_to_what_the_cache_has(tmp_path, capsys):
    commit = in_cache(tmp_path)

    def read(revision: str | None):
        source = HubConfig(dataset="someone/letters", config="letters", revision=revision)
        return read_split(source, "train", COLUMNS)

    assert len(read("main")) == len(read(None)) == len(read(commit[:7])) == 42
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and f"are those of commit {commit} in the cache" in said
    with pytest.raises(DataError, match=f"at {commit}, not at revision v1 as far as is known"):
        read("v1")
    # as huggingface_hub writes it down where a tag was asked for
    ref = tmp_path / "hub/datasets--someone--letters/refs/v1"
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMITS[1])
    with pytest.raises(DataError, match="not at revision v1"):
        read("v1")
    ref.write_text(commit)
    assert len(read("v1")) == 42


class LeavesAFile:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


def test_a_folder_called_like_a_reader_of_datasets_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("json", "pandas"):
        (tmp_path / name).mkdir()
    # the reader json would take all that lies around
    write_rows(tmp_path / "train.jsonl", letter_rows(5))
    write_rows(tmp_path / "json/train.jsonl", letter_rows(3, seed=2))
    rows = read_split(HubConfig(dataset="json"), "train", COLUMNS)
    assert rows.columns["text"] == [row["text"] for row in letter_rows(3, seed=2)]
    # the reader pandas would run what a pickle says
    (tmp_path / "pandas/train.pkl").write_bytes(pickle.dumps(LeavesAFile(tmp_path / "ran")))
    with pytest.raises(DataError):
        read_split(HubConfig(dataset="pandas", folder="pandas"), "train", COLUMNS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("webdataset", "a.tar", "would be read as webdataset; needed: arrow, cache, conll, csv"),
        ("csv", "a.csv.PKL", "has the file a.csv.PKL; needed: no pickle"),
    ],
)
def test_what_is_no_plain_file_of_rows_is_refused(monkeypatch, name, file, said):
    builder = FakeBuilder(splits(count=2), COMMITS[0])
    builder.name, builder.config.data_files = name, {"train": [file]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(DataError, match=re.escape(said)):
        read_split(HubConfig(dataset="someone/letters"), "train", COLUMNS)


def write_card(folder: Path, path: str) -> None:
    files = f"[{{split: train, path: '{path}'}}]"
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- {{config_name: c, data_files: {files}}}\n---\n"
    )


@pytest.mark.parametrize(
    "path",
    ["../secret.jsonl", "{}/secret.jsonl", "link.jsonl", "https://127.0.0.1:9/secret.jsonl"],
)
def test_a_copy_names_no_file_outside_of_its_folder(tmp_path, path):
    write_rows(tmp_path / "secret.jsonl", letter_rows(2))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    write_card(copy, path.format(tmp_path))
    with pytest.raises(DataError, match="needed: files inside"):
        read_split(HubConfig(dataset=str(copy)), "train", COLUMNS)


def test_files_that_were_changed_are_read_anew(tmp_path):
    """With a card `datasets` knows rows by the names of folder and files: those of another folder were read, too."""
    for place, seed in (("a", 1), ("b", 2), ("a", 3)):
        copy = tmp_path / place / "letters"
        copy.mkdir(parents=True, exist_ok=True)
        write_rows(copy / "train.jsonl", letter_rows(3, seed=seed))
        write_card(copy, "train.jsonl")
        hub_rows._open.cache_clear()
        rows = read_split(HubConfig(dataset=str(copy)), "train", COLUMNS)
        assert rows.columns["text"] == [row["text"] for row in letter_rows(3, seed=seed)]


def test_a_snapshot_in_the_cache_of_the_hub_is_read_through_its_links(tmp_path):
    snapshot = tmp_path / "datasets--someone--letters/snapshots" / COMMITS[0]
    blobs = snapshot.parent.parent / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    write_rows(blobs / "1234", letter_rows(2))
    (snapshot / "train.jsonl").symlink_to("../../blobs/1234")
    write_card(snapshot, "train.jsonl")
    assert len(read_split(HubConfig(dataset=str(snapshot)), "train", COLUMNS)) == 2


def test_a_saved_dataset_consists_of_files_of_its_folder(tmp_path, monkeypatch):
    found = splits()
    found.save_to_disk(tmp_path / "saved")
    found["train"].save_to_disk(tmp_path / "secret")
    state = tmp_path / "saved/train/state.json"
    content = json.loads(state.read_text())
    (file,) = content["_data_files"]
    file["filename"] = f"../../secret/{file['filename']}"
    state.write_text(json.dumps(content))
    source = HubConfig(dataset=str(tmp_path / "saved"))
    with pytest.raises(DataError, match="needed: files inside"):
        read_split(source, "train", COLUMNS)

    # a split that calls itself a dataset of splits is none
    split = tmp_path / "saved/validation"
    (split / "dataset_info.json").unlink()
    (split / "dataset_dict.json").write_text('{"splits": ["../../secret"]}')
    asked = []
    monkeypatch.setattr(datasets.DatasetDict, "load_from_disk", lambda *_, **__: asked.append(1))
    with pytest.raises(DataError, match="cannot be read"):
        read_split(source, "validation", COLUMNS)
    assert not asked


@pytest.mark.parametrize(
    ("kind", "cells", "targets"),
    [
        ("classify", [2, 0, 2], [0, 1, 0]),
        ("labels", [[2], [0, 2], []], [[1, 0], [1, 1], [0, 0]]),
    ],
)
def test_classes_of_a_dataset_are_known_by_name(tmp_path, kind, cells, targets):
    write_task(tmp_path)
    classes = datasets.ClassLabel(names=["b", "z", "a"])
    label = [classes] if kind == "labels" else classes
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = datasets.Dataset.from_dict({"text": ["x", "y", "v"], "label": cells}, features=features)
    rows.save_to_disk(tmp_path / "saved")

    def prepared(*overrides: str):
        task = read_task(
            tmp_path / "task.yaml",
            [
                f"task={{kind: {kind}, texts: [text], label: label}}",
                f"data={{hub: {{dataset: {tmp_path}/saved}}, train: train, max_tokens: 24}}",
                *overrides,
            ],
        )
        return prepare(task, read_start(task))

    said = """'z', which the dataset names. Set task.labels to those that occur, ["b", "a"]"""
    with pytest.raises(DataError, match=re.escape(said)):
        prepared()
    # 2 is a, which the dataset counts last
    assert prepared("task.labels=[a, b]").train.value_P.tolist() == targets
