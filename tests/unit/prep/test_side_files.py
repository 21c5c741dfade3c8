"""Shards made elsewhere get their side files and train here; ours are read by streaming's own dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from encoder.base.errors import ShardError
from encoder.data.shard_format import SpecialIds, read_card, read_lengths, with_specials
from encoder.data.shards import open_source
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import MlmConfig
from tests.helpers.loading import loader_with
from tests.helpers.prep import bytes_of, run, settings, texts, write_jsonl
from tests.helpers.shards import mds_writer, random_documents, write_tokenizer
from tests.unit.prep.test_bad_input import refused

V, CLS, SEP, PAD = 64, 60, 61, 62
DOCUMENTS = random_documents(60, longest=400)
MODERNBERT = {"input_ids": "ndarray:uint16", "id": "str", "len": "int"}
ETTIN = {"input_ids": "ndarray:uint32", "id": "str"}


def write_foreign(folder: Path, columns: dict[str, str], documents=DOCUMENTS, **settings) -> Path:
    """Shards as another program writes them: plain MDSWriter, no hashes unless asked for."""
    dtype = columns["input_ids"].partition(":")[2] if "input_ids" in columns else ""
    with mds_writer(columns=columns, out=str(folder), **{"size_limit": 4096, **settings}) as out:
        for number, ids in enumerate(documents):
            values = {
                "input_ids": np.asarray(ids, dtype or None),
                "id": f"document {number}",
                "len": len(ids),
                "chars": number,
                "text": "x",
            }
            out.write({name: values[name] for name in columns})
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer.json", vocab_size=V)


def streamed(folder: Path, cache: Path) -> list[np.ndarray]:
    """What streaming.StreamingDataset reads, in stored order; its shared memory goes when this process ends."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        local=str(cache), remote=str(folder), shuffle=False, batch_size=1, keep_zip=False
    )
    return [dataset[i]["input_ids"] for i in range(len(dataset))]


@pytest.mark.parametrize(
    "columns",
    [MODERNBERT, ETTIN, {"input_ids": "ndarray:uint16"}, {"chars": "int", **MODERNBERT}],
    ids=["modernbert", "ettin", "bare", "fixed column first"],
)
@pytest.mark.parametrize(
    "writing",
    [
        {},
        {"compression": "zstd"},
        {"hashes": ["sha256"]},
        {"compression": "zstd:3", "hashes": ["xxh64"]},
    ],
    ids=["plain", "zstd", "hashed", "other hash"],
)
def test_shards_made_elsewhere_give_streamings_ids_after_index(
    tmp_path, tokenizer, capsys, columns, writing
):
    folder = write_foreign(tmp_path / "web/train", columns, **writing)
    before = bytes_of(folder)
    assert run("index", folder, "--tokenizer", tokenizer) == 0
    after = bytes_of(folder)
    assert {name: after[name] for name in before} == before, "a foreign file was changed"
    hashes = set() if writing.get("hashes") == ["sha256"] else {"hashes.json"}
    assert set(after) - set(before) == {"card.json", "lengths.bin", "tokenizer.json"} | hashes
    card = read_card(folder)
    assert (card.source, card.dtype, card.documents) == (
        "web",
        columns["input_ids"].partition(":")[2],
        60,
    )
    source = open_source(folder, name="web", cache=tmp_path / "ours")
    assert all(np.array_equal(source.read(i), ids) for i, ids in enumerate(DOCUMENTS))
    assert run("verify", folder) == 0 and run("report", folder) == 0
    if (
        "chars" not in columns
    ):  # one look through StreamingDataset for each layout and way of storing is enough
        theirs = streamed(folder, tmp_path / "theirs")
        assert all(
            np.array_equal(source.read(i), ids) and source.read(i).dtype == ids.dtype
            for i, ids in enumerate(theirs)
        )


def test_our_own_shards_give_streaming_dataset_the_same_ids(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", settings(tmp_path), "shard_bytes=2048", "compression=zstd") == 0
    folder = tmp_path / "shards/a/train"
    source, theirs = (
        open_source(folder, name="a", cache=tmp_path / "ours"),
        streamed(folder, tmp_path / "theirs"),
    )
    assert len(theirs) == source.documents > 20
    assert all(np.array_equal(source.read(i), ids) for i, ids in enumerate(theirs))


@pytest.mark.parametrize("columns", [MODERNBERT, ETTIN], ids=["modernbert", "ettin"])
def test_shards_made_elsewhere_train_here(tmp_path, tokenizer, columns):
    folder = write_foreign(tmp_path / "web", columns)
    assert run("index", folder, "--tokenizer", tokenizer) == 0
    source = open_source(folder, name="web")
    masker = build_objective(MlmConfig(), vocab_size=V, specials=source.card.specials)
    with loader_with(
        [source],
        seed=3,
        max_tokens_per_document=400,
        row_tokens=512,
        window_documents=60,
        masker=masker,
        rows_at=lambda _: 1,
    ) as loader:
        shown = []
        while sum(map(len, shown)) < sum(map(len, DOCUMENTS)):
            for batch in loader.next_step().micro_batches:
                ids_T = batch.ids_T.clone()
                kept = batch.targets["mlm"].value_M >= 0
                ids_T[batch.targets["mlm"].index_M[kept]] = batch.targets["mlm"].value_M[kept]
                bounds = batch.cu_seqlens_S1.tolist()
                shown += [
                    ids_T[a:b].tolist()
                    for a, b in zip(bounds, bounds[1:], strict=False)
                    if b > a and ids_T[a] != PAD
                ]
    assert sorted(shown) == sorted(ids.tolist() for ids in DOCUMENTS)


SHAPES = {
    "as they are": lambda ids: ids,
    "one row": lambda ids: ids[None, :],
    "one column": lambda ids: ids[:, None],
}


def write_tokens(
    folder: Path,
    encoding: str,
    documents=DOCUMENTS,
    *,
    dtype: str = "int64",
    shape: str = "as they are",
    compression: str | None = None,
) -> Path:
    """Shards whose ids are in a column `tokens` beside another one, as other programs have them."""
    with mds_writer(
        columns={"id": "str", "tokens": encoding},
        out=str(folder),
        size_limit=4096,
        compression=compression,
    ) as out:
        for number, ids in enumerate(documents):
            values = np.asarray(ids, dtype)
            out.write(
                {
                    "id": f"document {number}",
                    "tokens": values.tobytes() if encoding == "bytes" else SHAPES[shape](values),
                }
            )
    return folder


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
)
@pytest.mark.parametrize("kind", ["typed", "untyped", "bytes"])
def test_ids_of_any_width_and_sign_in_any_column_are_read_exactly(
    tmp_path, tokenizer, capsys, dtype, kind
):
    encoding = {"typed": f"ndarray:{dtype}", "untyped": "ndarray", "bytes": "bytes"}[kind]
    folder = write_tokens(
        tmp_path / "web", encoding, dtype=dtype, compression="zstd" if kind == "typed" else None
    )
    told = ["--dtype", dtype] if kind == "bytes" else []
    assert run("index", folder, "--tokenizer", tokenizer, "--column", "tokens", *told) == 0
    source = open_source(folder, name="web")
    assert all(np.array_equal(source.read(i), ids) for i, ids in enumerate(DOCUMENTS))
    assert run("verify", folder) == 0 and run("report", folder) == 0
    card = read_card(folder)
    assert (card.column, card.stored_as, card.tokens) == (
        "tokens",
        encoding,
        sum(map(len, DOCUMENTS)),
    )


@pytest.mark.parametrize(
    "encoding", ["ndarray:int32", "ndarray", "ndarray:int32:1,40", "ndarray:int32:40"]
)
@pytest.mark.parametrize("shape", ["one row", "one column", "as they are"])
def test_axes_of_size_one_fold_and_two_long_ones_are_told(
    tmp_path, tokenizer, capsys, encoding, shape
):
    even = [np.concatenate([[CLS], np.arange(38) % 50, [SEP]])] * 50
    shape = {"ndarray:int32:1,40": "one row", "ndarray:int32:40": "as they are"}.get(
        encoding, shape
    )
    folder = write_tokens(tmp_path / "web", encoding, even, dtype="int32", shape=shape)
    assert (
        run("index", folder, "--tokenizer", tokenizer, "--column", "tokens") == 0
        and run("verify", folder) == 0
    )
    source = open_source(folder, name="web")
    assert all(np.array_equal(source.read(i), even[0]) for i in range(50))
    with mds_writer(columns={"input_ids": "ndarray:int32"}, out=str(tmp_path / "two")) as out:
        out.write({"input_ids": np.zeros((2, 20), np.int32)})
    assert "an array of shape (2, 20); needed: one axis" in refused(
        capsys, "index", tmp_path / "two", "--tokenizer", tokenizer
    )


def test_the_message_says_which_columns_were_found_and_what_to_write(tmp_path, tokenizer, capsys):
    typed, plain = (
        write_tokens(tmp_path / "a", "ndarray:int32", dtype="int32"),
        write_tokens(tmp_path / "b", "bytes"),
    )
    err = refused(capsys, "index", typed, "--tokenizer", tokenizer)
    assert (
        "has the columns id (str), tokens (ndarray:int32); needed: input_ids" in err
        and "--column tokens" in err
    )
    assert "needed: --dtype, one of uint8" in refused(
        capsys, "index", plain, "--tokenizer", tokenizer, "--column", "tokens"
    )
    args = ("--tokenizer", tokenizer, "--column", "tokens", "--dtype")
    for dtype in ("uint16", "int32", "uint8"):
        assert "Needed: --dtype int64" in refused(capsys, "index", plain, *args, dtype)
    assert "--dtype int64 has no effect" in refused(capsys, "index", typed, *args, "int64")
    narrow = write_tokens(tmp_path / "c", "bytes", dtype="uint16")
    err = refused(capsys, "index", narrow, *args, "uint64")
    assert "no whole number of uint64" in err or "holds the id" in err
    negative = write_tokens(
        tmp_path / "d", "ndarray:int16", [np.array([CLS, -5, SEP])], dtype="int16"
    )
    assert "holds the id -5" in refused(capsys, "index", negative, *args[:-1])


PADDED = [
    np.concatenate([[PAD] * (i % 3), ids, [PAD] * (7 * i % 5)]).astype(int)
    for i, ids in enumerate(DOCUMENTS)
]


def test_padding_at_the_ends_is_refused_with_a_way_out_or_cut_when_read(
    tmp_path, tokenizer, capsys
):
    folder = write_foreign(tmp_path / "web/train", MODERNBERT, PADDED)
    before = bytes_of(folder)
    for more in ([], ["--add-specials"]):  # which would put [CLS] before the padding
        err = refused(capsys, "index", folder, "--tokenizer", tokenizer, *more)
        assert (
            "shard.00000.mds has [PAD] at the ends of" in err
            and "--strip-padding" in err
            and "--add-specials" not in err
        )
    assert bytes_of(folder) == before
    assert run("index", folder, "--tokenizer", tokenizer, "--strip-padding") == 0
    assert "with [PAD] at their ends" in capsys.readouterr().out
    source = open_source(folder, name="web")
    assert source.card.strips_padding and not source.card.adds_specials
    assert all(np.array_equal(source.read(i), ids) for i, ids in enumerate(DOCUMENTS))
    assert (
        read_lengths(folder, source.card).tolist() == [len(ids) for ids in DOCUMENTS]
        and run("verify", folder) == 0
    )


def test_padding_is_cut_before_cls_and_sep_are_added(tmp_path, tokenizer):
    bare = [np.concatenate([ids[1:-1], [PAD] * 5]) for ids in DOCUMENTS] + [np.array([PAD] * 4)]
    folder = write_foreign(tmp_path / "web", MODERNBERT, bare)
    assert run("index", folder, "--tokenizer", tokenizer, "--strip-padding", "--add-specials") == 0
    source = open_source(folder, name="web")
    assert all(np.array_equal(source.read(i), ids) for i, ids in enumerate(DOCUMENTS))
    assert source.read(len(DOCUMENTS)).tolist() == [CLS, SEP] and run("verify", folder) == 0


@pytest.mark.parametrize(
    "place, word",
    [
        (63, "[MASK]"),
        (PAD, "[PAD]"),
        (CLS, "[CLS] behind its first place"),
        (SEP, "[SEP] before its last place"),
    ],
)
def test_special_ids_inside_samples_are_refused_or_kept_on_demand(
    tmp_path, tokenizer, capsys, place, word
):
    holed = [
        np.concatenate([ids[:2], [place], ids[2:]]) if len(ids) > 9 else ids for ids in DOCUMENTS
    ]
    folder = write_foreign(tmp_path / "web", MODERNBERT, holed)
    err = refused(capsys, "index", folder, "--tokenizer", tokenizer)
    assert (
        f"shard.00000.mds has {word} in " in err
        and "would be trained as text" in err
        and "--keep-specials" in err
    )
    assert run("index", folder, "--tokenizer", tokenizer, "--keep-specials") == 0
    source = open_source(folder, name="web")
    assert (
        all(np.array_equal(source.read(i), ids) for i, ids in enumerate(holed))
        and run("verify", folder) == 0
    )
    change_card = json.loads((folder / "card.json").read_text())
    assert change_card.pop("holds_specials") is True
    (folder / "card.json").write_text(json.dumps(change_card))  # as an earlier index wrote it
    assert f"has {word} in " in refused(capsys, "verify", folder)


def test_verify_tells_of_padding_that_an_earlier_index_let_in(tmp_path, tokenizer, capsys):
    folder = write_foreign(
        tmp_path / "web", MODERNBERT, [np.concatenate([ids, [PAD] * 3, [SEP]]) for ids in DOCUMENTS]
    )
    assert run("index", folder, "--tokenizer", tokenizer, "--keep-specials") == 0
    card = json.loads((folder / "card.json").read_text())
    del card["holds_specials"]
    (folder / "card.json").write_text(json.dumps(card))
    assert "[PAD]" in refused(capsys, "verify", folder)


def test_unknown_tokens_are_text(tmp_path, tokenizer):
    folder = write_foreign(tmp_path / "web", MODERNBERT, [np.array([CLS, 3, 59, 59, SEP])] * 9)
    assert run("index", folder, "--tokenizer", tokenizer) == 0 and run("verify", folder) == 0


def test_chunks_that_are_just_above_a_length_are_said_by_index(tmp_path, tokenizer, capsys):
    chunks = [np.arange(128) % 50] * 30
    folder = write_foreign(tmp_path / "web", MODERNBERT, chunks)
    assert run("index", folder, "--tokenizer", tokenizer, "--add-specials") == 0
    out = capsys.readouterr().out
    assert (
        "100% of the samples are just above 128, with 129 or 130 tokens" in out
        and "of 130 takes them whole" in out
    )


def test_a_card_of_prepare_is_the_same_bytes_as_before(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    assert run("prepare", settings(tmp_path)) == 0
    card = json.loads((tmp_path / "shards/a/train/card.json").read_text())
    assert not {"column", "encoding", "strips_padding", "holds_specials"} & set(card)
    assert read_card(tmp_path / "shards/a/train").column == "input_ids"


def test_samples_without_cls_and_sep_get_them_only_when_asked_for(tmp_path, tokenizer, capsys):
    bare = [
        ids[1:-1] if i % 3 == 0 else ids[:-1] if i % 3 == 1 else ids
        for i, ids in enumerate(DOCUMENTS)
    ]
    folder = write_foreign(tmp_path / "web", MODERNBERT, bare)
    before = bytes_of(folder)
    err = refused(capsys, "index", folder, "--tokenizer", tokenizer)
    assert "shard.00000.mds sample 0 does not begin with [CLS]" in err and "--add-specials" in err
    assert bytes_of(folder) == before
    assert run("index", folder, "--tokenizer", tokenizer, "--add-specials") == 0
    assert "40 of them without [CLS] or [SEP]" in capsys.readouterr().out
    source = open_source(folder, name="web")
    assert all(np.array_equal(source.read(i), ids) for i, ids in enumerate(DOCUMENTS))
    assert read_lengths(folder, source.card).tolist() == [len(ids) for ids in DOCUMENTS]
    assert run("verify", folder) == 0


def test_a_special_token_is_put_on_once():
    specials = SpecialIds(
        cls_id=9, sep_id=8, pad_id=7, mask_id=6, unk_id=5, all_special=(5, 6, 7, 8, 9)
    )
    for ids, whole in (
        ([1], [9, 1, 8]),
        ([9, 1], [9, 1, 8]),
        ([1, 8], [9, 1, 8]),
        ([9, 1, 8], [9, 1, 8]),
    ):
        out = with_specials(np.array(ids, np.uint16), specials)
        assert out.tolist() == whole and out.dtype == np.uint16


@pytest.mark.parametrize(
    "columns, words",
    [
        (
            {"input_ids": "ndarray:float32"},
            "the column input_ids is ndarray:float32; needed: ndarray of whole numbers",
        ),
        (
            {"input_ids": "ndarray:uint16", "text": "pkl"},
            "the column text as pkl: to read a pickle is to run its code",
        ),
        ({"input_ids": "pkl"}, "the column input_ids as pkl"),
        ({"text": "str"}, "has the columns text (str); needed: input_ids"),
    ],
)
def test_a_layout_that_cannot_be_read_is_one_line_and_nothing_is_written(
    tmp_path, tokenizer, capsys, columns, words
):
    folder = write_foreign(tmp_path / "web", columns)
    before = bytes_of(folder)
    assert words in refused(capsys, "index", folder, "--tokenizer", tokenizer)
    assert bytes_of(folder) == before


def damaged(change, folder: Path) -> None:
    path = folder / "shard.00001.mds"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: damaged(lambda b: b[:-1], f), "shard.00001.mds has"),
        (lambda f: (f / "shard.00001.mds").unlink(), "cannot be read"),
        (lambda f: damaged(lambda b: b"\xff" * 4 + b[4:], f), "shard.00001.mds is no MDS shard of"),
        (
            lambda f: damaged(lambda b: b[:4] + b"\xff" * 40 + b[44:], f),
            "shard.00001.mds is no MDS shard of",
        ),
        (
            lambda f: damaged(lambda b: b[:-12] + b"\xff\xff" + b[-10:], f),
            "holds the id 65,535, the tokenizer has 64 entries",
        ),
        (lambda f: (f / "index.json").write_text("{"), "index.json cannot be read"),
        (
            lambda f: (f / "index.json").write_text('{"shards": [{"format": "mds"}]}'),
            "is no index of MDS shards",
        ),
        (lambda f: (f / "index.json").write_text('{"shards": []}'), "lists no samples"),
        (lambda f: (f / "index.json").unlink(), "holds no index.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "holds another tokenizer.json"),
    ],
)
def test_damage_is_one_line_with_the_file_and_nothing_is_written(
    tmp_path, tokenizer, capsys, change, words
):
    folder = write_foreign(tmp_path / "web", MODERNBERT)
    change(folder)
    before = bytes_of(folder)
    assert words in refused(capsys, "index", folder, "--tokenizer", tokenizer)
    assert bytes_of(folder) == before


def change_index(folder: Path, change) -> None:
    content = json.loads((folder / "index.json").read_text())
    change(content["shards"], content["shards"][0], content)
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda all, one, top: top.update(shards=None), "shards is no list of mappings"),
        (lambda all, one, top: top.update(shards=5), "shards is no list of mappings"),
        (lambda all, one, top: all.insert(0, "x"), "shards is no list of mappings"),
        (lambda all, one, top: one["raw_data"].pop("bytes"), "'bytes' is missing"),
        (lambda all, one, top: one.pop("zip_data"), "'zip_data' is missing"),
        (lambda all, one, top: one.update(raw_data=None), "no index of MDS shards"),
        (lambda all, one, top: one["raw_data"].update(hashes=None), "hashes is None"),
        (lambda all, one, top: one["raw_data"].update(basename=7), "basename is 7"),
        (lambda all, one, top: one.update(samples="x"), "samples is 'x'"),
        (lambda all, one, top: all.append(one), "lists shard.00000.mds more than once"),
    ],
)
def test_an_index_json_of_another_making_is_one_line(tmp_path, tokenizer, capsys, change, words):
    folder = write_foreign(tmp_path / "web", MODERNBERT)
    change_index(folder, change)
    before = bytes_of(folder)
    err = refused(capsys, "index", folder, "--tokenizer", tokenizer)
    assert words in err and "index.json" in err
    assert bytes_of(folder) == before


def test_damage_after_index_is_found_although_index_json_has_no_hash(tmp_path, tokenizer, capsys):
    folder = write_foreign(tmp_path / "web", MODERNBERT, compression="zstd")
    assert run("index", folder, "--tokenizer", tokenizer) == 0
    capsys.readouterr()
    path = folder / "shard.00000.mds.zstd"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert "shard.00000.mds.zstd is damaged" in refused(capsys, "verify", folder)
    with pytest.raises(ShardError, match=r"shard\.00000\.mds\.zstd has SHA-256"):
        open_source(folder, name="web", cache=tmp_path / "cache").read(0)
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(json.dumps({**hashes, path.name: "0" * 64}))
    with pytest.raises(ShardError, match=r"hashes\.json has SHA-256"):
        open_source(folder, name="web")


def test_an_index_again_that_fails_leaves_the_good_card(tmp_path, tokenizer, capsys):
    folder = write_foreign(tmp_path / "web", MODERNBERT)
    assert run("index", folder, "--tokenizer", tokenizer) == 0
    before = bytes_of(folder)
    wrong = write_tokenizer(tmp_path / "wrong.json", vocab_size=V + 1)  # its [CLS] is another id
    assert "does not begin with [CLS]" in refused(
        capsys, "index", folder, "--tokenizer", wrong, "--again"
    )
    assert bytes_of(folder) == before


def test_an_indexed_folder_is_left_alone_and_redone_only_on_demand(tmp_path, tokenizer, capsys):
    for name in ("x/train", "x/val"):
        write_foreign(tmp_path / name, MODERNBERT)
    assert (
        run(
            "index",
            tmp_path / "x",
            "--tokenizer",
            tokenizer,
            "--split",
            "held_out",
            "--source",
            "web",
        )
        == 0
    )
    assert {read_card(tmp_path / "x" / name).split for name in ("train", "val")} == {"held_out"}
    before = bytes_of(tmp_path / "x")
    assert "has a card.json already" in refused(
        capsys, "index", tmp_path / "x", "--tokenizer", tokenizer
    )
    assert (
        run(
            "index",
            tmp_path / "x",
            "--tokenizer",
            tokenizer,
            "--split",
            "held_out",
            "--source",
            "web",
            "--again",
        )
        == 0
    )
    assert bytes_of(tmp_path / "x") == before
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    assert run("prepare", settings(tmp_path)) == 0
    own = tmp_path / "shards/a/train"
    assert "of data-prep prepare" in refused(
        capsys, "index", own, "--tokenizer", own / "tokenizer.json", "--again"
    )
