"""Folders made to harm: nothing of theirs is executed, nothing outside of them is written, read or removed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from data_prep.cli import main as data_prep
from encoder.base.errors import ShardError
from encoder.base.files import open_to_append, write_atomic
from encoder.data.shard_format import CARD, HASHES, INDEX, TOKENIZER, read_card, write_card
from encoder.data.shards import open_source
from encoder.engine.checkpoint.folder import claim_next, remove_old
from encoder.runs.lock import RunLock
from launch import pretrain
from tests.helpers.shards import random_documents, seal_again, write_source
from tests.unit.launch.test_bad_input import run_file

NAMES = [
    "../victim/evil.pth",
    "a/../../victim/evil.pth",
    "/tmp/evil.mds",
    "..",
    "",
    "a\0b",
    "..\\victim\\evil.pth",
    "C:evil",
    "./shard.00000.mds",
    "card.json",
    "tokenizer.json",
    ".room.lock",
    "notes.txt",
    "shard.00001.mds",
]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A shard folder of packed shards as streaming writes them, and a folder beside it with somebody's file."""
    shards = write_source(
        tmp_path / "shards",
        random_documents(60, longest=40),
        shard_bytes=1 << 11,
        compression="zstd",
    )
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "evil.pth").write_text("precious")
    (shards / "notes.txt").write_text("mine")
    return shards, victim


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["shards"])
    (folder / INDEX).write_text(json.dumps(index))


def everything(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def refused(capsys, command, *words) -> str:
    assert command([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    (said,) = (line for line in lines if not line.startswith("warning: "))
    assert said.startswith("error: ") and len(said) < 1000, said
    return said


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("which", ["raw_data", "zip_data"])
def test_a_name_inside_an_index_never_leaves_its_folder(folders, capsys, tmp_path, which, name):
    """By `index`, `verify`, `upload` and training: one line, and no file but ours is touched."""
    shards, victim = folders
    if which == "zip_data" and name == "shard.00001.mds":
        pytest.skip("a packed shard under another shard's name is the case of raw_data")
    change_index(shards, lambda entries: entries[0][which].update(basename=name))
    before = everything(tmp_path)
    (shards / CARD).rename(tmp_path / CARD)
    said = refused(capsys, data_prep, "index", shards, "--tokenizer", shards / TOKENIZER)
    assert INDEX in said
    (tmp_path / CARD).rename(shards / CARD)
    seal_again(shards)
    before[str((shards / CARD).relative_to(tmp_path))] = hashlib.sha256(
        (shards / CARD).read_bytes()
    ).hexdigest()
    run = run_file(tmp_path, shards)
    before["run.yaml"] = hashlib.sha256(run.read_bytes()).hexdigest()
    for command, *words in (
        (data_prep, "verify", shards),
        (data_prep, "upload", shards, tmp_path / "copy"),
        (pretrain.main, run, "device=cpu"),
        (pretrain.main, run, "device=cpu", "loader.on_bad_shard=quarantine"),
    ):
        said = refused(capsys, command, *words)
        assert INDEX in said and "Remove it" not in said
    assert everything(tmp_path) == before and (victim / "evil.pth").read_text() == "precious"


def test_a_link_among_the_shards_that_leaves_the_folder_is_refused(folders, capsys, tmp_path):
    shards, victim = folders
    packed = sorted(shards.glob("*.zstd"))[0]
    (victim / "shard").write_bytes(packed.read_bytes())
    packed.unlink()
    packed.symlink_to(victim / "shard")
    for command, *words in (
        (data_prep, "verify", shards),
        (data_prep, "upload", shards, tmp_path / "copy"),
    ):
        assert "is a symbolic link that leaves its folder" in refused(capsys, command, *words)
    with pytest.raises(ShardError, match="is a symbolic link that leaves its folder"):
        open_source(shards, name="s").read(0)
    assert not list(shards.glob("*.mds")) and not list((tmp_path / "copy").rglob("*shard*"))


def test_unpacked_bytes_are_judged_before_they_get_a_name(folders):
    """The packed file is the one of the index; what is in it is not."""
    shards, _ = folders
    first = sorted(shards.glob("*.zstd"))[0]
    name = first.name.removesuffix(".zstd")
    change_index(shards, lambda entries: entries[0]["raw_data"]["hashes"].update(sha256="0" * 64))
    seal_again(shards)
    with pytest.raises(ShardError, match="unpacks to bytes of SHA-256"):
        open_source(shards, name="s").read(0)
    assert not (shards / name).exists()
    change_index(shards, lambda entries: entries[0]["raw_data"].update(bytes=10, hashes={}))
    seal_again(shards)
    with pytest.raises(ShardError, match="cannot be unpacked to the 10 bytes"):
        open_source(shards, name="s").read(0)
    assert not (shards / name).exists()


@pytest.mark.parametrize("name", ["../x", "/x", ""])
def test_names_and_values_in_hashes_json_are_judged(folders, capsys, name):
    shards, _ = folders
    for found in (
        {name: "0" * 64},
        {"shard.00000.mds.zstd": "0"},
        {"shard.00000.mds.zstd": ["x"]},
        [],
    ):
        (shards / HASHES).write_text(json.dumps(found))
        card = read_card(shards)
        digest = hashlib.sha256((shards / HASHES).read_bytes()).hexdigest()
        write_card(shards, type(card)(**{**card.__dict__, "hashes_sha256": digest}))
        assert HASHES in refused(capsys, data_prep, "verify", shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e[0].update(samples=2**40),
        lambda e: e[0].update(samples=-1),
        lambda e: e[0].update(samples=True),
        lambda e: e[0].update(column_sizes=[2**70]),
        lambda e: e[0].update(column_sizes="x"),
        lambda e: e[0].update(column_names=[7]),
        lambda e: e[0].update(column_encodings=[]),
        lambda e: e[0].update(compression=["zstd"]),
        lambda e: e[0].update(raw_data=7),
        lambda e: e[0]["raw_data"].update(hashes=[]),
        lambda e: e[0]["raw_data"].update(bytes=-5),
        lambda e: e.append(7),
        lambda e: e[0]["raw_data"].update(hashes={"sha256": 7}),
        lambda e: e[0]["zip_data"].update(hashes={"sha256": [7]}),
        lambda e: e[0].update(version="2" * 5000),
        lambda e: e[0].update(format="\x1b[31m"),
        lambda e: e.append(e[0]),
    ],
)
def test_an_index_of_strange_values_is_one_line(folders, capsys, tmp_path, change):
    shards, _ = folders
    change_index(shards, change)
    seal_again(shards)
    run = run_file(tmp_path, shards)
    for command, *words in ((data_prep, "verify", shards), (pretrain.main, run, "device=cpu")):
        said = refused(capsys, command, *words)
        assert "\x1b" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [CARD, INDEX, TOKENIZER, "lengths.bin", "shard.00000.mds"])
def test_a_fifo_among_the_shards_is_not_waited_for(tmp_path, capsys, name):
    shards = write_source(tmp_path / "shards", random_documents(20))
    run = run_file(tmp_path, shards)
    (shards / name).unlink()
    os.mkfifo(shards / name)
    for command, *words in ((data_prep, "verify", shards), (pretrain.main, run, "device=cpu")):
        assert str(shards) in refused(capsys, command, *words)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"tokens": -5},
        {"tokens": 10**15},
        {"documents": 0},
        {"documents": -1},
        {"max_tokens_per_document": 0},
        {"max_tokens_per_document": 2**40},
        {"vocab_size": -1},
        {"vocab_size": 2**62},
        {"specials": {"cls_id": -1}},
        {"specials": {"pad_id": -7}},
        {"specials": {"mask_id": 0}},
        {"specials": {"all_special": [-1]}},
        {"specials": {"all_special": []}},
    ],
    ids=str,
)
def test_numbers_on_a_card_that_cannot_be_are_one_sentence(folders, capsys, change):
    """No command divides by them, and no special id that is masked as text, or lies outside, is trained."""
    shards, _ = folders
    card = json.loads((shards / "card.json").read_text())
    for key, value in change.items():
        card[key] = {**card[key], **value} if isinstance(value, dict) else value
    (shards / "card.json").write_text(json.dumps(card))
    with pytest.raises(ShardError, match="card.json cannot be read"):
        open_source(shards, name="a")
    for command in ("verify", "report"):
        assert "card.json cannot be read" in refused(capsys, data_prep, command, shards)


def test_an_index_without_samples_is_one_sentence_in_a_report(folders, capsys):
    shards, _ = folders
    change_index(shards, lambda entries: entries.clear())
    seal_again(shards)
    assert "lists no samples" in refused(capsys, data_prep, "report", shards)


def test_a_link_in_place_of_a_lock_or_log_writes_nothing_outside(folders, tmp_path):
    """A folder made elsewhere holds links to a person's file where ours are locked, appended to and removed."""
    shards, victim = folders
    evil, before = victim / "evil.pth", everything(victim)
    source = open_source(shards, name="a")
    (shards / ".shard.00000.mds.lock").symlink_to(evil)
    with pytest.raises(ShardError, match="symbolic link in place of a lock"):
        source.read(0)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (".lock", "events.jsonl", "metrics.jsonl"):
        (run / name).symlink_to(evil)
    with pytest.raises(OSError, match="symbolic link in place of a lock"):
        RunLock(run, {"host": "h"})
    for name in ("events.jsonl", "metrics.jsonl"):
        with pytest.raises(OSError):
            open_to_append(run / name)
    (victim / "COMMITTED").write_text("")
    (run / "checkpoints/tokens0000000000010-i0001").symlink_to(victim)
    start = claim_next(run)
    remove_old(run / "checkpoints", incarnation=start, keep_last=1, is_whole=lambda path: True)
    for number in range(20, 40, 10):
        (run / f"checkpoints/tokens00000000000{number}-i0001").mkdir()
        (run / f"checkpoints/tokens00000000000{number}-i0001/COMMITTED").write_text("")
    remove_old(run / "checkpoints", incarnation=start, keep_last=1, is_whole=lambda path: True)
    (victim / "COMMITTED").unlink()
    assert [p.name for p in (run / "checkpoints").iterdir()] == [
        "tokens0000000000030-i0001"
    ] and everything(victim) == before
    (run / f".card.json.{os.getpid()}.part").symlink_to(evil)
    write_atomic(run / "card.json", "{}")
    assert everything(victim) == before and not (run / "card.json").is_symlink()
