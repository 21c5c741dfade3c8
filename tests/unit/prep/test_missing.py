"""Which parts of a job array are not done: data-prep missing, and merge --verify."""

from __future__ import annotations

import shutil

from data_prep.segments import numbers_text
from tests.helpers.prep import run, settings, texts, write_jsonl


def test_parts_are_missing_until_all_their_segments_are_there_and_none_once_they_are_merged(
    tmp_path, capsys
):
    write_jsonl(tmp_path / "a.jsonl", texts(3_000, longest=100))
    config = settings(tmp_path, shard_bytes=2**14)  # segments of 64 KiB

    def missing(parts: int) -> str:
        capsys.readouterr()
        assert run("missing", config, "--parts", parts) == 0
        return capsys.readouterr().out.strip()

    assert missing(4) == "1-4"
    assert run("prepare", config, "--part", "2/4") == 0
    assert missing(4) == "1,3-4"
    assert missing(2) == "1-2"  # half of each is there
    assert run("prepare", config) == 0
    assert missing(4) == ""
    shutil.rmtree(tmp_path / "shards")
    for part in range(1, 5):
        assert run("prepare", config, "--part", f"{part}/4") == 0
    assert missing(4) == "" and run("merge", config, "--verify") == 0
    assert "held_out: good" in (said := capsys.readouterr().out) and "train: good" in said
    (tmp_path / "shards" / "a" / "train" / "shard.00000.mds").write_bytes(b"damaged")
    assert run("merge", config, "--verify") == 2


def test_segments_of_a_file_that_changed_are_no_answer(tmp_path, capsys):
    """As prepare and merge: a script that submits the missing parts would fail later."""
    file = write_jsonl(tmp_path / "a.jsonl", texts(3_000, longest=100))
    config = settings(tmp_path, shard_bytes=2**14)
    assert run("prepare", config, "--part", "2/4") == 0
    with open(file, "a") as more:
        more.write('{"text": "the cat"}\n')
    capsys.readouterr()
    assert run("missing", config, "--parts", "4") == 2
    said = capsys.readouterr()
    assert said.out == "" and "holds segments made from something else" in said.err


def test_numbers_are_written_as_sbatch_takes_them():
    assert numbers_text([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10" and numbers_text([]) == ""


def test_a_count_of_parts_that_is_none_is_said(tmp_path, capsys):
    assert run("missing", tmp_path / "x.yaml", "--parts", "0") == 2
    assert "argument --parts: '0'; needed: a whole number of at least 1" in capsys.readouterr().err
    assert run("missing", settings(tmp_path), "--parts", "3000000000") == 2
    assert "--parts: 3000000000; needed: at most 2,147,483,647" in capsys.readouterr().err
