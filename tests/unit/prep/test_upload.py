"""upload: what arrives is what was verified, and the card arrives last."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.helpers.prep import bytes_of, run, settings, texts, write_jsonl


@pytest.fixture
def theirs():
    """streaming's uploaders, imported where they are asked for: that takes 4 s."""
    return importlib.import_module("streaming.base.storage.upload")


def prepared(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", settings(tmp_path), "shard_bytes=2048") == 0
    return tmp_path / "shards"


def test_another_disk_gets_the_same_bytes(tmp_path, caplog):
    shards = prepared(tmp_path)
    assert run("upload", shards, tmp_path / "copy") == 0
    assert bytes_of(tmp_path / "copy") == bytes_of(shards)
    assert not caplog.messages, "streaming warns that the folder holds files"


def test_another_disk_needs_no_clients_of_object_storage(tmp_path, monkeypatch, capsys):
    shards = prepared(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "streaming", None)
    assert run("upload", shards, tmp_path / "copy") == 0 and bytes_of(
        tmp_path / "copy"
    ) == bytes_of(shards)
    assert run("upload", shards, "s3://b/x") == 2
    assert "pip install 'tessera-encoders[remote]'" in capsys.readouterr().err


def test_a_folder_is_not_copied_onto_itself(tmp_path, capsys):
    shards = prepared(tmp_path)
    assert run("upload", shards, tmp_path / "shards/../shards") == 2
    assert "is the folder that is to be copied; needed: another place." in capsys.readouterr().err


def test_object_storage_gets_every_file_under_its_place_and_the_card_last(
    tmp_path, monkeypatch, capsys, theirs
):
    shards, sent = prepared(tmp_path), []

    class Recorder(theirs.CloudUploader):
        def upload_file(self, filename):
            sent.append((self.remote, filename, (shards / filename).read_bytes() and self.local))

    monkeypatch.setattr(theirs, "S3Uploader", Recorder)
    assert run("upload", shards, "s3://bucket/here") == 0
    assert {name for _, name, _ in sent} == set(bytes_of(shards))
    assert {(remote, local) for remote, _, local in sent} == {("s3://bucket/here", str(shards))}
    names = [name for _, name, _ in sent]
    for split in ("train", "held_out"):
        of_split = [name for name in names if name.startswith(f"a/{split}/")]
        assert of_split[-1] == f"a/{split}/card.json" and len(of_split) > 4
    assert "-> s3://bucket/here/a/train: " in capsys.readouterr().out


def test_what_is_damaged_or_cannot_be_reached_is_one_line(tmp_path, monkeypatch, capsys, theirs):
    shards = prepared(tmp_path)

    class Unreachable(theirs.CloudUploader):
        def upload_file(self, filename):
            if "shard.00002" in filename:
                raise ConnectionError("no way\nto the bucket.")

    monkeypatch.setattr(theirs, "S3Uploader", Unreachable)
    for remote, words in (
        ("s3://b", "could not be copied to s3://b: no way to the bucket. Run the same"),
        ("ftp://x", "begins with ftp://; needed: one of s3://"),
        ("hf://datasets/o/n/sub", "is not hf://datasets/"),
    ):
        assert run("upload", shards, remote) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    shard = shards / "a/train/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run("upload", shards / "a/train", tmp_path / "copy") == 2
    assert "shard.00000.mds has" in capsys.readouterr().err and bytes_of(tmp_path / "copy") == {}
