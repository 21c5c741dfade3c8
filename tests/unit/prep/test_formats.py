"""CSV, TSV, JSON arrays and MDS of text: the texts, filters, segments and shards of JSON lines that say the same."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import shutil

import pytest

from data_prep import readers
from data_prep.config import CsvSource, JsonArraySource, JsonlSource, MdsSource, TsvSource
from data_prep.filters import Filter
from encoder.base import log
from encoder.base.errors import ConfigError
from encoder.data.shard_format import read_card
from tests.helpers.prep import bytes_of, ids_of, run, settings, texts, write_jsonl
from tests.helpers.shards import mds_writer
from tests.unit.prep.test_bad_input import refused
from tests.unit.prep.test_readers import texts_of

# what a quoted cell may hold: delimiters, quotes, line ends of all kinds, the other delimiter, letters beyond ASCII
DOCUMENTS = [
    *texts(40),
    'a "quoted" word',
    "one,two;three\tfour",
    "line one\nline two\r\nline three\rend",
    '"',
    '""',
    "é 日本 \U0001f600",
    " spaces ",
    ",",
    "x" * 3000,
    "\u2028 separators \u0085 of unicode",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(log._state, "said", set())
    monkeypatch.setattr("data_prep.prepare.choose_encoder", lambda *_: "fastokens")


def csv_of(rows: list[list], **how) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, **how).writerows(rows)
    return out.getvalue().encode("utf-8")


def write_mds(folder, rows: list[dict], columns: dict, **how):
    with mds_writer(out=str(folder), columns=columns, size_limit=2000, **how) as out:
        for row in rows:
            out.write(row)
    return folder


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lineterminator": "\n"},
        {"lineterminator": "\r"},
        {"quoting": csv.QUOTE_ALL},
        {"delimiter": ";"},
        {"delimiter": "\t"},
        {"delimiter": "n"},
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 7, 2**18])
def test_csv_is_what_pythons_csv_reads_wherever_pieces_end(tmp_path, monkeypatch, how, piece):
    monkeypatch.setattr("data_prep.readers.delimited.READ_BYTES", piece)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    content = csv_of([["id", "text"], *[[i, text] for i, text in enumerate(DOCUMENTS)]], **how)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" * (piece % 2) + content)
    source = CsvSource(name="a", files=("a.csv",), delimiter=how.get("delimiter", ","))
    assert texts_of(source, tmp_path)[0] == DOCUMENTS
    if how.get("delimiter") == "\t":
        assert texts_of(TsvSource(name="a", files=("a.csv",)), tmp_path)[0] == DOCUMENTS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [1, 2, 7, 2**20])
def test_a_json_array_is_cut_into_its_items_wherever_pieces_end(
    tmp_path, monkeypatch, indent, piece
):
    monkeypatch.setattr("data_prep.readers.arrays.READ_BYTES", piece)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    documents = [*DOCUMENTS, 'brackets ]}[{ "\\" \\', "\\", 'ends in a quote "', '\\\\"']
    rows = [{"text": text, "more": [[{"a": "]"}], {}], "n": 1.5} for text in documents]
    (tmp_path / "a.json").write_text(
        json.dumps(rows, indent=indent, ensure_ascii=indent is None), encoding="utf-8"
    )
    assert texts_of(JsonArraySource(name="a", files=("a.json",)), tmp_path)[0] == documents
    for content, found in (("[]", []), (" [ ] \n", []), ('[{"text": "x"}]', ["x"])):
        (tmp_path / "a.json").write_text(content)
        assert texts_of(JsonArraySource(name="a", files=("a.json",)), tmp_path)[0] == found


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:7", "gz", "bz2", "br", "snappy"])
def test_mds_of_text_is_read_compressed_or_not(tmp_path, compression):
    rows = [{"text": text, "n": i, "score": i / 2} for i, text in enumerate(DOCUMENTS)]
    write_mds(
        tmp_path / "set/train",
        rows,
        {"text": "str", "n": "int", "score": "float64"},
        compression=compression,
    )
    for files in (("set/train",), ("set/train/index.json",), ("set/*",)):
        assert texts_of(MdsSource(name="a", files=files), tmp_path)[0] == DOCUMENTS
    some = MdsSource(
        name="a",
        files=("set/train",),
        filters=(Filter(column="n", at_least=40), Filter(column="score", at_most=22)),
    )
    assert texts_of(some, tmp_path)[0] == DOCUMENTS[40:45]


def sources(folder) -> list[dict]:
    """The same documents and numbers in every format."""
    rows = [{"text": text, "n": i, "kind": "ab"[i % 2]} for i, text in enumerate(DOCUMENTS)]
    table = [["n", "kind", "text"], *[[row["n"], row["kind"], row["text"]] for row in rows]]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in (
        ("a.csv", csv_of(table)),
        ("a.tsv", csv_of(table, delimiter="\t")),
        ("bare.csv", csv_of(table[1:])),
        ("a.json", json.dumps(rows).encode()),
    ):
        (folder / name).write_bytes(content)
        for ending, pack in (
            (".gz", gzip.compress),
            (".bz2", bz2.compress),
            (".xz", lzma.compress),
        ):
            (folder / f"{name}{ending}").write_bytes(pack(content))
    write_mds(folder / "mds", rows, {"text": "str", "n": "int", "kind": "str"}, compression="zstd")
    kinds = [
        ("jsonl", "a.jsonl", {}),
        *[("csv", f"a.csv{e}", {}) for e in ("", ".gz", ".bz2", ".xz")],
        ("tsv", "a.tsv.gz", {}),
        ("csv", "bare.csv", {"columns": ["n", "kind", "text"]}),
        ("json_array", "a.json", {}),
        ("json_array", "a.json.xz", {}),
        ("mds", "mds", {}),
    ]
    filters = [{"column": "n", "at_least": 3}, {"column": "kind", "equals": "a"}]
    return [
        {"name": "a", "format": kind, "files": [name], "filters": filters, **more}
        for kind, name, more in kinds
    ]


def test_every_new_format_gives_the_ids_of_json_lines_on_any_number_of_processes(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    wanted, given = None, sources(tmp_path)
    for number, source in enumerate(given):
        config, out = settings(tmp_path, [source]), tmp_path / f"out{number}"
        assert run("prepare", config, f"out={out}") == 0
        ids = {split: ids_of(out / "a" / split) for split in ("train", "held_out")}
        counts = read_card(out / "a/train").recipe["counts"]
        wanted = wanted or (ids, counts)
        assert (ids, counts) == wanted, source
        assert counts["left_out"] == {"kind not equals a": 24, "n not at_least 3.0": 3}
    two = [
        {**source, "files": [*source["files"], f"second/{source['files'][0]}"]}
        for source in given
        if source["files"][0] in ("a.csv", "a.json", "mds")
    ]
    (tmp_path / "second").mkdir()
    for source in two:
        name = source["files"][0]
        (shutil.copytree if name == "mds" else shutil.copy)(
            tmp_path / name, tmp_path / "second" / name
        )
        config = settings(tmp_path, [source], shard_bytes=1024)
        assert run("prepare", config, f"out={tmp_path / name}.whole") == 0
        for part in (1, 2, 3):
            assert (
                run("prepare", config, f"out={tmp_path / name}.parts", "--part", f"{part}/3") == 0
            )
        assert run("merge", config, f"out={tmp_path / name}.parts") == 0
        assert bytes_of(tmp_path / f"{name}.whole") == bytes_of(tmp_path / f"{name}.parts")
        assert run("verify", tmp_path / f"{name}.whole") == 0


@pytest.mark.parametrize(
    "source, name, content, words",
    [
        (
            "csv",
            "a.csv",
            b"txt,n\nx,1\n",
            (
                "a.csv has no column 'text'. Did you mean txt? Set the source's text or filters, or"
                " columns"
            ),
        ),
        (
            "csv",
            "a.csv",
            b"n;text\n1;x\n",
            "Its first line holds ';': set the source's delimiter to it.",
        ),
        ("csv", "a.csv", b"text,text\na,b\n", "names the column 'text' twice"),
        (
            "csv",
            "a.csv",
            b'text\nfine\n"never closed\nmore\n',
            "a.csv line 3: a quote is opened and never closed. Close it, or set quotes: false",
        ),
        ("csv", "a.csv", b"text\nfine\na,b\n", "a.csv line 3 has 2 cells, there are 1 columns"),
        ("csv", "a.csv", b"n,text\n1,x\n2\n", "a.csv line 3 has no 'text'"),
        (
            "csv",
            "a.csv",
            b'text\n"two\nlines"\nb\xffd\n',
            "a.csv line 4: byte 2 of 'text' is not UTF-8",
        ),
        ("tsv", "a.tsv", b"text\tn\nfine\t1\tx\n", "a.tsv line 2 has 3 cells, there are 2 columns"),
        (
            "json_array",
            "a.json",
            b'[{"text": "x"}, {"text": "y"',
            "a.json does not end with ]: it cannot be read beyond item 1",
        ),
        ("json_array", "a.json", b'[{"text": "x"}, {"txt": "y"}]', "a.json item 2 has no 'text'"),
        ("json_array", "a.json", b'[{"text": "x"}, {"text": y}]', "a.json item 2 is not JSON"),
        ("json_array", "a.json", b'[{"text": "x"}] [{"text": "y"}]', "goes on after its array"),
        (
            "json_array",
            "a.json",
            b'[{"text": "x"}, 5]',
            "a.json item 2 is a number; needed: a JSON object with 'text'",
        ),
        ("json_array", "a.json", b'"text"', "does not begin with ["),
    ],
)
def test_bad_records_and_items_are_named_by_their_place(
    tmp_path, capsys, source, name, content, words
):
    (tmp_path / name).write_bytes(content)
    config = settings(
        tmp_path, [{"name": "a", "format": source, "files": [name]}], held_out_share=0.0
    )
    err = refused(capsys, "prepare", config)
    assert words in err and "on_error: skip" in err
    if b"fine" in content or b'"x"}, ' in content:
        assert run("prepare", config, "on_error=skip") == (
            2 if source == "tsv" or b"},  " in content else 0
        )


def test_quotes_may_be_letters_as_others(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'text\tn\n5" pipe\t1\n"open\t2\n')
    found = texts_of(TsvSource(name="a", files=("a.tsv",), quotes=False), tmp_path)[0]
    assert found == ['5" pipe', '"open']


def test_numbers_and_truth_values_in_csv_are_judged_by_filters(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"text,score,good\na,0.5,true\nb,,False\nc,1e1,TRUE\nd,-3,false\ne,high,true\n"
    )

    def taken(**rule):
        source = CsvSource(name="a", files=("a.csv",), filters=(Filter(**rule),))
        blocks = [
            readers.parse(b)
            for f in readers.find_files(source, tmp_path)
            for b in readers.read_blocks(source, f)
        ]
        return sum((b.texts for b in blocks), []), sum((list(b.left_out) for b in blocks), [])

    assert (
        taken(column="score", at_least=0.5)[0] == ["a", "c"]
        and "filter cannot judge" in taken(column="score", at_least=0.5)[1]
    )
    assert taken(column="good", equals=True)[0] == ["a", "c", "e"] and taken(
        column="score", equals="high"
    )[0] == ["e"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"basename": "../outside.mds"}, "leaves its folder"),
        ({"basename": "/etc/passwd"}, "is absolute"),
        ({"basename": 5}, "is no text"),
        ({"bytes": 7}, "says 7"),
    ],
)
def test_names_in_an_index_of_text_stay_below_their_folder(tmp_path, capsys, change, words):
    write_mds(tmp_path / "set", [{"text": t} for t in texts(20)], {"text": "str"})
    shutil.copy(tmp_path / "set/shard.00000.mds", tmp_path / "outside.mds")
    index = json.loads((tmp_path / "set/index.json").read_text())
    index["shards"][0]["raw_data"].update(change)
    (tmp_path / "set/index.json").write_text(json.dumps(index))
    assert words in refused(
        capsys, "prepare", settings(tmp_path, [{"name": "a", "format": "mds", "files": ["set"]}])
    )


def test_an_index_of_other_columns_or_formats_is_told_what_it_is(tmp_path, capsys):
    import numpy as np

    write_mds(
        tmp_path / "ids",
        [{"input_ids": np.arange(5, dtype=np.uint16)}],
        {"input_ids": "ndarray:uint16"},
    )
    write_mds(tmp_path / "set", [{"body": "x", "code": {"a": 1}}], {"body": "str", "code": "pkl"})
    cases = (
        (
            {"files": ["ids"], "text": "input_ids"},
            "These are shards of ids: train on them, after data-prep index",
        ),
        ({"files": ["set"]}, "has no column 'text'. Known: body, code."),
        ({"files": ["set"], "text": "code"}, "as pkl"),
        ({"files": ["none"]}, "does not exist"),
        ({"files": ["."]}, "is a folder; needed: one with an index.json"),
    )
    for source, words in cases:
        assert words in refused(
            capsys, "prepare", settings(tmp_path, [{"name": "a", "format": "mds", **source}])
        ), source
    assert texts_of(MdsSource(name="a", files=("set",), text="body"), tmp_path)[0] == [
        "x"
    ]  # the pickle is not opened


def test_settings_of_csv_without_a_sense_are_refused():
    for more, words in (
        ({"delimiter": ",,"}, "needed: one character"),
        ({"delimiter": '"'}, "needed: one character"),
        ({"columns": ("a", "a")}, "has a twice"),
        ({"columns": ("a", "b")}, "lacks text"),
    ):
        with pytest.raises(ConfigError, match=words):
            CsvSource(name="a", files=("x",), **more)


def test_fields_of_a_json_line_that_nothing_uses_are_not_judged(tmp_path, capsys):
    """An integer of 5,000 digits, 3,000 levels, bytes that are not UTF-8: in a field beside the text."""
    unused = [
        b"9" * 5000,
        b"[" * 3000 + b"]" * 3000,
        b'"\xff"',
        b'{"a": ' * 2000 + b"1" + b"}" * 2000,
    ]
    lines = [
        b'{"before": %s, "text": "document %d", "n": {"m": %d}}\n' % (field, i, i)
        for i, field in enumerate(unused)
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    source = JsonlSource(name="a", files=("a.jsonl",), filters=(Filter(column="n.m", at_least=1),))
    assert texts_of(source, tmp_path)[0] == ["document 1", "document 2", "document 3"]
    for line, words in (
        (b'{"text": "x", "n": %s}' % (b"9" * 5000), "integer of thousands of digits"),
        (b'{"text": "\xff", "a": %s}' % (b"9" * 5000), "is not UTF-8"),
        (b'{"text": "x", "a": %s' % (b"[" * 3000), "nested too deeply"),
        (b'{"text": "x", "a": %s, oops}' % (b"9" * 5000), "digits"),
    ):
        (tmp_path / "a.jsonl").write_bytes(line + b"\n")
        config = settings(
            tmp_path,
            [
                {
                    "name": "a",
                    "format": "jsonl",
                    "files": ["a.jsonl"],
                    "filters": [{"column": "n", "at_least": 1}],
                }
            ],
        )
        err = refused(capsys, "prepare", config)
        assert "line 1" in err and words in err and "Exceeds the limit" not in err, line[:40]


def test_files_of_a_hub_folder_may_differ_in_columns_that_nothing_uses(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    data = tmp_path / "set/data"
    data.mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts(5), "a": [1] * 5}), data / "train-0.parquet"
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"b": ["x"] * 5, "text": texts(5, seed=1)}), data / "train-1.parquet"
    )
    hub = {"name": "a", "format": "hub", "dataset": str(tmp_path / "set")}
    config = settings(tmp_path, [hub], held_out_share=0.0)
    assert run("prepare", config) == 0
    assert read_card(tmp_path / "shards/a/train").documents == 10
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"] * 5}), data / "train-1.parquet")
    err = refused(capsys, "prepare", config, f"out={tmp_path / 'other'}")
    assert (
        "train-1.parquet has no column 'text'. Known: body." in err
        and "Set the source's text" in err
    )
    assert "Fetch the file again" not in err
    others = {
        "train-0.jsonl": [{"text": "x", "a": 1}],
        "train-1.jsonl": [{"text": "y", "b": [2]}, {"text": "z", "a": "1"}],
    }
    for name, rows in others.items():
        (tmp_path / "lines/data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lines/data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        run(
            "prepare",
            config,
            f"sources.0.dataset={tmp_path / 'lines'}",
            f"out={tmp_path / 'lines_out'}",
        )
        == 0
    )
    (tmp_path / "tables/data").mkdir(parents=True)
    features = "".join(f"  - name: {name}\n    dtype: string\n" for name in ("text", "a"))
    (tmp_path / "tables/README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    (tmp_path / "tables/data/train-0.csv").write_text("text,a\nx,1\n")
    (tmp_path / "tables/data/train-1.csv").write_text("text,b\ny,2\n")
    err = refused(
        capsys,
        "prepare",
        config,
        f"sources.0.dataset={tmp_path / 'tables'}",
        f"out={tmp_path / 'tables_out'}",
    )
    assert (
        "train-1.csv has other columns than the first file of the dataset" in err
        and "files: [GLOB]" in err
    )
    assert "Fetch the file again" not in err


def test_random_json_is_outlined_as_pythons_json_reads_it():
    from data_prep.readers.structure import NotJson, fields_of

    chance = random.Random(3)

    def value(depth: int):
        kind = chance.randrange(6 if depth < 4 else 4)
        if kind == 4:
            return [value(depth + 1) for _ in range(chance.randrange(4))]
        if kind == 5:
            return {str(k): value(depth + 1) for k in range(chance.randrange(4))}
        return [
            None,
            chance.random() * 10 ** chance.randrange(-9, 9),
            chance.randrange(-99, 99),
            "".join(chance.choices('a"\\{}[]:,é\n\U0001f600', k=chance.randrange(9))),
        ][kind]

    for _ in range(300):
        row = {"text": value(9), 'k"ey': value(0), "other": value(0)}
        data = json.dumps(
            row, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1])
        ).encode()
        assert fields_of(data, set(row)) == row and fields_of(data, {"text"}) == {
            "text": row["text"]
        }
        cut = data[: chance.randrange(1, len(data) - 1)]
        with pytest.raises(NotJson):
            fields_of(cut, set())


def test_a_sources_format_is_known_by_its_file_for_the_tokenizer(tmp_path):
    from data_prep.tokenizer_training import sources_of

    names = ["a.jsonl.bz2", "a.csv", "a.tsv.gz", "a.parquet", "a.txt", "d/index.json"]
    kinds = [type(source).__name__ for source in sources_of(names)]
    assert kinds == [
        "JsonlSource",
        "CsvSource",
        "TsvSource",
        "ParquetSource",
        "TextSource",
        "MdsSource",
    ]
    assert write_jsonl(tmp_path / "a.jsonl", ["x"])
