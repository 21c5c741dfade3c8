"""Bad input of data-prep: one line with the place, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import threading

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_prep import cli, environment_corpus, readers
from data_prep.config import JsonlSource
from encoder.data.shard_format import read_card
from tests.helpers.denied import denied
from tests.helpers.prep import bytes_of, run, settings, texts, write_jsonl

GOOD = json.dumps({"text": "a good line of text"}).encode() + b"\n"


def refused(capsys, *command) -> str:
    """The one line on stderr of a command that must fail with code 2."""
    assert run(*command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.mark.parametrize(
    "line, reason, words",
    [
        (b"{not json}\n", "not json", ["line 3 is not JSON", "needed: one JSON object a line"]),
        (b'{"txt": "x"}\n', "no text", ["line 3 has no 'text'", "Did you mean txt?"]),
        (b"{}\n", "no text", ["line 3 has no 'text'"]),
        (b'{"text": 5}\n', "no text", ["line 3: 'text' is a number", "needed: text"]),
        (b'{"text": null}\n', "no text", ["line 3: 'text' is null"]),
        (b'["text"]\n', "not json", ["line 3 is a list", "needed: a JSON object"]),
        (b'{"text": "\xff"}\n', "not utf-8", ["line 3: byte 11 is not UTF-8"]),
        (
            b'{"text": "half \\ud800 pair"}\n',
            "not unicode",
            ["line 3: the text holds half a surrogate pair"],
        ),
        (b"[" * 100_000 + b"\n", "not json", ["line 3 is not JSON"]),
    ],
)
def test_a_bad_line_is_named_with_file_and_number_and_can_be_skipped(
    tmp_path, capsys, line, reason, words
):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + GOOD * 20)
    config = settings(tmp_path, held_out_share=0.0)
    err = refused(capsys, "prepare", config)
    assert (
        str(tmp_path / "a.jsonl") in err
        and all(word in err for word in words)
        and "on_error: skip" in err
    )
    assert list((tmp_path / "shards").iterdir()) == []
    assert run("prepare", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 21 and counts["left_out"] == {"empty": 1, reason: 1}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_wrong_column_of_the_last_source_stops_before_the_first_is_made(tmp_path, capsys, kind):
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    table = pyarrow.table({"txt": texts(20)})
    if kind == "jsonl":
        rows = [json.dumps({"txt": text}) for text in texts(20)]
        (tmp_path / "b.jsonl").write_text("\n".join(rows) + "\n")
    elif kind == "csv":
        (tmp_path / "b.csv").write_text("\n".join(["txt", *texts(20)]) + "\n")
    else:
        pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    sources = [
        {"name": "a", "format": "jsonl", "files": ["a.jsonl"]},
        {"name": "b", "format": kind, "files": [f"b.{kind}"]},
    ]
    config = settings(tmp_path, sources)
    err = refused(capsys, "prepare", config)
    assert "Did you mean txt?" in err and not (tmp_path / "shards" / "a").exists()
    # the sentence is the one of the source's own turn
    assert refused(capsys, "prepare", config, "--source", "b") == err
    # and in processes of their own
    assert refused(capsys, "prepare", config, "processes=2") == err
    # under skip the sources are made in their turn
    assert run("prepare", config, "on_error=skip") == 2
    assert "source b has no document" in capsys.readouterr().err
    assert read_card(tmp_path / "shards/a/train").documents


def test_a_column_that_some_documents_lack_is_told_in_its_turn(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    (tmp_path / "b.jsonl").write_bytes(GOOD + b'{"txt": "x"}\n')
    sources = [{"name": n, "format": "jsonl", "files": [f"{n}.jsonl"]} for n in "ab"]
    err = refused(capsys, "prepare", settings(tmp_path, sources))
    assert "line 2 has no 'text'" in err
    assert read_card(tmp_path / "shards/a/train").documents


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_without_rights_stops_however_errors_are_taken(
    tmp_path, capsys, monkeypatch, on_error
):
    path = write_jsonl(tmp_path / "a.jsonl", texts(20))
    denied(monkeypatch, path)
    err = refused(capsys, "prepare", settings(tmp_path), f"on_error={on_error}")
    assert err == (
        f"error: {path} cannot be read: Permission denied. Needed: rights to read it. Give them"
        " (chmod u+r), or name another.\n"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("body.txt", "line 1 has no 'body.txt'. Did you mean body.text? Set the source's text"),
        ("text", "line 1 has no 'text'. Did you mean body.text?"),
        ("zzz", "Known: body.author.name, body.text, id."),
        ("body", "'body' is an object; needed: text. It holds body.author.name, body.text. Set"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_dotted_column_is_looked_for_inside_of_objects(tmp_path, capsys, kind, wrong, said):
    row = {"body": {"author": {"name": "x"}, "text": "a good text"}, "id": 1}
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        table = pyarrow.Table.from_pylist([row])
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        # a table says once for all rows what it lacks, and names types
        said = said.replace("line 1 has no", "a." + kind + " has no column").split(" Set")[0]
        said = said.replace("'body.txt'.", "'body.txt': nothing in 'body' is named 'txt'.")
        said = said.removeprefix("'body' is an object; ")
    source = {"name": "a", "format": kind, "files": [path.name], "text": wrong}
    err = refused(capsys, "prepare", settings(tmp_path, [source]))
    assert said in err and "on_error: skip" in err, err


_TEXT = b'{"text": "a"}\n'
OPTION_FILES = {
    "column.csv": (b"sentence,label\nx,1\n", "Known: sentence, label. Name it: --text COLUMN."),
    "column.jsonl": (b'{"body": "x"}\n', "line 1 has no 'text'. Known: body. Name it: --text"),
    "parted.csv": (b"n;text\n1;x\n", "save it with commas as .csv, or with tabs as .tsv"),
    "open.csv": (b'text\n"x\n', "a quote is opened and never closed. Close it."),
    "array.json": (
        b'[{"text": "a"}]',
        "it is read as jsonl. Write one object a line (jq -c '.[]')",
    ),
    "json.csv": (_TEXT, "is JSON; it is read as csv. Give it the ending .jsonl."),
    "packed.txt": (b"PAR1" + bytes(99), "it is read as text. Give it the ending .parquet."),
    "long.jsonl": (b'"' + b"x" * 70_000_001, "needed: at most 70,000,000. Leave it out."),
    "bad.txt": (b"\xff\n" * 9, "is not UTF-8"),
}
OF_SETTINGS = (
    "on_error",
    "the source's",
    "source says",
    "format:",
    "filters",
    "source files",
    "max_document",
    "quotes:",
)


@pytest.mark.parametrize("name", OPTION_FILES)
def test_files_of_options_are_told_what_options_can_do(tmp_path, capsys, name):
    content, said = OPTION_FILES[name]
    (tmp_path / name).write_bytes(content)
    command = ("tokenizer", "train", "--files", tmp_path / name, "--out", tmp_path / "t.json")
    err = refused(capsys, *command)
    assert said in err and not any(word in err for word in OF_SETTINGS), err


def test_the_column_of_files_is_an_option_of_the_tokenizer(tmp_path, capsys):
    documents = [{"body": {"text": text}} for text in texts(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    train = ("tokenizer", "train", "--vocab-size", 300, "--out", tmp_path / "t.json")
    assert run(*train, "--files", tmp_path / "a.jsonl", "--text", "body.text") == 0
    err = refused(capsys, *train, "--config", settings(tmp_path), "--text", "body.text")
    assert "--text is for --files" in err
    err = refused(capsys, *train, "--files", tmp_path / "b.jsonl")
    assert f"error: {tmp_path / 'b.jsonl'} does not exist. Did you mean a.jsonl?" in err


def test_the_first_bad_line_is_named_also_by_several_processes_of_several_segments(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", 300)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 200 + b"{\n" + GOOD * 200 + b"{\n")  # four segments
    assert "line 201 " in refused(
        capsys, "prepare", settings(tmp_path), "processes=2", "shard_bytes=1024"
    )
    assert "line 201 " in refused(capsys, "prepare", settings(tmp_path), "shard_bytes=1024")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert "a.jsonl.gz line 201 " in refused(
        capsys, "prepare", settings(tmp_path), "sources.0.files=[a.jsonl.gz]", "--again"
    )


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": ""}\n\n' + GOOD + b'{"text": " \\n\\t"}\n   \n' + GOOD
    )
    assert run("prepare", settings(tmp_path, held_out_share=0.0)) == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 2 and counts["left_out"] == {"empty": 4}


def test_a_byte_order_mark_and_a_missing_last_line_end_are_no_fault(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + GOOD.strip())
    assert run("prepare", settings(tmp_path, held_out_share=0.0)) == 0
    assert read_card(tmp_path / "shards/a/train").documents == 2


def test_a_source_of_nothing_but_empty_documents_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    assert "no document for training (0 read, 2 left out" in refused(
        capsys, "prepare", settings(tmp_path)
    )
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize(
    "files, words",
    [
        (["b.jsonl"], "does not exist. Did you mean a.jsonl?"),
        (["a*.json"], "matches no file. Did you mean a.jsonl?"),
        (["gone/*.jsonl"], "No file is in"),
        ([], "files of a is an empty list"),
    ],
)
def test_a_missing_file_is_named_with_its_neighbour(tmp_path, capsys, files, words):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    config = settings(tmp_path, [{"name": "a", "format": "jsonl", "files": files}])
    assert words in refused(capsys, "prepare", config)
    assert not (tmp_path / "shards").exists()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def table_bytes(how: str, table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    if how == "parquet":
        pyarrow.parquet.write_table(table, sink, row_group_size=100)
    else:
        with {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}[how](
            sink, table.schema
        ) as writer:
            writer.write_table(table, max_chunksize=100)
    return sink.getvalue().to_pybytes()


def broken_page() -> bytes:
    """A Parquet file of three row groups with the second's first page destroyed."""
    content = bytearray(table_bytes("parquet", pyarrow.table({"text": texts(300)})))
    at = (
        pyarrow.parquet.read_metadata(pyarrow.BufferReader(bytes(content)))
        .row_group(1)
        .column(0)
        .dictionary_page_offset
    )
    content[at : at + 60] = b"\xff" * 60
    return bytes(content)


def cut_between_batches(**more: list) -> bytes:
    """An Arrow stream that ends after its first batch, without the mark of its end."""
    table = pyarrow.table({"text": texts(300), **more})
    return table_bytes("stream", table.slice(0, 100))[:-8]


def old_stream() -> bytes:
    """As Arrow wrote streams before 0.15."""
    sink, table = pyarrow.BufferOutputStream(), pyarrow.table({"text": texts(5)})
    with pyarrow.ipc.new_stream(
        sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(use_legacy_format=True)
    ) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name, content, source, words",
    [
        ("a.jsonl.gz", half(gzip.compress(GOOD * 20_000)), "jsonl", "beyond line 9,"),
        ("a.jsonl.gz", b"", "jsonl", "is cut short"),
        ("a.jsonl.zst", b"", "jsonl", "is cut short"),
        ("a.parquet", b"PAR1 and no end", "parquet", "cannot be read beyond row 0"),
        (
            "a.parquet",
            half(table_bytes("parquet", pyarrow.table({"text": texts(300)}))),
            "parquet",
            "beyond row 0",
        ),
        ("a.parquet", broken_page(), "parquet", "cannot be read beyond row 100"),
        (
            "a.arrow",
            half(table_bytes("file", pyarrow.table({"text": texts(300)}))),
            "arrow",
            "is cut short",
        ),
        ("a.arrow", cut_between_batches(), "arrow", "is cut short"),
        ("a.arrow", cut_between_batches(z=[0] * 300), "arrow", "is cut short"),
        ("a.arrow", cut_between_batches(z=[2**32 - 1] * 300), "arrow", "is cut short"),
        ("a.arrow", old_stream()[:-4], "arrow", "is cut short"),
        ("a.arrow", b"", "arrow", "is cut short"),
        ("a.txt", b"fine\n\xff\n", "text", "line 2: byte 1 is not UTF-8"),
        (
            "a.parquet",
            table_bytes("parquet", pyarrow.table({"texts": ["x"]})),
            "parquet",
            "has no column 'text'. Did you mean texts?",
        ),
        (
            "a.parquet",
            table_bytes("parquet", pyarrow.table({"text": [5]})),
            "parquet",
            "column 'text' is int64; needed: text",
        ),
        (
            "a.arrow",
            table_bytes("file", pyarrow.table({"text": [["x"]]})),
            "arrow",
            "column 'text' is list<",
        ),
    ],
)
def test_a_broken_file_is_named_and_can_be_skipped(tmp_path, capsys, name, content, source, words):
    (tmp_path / name).write_bytes(content)
    good = tmp_path / f"good.{source}"
    if source in ("jsonl", "text"):
        write_jsonl(good, texts(5))
    else:
        good.write_bytes(
            table_bytes(source.replace("arrow", "file"), pyarrow.table({"text": texts(5)}))
        )
    broken = {"name": "a", "format": source, "files": [name]}
    err = refused(capsys, "prepare", settings(tmp_path, [broken]))
    assert name in err and words in err
    assert list((tmp_path / "shards").iterdir()) == []
    broken["files"].append(good.name)
    assert run("prepare", settings(tmp_path, [broken], held_out_share=0.0), "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    reason = "not utf-8" if source == "text" else "rest of a broken file"
    before = re.search(r"beyond (?:row|line) ([\d,]+)", err)
    kept = 1 if source == "text" else 5 + (int(before[1].replace(",", "")) if before else 0)
    assert counts["documents_read"] == kept and counts["left_out"] == {reason: 1}


def test_a_stream_of_before_arrow_0_15_is_read(tmp_path):
    (tmp_path / "a.arrow").write_bytes(old_stream())
    assert (
        run(
            "prepare",
            settings(
                tmp_path,
                [{"name": "a", "format": "arrow", "files": ["a.arrow"]}],
                held_out_share=0.0,
            ),
        )
        == 0
    )
    assert read_card(tmp_path / "shards/a/train").documents == 5


@pytest.mark.parametrize("other", ["d/../a.jsonl", "link.jsonl", "hard.jsonl", "*.jsonl"])
def test_one_file_under_two_names_is_refused(tmp_path, capsys, other):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    (tmp_path / "d").mkdir()
    if not other.startswith("*"):
        (tmp_path / "link.jsonl").symlink_to("a.jsonl")
        os.link(tmp_path / "a.jsonl", tmp_path / "hard.jsonl")
    config = settings(tmp_path, [{"name": "a", "format": "jsonl", "files": ["a.jsonl", other]}])
    if other.startswith("*"):  # the same name again is no mistake
        assert run("prepare", config) == 0
    else:
        assert f"{tmp_path}/a.jsonl and {tmp_path}/{other} are the same file" in refused(
            capsys, "prepare", config
        )


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    "content", [GOOD * 30, GOOD * 99 + b"cut", GOOD * 101, GOOD.replace(b"good", b"evil") * 100]
)
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path, capsys, monkeypatch, content, on_error
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 100)

    def change(*_) -> str:
        path.write_bytes(content)
        return "fastokens"

    monkeypatch.setattr(
        "data_prep.prepare.choose_encoder", change
    )  # after the plan, before the reading
    err = refused(capsys, "prepare", settings(tmp_path), f"on_error={on_error}")
    assert f"{path} was changed while" in err
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize(
    "document, place",
    [
        ("file", "a.txt line 4: byte 3"),
        ("line", "a.txt line 4: byte 3"),
        ("paragraph", "a.txt line 4: byte 3"),
    ],
)
def test_bad_bytes_of_plain_text_are_named_with_line_and_byte(tmp_path, capsys, document, place):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nab\xff\n\nlast\n")
    source = {"name": "a", "format": "text", "files": ["a.txt"], "document": document}
    assert f"{place} is not UTF-8" in refused(capsys, "prepare", settings(tmp_path, [source]))


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_empty_lines_at_the_beginning_count(tmp_path, capsys, document):
    (tmp_path / "a.txt").write_bytes(b"\n\r\n\nab\xff\n\nlast\n")
    source = {"name": "a", "format": "text", "files": ["a.txt"], "document": document}
    assert "a.txt line 4: byte 3 is not UTF-8" in refused(
        capsys, "prepare", settings(tmp_path, [source])
    )


def test_of_a_parquet_file_only_the_row_that_is_not_utf_8_is_left_out(tmp_path, capsys):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [*texts(30), "bad #*# bytes", *texts(5, seed=1)]}),
        sink,
        compression="none",
    )
    (tmp_path / "a.bin").write_bytes(sink.getvalue().to_pybytes().replace(b"#*#", b"#\xff#"))
    source = {"name": "a", "format": "parquet", "files": ["a.bin"]}
    config = settings(tmp_path, [source], held_out_share=0.0)
    assert "a.bin row 31: byte 6 of 'text' is not UTF-8" in refused(capsys, "prepare", config)
    assert run("prepare", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 35 and counts["left_out"] == {"not utf-8": 1}


def test_a_parquet_file_of_an_empty_row_group_is_empty(tmp_path):
    (tmp_path / "a.parquet").write_bytes(table_bytes("parquet", pyarrow.table({"text": texts(5)})))
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    with pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", empty.schema) as writer:
        writer.write_table(empty)
    assert pyarrow.parquet.read_metadata(tmp_path / "b.parquet").num_row_groups == 1
    source = {"name": "a", "format": "parquet", "files": ["*.parquet"]}
    assert run("prepare", settings(tmp_path, [source], held_out_share=0.0)) == 0
    assert read_card(tmp_path / "shards/a/train").documents == 5


def test_a_nul_character_and_a_null_row_are_named_by_line_and_row(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "a\\u0000b"}\n' + b"\0" * 40 + b"\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    for line, words in (
        ("jsonl", "line 2: the text holds a NUL character"),
        ("parquet", "row 2: 'text' is null"),
    ):
        config = settings(
            tmp_path, [{"name": "a", "format": line, "files": [f"a.{line}"]}], held_out_share=0.0
        )
        assert words in refused(capsys, "prepare", config)
    assert (
        run(
            "prepare",
            config,
            "on_error=skip",
            "sources.0.format=jsonl",
            "sources.0.files=[a.jsonl]",
        )
        == 0
    )
    assert read_card(tmp_path / "shards/a/train").recipe["counts"]["left_out"] == {
        "nul character": 1,
        "not json": 1,
    }


def test_a_line_of_50_mb_is_one_document(tmp_path):
    long = "word " * 10_000_000
    (tmp_path / "a.jsonl").write_bytes(GOOD + json.dumps({"text": long}).encode() + b"\n" + GOOD)
    source = JsonlSource(name="a", files=("a.jsonl",))
    blocks = list(readers.read_blocks(source, readers.find_files(source, tmp_path)[0]))
    found = [(block.first, [len(text) for text in readers.parse(block).texts]) for block in blocks]
    assert sum((lengths for _, lengths in found), []) == [19, len(long), 19] and found[0] == (
        1,
        [19],
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ("held_out_shar=0.1", "held_out_shar is unknown. Did you mean held_out_share?"),
        ("sources.0.tex=body", "sources.0.tex is unknown. Did you mean text?"),
        ("sources.0.format=json", "Did you mean jsonl?"),
        ("sources.0.name=../x", "cannot name a folder"),
        ("held_out_share=1", "needed: 0 or more and less than 1"),
        ("tokenizer=gone.json", "tokenizer gone.json does not exist"),
        ("max_tokens_per_document=10000000000000000", "needed: at least 8 and at most 4294967295"),
        ("compression=gzip", "compression is 'gzip'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, capsys, change, words):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    assert words in refused(capsys, "prepare", settings(tmp_path), change)
    assert not (tmp_path / "shards").exists()


def test_wrong_words_on_the_command_line_are_named(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    config = settings(tmp_path)
    assert "Did you mean --source?" in refused(capsys, "prepare", config, "--sorce", "a")
    assert "Did you mean a?" in refused(capsys, "prepare", config, "--source", "aa")
    assert "prep.yaml" in refused(capsys, "prepare", tmp_path / "prp.yaml")
    assert "prepare" in refused(capsys, "prepre", config)
    assert "does not exist" in refused(capsys, "verify", tmp_path / "gone")
    assert "holds no shards" in refused(capsys, "report", tmp_path)


def test_a_tokenizer_without_the_five_special_tokens_is_refused(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    config = settings(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    assert "lacks [CLS], [SEP]" in refused(capsys, "prepare", config)
    (tmp_path / "tokenizer.json").write_text("no json")
    assert "is no tokenizer.json" in refused(capsys, "prepare", config)


@pytest.fixture
def commands(tmp_path, monkeypatch) -> dict[str, tuple]:
    """Every command that writes to --out, ready to run but for the place."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", texts(200))
    assert run("prepare", settings(tmp_path)) == 0
    (tmp_path / "file").write_bytes(b"old")
    module = tmp_path / "library/one.py"
    module.parent.mkdir()
    sentence = (
        "This function reads the file and returns all of its lines in a list that is for the"
        " caller."
    )
    module.write_text("x = 1\n" * 100)
    (module.parent / "one.txt").write_text(
        "\n\n".join(f"{sentence[:-1]} of part {i}." for i in range(5))
    )
    monkeypatch.setattr(
        environment_corpus.sysconfig,
        "get_paths",
        lambda: {
            "stdlib": str(module.parent),
            "purelib": str(module.parent),
            "platlib": str(module.parent),
        },
    )
    return {
        "train": ("tokenizer", "train", "--files", "a.jsonl", "--vocab-size", "300"),
        "from-hf": ("tokenizer", "from-hf", "tokenizer.json"),
        "report": ("report", "shards"),
        "environment-corpus": ("environment-corpus", "--size-mb", "0.001"),
    }


@pytest.mark.parametrize("name", ["train", "from-hf", "report", "environment-corpus"])
def test_a_place_that_cannot_be_written_is_one_line_and_nothing_is_left(
    tmp_path, commands, capsys, monkeypatch, name
):
    before = bytes_of(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        err = refused(capsys, *commands[name], "--out", "new/deep")
        assert "new/deep: No space left on device. Make room, or name another place." in err
    assert "file is a file; needed: a folder" in refused(capsys, *commands[name], "--out", "file/x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write to read-only folders
        assert "may not be written to" in refused(capsys, *commands[name], "--out", "new/deep")
    in_the_way, words = "file", "file is a file; needed: a folder"
    if name in ("train", "from-hf"):
        in_the_way, words = "shards", "shards is a folder; needed: the name of a file"
    assert words in refused(capsys, *commands[name], "--out", in_the_way)
    assert bytes_of(tmp_path) == before and not (tmp_path / "new").exists()
    assert run(*commands[name], "--out", "new/deep") == 0


def test_a_full_disk_leaves_an_older_report_as_a_whole(tmp_path, commands, capsys, monkeypatch):
    assert run(*commands["report"], "--out", "made") == 0
    before = bytes_of(tmp_path / "made")

    def refuse(*_) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    assert "made: Read-only file system" in refused(capsys, *commands["report"], "--out", "made")
    assert bytes_of(tmp_path / "made") == before


def test_a_report_names_a_missing_and_a_damaged_tokenizer(tmp_path, commands, capsys):
    path = tmp_path / "shards/a/train/tokenizer.json"
    path.write_bytes(half(path.read_bytes()))
    assert "train/tokenizer.json is damaged" in refused(capsys, "report", "shards")
    path.unlink()
    err = refused(capsys, "report", "shards")
    assert "train/tokenizer.json cannot be read: No such file" in err and "Errno" not in err


@pytest.mark.parametrize("size", ["nan", "-1", "0", "inf", "1e300"])
def test_a_sample_size_that_is_no_size_is_refused(tmp_path, commands, capsys, size):
    err = refused(capsys, *commands["train"], f"--sample-mb={size}", "--out", "t.json")
    assert "needed: more than 0 and at most 1,000,000" in err


def test_options_are_not_guessed_from_their_first_letters(tmp_path, commands, capsys):
    err = refused(capsys, "prepare", "prep.yaml", "--sourc", "a")
    assert "--sourc is unknown. Did you mean --source? See data-prep prepare --help." in err


def test_a_folder_in_the_place_of_a_file_is_called_a_folder(tmp_path, commands, capsys):
    assert "tokenizer shards is a folder; needed: a tokenizer.json" in refused(
        capsys, "prepare", "prep.yaml", "tokenizer=shards"
    )
    assert "shards is a folder; needed: files" in refused(
        capsys, "tokenizer", "train", "--files", "shards", "--out", "t"
    )
    assert "shards/tokenizer.json does not exist; needed" in refused(
        capsys, "tokenizer", "from-hf", "shards", "--out", "t"
    )


@pytest.mark.parametrize(
    "command, words",
    [
        ("_prepare", "finished segments and sources are kept"),
        ("_train", "nothing half-made was left"),
        ("_verify", "were not checked"),
    ],
)
def test_ctrl_c_says_what_the_command_leaves(commands, capsys, monkeypatch, command, words):
    def interrupted(args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, command, interrupted)
    line = {
        "_prepare": ("prepare", "prep.yaml"),
        "_train": (*commands["train"], "--out", "t"),
        "_verify": ("verify", "x"),
    }
    assert run(*line[command]) == 130
    err = capsys.readouterr().err
    assert err.startswith("stopped") and words in err and err.count("\n") == 1
    assert ("source" in err) == (command == "_prepare")


def test_ctrl_c_while_training_a_tokenizer_leaves_nothing(tmp_path, commands, capsys, monkeypatch):
    def interrupted(block) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.tokenizer_training.parse", interrupted)
    assert run(*commands["train"], "--out", "new/t.json") == 130
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_ctrl_c_is_heard_while_the_library_trains(kind, tmp_path, commands, capsys, monkeypatch):
    """In the middle of one call of the library, which takes minutes, lets no signal through, and holds the tokenizer."""
    import signal

    began, ends = threading.Event(), threading.Event()

    def slow(words):
        # more than the library takes at a time before it begins
        yield from ["a b\n"] * 1000
        began.set()
        assert ends.wait(60)

    def press() -> None:
        began.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr("data_prep.tokenizer_training._repeated", slow)
    hand = threading.Thread(target=press)
    hand.start()
    try:
        assert run(*commands["train"], "--kind", kind, "--out", "new/t.json") == 130
        assert began.is_set() and not ends.is_set()
    finally:
        ends.set()
        hand.join()
    assert "nothing half-made was left" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_command_that_was_stopped_while_training_waits_for_no_thread(
    commands, capsys, monkeypatch
):
    """The library's own threads panic where Python ends before them."""

    def interrupted(args) -> None:
        raise KeyboardInterrupt

    def end(code) -> None:
        raise SystemExit(f"at once, {code}")

    monkeypatch.setattr(cli, "_train", interrupted)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("sys.argv", ["data-prep", *commands["train"], "--out", "t"])
    with pytest.raises(SystemExit, match="at once, 130"):
        cli.main()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_signal_that_asks_to_end_is_answered_with_how_to_go_on(name, monkeypatch, capsys):
    import signal

    from data_prep import cli
    from encoder.base.stopping import STOP_SIGNALS

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setattr(cli, "_prepare", lambda _: signal.raise_signal(getattr(signal, name)))
    try:
        assert cli.main(["prepare", "prep.yaml"]) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "Run the same command to go on" in capsys.readouterr().err
