"""Bad input of data-prep: one line with the place, exit code 2, and nothing half-written."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from encoder.data.shard_format import read_card
from tests.unit.prep_helpers import run, settings, texts, write_jsonl

GOOD = json.dumps({"text": "a good line of text"}).encode() + b"\n"


def refused(capsys, *command) -> str:
    """The one line on stderr of a command that must fail with code 2."""
    assert run(*command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.mark.parametrize("line, reason, words", [
    (b"{not json}\n", "not json", ["line 3 is not JSON", "needed: one JSON object a line"]),
    (b'{"txt": "x"}\n', "no text", ["line 3 has no 'text'", "Did you mean txt?"]),
    (b"{}\n", "no text", ["line 3 has no 'text'"]),
    (b'{"text": 5}\n', "no text", ["line 3: 'text' is a number", "needed: text"]),
    (b'{"text": null}\n', "no text", ["line 3: 'text' is null"]),
    (b'["text"]\n', "not json", ["line 3 is a list", "needed: a JSON object"]),
    (b'{"text": "\xff"}\n', "not utf-8", ["line 3: byte 11 is not UTF-8"]),
    (b'{"text": "half \\ud800 pair"}\n', "not unicode", ["line 3: the text holds half a surrogate pair"]),
    (b"[" * 100_000 + b"\n", "not json", ["line 3 is not JSON"]),
])
def test_a_bad_line_is_named_with_file_and_number_and_can_be_skipped(tmp_path, capsys, line, reason, words):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + GOOD * 20)
    config = settings(tmp_path, held_out_share=0.0)
    err = refused(capsys, "prepare", config)
    assert str(tmp_path / "a.jsonl") in err and all(word in err for word in words) and "on_error: skip" in err
    assert list((tmp_path / "shards").iterdir()) == []
    assert run("prepare", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 21 and counts["left_out"] == {"empty": 1, reason: 1}


def test_the_first_bad_line_is_named_also_by_several_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", 300)
    monkeypatch.setattr("data_prep.prepare.BLOCK_BYTES", 300)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 40 + b"{\n" + GOOD * 40 + b"{\n")
    assert "line 41 " in refused(capsys, "prepare", settings(tmp_path), "processes=2")


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n\n' + GOOD + b'{"text": " \\n\\t"}\n   \n' + GOOD)
    assert run("prepare", settings(tmp_path, held_out_share=0.0)) == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 2 and counts["left_out"] == {"empty": 4}


def test_a_byte_order_mark_and_a_missing_last_line_end_are_no_fault(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + GOOD.strip())
    assert run("prepare", settings(tmp_path, held_out_share=0.0)) == 0
    assert read_card(tmp_path / "shards/a/train").documents == 2


def test_a_source_of_nothing_but_empty_documents_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    assert "no document for training (0 read, 2 left out" in refused(capsys, "prepare", settings(tmp_path))
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize("files, words", [
    (["b.jsonl"], "does not exist. Did you mean a.jsonl?"), (["a*.json"], "matches no file. Did you mean a.jsonl?"),
    (["gone/*.jsonl"], "No file is in"), ([], "files of a is an empty list")])
def test_a_missing_file_is_named_with_its_neighbour(tmp_path, capsys, files, words):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    config = settings(tmp_path, [{"name": "a", "format": "jsonl", "files": files}])
    assert words in refused(capsys, "prepare", config)
    assert not (tmp_path / "shards").exists()


def half(content: bytes) -> bytes:
    return content[:len(content) // 2]


@pytest.mark.parametrize("name, content, source, words", [
    ("a.jsonl.gz", half(gzip.compress(json.dumps(texts(500)).encode())), {"format": "jsonl"}, "cannot be read to its end"),
    ("a.jsonl.gz", GOOD, {"format": "jsonl"}, "Not a gzipped file"),
    ("a.jsonl.zst", GOOD, {"format": "jsonl"}, "cannot be read to its end"),
    ("a.parquet", b"PAR1 and no end", {"format": "parquet"}, "cannot be read as parquet"),
    ("a.txt", b"fine\n\xff\n", {"format": "text"}, "byte 6 is not UTF-8"),
])
def test_a_broken_file_is_named_and_can_be_skipped(tmp_path, capsys, name, content, source, words):
    (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "good.jsonl", texts(5))
    broken = {"name": "a", "files": [name], **source}
    err = refused(capsys, "prepare", settings(tmp_path, [broken]))
    assert name in err and words in err
    assert list((tmp_path / "shards").iterdir()) == []
    if source["format"] == "jsonl":
        broken["files"].append("good.jsonl")
        assert run("prepare", settings(tmp_path, [broken], held_out_share=0.0), "on_error=skip") == 0
        counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
        assert counts["documents_read"] == 5 and counts["left_out"] == {"unreadable file or its end": 1}


def test_a_missing_column_of_parquet_is_named(tmp_path, capsys):
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["x"]}), tmp_path / "a.parquet")
    config = settings(tmp_path, [{"name": "a", "format": "parquet", "files": ["a.parquet"]}])
    assert "has no column 'text'. Did you mean texts?" in refused(capsys, "prepare", config, "on_error=skip")


@pytest.mark.parametrize("change, words", [
    ("held_out_shar=0.1", "held_out_shar is unknown. Did you mean held_out_share?"),
    ("sources.0.tex=body", "sources.0.tex is unknown. Did you mean text?"),
    ("sources.0.format=json", "Did you mean jsonl?"),
    ("sources.0.name=../x", "cannot name a folder"),
    ("held_out_share=1", "needed: 0 or more and less than 1"),
    ("tokenizer=gone.json", "tokenizer gone.json does not exist"),
    ("compression=gzip", "compression is 'gzip'"),
])
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
