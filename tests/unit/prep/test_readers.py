"""Inputs: every format gives the same texts, filters count what they leave out, and the hub is read without its code."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_prep import readers
from data_prep.config import (
    ArrowSource,
    CsvSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    TextSource,
    recipe_of,
)
from data_prep.filters import ABSENT, Filter, WrongType, look_up
from data_prep.readers import ReadError, delimited, find_files, read_blocks
from encoder.data.shard_format import read_card
from tests.helpers.prep import ids_of, run, settings, texts, write_jsonl
from tests.unit.prep.test_bad_input import refused, table_bytes

ROWS = [
    {
        "n": i,
        "meta": {"language": ["en", "de", None][i % 3], "score": i / 10, "body": text},
        "licenses": tags,
    }
    for i, (text, tags) in enumerate(
        zip(texts(12), [["MIT"], ["MIT", "GPL"], [], None] * 3, strict=True)
    )
]
FILTERS = (
    {"column": "meta.language", "equals": "en"},
    {"column": "meta.score", "at_least": 0.3, "at_most": 0.8},
    {"column": "licenses", "one_of": ["MIT", "BSD"]},
)


def texts_of(source, root) -> tuple[list[str], dict[str, int]]:
    found, left_out = [], {}
    for file in readers.find_files(source, root):
        for block in readers.read_blocks(source, file):
            parsed = readers.parse(block)
            assert parsed.problem is None, parsed.problem
            found += parsed.texts
            for reason, count in parsed.left_out.items():
                left_out[reason] = left_out.get(reason, 0) + count
    return found, left_out


@pytest.mark.parametrize(
    "rule, taken, not_taken",
    [
        (
            {"equals": "en"},
            ["en", ["en", "en"]],
            ["de", "EN", None, ABSENT, [], ["en", "de"], ["en", None]],
        ),
        ({"equals": True}, [True], [False]),
        ({"equals": 4}, [4, 4.0], [5]),
        ({"one_of": ("x", 4)}, ["x", 4], ["4", 5]),
        (
            {"one_of": ("MIT", "BSD")},
            ["BSD", ["MIT"], ["MIT", "BSD"]],
            ["GPL", ["MIT", "GPL"], [], None],
        ),
        (
            {"none_of": ("GPL",)},
            ["MIT", ["MIT"], [], None, ABSENT, ["MIT", None]],
            ["GPL", ["MIT", "GPL"]],
        ),
        ({"at_least": 3, "at_most": 4}, [3, 3.5, 4], [2.9, 4.1, None, ABSENT]),
        ({"not_empty": True}, ["x", ["x"], {"a": 1}, 0], ["", " \n", [], {}, None, ABSENT]),
        ({"at_least_chars": 3}, ["abc"], ["ab", None]),
        ({"at_most_chars": 3}, ["abc", ""], ["abcd", None]),
    ],
)
def test_a_rule_takes_exactly_what_it_says(rule, taken, not_taken):
    one = Filter(column="x", **rule)
    assert [one.passes(value) for value in taken] == [True] * len(taken)
    assert [one.passes(value) for value in not_taken] == [False] * len(not_taken)


def test_a_rule_that_cannot_judge_a_value_says_so():
    for rule, value in (({"at_least": 3}, "4"), ({"at_least": 3}, True), ({"at_most_chars": 3}, 4)):
        with pytest.raises(WrongType, match="'x' is .*; needed: (a number|text)"):
            Filter(column="x", **rule).passes(value)
    for rule, value in (
        ({"equals": False}, "no"),
        ({"equals": True}, 1),
        ({"equals": 4}, True),
        ({"one_of": (4,)}, "4"),
        ({"none_of": (2000,)}, "2000"),
        ({"one_of": ("a",)}, ["a", 1]),
        ({"equals": "a"}, b"a"),
        ({"none_of": ("a",)}, [["a"]]),
    ):
        with pytest.raises(
            WrongType, match="'x' is .*; needed: (a number|a text|true or false), as in the filter"
        ):
            Filter(column="x", **rule).passes(value)


def test_a_name_with_dots_comes_before_a_nested_field():
    assert (
        look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
        and look_up({"a": {"b": {"c": 3}}}, "a.b.c") == 3
    )
    assert look_up({"a": 5}, "a.b") is ABSENT and look_up({"a": None}, "a.b") is ABSENT


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow file", "arrow stream", "hub"])
def test_nested_columns_and_filters_are_the_same_in_every_format(tmp_path, kind):
    # of 12 rows: en are 0 3 6 9; scores 0.3 to 0.8 leave 3 6; licenses leave none of 3 (null) and 6 (empty): so widen
    rows = [{**row, "licenses": ["MIT"] if row["n"] == 6 else row["licenses"]} for row in ROWS]
    common = {
        "name": "a",
        "text": "meta.body",
        "filters": tuple(
            Filter(
                **{
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in f.items()
                }
            )
            for f in FILTERS
        ),
    }
    table, name = pyarrow.Table.from_pylist(rows), kind.split()[-1]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = JsonlSource(files=("a.jsonl",), **common)
    elif kind == "hub":
        (tmp_path / "set/data").mkdir(parents=True)
        (tmp_path / "set/data/train-00000.parquet").write_bytes(table_bytes("parquet", table))
        source = HubSource(dataset=str(tmp_path / "set"), **common)
    else:
        (tmp_path / "a.bin").write_bytes(table_bytes(name, table))
        source = (ParquetSource if name == "parquet" else ArrowSource)(files=("a.bin",), **common)
    found, left_out = texts_of(source, tmp_path)
    assert found == [rows[6]["meta"]["body"]]
    assert left_out == {
        "meta.language not equals en": 8,
        "meta.score not at_least 0.3, at_most 0.8": 2,
        "licenses not one_of [MIT, BSD]": 1,
    }


def test_left_out_by_a_filter_is_counted_on_the_card_and_the_law_of_conservation_holds(
    tmp_path, capsys
):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts(50)))
    )
    source = {
        "name": "a",
        "format": "jsonl",
        "files": ["a.jsonl"],
        "license": "CC0-1.0",
        "filters": [{"column": "n", "at_least": 20}, {"column": "text", "at_least_chars": 100}],
    }
    assert run("prepare", settings(tmp_path, [source])) == 0
    recipe = read_card(tmp_path / "shards/a/train").recipe
    short = sum(len(t) < 100 for t in texts(50)[20:])
    assert recipe["counts"]["left_out"] == {
        "n not at_least 20.0": 20,
        "text not at_least_chars 100": short,
    }
    assert (
        recipe["counts"]["documents_read"] == 30 - short and "50 in = " in capsys.readouterr().out
    )
    assert recipe["settings"]["license"] == "CC0-1.0"
    assert recipe["settings"]["filters"] == [
        {"column": "n", "at_least": 20.0},
        {"column": "text", "at_least_chars": 100},
    ]


def test_settings_that_say_nothing_leave_the_recipe_as_it_was():
    assert recipe_of(JsonlSource(name="a", files=("x",))) == {
        "name": "a",
        "text": "text",
        "format": "jsonl",
    }


def test_local_json_lines_are_the_texts_of_the_json_builder_of_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(readers, "BLOCK_BYTES", 300)
    documents = [
        *texts(40),
        "\u2028 line\u0085 ends \x0b of unicode \r\n",
        '"quotes" \\ and \U0001f600',
    ]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in documents)
    )
    theirs = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True
    )
    assert (
        texts_of(JsonlSource(name="a", files=("a.jsonl",)), tmp_path)[0]
        == [r["text"] for r in theirs]
        == documents
    )


def test_lines_and_paragraphs_do_not_depend_on_where_blocks_end(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\nthree\r\n\r\n\n\nfour\nfive")
    for block_bytes in (1, 2, 3, 5, 100):
        monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
        found = {
            word: texts_of(TextSource(name="a", files=("a.txt",), document=word), tmp_path)
            for word in ("line", "paragraph", "file")
        }
        assert found["line"] == (["one", "two", "three", "four", "five"], {"empty": 4})
        assert found["paragraph"] == (["one\ntwo", "three", "four\nfive"], {})
        assert found["file"][0] == ["one\ntwo\n\nthree\r\n\r\n\n\nfour\nfive"]


@pytest.fixture
def local_hub(tmp_path):
    """A folder of the layout of a hub dataset: two files a split, and a subset of its own."""
    documents = texts(40)
    for part in range(2):
        write_jsonl(
            tmp_path / f"set/data/train-{part}.jsonl", documents[20 * part : 20 * part + 20]
        )
    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: big\n  data_files: data/train-*.jsonl\n"
        "- config_name: small\n  data_files: data/train-0.jsonl\n---\n"
    )
    return tmp_path / "set"


def test_a_dataset_of_the_hub_gives_the_shards_of_its_files(tmp_path, local_hub):
    hub = {"name": "b", "format": "hub", "dataset": str(local_hub), "config": "big"}
    files = {"name": "b", "format": "jsonl", "files": ["set/data/*.jsonl"]}
    assert run("prepare", settings(tmp_path, [hub])) == 0
    assert run("prepare", settings(tmp_path, [files]), f"out={tmp_path / 'files'}") == 0
    for split in ("train", "held_out"):  # the sizes of hub files are not known: each is a segment
        assert ids_of(tmp_path / "shards/b" / split) == ids_of(tmp_path / "files/b" / split)
    names = [f["name"] for f in read_card(tmp_path / "shards/b/train").recipe["files"]]
    assert names == ["data/train-0.jsonl", "data/train-1.jsonl"]


def test_a_subset_a_split_and_a_choice_of_files_are_followed(tmp_path, local_hub):
    whole = texts_of(HubSource(name="b", dataset=str(local_hub), config="big"), tmp_path)[0]
    assert whole == texts(40)
    assert (
        texts_of(HubSource(name="b", dataset=str(local_hub), config="small"), tmp_path)[0]
        == whole[:20]
    )
    assert (
        texts_of(HubSource(name="b", dataset=str(local_hub), files=("data/*-1.jsonl",)), tmp_path)[
            0
        ]
        == whole[20:]
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"config": "bg"}, "source b: dataset .* cannot be opened: .*bg"),
        ({"config": "big", "split": "validation"}, "validation"),
        ({"config": "big", "files": ["x"]}, "both config and files"),
        ({"files": ["gone/*.jsonl"]}, "cannot be opened"),
    ],
)
def test_a_wrong_subset_split_or_file_of_the_hub_is_one_line(
    tmp_path, local_hub, capsys, change, words
):
    err = refused(
        capsys,
        "prepare",
        settings(tmp_path, [{"name": "b", "format": "hub", "dataset": str(local_hub), **change}]),
    )
    assert re.search(words, err)


def test_without_a_way_to_the_hub_the_message_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    import datasets

    asked = []

    def unreachable(*words, **more):
        asked.append((words, more))
        raise ConnectionError("Couldn't reach 'someone/some-set' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    source = {
        "name": "b",
        "format": "hub",
        "dataset": "someone/some-set",
        "config": "x",
        "revision": "0123abc",
    }
    err = refused(capsys, "prepare", settings(tmp_path, [source]))
    assert "someone/some-set cannot be opened: no network" in err
    assert (
        "hf download someone/some-set --repo-type dataset --local-dir FOLDER) and set dataset:"
        " FOLDER" in err
    )
    assert asked == [(("someone/some-set", "x"), {"data_files": None, "revision": "0123abc"})]


def test_a_file_of_the_hub_is_named_with_its_commit_and_read_by_its_number(monkeypatch):
    """A stand-in for the hub: a builder whose files have resolved addresses, as `datasets` gives them."""
    import datasets

    class Builder:
        class config:
            data_files = {"train": [f"hf://datasets/o/d@c0ffee/data/{i}.parquet" for i in range(2)]}

        class info:
            splits = None

        def as_streaming_dataset(self, split):
            def rows(shards):
                for shard in shards:
                    yield {"text": f"{split} {shard}"}

            return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder())
    source = HubSource(name="b", dataset="o/d")
    files = readers.find_files(source, None)
    assert [f.described() for f in files] == [
        {"name": f"o/d@c0ffee/data/{i}.parquet"} for i in range(2)
    ]
    blocks = [block for file in files for block in readers.read_blocks(source, file)]
    assert [(b.file, readers.parse(b).texts) for b in blocks] == [
        (f"o/d@c0ffee/data/{i}.parquet", [f"train {i}"]) for i in range(2)
    ]


def test_a_filter_without_a_sense_is_refused(tmp_path, capsys):
    for wrong, words in (
        ({"column": "x"}, "has no rule"),
        ({"column": "x", "one_of": []}, "has an empty list"),
        (
            {"column": "x", "one_of": ["en", False]},
            "[en, False] in one_of: true and false beside others",
        ),
        ({"column": "x", "none_of": [True, 1]}, "in none_of: true and false"),
        ({"column": "x", "equals": ["a"]}, "compares with"),
        ({"column": "x", "at_lest": 1}, "at_least"),
        ({"column": "x", "at_least": 2, "at_most": 1}, "no value is both"),
    ):
        source = {"name": "a", "format": "jsonl", "files": ["a.jsonl"], "filters": [wrong]}
        assert words in refused(capsys, "prepare", settings(tmp_path, [source]))


def test_a_value_that_a_filter_cannot_judge_is_named_by_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "n": 1}\n{"text": "not", "n": "1"}\n')
    source = {
        "name": "a",
        "format": "jsonl",
        "files": ["a.jsonl"],
        "filters": [{"column": "n", "at_least": 1}],
    }
    config = settings(tmp_path, [source], held_out_share=0.0)
    assert "line 2: 'n' is a text; needed: a number" in refused(capsys, "prepare", config)
    assert run("prepare", config, "on_error=skip") == 0
    assert read_card(tmp_path / "shards/a/train").recipe["counts"]["left_out"] == {
        "filter cannot judge": 1
    }


@pytest.mark.parametrize("piece_bytes", [1, 7, 2**20])
def test_csv_records_are_those_of_pythons_csv(piece_bytes, tmp_path, monkeypatch):
    """Well-formed records are read by a pattern, others by csv: here it reads them all, a line at a time."""
    monkeypatch.setattr(delimited, "READ_BYTES", piece_bytes)
    parts = ['"', '""', "a", "bc", "\n", "\r\n", "\r", ",", "é", "x\ny", '"a\nb\n\nc"', '"d"\n']
    chance = random.Random(piece_bytes)
    for _ in range(150):
        content = "text\n" + "".join(chance.choices(parts, k=chance.randint(0, 50)))
        (tmp_path / "a.csv").write_bytes(content.encode())
        source = CsvSource(name="a", files=("a.csv",))
        (file,) = find_files(source, tmp_path)
        found: list[tuple[int, str]] = []
        try:
            for block in read_blocks(source, file):
                found += zip(block.numbers, block.columns["text"], strict=True)
        # a quote that is never closed: what stands before it is kept
        except ReadError as error:
            assert "never closed" in str(error)
            assert found == records_of_csv(content)[: len(found)]
            continue
        assert found == records_of_csv(content), ascii(content)


def records_of_csv(content: str) -> list[tuple[int, str]]:
    """(first line, cell) of the records that have one cell, behind the header."""
    lines = content.encode().splitlines(keepends=True)
    taken = 0

    def given() -> Iterator[str]:
        nonlocal taken
        for line in lines:
            taken += 1
            yield line.decode()

    reader = csv.reader(given())
    next(reader)
    found = []
    while True:
        first = taken + 1
        cells = next(reader, None)
        if cells is None:
            return found
        if len(cells) == 1:
            found.append((first, cells[0]))
