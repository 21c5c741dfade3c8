"""Where a core has nothing to do, a thread parses the next block: the shards, the counts and the errors stay what they are."""

from __future__ import annotations

import csv
import gzip
import threading
from multiprocessing import get_context
from unittest.mock import patch

import pytest

from data_prep import worker
from data_prep.worker import made_ahead
from tests.helpers.prep import bytes_of, run, settings, texts, write_jsonl


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", 500)


def prepared(folder, sources, *, processes, code=0, **changes):
    """Everything that was made, and in which threads blocks were parsed."""
    config = settings(folder, sources, processes=processes, out=str(folder / f"{processes}"))
    parse, threads = worker.parse, set()

    def watched(block):
        threads.add(threading.current_thread() is threading.main_thread())
        return parse(block)

    words = [f"{name}={value}" for name, value in changes.items()]
    with patch.object(worker, "parse", watched):
        assert run("prepare", config, *words) == code
    return bytes_of(folder / f"{processes}"), threads


def test_one_segment_for_two_processes_is_read_ahead_and_becomes_the_same_shards(tmp_path):
    documents = texts(300)
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([document] for document in documents)])
    for kind, name in (("jsonl", "a.jsonl"), ("jsonl", "a.jsonl.gz"), ("csv", "a.csv")):
        sources = [{"name": "a", "format": kind, "files": [name]}]
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes((tmp_path / name).read_bytes())
        alone, in_main = prepared(folder, sources, processes=1)
        ahead, in_thread = prepared(folder, sources, processes=2)
        # the sample for the check of the encoder is parsed in the main thread
        assert in_main == {True} and False in in_thread
        assert len(alone) > 3 and alone == ahead


def test_a_bad_line_read_ahead_is_said_like_any_other(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(100))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{no json\n")
    said = []
    for processes in (1, 2):
        prepared(tmp_path, None, processes=processes, code=2)
        said.append(capsys.readouterr().err)
    assert "line 101" in said[0] and said[0] == said[1]
    # what is left out is counted alike
    kept = [prepared(tmp_path, None, processes=p, on_error="skip")[0] for p in (1, 2)]
    assert kept[0] == kept[1]


def test_what_is_made_ahead_comes_in_order_then_its_error():
    def items():
        yield from range(100)
        raise ValueError("after 100")

    found = []
    with pytest.raises(ValueError, match="after 100"), made_ahead(items()) as made:
        found.extend(made)
    assert found == [*range(100)]


def test_one_item_is_made_ahead_and_not_all():
    begun = []

    def items():
        for number in range(10):
            begun.append(number)
            yield number

    with made_ahead(items()) as made:
        assert [next(made), next(made)] == [0, 1]
    # the third was being made
    assert begun == [0, 1, 2]


def test_a_process_whose_parent_is_gone_ends_without_a_word(tmp_path, capfd):
    context = get_context("spawn")
    here, there = context.Pipe()
    settings(tmp_path)
    job = worker.EncodeJob(
        tokenizer_json=str(tmp_path / "tokenizer.json"),
        specials=None,
        dtype="uint16",
        max_tokens_per_document=64,
        held_out_share=0.0,
        shard_bytes=1024,
        compression=None,
        stop_on_error=True,
        max_document_bytes=1024,
        sentence_language=None,
    )
    process = context.Process(target=worker._work, args=(job, there), daemon=True)
    process.start()
    there.close()
    here.close()
    process.join(60)
    assert process.exitcode == 0 and "Traceback" not in capfd.readouterr().err
