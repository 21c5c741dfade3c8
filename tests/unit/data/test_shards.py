"""Reading shards: the same ids as streaming's own reader, foreign layouts, and damage that is named."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from encoder.base.errors import ShardError
from encoder.data import shards
from encoder.data.loader import check_fits, token_counts
from encoder.data.shard_format import CARD, INDEX, LENGTHS, SHARD_HASH, write_lengths
from encoder.data.shards import open_source
from tests.helpers.shards import random_documents, seal_again, write_source

# lengths on both sides of 256, where MDS writes a shape in two bytes
DOCUMENTS = random_documents(200, longest=64) + random_documents(20, longest=600, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("web") / "train", DOCUMENTS)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("web") / "train", DOCUMENTS[:60], shard_bytes=1 << 11
    )


@pytest.fixture()
def copy(tmp_path, small_folder):
    """A folder of 60 documents in several shards, to be damaged."""
    return shutil.copytree(small_folder, tmp_path / "web" / "train")


def change_card(folder, **values) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, **values}))


def test_every_document_comes_back_in_any_order(folder):
    source = open_source(folder, name="web")
    assert (source.documents, source.name) == (220, "web")
    assert len(source.samples_per_shard) > 1 and source.samples_per_shard.sum() == 220
    assert source.mean_tokens == pytest.approx(np.mean([len(d) for d in DOCUMENTS]))
    for number in np.random.default_rng(0).permutation(220).tolist():
        ids = source.read(number)
        assert (
            ids.dtype == np.uint16
            and (ids == DOCUMENTS[number]).all()
            and len(ids) == source.lengths[number]
        )


@pytest.mark.parametrize(
    "vocab_size, columns",
    [
        (64, {}),
        (70_000, {}),  # uint16, uint32
        (
            64,
            {"id": "str", "len": "int"},
        ),  # the columns of ModernBERT's shards: one sorts before input_ids
        (64, {"chars": "int", "id": "str", "url": "str"}),
    ],
)  # a column of fixed size before input_ids
def test_ids_are_those_of_streamings_own_reader(tmp_path, vocab_size, columns):
    from streaming.base.format import reader_from_json

    documents = random_documents(50, vocab_size=vocab_size, longest=400)
    folder = write_source(tmp_path / "train", documents, vocab_size=vocab_size, columns=columns)
    source = open_source(folder, name="web")
    readers = [
        reader_from_json(str(folder), None, info)
        for info in json.loads((folder / INDEX).read_text())["shards"]
    ]
    theirs = [reader[i]["input_ids"] for reader in readers for i in range(reader.samples)]
    assert len(theirs) == source.documents
    for number, ids in enumerate(theirs):
        assert source.read(number).dtype == ids.dtype and (source.read(number) == ids).all()


def test_plain_shards_are_read_without_importing_streaming(folder):
    code = (
        "import sys; from pathlib import Path; from encoder.data.shards import open_source\n"
        f"open_source(Path({str(folder)!r}), name='web').read(3)\n"
        "assert 'streaming' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_compressed_shards_are_unpacked_into_the_cache(tmp_path):
    folder = write_source(tmp_path / "train", DOCUMENTS, compression="zstd")
    assert not list(folder.glob("*.mds"))
    source = open_source(folder, name="web", cache=tmp_path / "cache")
    assert all((source.read(n) == DOCUMENTS[n]).all() for n in range(220))
    assert not list(folder.glob("*.mds")) and list((tmp_path / "cache/shards").glob("*.mds"))


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1] + bytes([b[-1] ^ 4]), lambda b: b[:-7], lambda b: b + b"0", lambda b: b""],
)
def test_a_damaged_copy_of_a_shard_unpacked_in_place_is_unpacked_again(tmp_path, damage):
    folder = write_source(tmp_path / "train", DOCUMENTS, compression="zstd")
    before = open_source(folder, name="web")
    assert (before.read(0) == DOCUMENTS[0]).all()
    copy = folder / "shard.00000.mds"
    right = copy.read_bytes()
    (folder / "new").write_bytes(damage(right))
    (folder / "new").rename(copy)  # `before` has the old one, and keeps it
    source = open_source(folder, name="web")
    assert (
        all((source.read(n) == DOCUMENTS[n]).all() for n in range(220))
        and copy.read_bytes() == right
    )


def test_an_unpacked_copy_is_read_through_once_only(tmp_path, monkeypatch):
    folder = write_source(tmp_path / "train", DOCUMENTS, compression="zstd")
    open_source(folder, name="web").read(0)
    source, read, plain = open_source(folder, name="web"), [], hashlib.sha256
    monkeypatch.setattr(
        hashlib, "sha256", lambda content: read.append(len(content)) or plain(content)
    )
    for _ in range(3):
        source.read(0)
        source._open.clear()
    assert read == [(folder / "shard.00000.mds").stat().st_size]


def test_a_cache_holds_only_the_shards_that_were_read(tmp_path, copy):
    source = open_source(copy, name="web", cache=tmp_path / "cache")
    assert (source.read(0) == DOCUMENTS[0]).all()
    assert [p.name for p in (tmp_path / "cache/shards").glob("*.mds")] == ["shard.00000.mds"]


def test_a_source_survives_pickling_without_its_maps(folder):
    source = open_source(folder, name="web")
    source.read(0)
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert len(pickle.dumps(source)) < 500 and (again.read(7) == DOCUMENTS[7]).all()


def test_the_number_of_open_shards_is_bounded(copy, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    source = open_source(copy, name="web")
    held = [source.read(n) for n in range(60)]
    assert len(source.samples_per_shard) > 2 and len(source._open) == 2
    assert all(
        (ids == DOCUMENTS[n]).all() for n, ids in enumerate(held)
    )  # views outlive the closing


def test_a_missing_shard_is_named(copy):
    (copy / "shard.00001.mds").unlink()
    source = open_source(copy, name="web")
    source.read(0)
    with pytest.raises(ShardError, match=r"shard\.00001\.mds is missing"):
        source.read(source.samples_per_shard[0])


def test_a_shard_cut_short_is_named(copy):
    path = copy / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"shard\.00000\.mds has [\d,]+ bytes, index\.json says"):
        open_source(copy, name="web").read(0)


def test_an_empty_shard_file_is_named(copy):
    (copy / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(ShardError, match=r"shard\.00000\.mds cannot be read"):
        open_source(copy, name="web").read(0)


@pytest.mark.parametrize(
    "at, value, word",
    [(0, 99, "holds 99 samples"), (8, 255, "sample"), (4, 0, "sample 0 is damaged")],
)
def test_damaged_bytes_in_a_shards_head_are_named(copy, at, value, word):
    path = copy / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    with pytest.raises(ShardError, match=rf"shard\.00000\.mds.*{word}"):
        source = open_source(copy, name="web")
        for n in range(int(source.samples_per_shard[0])):
            source.read(n)


def test_a_length_that_disagrees_is_named(copy):
    lengths = np.array([len(d) for d in DOCUMENTS[:60]])
    lengths[5] += 1
    write_lengths(copy, lengths, max_tokens_per_document=8192)
    with pytest.raises(
        ShardError, match=rf"sample 5 has {lengths[5] - 1} tokens, {LENGTHS} says {lengths[5]}"
    ):
        open_source(copy, name="web").read(5)


@pytest.mark.parametrize(
    "break_it, word",
    [
        (lambda d: (d / INDEX).write_text("{"), "index.json cannot be read"),
        (
            lambda d: (d / INDEX).write_text(
                (d / INDEX).read_text().replace("input_ids", "tokens")
            ),
            "needed: input_ids",
        ),
        (
            lambda d: (d / INDEX).write_text((d / INDEX).read_text().replace("uint16", "uint32")),
            "is ndarray:uint32",
        ),
        (
            lambda d: (d / INDEX).write_text(
                (d / INDEX).read_text().replace('"samples": ', '"samples": 1')
            ),
            "samples, the card",
        ),
        (
            lambda d: (d / INDEX).write_text((d / INDEX).read_text().replace(SHARD_HASH, "md5")),
            r"index\.json has no sha256 of shard\.00000\.mds",
        ),
    ],
)
def test_an_index_that_does_not_fit_is_refused_although_the_card_tells_of_it(copy, break_it, word):
    break_it(copy)
    seal_again(copy)
    with pytest.raises(ShardError, match=word):
        open_source(copy, name="web")


@pytest.mark.parametrize(
    "break_it, word",
    [
        (lambda d: (d / INDEX).unlink(), "index.json cannot be read: No such file"),
        (lambda d: (d / CARD).unlink(), "card.json"),
        (
            lambda d: change_card(d, format=1),
            "it has format 1, this version reads format 2.*data-prep prepare CONFIG --again",
        ),
        (lambda d: (d / CARD).write_text("[]"), "card.json cannot be read: it has format None"),
        (lambda d: (d / LENGTHS).write_bytes(b"12"), "lengths.bin has 2 bytes"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused_when_opened(copy, break_it, word):
    break_it(copy)
    with pytest.raises(ShardError, match=word):
        open_source(copy, name="web")


def test_shards_replaced_by_others_of_the_same_counts_are_refused_when_opened(tmp_path):
    documents = DOCUMENTS[:60]
    changed = [
        np.concatenate([d[:1], (d[1:-1] + 1) % 59, d[-1:]]) for d in documents
    ]  # same lengths, other words
    old, new = (
        write_source(tmp_path / n / "train", docs)
        for n, docs in (("old", documents), ("new", changed))
    )
    assert (old / LENGTHS).read_bytes() == (new / LENGTHS).read_bytes()
    for path in [*new.glob("*.mds"), new / INDEX]:
        shutil.copy(path, old)
    with pytest.raises(
        ShardError, match=rf"{old}/index\.json has SHA-256 \w{{12}}, card\.json beside it says"
    ):
        open_source(old, name="web")
    cards = [json.loads((d / CARD).read_text()) for d in (old, new)]
    assert {k for k in cards[0] if cards[0][k] != cards[1][k]} == {"source", "index_sha256"}


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ShardError, match="does not exist"):
        open_source(tmp_path / "nothing", name="web")


def test_tokens_are_counted(folder):
    source = open_source(folder, name="web")
    assert (token_counts(source, 64) == np.bincount(np.concatenate(DOCUMENTS), minlength=64)).all()
    assert (
        token_counts(source, 80, documents=3)
        == np.bincount(np.concatenate(DOCUMENTS[:3]), minlength=80)
    ).all()


def test_an_id_beyond_the_vocabulary_is_named_with_its_document_when_tokens_are_counted(tmp_path):
    documents = [*DOCUMENTS[:50], np.array([60, 64, 3, 61])]
    source = open_source(write_source(tmp_path / "train", documents), name="web")
    assert token_counts(source, 65)[64] == 1
    with pytest.raises(
        ShardError,
        match=r"source web: document 50, in .*train/shard\.00000\.mds, has the id 64, "
        r"beyond the vocabulary of 64\. Check with data-prep verify .*train, and copy",
    ):
        token_counts(source, 64)


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(folder):
    card = open_source(folder, name="web").card
    check_fits(card, vocab_size=64, where="data/web")
    with pytest.raises(
        ShardError, match="data/web was made with a vocabulary of 64, the model has 63. Set"
    ):
        check_fits(card, vocab_size=63, where="data/web")
