"""Kinds of files: known by their first bytes, whatever their names; what is none of ours is one bad file with a sentence."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import random
import sqlite3
import subprocess
import tarfile
import zipfile

import pyarrow
import pytest

from data_prep.config import JsonlSource
from data_prep.readers import packed
from data_prep.readers.kinds import kind_of
from data_prep.readers.mds import TextShard, _decoder
from encoder.base import log
from encoder.data.shard_format import read_card
from tests.helpers.prep import ids_of, run, settings, texts, write_jsonl
from tests.unit.prep.test_bad_input import refused, table_bytes
from tests.unit.prep.test_readers import texts_of

DOCUMENTS = texts(60)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(log._state, "said", set())
    monkeypatch.setattr("data_prep.prepare.choose_encoder", lambda *_: "fastokens")


def zstd(data: bytes, *options: str) -> bytes:
    """By the zstd command where it is, which writes a window without the size; else by Arrow."""
    try:
        return subprocess.run(
            ["zstd", "-c", *options], input=data, capture_output=True, check=True
        ).stdout
    except FileNotFoundError:
        return pyarrow.compress(data, codec="zstd", asbytes=True)


def zip_of(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", data)
    return out.getvalue()


def tar_of(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def sqlite_of(folder) -> bytes:
    with sqlite3.connect(folder / "x.db") as db:
        db.execute("create table t (text)")
    return (folder / "x.db").read_bytes()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.bz2", "a.xz", "a.gzip", "a.zstd", "a.lz4", "a"]
)
@pytest.mark.parametrize(
    "pack",
    [
        bytes,
        gzip.compress,
        bz2.compress,
        lzma.compress,
        zstd,
        lambda data: bz2.compress(data[:999]) + bz2.compress(data[999:]),
        lambda data: lzma.compress(data[:999]) + b"\0" * 8 + lzma.compress(data[999:]),
        lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    ],
)
def test_a_packed_file_is_read_by_its_content_whatever_its_name(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(packed, "STEP_BYTES", 100)
    (tmp_path / name).write_bytes(pack(LINES))
    assert texts_of(JsonlSource(name="a", files=(name,)), tmp_path) == (DOCUMENTS, {})


FOREIGN = {
    "zip": (lambda _: zip_of(LINES), "is a zip archive", "Unpack it (unzip)"),
    "tar": (lambda _: tar_of(LINES), "is a tar archive", "tar xf"),
    "tar.gz": (
        lambda _: gzip.compress(tar_of(LINES)),
        "holds a tar archive inside a gzip file",
        "tar xf",
    ),
    "gz.gz": (
        lambda _: gzip.compress(gzip.compress(LINES)),
        "holds a gzip file inside a gzip file",
        "Unpack it",
    ),
    "lz4": (
        lambda _: b"\x04\x22\x4d\x18" + random.Random(2).randbytes(500),
        "is an lz4 file",
        "lz4 -d",
    ),
    "7z": (lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(60), "is a 7z archive", "7z x"),
    "lzma": (lambda _: lzma.compress(LINES, format=lzma.FORMAT_ALONE), "is an lzma file", "xz -d"),
    "sqlite": (sqlite_of, "is an SQLite database", "JSON lines or CSV"),
    "parquet": (
        lambda _: table_bytes("parquet", pyarrow.table({"text": DOCUMENTS})),
        "is a Parquet file",
        "Set format: parquet",
    ),
    "arrow": (
        lambda _: table_bytes("file", pyarrow.table({"text": DOCUMENTS})),
        "is an Arrow file",
        "Set format: arrow",
    ),
    "stream": (
        lambda _: table_bytes("stream", pyarrow.table({"text": DOCUMENTS})),
        "is an Arrow file",
        "Set format: arrow",
    ),
    "utf-16": (lambda _: LINES.decode().encode("utf-16"), "is text in UTF-16", "iconv"),
    "utf-16-le": (lambda _: LINES.decode().encode("utf-16-le"), "is text in UTF-16", "iconv"),
    "utf-32": (lambda _: LINES.decode().encode("utf-32"), "is text in UTF-32", "iconv"),
    "utf-32-be": (lambda _: LINES.decode().encode("utf-32-be"), "is text in UTF-32", "iconv"),
    "utf-32-le": (lambda _: LINES.decode().encode("utf-32-le"), "is text in UTF-32", "iconv"),
    "nul": (lambda _: bytes(4000), "is nothing but NUL bytes", "Fetch the file again"),
    "random": (
        lambda _: random.Random(1).randbytes(9000),
        "is no text, but bytes of an unknown kind",
        "file, hexdump",
    ),
    "pdf": (lambda _: b"%PDF-1.7\n" + bytes(200), "is a PDF document", "Give the text"),
    "lfs": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "is a pointer of Git LFS",
        "git lfs pull",
    ),
    "html": (
        lambda _: b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n",
        "is HTML or XML",
        "Fetch it again",
    ),
    "array": (
        lambda _: json.dumps([{"text": t} for t in DOCUMENTS]).encode(),
        "is one JSON array",
        "Set format: json_array",
    ),
    "pretty": (
        lambda _: json.dumps({"text": "x", "n": 1}, indent=1).encode(),
        "holds a JSON object over several lines",
        "jq -c",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_one_bad_file_and_named(tmp_path, capsys, kind):
    content, what, to_do = FOREIGN[kind]
    (tmp_path / "b.jsonl").write_bytes(content(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    config = settings(
        tmp_path, [{"name": "a", "format": "jsonl", "files": ["*.jsonl"]}], held_out_share=0.0
    )
    err = refused(capsys, "prepare", config)
    assert (
        f"b.jsonl {what}" in err
        and "the source says format: jsonl" in err
        and to_do in err
        and "on_error: skip" in err
    )
    assert not (tmp_path / "shards/a").exists()
    assert run("prepare", config, "on_error=skip") == 0
    said = capsys.readouterr()
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert counts["documents_read"] == 60 and counts["left_out"] == {"rest of a broken file": 1}
    assert (
        list(counts["bad_files"]) == ["b.jsonl"]
        and "bad files              1 of 2: b.jsonl" in said.out
    )
    assert (
        f"b.jsonl {what}" in said.err
        and "1 of its files could not be read as jsonl, first b.jsonl" in said.err
    )
    assert (
        run(
            "prepare",
            config,
            "on_error=skip",
            "sources.0.files=[b.jsonl]",
            f"out={tmp_path / 'other'}",
        )
        == 2
    )
    err = capsys.readouterr().err
    assert (
        "no document for training" in err
        and what in err
        and not list((tmp_path / "other").iterdir())
    )


@pytest.mark.parametrize(
    "source, content, words",
    [
        ("parquet", LINES, "is text (JSON lines; set format: jsonl)"),
        ("arrow", LINES, "is text (JSON lines; set format: jsonl)"),
        (
            "parquet",
            gzip.compress(table_bytes("parquet", pyarrow.table({"text": DOCUMENTS}))),
            "holds a Parquet file inside a gzip",
        ),
        ("parquet", table_bytes("file", pyarrow.table({"text": DOCUMENTS})), "is an Arrow file"),
        ("arrow", table_bytes("parquet", pyarrow.table({"text": DOCUMENTS})), "is a Parquet file"),
        ("json_array", LINES, "begins with a JSON object, as JSON lines do"),
        ("csv", LINES, "is JSON; the source says format: csv"),
        ("text", table_bytes("parquet", pyarrow.table({"text": DOCUMENTS})), "is a Parquet file"),
        ("text", gzip.compress(tar_of(LINES)), "holds a tar archive inside a gzip file"),
        ("csv", zip_of(LINES), "is a zip archive"),
        ("tsv", bz2.compress(zip_of(LINES)), "holds a zip archive inside a bzip2 file"),
    ],
)
def test_content_that_is_not_the_format_is_called_what_it_is(
    tmp_path, capsys, source, content, words
):
    (tmp_path / "a").write_bytes(content)
    assert words in refused(
        capsys, "prepare", settings(tmp_path, [{"name": "a", "format": source, "files": ["a"]}])
    )


@pytest.mark.parametrize("kind", ["parquet", "file"])
def test_a_table_that_has_a_column_twice_is_told_so(tmp_path, capsys, kind):
    table = pyarrow.Table.from_arrays([pyarrow.array(DOCUMENTS)] * 2, names=["text", "text"])
    (tmp_path / "a").write_bytes(table_bytes(kind, table))
    source = {"name": "a", "format": "parquet" if kind == "parquet" else "arrow", "files": ["a"]}
    assert "has the column 'text' 2 times" in refused(
        capsys, "prepare", settings(tmp_path, [source])
    )


def test_json_of_any_depth_in_an_mds_column_is_a_broken_sample():
    with pytest.raises(ValueError, match="nested too deeply"):
        _decoder(
            TextShard(
                samples=1,
                bytes=1,
                names=("text",),
                encodings=("json",),
                sizes=(None,),
                compression=None,
            ),
            "text",
        )(b"[" * 50_000 + b"]" * 50_000)


def test_text_of_any_language_and_a_stray_nul_is_text():
    for text in (
        "Grüße aus Köln, naïve café. ",
        "Привет, мир. ",
        "日本語の文章。",
        "שלום ",
        "\x1b[1mbold\x1b[0m of a terminal ",
    ):
        for encoding in ("utf-8", "utf-8-sig"):
            assert kind_of((text * 300).encode(encoding)[:8192]).word == "text"
    assert kind_of("Grüße aus Köln, naïve café. ".encode("latin-1") * 300).word == "text"
    assert kind_of("Привет, мир. ".encode("koi8-r") * 300).word == "text"
    assert kind_of("日本語の文章。".encode("shift-jis") * 300).word == "text"
    assert (
        kind_of(b"a line\n" * 100 + b"\0" * 40 + b"\n").word == "text"
        and kind_of(b"").word == "text"
    )
    assert (
        kind_of(b"ORCHESTRA and PARENTS " * 20).word
        == kind_of(b"PARENTS " * 40).word
        == kind_of(b"LZIP? " * 40).word
        == "text"
    )


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, functools.partial(lzma.compress, preset=1), zstd]
)
def test_a_packed_file_cut_short_is_read_to_its_break(tmp_path, capsys, pack):
    chance = random.Random(0)
    lines = [json.dumps({"text": f"{chance.getrandbits(400):x}"}) + "\n" for _ in range(20_000)]
    content = pack("".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) * 2 // 3])
    config = settings(tmp_path, held_out_share=0.0)
    assert "cannot be read beyond line" in refused(
        capsys, "prepare", config, "sources.0.files=[a.jsonl.gz]"
    )
    assert run("prepare", config, "sources.0.files=[a.jsonl.gz]", "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert (
        1_000 < counts["documents_read"] < 15_000
        and counts["left_out"]["rest of a broken file"] == 1
    )
    assert list(counts["bad_files"]) == ["a.jsonl.gz"]


def test_zstd_of_a_long_window_is_read_up_to_the_setting_which_is_named(tmp_path, capsys):
    """A frame by hand: magic, descriptor without content size, window of 2 GiB, one raw block, the last."""

    def frame(exponent: int) -> bytes:
        return (
            b"\x28\xb5\x2f\xfd\x00"
            + bytes([exponent << 3])
            + (len(LINES) << 3 | 1).to_bytes(3, "little")
            + LINES
        )

    (tmp_path / "a.jsonl.zst").write_bytes(frame(21))
    config = settings(tmp_path, [{"name": "a", "format": "jsonl", "files": ["a.jsonl.zst"]}])
    for on_error in ("stop", "skip"):
        assert run("prepare", config, f"on_error={on_error}") == 2
        err = capsys.readouterr().err
        assert (
            "a.jsonl.zst needs a zstd window of 2,147,483,648 bytes" in err
            and "zstd_window_bytes: 2147483648" in err
        )
        assert "Fetch the file again" not in err
    assert run("prepare", config, "sources.0.zstd_window_bytes=2147483648") == 0
    (tmp_path / "b.jsonl.zst").write_bytes(frame(17))
    usual = settings(
        tmp_path / "b",
        [{"name": "a", "format": "jsonl", "files": ["b.jsonl.zst"]}],
        root=str(tmp_path),
    )
    assert run("prepare", usual) == 0
    assert ids_of(tmp_path / "shards/a/train") == ids_of(tmp_path / "b/shards/a/train")
    # where only a later frame is that wide, Arrow meets it
    (tmp_path / "c.jsonl.zst").write_bytes(frame(17) + frame(21))
    assert run("prepare", config, "sources.0.files=[c.jsonl.zst]", f"out={tmp_path / 'c'}") == 2
    err = capsys.readouterr().err
    assert "wider than the settings allow" in err and "zstd_window_bytes: 2147483648" in err
    wide = (
        "sources.0.files=[c.jsonl.zst]",
        f"out={tmp_path / 'c'}",
        "sources.0.zstd_window_bytes=2147483648",
    )
    assert run("prepare", config, *wide) == 0
    assert "needed: 1,024 to 2,147,483,648" in refused(
        capsys, "prepare", config, "sources.0.zstd_window_bytes=5"
    )
