"""Text to pieces: cutting, wrapping, the held-out choice, and two encoders with the same ids."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest

from data_prep import tokenization
from data_prep.tokenization import (
    HOSTILE,
    TextEncoder,
    choose_encoder,
    cut_lengths,
    encode_pieces,
    is_held_out,
)
from encoder.base import log
from encoder.base.errors import ShardError
from encoder.base.tokenizer_json import special_ids_of
from tests.helpers.prep import texts, tokenizer_bytes


@pytest.fixture
def tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_bytes())
    return tmp_path / "tokenizer.json"


def test_ten_tokens_at_capacity_four_become_four_three_three():
    pieces_P, document_P = cut_lengths(np.array([10, 4, 5, 1]), 4)
    assert pieces_P.tolist() == [4, 3, 3, 4, 3, 2, 1]
    assert document_P.tolist() == [0, 0, 0, 1, 2, 2, 3]


def test_cutting_conserves_tokens_and_pieces_are_near_equal():
    lengths_D = np.random.default_rng(0).integers(1, 5000, size=500)
    pieces_P, document_P = cut_lengths(lengths_D, 97)
    assert np.array_equal(np.bincount(document_P, weights=pieces_P), lengths_D)
    assert pieces_P.max() <= 97
    for d in range(500):
        own = pieces_P[document_P == d]
        assert own.max() - own.min() <= 1
        assert len(own) == -(-lengths_D[d] // 97)


def test_pieces_joined_without_cls_and_sep_are_the_document(tokenizer_json):
    encoder, documents = TextEncoder(tokenizer_json, "fastokens"), texts(30)
    plain_T, lengths_D = encoder.encode(documents)
    pieces = encode_pieces(
        encoder,
        documents,
        specials=special_ids_of(tokenizer_json)[1],
        dtype=np.dtype("uint16"),
        max_tokens_per_document=16,
        held_out_share=0.5,
    )
    assert pieces.ids_T.dtype == np.uint16
    assert pieces.content_tokens == len(plain_T) == pieces.ids_T.size - 2 * len(pieces.lengths_P)
    each = np.split(pieces.ids_T, np.cumsum(pieces.lengths_P)[:-1])
    assert all(p[0] == 316 and p[-1] == 317 and len(p) <= 16 for p in each)
    assert np.array_equal(np.concatenate([p[1:-1] for p in each]), plain_T)
    # all pieces of a document go to the same split
    document_P = cut_lengths(lengths_D, 14)[1]
    assert all(len(set(pieces.held_out_P[document_P == d].tolist())) == 1 for d in range(30))


def test_held_out_is_a_function_of_the_text_and_keeps_its_share():
    documents = texts(4000)
    chosen = {t for t in documents if is_held_out(t, 0.1)}
    assert chosen == {t for t in reversed(documents) if is_held_out(t, 0.1)}
    assert 340 < len(chosen) < 460  # 400 +- 3 standard deviations
    assert chosen <= {t for t in documents if is_held_out(t, 0.2)}, (
        "a larger share only adds documents"
    )
    assert not any(is_held_out(t, 0.0) for t in documents)


@pytest.mark.parametrize("name", ["fastokens", "tokenizers"])
def test_spellings_of_special_tokens_stay_text(tokenizer_json, name):
    ids_T, lengths_D = TextEncoder(tokenizer_json, name).encode(
        ["a [MASK] b", "[CLS][SEP]", " [PAD] [UNK]"]
    )
    assert lengths_D.sum() == len(ids_T) > 20  # spelt out byte by byte
    assert ids_T.max() < 315, "an id of a special token came out of raw text"


def test_both_encoders_agree_on_hostile_text(tokenizer_json):
    fast, judge = (
        TextEncoder(tokenizer_json, name).encode(HOSTILE) for name in ("fastokens", "tokenizers")
    )
    assert np.array_equal(fast[0], judge[0]) and np.array_equal(fast[1], judge[1])
    assert choose_encoder(tokenizer_json, lambda: texts(20)) == "fastokens"


def test_without_fastokens_tokenizers_encodes_and_says_so(tokenizer_json, monkeypatch, capsys):
    real = builtins.__import__

    def no_fastokens(name, *rest, **more):
        if name == "fastokens":
            raise ImportError("No module named 'fastokens'")
        return real(name, *rest, **more)

    monkeypatch.setattr(log._state, "said", set())
    monkeypatch.setattr(builtins, "__import__", no_fastokens)
    assert choose_encoder(tokenizer_json) == "tokenizers"
    assert "fastokens cannot be used" in capsys.readouterr().err


def test_a_fast_encoder_with_other_ids_is_not_used(tokenizer_json, monkeypatch, capsys):
    class Wrong(TextEncoder):
        def encode(self, documents):
            ids_T, lengths_D = super().encode(documents)
            return (ids_T + (self.name == "fastokens")), lengths_D

    monkeypatch.setattr(log._state, "said", set())
    monkeypatch.setattr(tokenization, "TextEncoder", Wrong)
    assert choose_encoder(tokenizer_json) == "tokenizers"
    assert "other ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"continuing_subword_prefix": "##"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(["},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
    ids=str,
)
def test_a_panic_of_native_code_is_one_sentence_with_the_tokenizer(tmp_path, change):
    content = json.loads(tokenizer_bytes())
    for key, value in change.items():
        content[key] = {**content[key], **value} if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match="is not a tokenizer that tokenizers can read"):
        choose_encoder(tmp_path / "tokenizer.json", lambda: ["a text"])


def test_an_id_beyond_any_vocabulary_makes_no_table(tmp_path):
    content = json.loads(tokenizer_bytes())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 2**31, "content": "[X]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match="below 2.24"):
        special_ids_of(tmp_path / "tokenizer.json")
