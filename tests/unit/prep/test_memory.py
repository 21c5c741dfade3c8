"""Memory of a preparing process: bounded in bytes by the longest document, whatever the format and however large the file."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tracemalloc
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_prep import long_texts, tokenization, worker
from data_prep.cli import main
from data_prep.config import JsonlSource
from data_prep.long_texts import TooLong, cuts_of, parts_of
from data_prep.readers import Block, InputFile, find_files, parse, read_blocks
from data_prep.segments import Part, Segment, Stretch
from data_prep.tokenization import TextEncoder
from data_prep.worker import At, SegmentJob, SegmentPool
from encoder.base.errors import UserError
from encoder.data.shard_format import read_card
from tests.helpers.prep import run, settings, texts, tokenizer_bytes, write_jsonl
from tests.unit.prep.test_bad_input import refused

MB = 10**6
MOST = 2 * MB  # max_document_bytes here, and about the bytes of a row
ROWS = 24  # 48 MB in a file
SPREAD_MB, MOST_MB = (
    35,
    500,
)  # what runs differ by; Python, Arrow, both encoders and datasets take 100 to 320


def large_rows() -> list[str]:
    return ["the cat sees a house and runs over it. " * 48_000 + str(i) for i in range(ROWS)]


def write_table(folder: Path, kind: str) -> dict:
    table = pyarrow.table({"text": large_rows(), "n": list(range(ROWS))})
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    else:
        with {"arrow": pyarrow.ipc.new_file, "arrows": pyarrow.ipc.new_stream}[kind](
            path, table.schema
        ) as out:
            out.write_table(table)  # one record batch
    return {"format": kind.rstrip("s"), "files": [path.name]}


def write_rows(folder: Path, kind: str) -> dict:
    rows = [{"text": text, "n": i} for i, text in enumerate(large_rows())]
    if kind in ("parquet", "arrow", "arrows"):
        return write_table(folder, kind)
    if kind == "hub":
        (folder / "set/data").mkdir(parents=True)
        write_table(folder / "set/data", "parquet")
        (folder / "set/data/a.parquet").rename(folder / "set/data/train-0.parquet")
        return {"format": "hub", "dataset": str(folder / "set")}
    if kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / "a").write_bytes(gzip.compress(content, 1))
    elif kind == "json_array":
        (folder / "a").write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        with open(folder / "a", "w", newline="") as f:
            csv.writer(f).writerows(
                [["n", "text"], *[[row["n"], row["text"].replace(". ", '.\n"', 9)] for row in rows]]
            )
    elif kind == "too large":
        (folder / "a").write_bytes(
            gzip.compress(
                json.dumps({"text": "".join(large_rows())}).encode() + b'\n{"text": "x"}\n', 1
            )
        )
        return {"format": "jsonl", "files": ["a"]}
    return {"format": kind, "files": ["a"]}


@pytest.mark.parametrize(
    "kind",
    [
        "jsonl",
        "too large",
        *(
            pytest.param(k, marks=pytest.mark.matrix)
            for k in ("csv", "parquet", "json_array", "arrow", "arrows", "hub")
        ),
    ],
)
def test_memory_is_bounded_in_bytes_by_the_longest_document(tmp_path, monkeypatch, kind):
    """Counted: a file of six times as many rows of 2 MB takes no more, and all of it little."""
    configs = [prepared(tmp_path / str(rows), monkeypatch, kind, rows) for rows in (4, ROWS)]
    few, many = peaks_mb(configs)
    assert many < few + SPREAD_MB and many < MOST_MB, (
        f"{kind}: {few:.0f} MB for 8 MB, {many:.0f} MB for 48 MB"
    )
    for config, rows in zip(configs, (4, ROWS), strict=True):
        counts = read_card(config.parent / "shards/a/train").recipe["counts"]
        if kind == "too large":
            found = counts["documents_read"], counts["left_out"]
            assert found == (1, {"larger than max_document_bytes": 1})
        else:
            assert counts["documents_read"] == rows


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int) -> Path:
    """Settings of a preparation of `rows` documents of 2 MB."""
    monkeypatch.setattr("tests.unit.prep.test_memory.ROWS", rows)
    folder.mkdir()
    return settings(
        folder, [{"name": "a", **write_rows(folder, kind)}], held_out_share=0.0, shard_bytes=2**20
    )


# the second peak is of both preparations, so never below the first
PEAKS = """
import resource, sys
from data_prep.cli import main
most, *configs = sys.argv[1:]
for config in configs:
    code = main(["prepare", config, f"max_document_bytes={most}", "on_error=skip"])
    assert code == 0, code
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print("peak", max(resource.getrusage(who).ru_maxrss for who in whose))
"""


# the kernel counts to a process's peak what started it: not this one, which other tests have made large
SMALL = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


def peaks_mb(configs: list[Path]) -> list[float]:
    """The largest resident memory of a process, and of those that it starts, after each preparation."""
    measured = [sys.executable, "-c", PEAKS, str(MOST), *map(str, configs)]
    done = subprocess.run([sys.executable, "-c", SMALL, *measured], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(peak) / 1000 for peak in re.findall(r"^peak (\d+)", done.stdout, re.M)]


@pytest.mark.parametrize(
    "kind", ["jsonl", "line", "paragraph", "file", "json_array", "csv", "parquet", "arrow"]
)
def test_a_document_that_is_too_large_is_named_and_the_others_are_read(
    tmp_path, capsys, monkeypatch, kind
):
    monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", 700)
    documents = ["first", "x " * 3000, "between", "y " * 5000, "last"]
    rows = [{"text": text} for text in documents]
    source = {"name": "a", "format": kind, "files": ["a"]}
    if kind in ("line", "paragraph"):
        source |= {"format": "text", "document": kind}
        (tmp_path / "a").write_text({"line": "\n", "paragraph": "\n\n"}[kind].join(documents))
    elif kind == "file":
        source = {"name": "a", "format": "text", "files": ["?"]}
        for name, text in zip("abcde", documents, strict=True):
            (tmp_path / name).write_text(text)
    elif kind == "jsonl":
        (tmp_path / "a").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json_array":
        (tmp_path / "a").write_text(json.dumps(rows))
    elif kind == "csv":
        (tmp_path / "a").write_text("text\n" + "\n".join(documents) + "\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "a", row_group_size=2
        )
    else:
        with pyarrow.ipc.new_stream(tmp_path / "a", pyarrow.schema({"text": "string"})) as out:
            out.write_table(pyarrow.Table.from_pylist(rows))
    config = settings(tmp_path, [source], held_out_share=0.0, max_document_bytes=4000)
    place = {
        "file": "b has",
        "line": "a line 2 has",
        "paragraph": "a line 3 has",
        "jsonl": "a line 2 has",
        "json_array": "a item 2 has",
        "csv": "a line 3: its record has",
    }.get(kind, "a row 2 has")
    err = refused(capsys, "prepare", config)
    assert (
        place in err
        and "needed: at most max_document_bytes, 4,000. Raise max_document_bytes" in err
    )
    assert run("prepare", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    if (
        kind == "csv"
    ):  # most often a quote that was left open: the rest of the file counts as broken
        assert (counts["documents_read"], counts["left_out"]) == (1, {"rest of a broken file": 1})
    else:
        assert (counts["documents_read"], counts["left_out"]) == (
            3,
            {"larger than max_document_bytes": 2},
        )
    assert run("prepare", config, "max_document_bytes=100000", f"out={tmp_path / 'all'}") == 0
    assert read_card(tmp_path / "all/a/train").recipe["counts"]["documents_read"] == 5


def test_large_documents_are_found_wherever_pieces_end(tmp_path, monkeypatch):
    chance = random.Random(5)
    for _ in range(60):
        lines = [b"x" * chance.choice([1, 3, 30, 90, 200]) for _ in range(chance.randint(1, 12))]
        (tmp_path / "a").write_bytes(b"\n".join(lines) + b"\n" * chance.randint(0, 1))
        monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", chance.choice([1, 2, 7, 50, 1000]))
        source = JsonlSource(name="a", files=("a",))
        blocks = list(read_blocks(source, find_files(source, tmp_path)[0], most_bytes=91))
        assert b"".join(block.lines for block in blocks if block.lines).split() == [
            line for line in lines if len(line) < 91
        ]
        assert sum(block.too_large is not None for block in blocks) == sum(
            len(line) > 91 for line in lines
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """ModernBERT's structure; BERT's; that of cl100k and Llama 3; with a word of many words among its tokens."""
    plain = json.loads(tokenizer_bytes())
    made = {
        "ours": {},
        "bert": {
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "BertPreTokenizer"},
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                ],
            },
        },
        "llama": {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": long_texts._SPLITS[1]},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                ],
            }
        },
    }
    for name, change in made.items():
        (folder / f"{name}.json").write_text(json.dumps({**plain, **change}))
    return [folder / f"{name}.json" for name in made]


@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
def test_a_long_text_in_parts_has_the_ids_of_the_whole(tmp_path, monkeypatch, library):
    chance = random.Random(7)
    letters = [
        " ",
        " ",
        " ",
        "\n",
        "\n\n",
        "  ",
        "a",
        "B",
        "cat",
        "house",
        "é",
        "e\u0301",
        "\u0301",
        "日本",
        "。",
        "、",
        "1",
        "23",
        "'s",
        "-",
        "\t",
        "\r\n",
        "\u00a0",
        "[MASK]",
        "\U0001f600",
        "ß",
        "\u017f",
        ".",
        ",",
        "   x",
        "\u0130",
        "Σ",
    ]
    documents = ["".join(chance.choices(letters, k=400)) for _ in range(40)]
    for path in tokenizer_files(tmp_path):
        try:
            encoder = TextEncoder(path, library)
        except UserError:  # fastokens knows fewer structures
            assert library == "fastokens"
            continue
        assert cuts_of(path).place is not None
        monkeypatch.setitem(tokenization.BATCH_CHARS, library, 10**9)
        whole_T, whole_D = encoder.encode(documents)
        for most in (1, 5, 40):
            monkeypatch.setitem(tokenization.BATCH_CHARS, library, most)
            ids_T, lengths_D = encoder.encode(documents)
            assert np.array_equal(ids_T, whole_T) and np.array_equal(lengths_D, whole_D)
            assert (
                max(len(list(parts_of(text, cuts_of(path), most_chars=most))) for text in documents)
                > 3
            )


def test_tokenizers_of_unknown_structure_are_given_whole_texts(tmp_path):
    plain = json.loads(tokenizer_bytes())
    phrase = {**plain["added_tokens"][0], "content": "the cat", "special": False}
    for change in (
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}},
        {"pre_tokenizer": None},
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "_",
                "prepend_scheme": "always",
                "split": True,
            }
        },
        {"model": {**plain["model"], "type": "Unigram"}},
        {"added_tokens": [*plain["added_tokens"], phrase]},
    ):
        (tmp_path / "t.json").write_text(json.dumps({**plain, **change}))
        assert cuts_of(tmp_path / "t.json").place is None
        with pytest.raises(TooLong):
            list(parts_of("a cat " * 1_000_000, cuts_of(tmp_path / "t.json"), most_chars=10))


def test_a_text_without_the_end_of_a_word_is_left_out_by_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(long_texts, "MOST_UNCUT_CHARS", 2_000_000)
    write_jsonl(tmp_path / "a.jsonl", ["x", "ab" * 1_100_000, "some words " * 250_000])
    config = settings(tmp_path, held_out_share=0.0)
    assert "a.jsonl line 2: 2,200,000 characters" in refused(capsys, "prepare", config)
    assert run("prepare", config, "on_error=skip") == 0
    counts = read_card(tmp_path / "shards/a/train").recipe["counts"]
    assert (counts["documents_read"], counts["left_out"]) == (2, {"no end of a word": 1})


def _dies(job: object, pipe: connection.Connection) -> None:
    """In the place of worker._work: dies as native code and the kernel do."""
    asked = pipe.recv()
    pipe.send(At(place="big.jsonl, line 5 and on"))
    os.kill(os.getpid(), int(getattr(asked, "made_from_sha256", signal.SIGABRT)))


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGABRT, 1), (signal.SIGKILL, 1), (signal.SIGSEGV, 1), (signal.SIGKILL, 2)],
)
def test_a_process_that_dies_is_one_sentence_with_file_and_row(monkeypatch, number, processes):
    monkeypatch.setattr(worker, "_work", _dies)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    file = InputFile(name="big.jsonl", place="big.jsonl", bytes=1)
    segment = Segment(number=0, begin=0, bytes=1, stretches=(Stretch(file=file),))
    job = SegmentJob(
        source=JsonlSource(name="a", files=("x",)),
        encoder="fastokens",
        part=Part(),
        folder="x",
        segment=segment,
        made_from_sha256=str(int(number)),
    )
    pool = SegmentPool(None, processes)
    try:
        words = (
            rf"died by signal {int(number)} \({number.name}\) at big\.jsonl, line 5 and on.*without"
            r" this file"
        )
        with pytest.raises(UserError, match=words):
            pool.make([job], lambda done: None)
    finally:
        pool.close()


def test_a_lack_of_memory_is_one_sentence_with_file_and_row(tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    config = settings(tmp_path)

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr("data_prep.prepare.choose_encoder", lambda *_: "fastokens")
    monkeypatch.setattr(worker, "encode_pieces", fails)
    err = refused(capsys, "prepare", config)
    assert (
        "memory ran out at" in err
        and "a.jsonl, line 1 and on. Run it again with fewer processes" in err
    )
    assert parse and list((tmp_path / "shards").iterdir()) == []


def test_no_file_of_others_is_read_by_the_process_that_commands(tmp_path, capsys, monkeypatch):
    """Native code that dies in the first block, where the encoder is checked, ends in a sentence, too."""
    monkeypatch.setattr("data_prep.worker._work", _dies)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    with pytest.raises(SystemExit) as left:
        sys.exit(main(["prepare", str(settings(tmp_path))]))
    err = capsys.readouterr().err
    assert left.value.code == 2 and "died by signal 6 (SIGABRT) at" in err and err.count("\n") == 1
    assert list((tmp_path / "shards").iterdir()) == []


def test_millions_of_lists_in_unused_fields_are_not_made_values_of(monkeypatch):
    monkeypatch.setattr("data_prep.readers.parsing.LARGE_LINE_BYTES", 10_000)
    monkeypatch.setattr("data_prep.readers.parsing.MOST_CONTAINERS", 10_000)
    line = b'{"text": "a b", "z": [' + b"[], " * 20_000 + b'{"": 0}], "n": 3}'
    source = JsonlSource(name="a", files=("x",))
    tracemalloc.start()
    try:
        parsed = parse(
            Block(source=source, file="a.jsonl", first=1, lines=line + b'\n{"text": "c"}\n')
        )
        assert parsed.texts == ["a b", "c"] and tracemalloc.get_traced_memory()[1] < 4 * len(line)
    finally:
        tracemalloc.stop()
