"""verify finds every damage; report shows what is there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from encoder.data.shard_format import read_card
from encoder.data.shards import open_source
from tests.helpers.prep import run, settings, texts, write_jsonl
from tests.helpers.shards import seal_again


@pytest.fixture
def shards(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", settings(tmp_path), "shard_bytes=2048") == 0
    capsys.readouterr()
    return tmp_path / "shards/a/train"


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_card(folder, **values) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **values}))


def swap_two_lengths(folder) -> None:
    """The same size, and the same documents and tokens in all."""
    lengths = np.fromfile(folder / "lengths.bin", "<u2")
    other = int(np.argmax(lengths != lengths[0]))
    lengths[[0, other]] = lengths[[other, 0]]
    lengths.tofile(folder / "lengths.bin")


def and_seal(change, folder) -> None:
    change(folder)
    seal_again(folder)


DAMAGES = {
    "shard.00001.mds is damaged": lambda f: flip(f / "shard.00001.mds", -3),
    "shard.00000.mds has": (
        lambda f: (f / "shard.00000.mds").write_bytes((f / "shard.00000.mds").read_bytes()[:-1])
    ),
    "shard.00002.mds cannot be read": lambda f: (f / "shard.00002.mds").unlink(),
    "other sample lengths than lengths.bin": lambda f: and_seal(swap_two_lengths, f),
    "lengths.bin has SHA-256": swap_two_lengths,
    "index.json has SHA-256": (
        lambda f: (f / "index.json").write_text((f / "index.json").read_text() + " ")
    ),
    "bytes, but the card says": (
        lambda f: (f / "lengths.bin").write_bytes((f / "lengths.bin").read_bytes() + b"\0\0")
    ),
    "is not the tokenizer of card.json": lambda f: flip(f / "tokenizer.json", 40),
    "index.json cannot be read": lambda f: (f / "index.json").unlink(),
    "index.json cannot be read: Expecting": lambda f: and_seal(
        lambda g: (g / "index.json").write_text("{"), f
    ),
    "tokens, card.json says": lambda f: change_card(f, tokens=5),
    "needed: input_ids as ndarray:uint32": lambda f: change_card(f, dtype="uint32"),
    "a sample longer than 64 tokens": lambda f: change_card(f, max_tokens_per_document=64),
    "does not begin with [CLS]": lambda f: change_card(f, specials=specials(f, cls_id=1)),
    "does not end with [SEP]": lambda f: change_card(f, specials=specials(f, sep_id=1)),
}


def specials(folder, **changed: int) -> dict:
    """The special ids of a card, with some of them others."""
    ids = json.loads((folder / "card.json").read_text())["specials"]
    return {**ids, **changed, "all_special": [*ids["all_special"], *changed.values()]}


def test_whole_shards_are_good(shards, capsys):
    assert run("verify", shards.parent.parent) == 0
    assert capsys.readouterr().out.count(": good, ") == 2


@pytest.mark.parametrize("words", DAMAGES)
def test_every_damage_is_found_and_named(shards, capsys, words):
    DAMAGES[words](shards)
    assert run("verify", shards.parent) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_an_unpacked_copy_beside_a_compressed_shard_is_checked_too(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", settings(tmp_path), "shard_bytes=2048", "compression=zstd") == 0
    folder = tmp_path / "shards/a/train"
    source = open_source(folder, name="a")
    assert all(
        len(source.read(i)) for i in range(source.documents)
    )  # unpacks every shard beside itself
    assert run("verify", folder) == 0
    flip(folder / "shard.00001.mds", -3)
    assert run("verify", folder) == 2
    assert (
        "shard.00001.mds is damaged: it is not what shard.00001.mds.zstd unpacks to"
        in capsys.readouterr().err
    )


def test_an_id_beyond_the_vocabulary_is_found(shards, capsys):
    top = read_card(
        shards
    ).specials.sep_id  # the highest id that text can hold; specials above are not written
    low = {"cls_id": 0, "sep_id": 0, "pad_id": 0, "mask_id": 0, "unk_id": 0, "all_special": [0]}
    change_card(shards, vocab_size=top, specials=low)
    assert run("verify", shards) == 2
    assert f"an id beyond the vocabulary of {top}" in capsys.readouterr().err


def test_all_folders_are_checked_although_the_first_is_damaged(shards, capsys):
    flip(shards / "shard.00000.mds", -1)
    assert run("verify", shards, shards.parent / "held_out") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "held_out: good" in said.out


def test_the_report_counts_tokens_and_reads_text_back(shards, capsys, tmp_path):
    lengths = np.fromfile(shards / "lengths.bin", "<u2")
    assert run("report", shards, "--out", tmp_path / "report") == 0
    out = capsys.readouterr().out
    assert f"{lengths.sum():,}" in out and f"{lengths.mean():,.0f}" in out
    assert "[CLS]" in out and any(word in out for word in ("house", "tree", "cat"))
    assert (tmp_path / "report/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "<table>" in (tmp_path / "report/report.html").read_text()


@pytest.mark.filterwarnings("error")
def test_the_report_of_held_out_text_alone_draws_it(shards, tmp_path):
    assert run("report", shards.parent / "held_out", "--out", tmp_path / "report") == 0
