"""prepare: the same bytes every time, nothing lost, nothing half-made, nothing done twice."""

from __future__ import annotations

import errno
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.ledger import open_ledger
from data_prep.segments import Part
from data_prep.shards import ShardWriter, read_shard
from encoder.base import log
from encoder.data.shard_format import Card, SpecialIds, read_card, read_index, read_lengths
from tests.helpers.prep import bytes_of, ids_of, run, settings, texts, write_jsonl
from tests.helpers.shards import mds_writer


@pytest.fixture(autouse=True)
def every_warning_again(monkeypatch):
    monkeypatch.setattr(log._state, "said", set())


def test_shards_are_the_same_bytes_on_one_process_and_on_two(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_prep.readers.BLOCK_BYTES", 2000
    )  # many blocks, so that two processes could swap them
    write_jsonl(tmp_path / "a.jsonl", texts(300))
    config = settings(tmp_path, shard_bytes=4096)
    assert run("prepare", config) == 0
    assert run("prepare", config, "processes=2", f"out={tmp_path / 'two'}") == 0
    assert run("prepare", config, f"out={tmp_path / 'again'}") == 0
    one = bytes_of(tmp_path / "shards")
    assert one == bytes_of(tmp_path / "two") == bytes_of(tmp_path / "again")
    assert len([name for name in one if name.endswith(".mds")]) > 5
    assert {
        "a/train/card.json",
        "a/train/lengths.bin",
        "a/train/tokenizer.json",
        "a/held_out/card.json",
    } <= set(one)


def test_processes_hold_no_semaphore_that_a_kill_would_leave_behind(tmp_path, monkeypatch):
    def refuse(*_, **__) -> None:
        raise AssertionError("a semaphore")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    write_jsonl(tmp_path / "a.jsonl", texts(200))
    assert run("prepare", settings(tmp_path), "processes=2", "shard_bytes=1024") == 0


def test_documents_and_tokens_are_conserved(tmp_path, capsys):
    documents = [*texts(80, longest=300), "", "  \n "]
    write_jsonl(tmp_path / "a.jsonl", documents)
    assert run("prepare", settings(tmp_path), "max_tokens_per_document=64") == 0
    train, held_out = (tmp_path / "shards/a" / split for split in ("train", "held_out"))
    counts = read_card(train).recipe["counts"]
    assert (
        counts["documents_read"] == 80 == counts["documents_train"] + counts["documents_held_out"]
    )
    assert counts["left_out"] == {"empty": 2}
    written = ids_of(train) + ids_of(held_out)
    assert len(written) == counts["pieces"] and max(map(len, written)) <= 64
    assert (
        sum(map(len, written))
        == counts["tokens"]
        == counts["content_tokens"] + 2 * counts["pieces"]
    )
    assert [len(s) for s in ids_of(train)] == read_lengths(train, read_card(train)).tolist()
    assert "82 in = " in capsys.readouterr().out


def test_held_out_documents_do_not_depend_on_order_or_files(tmp_path):
    documents = texts(200)
    write_jsonl(tmp_path / "x/a.jsonl", documents)
    write_jsonl(tmp_path / "y/a.jsonl", documents[120:][::-1])
    write_jsonl(tmp_path / "y/b.jsonl", documents[:120])
    assert run("prepare", settings(tmp_path / "x")) == 0
    two_files = [{"name": "a", "format": "jsonl", "files": ["*.jsonl"]}]
    assert run("prepare", settings(tmp_path / "y", two_files)) == 0
    for split in ("train", "held_out"):
        x, y = (sorted(ids_of(tmp_path / place / "shards/a" / split)) for place in "xy")
        assert x == y and x


def test_streaming_reads_the_same_ids_back(tmp_path):
    from streaming import LocalDataset

    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", settings(tmp_path), "shard_bytes=2048") == 0
    folder = tmp_path / "shards/a/train"
    theirs = [sample["input_ids"] for sample in LocalDataset(str(folder))]
    assert all(ids.dtype == np.uint16 for ids in theirs)
    assert [ids.tolist() for ids in theirs] == ids_of(folder)


@pytest.mark.parametrize(
    "dtype, compression", [(np.uint16, None), (np.uint32, None), (np.uint16, "zstd")]
)
def test_shards_have_the_bytes_of_streamings_own_writer(tmp_path, dtype, compression):
    lengths_P = np.array([2, 255, 256, 65535, 65536, 3])  # around the widths of a shape's numbers
    ids_T = np.arange(lengths_P.sum()).astype(dtype)
    name = np.dtype(dtype).name
    ours = ShardWriter(
        tmp_path, "train", dtype=np.dtype(dtype), shard_bytes=2**18, compression=compression
    )
    for half in (slice(0, 3), slice(3, 6)):
        ids_of_half = ids_T[lengths_P[: half.start].sum() :][: lengths_P[half].sum()]
        ours.add(ids_of_half, lengths_P[half], np.ones(3, bool))
    entries = ours.finish()
    with mds_writer(
        columns={"input_ids": f"ndarray:{name}"},
        out=str(tmp_path / "theirs"),
        size_limit=2**18,
        compression=compression,
        hashes=["sha256"],
    ) as theirs:
        for ids in np.split(ids_T, np.cumsum(lengths_P)[:-1]):
            theirs.write({"input_ids": ids})
    as_theirs = json.loads(json.dumps(entries, sort_keys=True).replace("train.", "shard."))
    assert as_theirs == read_index(tmp_path / "theirs") and len(entries) > 1
    for path in tmp_path.glob("train.*"):
        assert (
            path.read_bytes()
            == (tmp_path / "theirs" / path.name.replace("train", "shard")).read_bytes()
        )
    card = Card(
        source="a",
        split="train",
        tokenizer_sha256="",
        vocab_size=9,
        documents=0,
        tokens=0,
        max_tokens_per_document=9,
        specials=SpecialIds(
            cls_id=0, sep_id=1, pad_id=2, mask_id=3, unk_id=4, all_special=tuple(range(5))
        ),
        dtype=name,
        index_sha256="",
        lengths_sha256="",
    )
    read = [ids for entry in entries for ids in read_shard(tmp_path, entry, card=card)]
    assert np.array_equal(np.concatenate(read), ids_T)


@pytest.mark.parametrize(
    "name, source",
    [
        ("a.jsonl.gz", {"format": "jsonl"}),
        ("a.jsonl.zst", {"format": "jsonl"}),
        ("a.parquet", {"format": "parquet"}),
        ("a.txt", {"format": "text", "document": "line"}),
    ],
)
def test_every_format_gives_the_ids_of_plain_jsonl(tmp_path, name, source):
    documents = texts(40)
    write_jsonl(tmp_path / "a.jsonl", documents)
    raw = (tmp_path / "a.jsonl").read_bytes()
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(raw))
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(tmp_path / name), "zstd") as f:
            f.write(raw)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(
            pyarrow.table({"n": list(range(40)), "text": documents}), tmp_path / name
        )
    else:
        (tmp_path / name).write_text("\n".join(documents), encoding="utf-8")
    both = [
        {"name": "a", "format": "jsonl", "files": ["a.jsonl"]},
        {"name": "b", "files": [name], **source},
    ]
    assert run("prepare", settings(tmp_path, both)) == 0
    assert ids_of(tmp_path / "shards/a/train") == ids_of(tmp_path / "shards/b/train")


def test_zstd_shards_hold_the_same_samples(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    config = settings(tmp_path)
    assert (
        run("prepare", config)
        == run("prepare", config, "compression=zstd", f"out={tmp_path / 'small'}")
        == 0
    )
    assert ids_of(tmp_path / "shards/a/train") == ids_of(tmp_path / "small/a/train")
    assert (tmp_path / "small/a/train/shard.00000.mds.zstd").is_file()
    assert run("verify", tmp_path / "small") == 0


def test_a_finished_source_is_not_made_again(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config = settings(tmp_path)
    assert run("prepare", config) == 0
    before = (tmp_path / "shards/a").stat().st_ino
    assert run("prepare", config, "processes=2") == 0
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "shards/a").stat().st_ino == before


def test_a_source_made_before_says_what_was_left_out_of_it_and_merge_takes_settings_after_options(
    tmp_path, capsys
):
    write_jsonl(tmp_path / "a.jsonl", [*texts(60), ""])
    config = settings(tmp_path)
    assert run("prepare", config) == 0
    capsys.readouterr()
    assert run("merge", config, "--source", "a", "processes=1") == 0
    assert "documents held out, 1 left out (" in capsys.readouterr().out


def test_a_changed_recipe_is_refused_and_made_anew_only_on_demand(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config = settings(tmp_path)
    assert run("prepare", config) == 0
    assert run("prepare", config, "max_tokens_per_document=32") == 2
    assert "max_tokens_per_document was 8192, is 32" in capsys.readouterr().err
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", config) == 2
    assert "--again" in capsys.readouterr().err
    assert run("prepare", config, "--again") == 0
    assert read_card(tmp_path / "shards/a/train").recipe["counts"]["documents_read"] == 60
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["a"]


def test_a_folder_that_is_no_finished_source_is_never_removed(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    (tmp_path / "shards/a").mkdir(parents=True)
    (tmp_path / "shards/a/mine.txt").write_text("precious")
    assert run("prepare", settings(tmp_path), "--again") == 2
    assert "is no finished source" in capsys.readouterr().err
    assert (tmp_path / "shards/a/mine.txt").read_text() == "precious"


def test_leftovers_of_a_killed_run_are_thrown_away(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config = settings(tmp_path)
    leftover = tmp_path / "shards/.a.part/train"
    leftover.mkdir(parents=True)
    (leftover / "shard.00000.mds").write_bytes(b"half")
    assert run("prepare", config) == 0
    assert run("prepare", config, f"out={tmp_path / 'fresh'}") == 0
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    "error, code, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk of"),
        (KeyboardInterrupt(), 130, "Run the same command"),
    ],
)
def test_a_run_broken_in_the_middle_leaves_nothing_and_can_be_repeated(
    tmp_path, monkeypatch, capsys, error, code, words
):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config, real = settings(tmp_path), ShardWriter.finish

    def breaks(self, *rest):
        raise error

    monkeypatch.setattr(ShardWriter, "finish", breaks)
    assert run("prepare", config) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert list((tmp_path / "shards").iterdir()) == []
    monkeypatch.setattr(ShardWriter, "finish", real)
    assert run("prepare", config) == 0


def test_two_runs_do_not_make_the_same_source_at_once(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config = settings(tmp_path)
    (tmp_path / "shards").mkdir()
    with open_ledger(tmp_path / "shards/a", Part()):
        assert (
            run("prepare", config)
            == run("merge", config)
            == run("prepare", config, "--part", "1/2")
            == 2
        )
    assert capsys.readouterr().err.count("another data-prep is making") == 3
    with open_ledger(tmp_path / "shards/a", Part(index=2, count=2)):
        assert run("prepare", config, "--part", "1/2") == 0
        assert run("prepare", config, "--part", "2/2") == run("prepare", config) == 2
    assert run("prepare", config) == 0
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["a"]


def test_a_run_leaves_the_locks_of_a_source_whose_name_begins_alike(tmp_path):
    with open_ledger(tmp_path / "a.b", Part(index=1, count=2)):
        (tmp_path / ".a.2-of-4.lock").touch()  # of a killed part of a
        with open_ledger(tmp_path / "a", Part()):
            assert sorted(p.name for p in tmp_path.iterdir()) == [
                ".a.b.1-of-2.lock",
                ".a.b.lock",
                ".a.lock",
            ]


def test_the_card_names_no_place_of_this_machine_and_no_time(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    assert run("prepare", settings(tmp_path)) == 0
    card = (tmp_path / "shards/a/train/card.json").read_text()
    assert str(tmp_path) not in card
    assert json.loads(card)["recipe"]["files"][0]["name"] == "a.jsonl"


def test_too_few_documents_to_hold_any_out_are_said(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(3))
    assert run("prepare", settings(tmp_path), "held_out_share=0.000001") == 0
    assert "too few documents" in capsys.readouterr().err
    assert not (tmp_path / "shards/a/held_out").exists()
