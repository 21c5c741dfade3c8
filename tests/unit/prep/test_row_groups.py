"""Parquet cut by row groups: each read once whatever the footer says, the same shards from any parts, faults said once."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from data_prep import readers, segments
from data_prep.config import ParquetSource
from data_prep.readers import tables
from encoder.base import log
from encoder.data.shard_format import read_card
from tests.helpers.prep import bytes_of, ids_of, run, settings, texts

SOURCE = ParquetSource(name="a", files=("*.parquet",))
PREPARED = {"name": "a", "format": "parquet", "files": ["*.parquet"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(log._state, "said", set())
    monkeypatch.setattr("data_prep.prepare.choose_encoder", lambda *_: "fastokens")
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(path: Path, groups: list[list[str]], **how: object) -> Path:
    """A Parquet file of these row groups; a column that nobody asks for is its first."""
    schema = pyarrow.schema({"id": pyarrow.int64(), "text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", **how) as writer:
        for group in groups:
            writer.write_table(pyarrow.table({"id": range(len(group)), "text": group}, schema))
    return path


def groups_of(documents: list[str], *sizes: int) -> list[list[str]]:
    """Documents in order, so many to a row group."""
    left = iter(documents)
    return [[next(left) for _ in range(size)] for size in sizes]


def blocks_by_segment(root: Path, shard_bytes: int) -> list[list[readers.Block]]:
    files = readers.find_files(SOURCE, root)
    return [
        [
            block
            for stretch in segment.stretches
            for block in readers.read_blocks(SOURCE, stretch.file, stretch.begin, stretch.end)
        ]
        for segment in segments.segments_of(SOURCE, files, shard_bytes=shard_bytes)
    ]


def numbered_texts(blocks: list[readers.Block]) -> list[tuple[int, str]]:
    """(row in its file, text) of each."""
    return [
        (block.first + i, text)
        for block in blocks
        for i, text in enumerate(readers.parse(block).texts)
    ]


def read_as_a_whole(monkeypatch) -> pytest.MonkeyPatch:
    """Segments as they were before row groups were entered; ends with the test."""
    monkeypatch.setattr(segments, "can_be_cut", lambda source, file: False)
    return monkeypatch


@pytest.mark.parametrize("footer", ["honest", "hostile"])
def test_every_row_is_read_once_and_in_order_wherever_the_cuts_lie(tmp_path, monkeypatch, footer):
    honest, several = tables._begin_and_rows, 0
    for seed in range(40):
        chance = random.Random(seed)
        sizes = [chance.choice([0, 1, 2, 9]) for _ in range(chance.randint(0, 12))]
        documents = texts(sum(sizes), seed=seed)
        file = write(tmp_path / "a.parquet", groups_of(documents, *sizes))
        if footer == "hostile":
            # absent, far too small or large, out of order
            said = [chance.choice([0, -(2**63), 2**63 - 1, -1, *range(4, 2000, 7)]) for _ in sizes]
            monkeypatch.setattr(
                tables, "_begin_and_rows", lambda facts, g, s=said: (s[g], honest(facts, g)[1])
            )
        monkeypatch.setattr(readers, "BLOCK_BYTES", chance.choice([1, 300, 10**6]))
        cut = blocks_by_segment(tmp_path, chance.randint(1, 200))
        assert numbered_texts(sum(cut, [])) == list(enumerate(documents, start=1))
        # the progress bar ends at the end of a file that has rows
        shown = [block.file_bytes for block in sum(cut, [])]
        assert sum(shown) == bool(documents) * file.stat().st_size and min(shown, default=0) >= 0
        several += sum(map(bool, cut)) > 2
    assert several > 10


def test_a_footer_that_names_row_groups_twice_and_out_of_order_is_read_as_it_says(tmp_path):
    file = write(tmp_path / "a.parquet", groups_of(texts(60), 20, 20, 20))
    content, facts = file.read_bytes(), pyarrow.parquet.read_metadata(file)
    facts.append_row_groups(pyarrow.parquet.read_metadata(file))
    facts.write_metadata_file(tmp_path / "footer")
    footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    file.write_bytes(content[:-footer_bytes] + (tmp_path / "footer").read_bytes()[4:])
    cut = blocks_by_segment(tmp_path, 100)
    assert [text for _, text in numbered_texts(sum(cut, []))] == texts(60) * 2
    assert sum(map(bool, cut)) > 2


def test_a_place_is_never_before_that_of_the_group_in_front_nor_outside(monkeypatch):
    said = [4, 900, 0, 300, 10**9]
    monkeypatch.setattr(tables, "_begin_and_rows", lambda facts, g: (said[g], 10))
    groups = tables._RowGroups(SimpleNamespace(num_row_groups=5), 1000)
    assert groups.places == [4, 900, 900, 900, 999]
    assert groups.bytes == [900, 0, 0, 99, 1]
    assert [groups.between(*cut) for cut in ((0, 500), (500, 900), (900, 1000), (0, None))] == [
        range(0, 1),
        range(1, 1),
        range(1, 5),
        range(0, 5),
    ]


@pytest.mark.parametrize("sizes", [(), (0,), (5,), (200, 1, 1), (0, 30, 0, 30, 0)])
def test_a_file_of_any_row_groups_is_prepared_as_if_it_were_not_cut(tmp_path, monkeypatch, sizes):
    write(tmp_path / "a.parquet", groups_of(texts(sum(sizes)), *sizes), use_dictionary=False)
    write(tmp_path / "b.parquet", groups_of(texts(40, seed=1), 40))
    config = settings(tmp_path, [PREPARED], shard_bytes=1024, held_out_share=0.05)
    assert run("prepare", config) == 0
    assert run("verify", tmp_path / "shards") == 0
    read_as_a_whole(monkeypatch)
    assert run("prepare", config, f"out={tmp_path / 'whole'}") == 0
    for split in ("train", "held_out"):
        if (tmp_path / "whole/a" / split).exists():
            assert ids_of(tmp_path / "shards/a" / split) == ids_of(tmp_path / "whole/a" / split)
    counts = [read_card(tmp_path / out / "a/train").recipe["counts"] for out in ("shards", "whole")]
    assert counts[0] == counts[1] and counts[0]["documents_read"] == sum(sizes) + 40


@pytest.fixture
def config(tmp_path):
    """Nine row groups of two files in more segments, some of which are empty."""
    write(tmp_path / "a.parquet", groups_of(texts(160), 20, 20, 60, 1, 20, 39))
    write(tmp_path / "b.parquet", groups_of(texts(150, seed=1), 100, 25, 25))
    return settings(tmp_path, [PREPARED], shard_bytes=1024)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_parts_share_the_row_groups_of_a_file_and_make_the_same_bytes(tmp_path, config, count):
    assert run("prepare", config, f"out={tmp_path / 'serial'}", "processes=2") == 0
    parts = list(range(1, count + 1))
    random.Random(count).shuffle(parts)
    for index in parts:
        assert run("prepare", config, "--part", f"{index}/{count}") == 0
    made = sorted((tmp_path / "shards/.a.part/segments").glob("0*"))
    empty = [folder for folder in made if not (folder / "train.lengths").stat().st_size]
    assert len(made) > 8 and empty
    assert run("merge", config) == 0
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "serial")
    assert run("verify", tmp_path / "shards") == 0
    assert read_card(tmp_path / "shards/a/train").recipe["counts"]["documents_read"] == 310


def test_one_process_reads_the_footer_of_a_cut_file_once(tmp_path, config, monkeypatch):
    real, read = pyarrow.parquet.read_metadata, []
    monkeypatch.setattr(
        pyarrow.parquet, "read_metadata", lambda raw: read.append(raw.name) or real(raw)
    )
    assert run("prepare", config) == 0
    assert [Path(name).name for name in read] == ["a.parquet", "b.parquet"]


def test_what_was_finished_by_files_as_a_whole_stays_finished(
    tmp_path, config, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        read_as_a_whole(patch)
        assert run("prepare", config) == 0
    before = bytes_of(tmp_path / "shards")
    capsys.readouterr()
    assert run("prepare", config) == run("merge", config) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert run("verify", tmp_path / "shards") == 0
    assert bytes_of(tmp_path / "shards") == before


@pytest.mark.parametrize("by_parts", [False, True])
def test_segments_of_files_as_a_whole_are_made_anew_and_that_is_said(
    tmp_path, config, monkeypatch, capsys, by_parts
):
    assert run("prepare", config, f"out={tmp_path / 'serial'}") == 0
    with monkeypatch.context() as patch:
        read_as_a_whole(patch)
        assert run("prepare", config, "--part", "1/2") == 0
        assert run("prepare", config, "--part", "2/2") == 0
    assert len(list((tmp_path / "shards/.a.part/segments").glob("0*"))) == 2
    assert run("merge", config) == 2
    assert "a has 2 of" in capsys.readouterr().err
    assert run("missing", config, "--parts", "4") == 0
    assert capsys.readouterr().out.strip() == "1-4"
    words = [["--part", f"{i}/4"] for i in (3, 2, 1, 4)] if by_parts else [[]]
    for part in words:
        assert run("prepare", config, *part) == 0
    said = capsys.readouterr().out
    assert said.count("cut from the files in another way") == 1
    if by_parts:
        assert run("merge", config) == 0
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "serial")


def test_a_merge_of_another_version_that_was_killed_is_named(tmp_path, config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        read_as_a_whole(patch)
        assert run("prepare", config, "--part", "1/1") == 0
    (tmp_path / "shards/.a.part/held_out").mkdir()
    capsys.readouterr()
    assert run("prepare", config) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert ".a.part was being merged by another version" in err and "Remove it" in err


def broken(path: Path, *groups: int) -> None:
    """The first text page of these row groups is destroyed."""
    content = bytearray(path.read_bytes())
    for group in groups:
        chunk = pyarrow.parquet.read_metadata(path).row_group(group).column(1)
        at = tables._begin_of(chunk)
        content[at : at + 20] = b"\xff" * 20
    path.write_bytes(bytes(content))


def refused(capsys, config: Path, *words: str) -> str:
    assert run("prepare", config, *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_broken_row_group_is_named_by_its_row_and_costs_its_stretch_alone(tmp_path, capsys):
    path = write(tmp_path / "a.parquet", groups_of(texts(180), *[30] * 6), use_dictionary=False)
    broken(path, 1, 4)
    config = settings(tmp_path, [PREPARED], shard_bytes=1024, held_out_share=0.0)
    assert "a.parquet cannot be read beyond row 30" in refused(capsys, config)
    assert run("prepare", config, "on_error=skip") == 0
    err = capsys.readouterr().err
    assert err.count("cannot be read beyond row 30:") == 1
    assert err.count("cannot be read beyond row 120:") == 1
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 120
    assert counts["left_out"] == {"rest of a broken file": 2}
    assert list(counts["bad_files"]) == ["a.parquet"]
    assert "beyond row 30" in counts["bad_files"]["a.parquet"]


@pytest.mark.parametrize(
    "what, words",
    [
        ("cut short", "cannot be read beyond row 0: Parquet magic bytes not found"),
        ("footer", "cannot be read beyond row 0: Couldn't deserialize thrift"),
        ("other kind", "is an SQLite database"),
        ("no column", "has no column 'body'"),
        ("number", "column 'id' is int64; needed: text"),
        ("encrypted", "cannot be read beyond row 0"),
    ],
)
@pytest.mark.parametrize("by_parts", [False, True])
def test_a_file_of_which_nothing_can_be_read_is_said_and_counted_once(
    tmp_path, capsys, what, words, by_parts
):
    path = write(tmp_path / "a.parquet", groups_of(texts(120), *[30] * 4))
    content = path.read_bytes()
    changed = {
        "cut short": content[:-100],
        "footer": content[:-60] + b"\xff" * 52 + content[-8:],
        "other kind": b"SQLite format 3\0" + content[16:],
        "encrypted": content[:-4] + b"PARE",
    }
    path.write_bytes(changed.get(what, content))
    source = {**PREPARED, "text": {"no column": "body", "number": "id"}.get(what, "text")}
    good = pyarrow.table({source["text"]: texts(30, seed=1)})
    pyarrow.parquet.write_table(good, tmp_path / "b.parquet")
    config = settings(tmp_path, [source], shard_bytes=1024, held_out_share=0.0)
    assert words in refused(capsys, config)
    parts = [["--part", f"{i}/3"] for i in (3, 1, 2)] if by_parts else [[]]
    for part in parts:
        assert run("prepare", config, "on_error=skip", *part) == 0
    err = capsys.readouterr().err
    assert err.count("left out, with an unknown number") == 1 and words in err
    if by_parts:
        assert run("merge", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 30
    assert counts["left_out"] == {"rest of a broken file": 1}
    assert list(counts["bad_files"]) == ["a.parquet"]


def test_a_disk_that_does_not_answer_once_costs_a_stretch_and_is_counted(
    tmp_path, capsys, monkeypatch
):
    write(tmp_path / "a.parquet", groups_of(texts(180), *[30] * 6), use_dictionary=False)
    config = settings(tmp_path, [PREPARED], shard_bytes=1024, held_out_share=0.0)
    made_of, opened = tables.parquet_blocks, []

    def parquet_blocks(*given, begin, end):
        opened.append(begin)
        # the footer is asked for again
        tables._footer.cache_clear()
        return made_of(*given, begin=begin, end=end)

    real = tables._footer

    def footer(file):
        if len(opened) == 3:
            raise OSError(5, "Input/output error")
        return real(file)

    footer.cache_clear = real.cache_clear
    monkeypatch.setattr(tables, "parquet_blocks", parquet_blocks)
    monkeypatch.setattr(tables, "_footer", footer)
    assert run("prepare", config, "on_error=skip") == 0
    assert opened[2] > 0
    assert capsys.readouterr().err.count("left out, with an unknown number") == 1
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["left_out"] == {"rest of a broken file": 1}
    assert 0 < counts["documents_read"] < 180


def test_rows_that_fail_are_counted_and_named_by_their_row_in_the_file(tmp_path, capsys):
    documents = texts(180)
    documents[95] = ""
    documents[130] = None
    write(tmp_path / "a.parquet", groups_of(documents, *[30] * 6))
    source = {**PREPARED, "filters": [{"column": "id", "at_least": 5}]}
    config = settings(tmp_path, [source], shard_bytes=1024, held_out_share=0.0)
    assert "a.parquet row 131: 'text' is null" in refused(capsys, config)
    assert run("prepare", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] + sum(counts["left_out"].values()) == 180
    assert counts["left_out"]["empty"] == 1
    assert counts["documents_read"] == 180 - 6 * 5 - 2
