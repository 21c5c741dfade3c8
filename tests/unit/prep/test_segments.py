"""Segments: every document in exactly one, the same shards from any parts, and from any run killed at any moment."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import random
import shutil

import pytest

from data_prep import readers
from data_prep.config import JsonlSource, TextSource
from data_prep.segments import Part, segments_of
from encoder.base import log
from encoder.data.shard_format import read_card
from encoder.data.shards import open_source
from tests.helpers.prep import bytes_of, ids_of, run, settings, texts, write_jsonl


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(log._state, "said", set())
    monkeypatch.setattr("data_prep.prepare.choose_encoder", lambda *_: "fastokens")
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def texts_by_segment(source, root, shard_bytes) -> list[list[str]]:
    files = readers.find_files(source, root)
    return [
        [
            text
            for stretch in segment.stretches
            for block in readers.read_blocks(source, stretch.file, stretch.begin, stretch.end)
            for text in readers.parse(block).texts
        ]
        for segment in segments_of(source, files, shard_bytes=shard_bytes)
    ]


def random_text(chance: random.Random, kind: str) -> bytes:
    """Lines of 0 to 30 letters; line ends and empty lines of all sorts; JSON lines with one far longer than a segment."""
    if kind == "jsonl":
        return b"".join(
            json.dumps({"text": "x" * chance.choice([1, 5, 90])}).encode() + b"\n"
            for _ in range(12)
        )
    return b"\xef\xbb\xbf"[: chance.choice([0, 3])] + b"".join(
        b"l" * chance.randint(0, 30)
        + chance.choice([b"\n", b"\r\n", b"\n\n", b"\n\r\n", b"\n\n\n", b""])
        for _ in range(12)
    )


@pytest.mark.parametrize("kind", ["jsonl", "line", "paragraph"])
def test_every_document_is_in_exactly_one_segment_wherever_the_cuts_lie(
    tmp_path, monkeypatch, kind
):
    several = 0
    for seed in range(60):
        chance = random.Random(seed)
        for name in "ab":
            (tmp_path / name).write_bytes(random_text(chance, kind))
        source = (
            JsonlSource(name="s", files=("a", "b"))
            if kind == "jsonl"
            else TextSource(name="s", files=("a", "b"), document=kind)
        )
        monkeypatch.setattr(readers, "BLOCK_BYTES", chance.choice([1, 7, 1000]))
        whole = sum(texts_by_segment(source, tmp_path, 10**6), [])
        cut = texts_by_segment(source, tmp_path, chance.randint(1, 30))
        assert sum(cut, []) == whole
        several += sum(map(bool, cut)) > 2
    assert several > 40


def test_segments_do_not_depend_on_the_number_of_parts_and_parts_share_them_all(tmp_path):
    for name, size in (
        ("a.jsonl", 1000),
        ("b.jsonl.gz", 900),
        ("c.jsonl", 150),
        ("d.jsonl", 0),
        ("e.jsonl", 350),
    ):
        (tmp_path / name).write_bytes(b"x" * size)
    source = JsonlSource(name="s", files=("*",))
    files = readers.find_files(source, tmp_path)
    segments = segments_of(source, files, shard_bytes=100)  # a segment is 400 bytes
    assert [[s.described() for s in segment.stretches] for segment in segments] == [
        [["a.jsonl", 0, 400]],
        [["a.jsonl", 400, 800]],
        [["a.jsonl", 800, 1000], ["b.jsonl.gz", 0, None]],
        [["c.jsonl", 0, 100]],
        [["c.jsonl", 100, 150], ["d.jsonl", 0, None], ["e.jsonl", 0, None]],
    ]
    assert [(s.begin, s.bytes) for s in segments] == [
        (0, 400),
        (400, 400),
        (800, 1100),
        (1900, 100),
        (2000, 400),
    ]
    for count in (1, 2, 3, 5, 40):
        shares = [Part(index=i + 1, count=count).of(segments) for i in range(count)]
        assert sum(shares, []) == segments
    assert [len(Part(index=i, count=2).of(segments)) for i in (1, 2)] == [
        3,
        2,
    ]  # by bytes: 1,900 and 500 of 2,400


def test_an_empty_last_file_on_the_border_of_a_segment_belongs_to_the_last_part(tmp_path):
    for name, size in (("a.jsonl", 800), ("b.jsonl", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    source = JsonlSource(name="s", files=("*",))
    segments = segments_of(source, readers.find_files(source, tmp_path), shard_bytes=100)
    assert [(s.begin, s.bytes) for s in segments] == [(0, 400), (400, 400), (800, 0)]
    for count in (1, 2, 3):
        assert (
            sum((Part(index=i + 1, count=count).of(segments) for i in range(count)), []) == segments
        )


@pytest.fixture
def config(tmp_path):
    """A source of two plain files and a compressed one, in six segments."""
    documents = texts(160)
    write_jsonl(tmp_path / "a.jsonl", documents[:90])
    write_jsonl(tmp_path / "c.jsonl", documents[100:])
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress((write_jsonl(tmp_path / "b", documents[90:100])).read_bytes())
    )
    return settings(
        tmp_path, [{"name": "a", "format": "jsonl", "files": ["*.jsonl*"]}], shard_bytes=1024
    )


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_merged_parts_are_the_bytes_of_a_serial_run(tmp_path, config, count, capsys):
    assert run("prepare", config, f"out={tmp_path / 'serial'}") == 0
    parts = list(range(1, count + 1))
    random.Random(count).shuffle(parts)
    for index in parts:
        assert run("prepare", config, "--part", f"{index}/{count}") == 0
    empty = capsys.readouterr().out.count(
        "none of the source's 6 segments begins in this part. Nothing to do."
    )
    assert empty == count - min(count, 6) or count < 20 and not empty
    assert not (tmp_path / "shards/a").exists()
    assert run("merge", config) == 0
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "serial")
    assert run("verify", tmp_path / "shards") == 0
    assert (
        ids_of(tmp_path / "shards/a/train")
        and len(list((tmp_path / "shards/a/train").glob("*.mds"))) > 8
    )
    capsys.readouterr()
    assert run("merge", config) == run("prepare", config, "--part", "1/2") == 0
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_serial_run_goes_on_from_what_parts_have_made(tmp_path, config, capsys):
    assert run("prepare", config, f"out={tmp_path / 'serial'}") == 0
    assert run("prepare", config, "--part", "2/3") == 0
    capsys.readouterr()
    assert run("prepare", config, "processes=2") == 0
    assert "of 6 segments were finished before" in capsys.readouterr().out
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "serial")


def test_merge_says_what_is_missing_and_what_does_not_fit(tmp_path, config, capsys):
    def refused(*words) -> str:
        assert run(*words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert run("prepare", config, "--part", "1/2") == 0
    made = len(list((tmp_path / "shards/.a.part/segments").glob("0*")))
    assert f"a has {made} of 6 segments; the first missing one begins in {tmp_path}" in refused(
        "merge", config
    )
    assert "max_tokens_per_document was 8192, is 32" in refused(
        "merge", config, "max_tokens_per_document=32"
    )
    assert "max_tokens_per_document was 8192, is 32" in refused(
        "prepare", config, "--part", "2/2", "max_tokens_per_document=32"
    )
    assert "--again with --part would throw away" in refused(
        "prepare", config, "--part", "2/2", "--again"
    )
    assert "needed: I/N" in refused("prepare", config, "--part", "3/2")
    assert run("prepare", config, "--part", "2/2") == 0
    segment = tmp_path / "shards/.a.part/segments/000003"
    content = json.loads((segment / "segment.json").read_text())
    for change, words in (
        ({"made_from_sha256": "0"}, "other settings, another tokenizer or other files"),
        ({"stretches": []}, "another stretch"),
        ({"counts": {}}, "samples, its counts tell of 0"),
    ):
        (segment / "segment.json").write_text(json.dumps({**content, **change}))
        assert words in refused("merge", config)
    (segment / "segment.json").write_text("{")
    assert "segment.json cannot be read" in refused("merge", config)
    (segment / "segment.json").write_text(json.dumps(content))
    shard = segment / "train.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "000003 is missing or has another size" in refused("merge", config).replace(
        "/train.00000.mds", ""
    )
    shutil.rmtree(segment)
    assert run("prepare", config) == 0 and run("verify", tmp_path / "shards") == 0


def test_an_error_keeps_the_finished_segments_and_the_run_goes_on_from_them(
    tmp_path, config, capsys
):
    good = (tmp_path / "c.jsonl").read_bytes()
    (tmp_path / "c.jsonl").write_bytes(good[:-20] + b"#" * 20)
    assert run("prepare", config) == 2
    assert "c.jsonl line 60 is not JSON" in capsys.readouterr().err
    assert len(list((tmp_path / "shards/.a.part/segments").iterdir())) == 6  # 5 and recipe.json
    assert run("prepare", config, "on_error=skip") == 0
    assert "5 of 6 segments were finished before" in capsys.readouterr().out
    assert read_card(tmp_path / "shards/a/train").recipe["counts"]["left_out"] == {"not json": 1}


def test_a_cut_file_of_another_kind_is_counted_once(tmp_path, config, capsys):
    (tmp_path / "a.jsonl").write_text("[" + (tmp_path / "a.jsonl").read_text())
    assert run("prepare", config, "on_error=skip") == 0
    assert capsys.readouterr().err.count("a.jsonl is one JSON array") == 1
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["left_out"] == {"rest of a broken file": 1}
    assert list(counts["bad_files"]) == ["a.jsonl"] and counts["documents_read"] == 70


class Killed(BaseException):
    """Stands for SIGKILL: from here on nothing on the disk changes, whatever clean-up code tries."""


def kill_at(patch: pytest.MonkeyPatch, change: int) -> None:
    """Let the process end before the disk's `change`-th change; a file being written then is left half-written."""
    seen = 0

    def ended() -> bool:
        nonlocal seen
        seen += 1
        if seen > change:
            raise Killed
        return seen == change

    def wrap(real):
        def changes(*words, **more):
            if ended():
                raise Killed
            return real(*words, **more)

        return changes

    def opened(file, mode="r", *words, **more):
        if "w" in mode and ended():
            with real_open(file, "wb") as f:
                f.write(b"half")
            raise Killed
        return real_open(file, mode, *words, **more)

    real_open = builtins.open
    patch.setattr(builtins, "open", opened)
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        patch.setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize(
    "command, step",
    [
        (["prepare"], 3),
        (["prepare", "--again"], 5),
        (["merge"], 1),
        pytest.param(["prepare"], 1, marks=pytest.mark.slow),
        pytest.param(["prepare", "--again"], 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_before_any_change_of_the_disk_is_repeated_to_the_same_bytes(
    tmp_path, command, step
):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config, out = settings(tmp_path, shard_bytes=1024, held_out_share=0.05), tmp_path / "shards"
    words = [command[0], config, *command[1:]]
    assert run("prepare", config, f"out={tmp_path / 'whole'}") == 0
    whole, change = bytes_of(tmp_path / "whole"), 0
    assert len(list((tmp_path / "whole/a/train").glob("*.mds"))) >= 3
    before = tmp_path / "before"  # what the command finds: nothing, an older making, or parts
    if command == ["merge"]:
        assert all(run("prepare", config, "--part", f"{i}/2", f"out={before}") == 0 for i in (1, 2))
    elif "--again" in command:
        assert run("prepare", config, "max_tokens_per_document=64", f"out={before}") == 0
    else:
        before.mkdir()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        change += step
        try:
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, change)
                assert run(*words) == 0
            break
        except Killed:
            if (out / "a").exists() and "--again" not in command:
                assert bytes_of(out / "a") == {n.removeprefix("a/"): c for n, c in whole.items()}, (
                    "a half under its name"
                )
            assert run(*words) == 0
            assert bytes_of(out) == whole, f"killed before change {change}"
    assert change > 30


def test_leftovers_of_killed_writers_are_passed_over_in_every_folder(tmp_path, config, capsys):
    """A file .NAME.PID.part lies wherever write_atomic was killed: among segments, in what merge makes, in an empty cache."""
    assert run("prepare", config, "--part", "1/2") == 0
    part = tmp_path / "shards/.a.part"
    (part / "segments/.recipe.json.4711.part").write_text("{")
    (part / "segments/.1-of-2.000000.ab12").mkdir()
    (part / "segments/²").mkdir()
    (part / "train").mkdir()
    (part / "train/.index.json.4711.part").write_text("{")
    assert run("prepare", config, "--part", "2/2") == 0
    assert run("prepare", config) == 0, capsys.readouterr().err
    assert run("verify", tmp_path / "shards") == 0
    assert not [p for p in (tmp_path / "shards").rglob(".*")]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".origin.txt.4711.part").write_text("s3:")
    assert open_source(str(tmp_path / "shards/a/train"), name="a", cache=cache).documents


def test_half_made_folders_are_no_shards_of_a_folder_above(tmp_path, config, capsys):
    assert run("prepare", config) == 0
    shutil.copytree(tmp_path / "shards/a", tmp_path / "shards/.b.part")
    shutil.rmtree(tmp_path / "shards/a")
    for command in (
        ("verify", tmp_path / "shards"),
        ("index", tmp_path / "shards", "--tokenizer", tmp_path / "tokenizer.json"),
    ):
        assert run(*command) == 2
        err = capsys.readouterr().err
        assert ".b.part" not in err and "holds no" in err
