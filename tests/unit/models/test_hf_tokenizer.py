"""The tokenizer of an export gives the ids that transformers' own class of the family gives, for one text and for two."""

from __future__ import annotations

import json

import pytest
import transformers

from encoder.base.errors import ModelError
from encoder.base.tokenizer_json import special_ids_of
from encoder.models.bert import BertConfig, RobertaConfig
from encoder.models.catalog import build_model
from encoder.models.hf.tokenizer import read_tokenizer, write_tokenizer
from encoder.models.hf.write import export_hf
from encoder.models.stored import StoredModel
from launch.fill_mask import answers
from tests.helpers.tokenizers_of import NAMES, TEXTS, train

SIZES = dict(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
ASKED = [*TEXTS, "", "  Two  spaces ", "日本語 🙂 unseen", "The [MASK] sat on <mask>."]


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    """(name, transformers' tokenizer, its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, train(request.param, folder), folder


def exported(folder, source, *, segments):
    vocab_size, specials = special_ids_of(source / "tokenizer.json")
    folder.mkdir()
    write_tokenizer(
        folder,
        source / "tokenizer.json",
        specials,
        vocab_size=vocab_size,
        max_tokens=512,
        segments=segments,
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_one_text_and_two_have_the_ids_of_transformers_own_class(family, tmp_path):
    name, theirs, source = family
    ours = exported(tmp_path / "out", source, segments=name != "roberta")
    assert ours(ASKED)["input_ids"] == theirs(ASKED)["input_ids"]
    # transformers takes an empty second text for none
    for first, second in [pair for pair in zip(ASKED, ASKED[1:]) if pair[1]]:
        found = ours(first, second)
        ids, segments = pair_of(theirs, first, second)
        assert found["input_ids"] == ids
        assert found.get("token_type_ids", [0] * len(ids)) == segments


def pair_of(theirs, first: str, second: str) -> tuple[list[int], list[int]]:
    """Ids and segments of two texts, by transformers' class: as it writes them in Python, which only version 4 has."""
    if hasattr(theirs, "build_inputs_with_special_tokens"):
        ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
        segments = theirs.create_token_type_ids_from_sequences(*ids)
        return theirs.build_inputs_with_special_tokens(*ids), segments
    asked = theirs(first, second, return_token_type_ids=True)
    return asked["input_ids"], asked["token_type_ids"]


def test_the_roles_have_the_familys_names_and_ids(family, tmp_path):
    _, theirs, source = family
    ours = exported(tmp_path / "out", source, segments=False)
    for role in ("cls", "sep", "pad", "mask", "unk"):
        assert getattr(ours, f"{role}_token") == getattr(theirs, f"{role}_token")
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
    assert ours.padding_side == theirs.padding_side
    padded = ours(["cat", "The cat sat"], padding=True)["input_ids"]
    assert padded == theirs(["cat", "The cat sat"], padding=True)["input_ids"]


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_an_exported_family_is_asked_by_its_own_mask(kind, tmp_path):
    name = "bert" if kind is BertConfig else "roberta"
    theirs = train(name, tmp_path / "theirs")
    config = kind(**SIZES, vocab_size=len(theirs))
    stored = StoredModel(
        config=config,
        weights=build_model(config, seed=1).state_dict(),
        tokenizer_json=None,
        origin="a test",
        max_tokens=None,
    )
    path = tmp_path / "theirs/tokenizer.json"
    export_hf(stored, path, special_ids_of(path)[1], tmp_path / "out")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    pair = ours(TEXTS[0], TEXTS[1])
    assert pair["input_ids"] == theirs(TEXTS[0], TEXTS[1])["input_ids"]
    assert ("token_type_ids" in pair) == (name == "bert")
    asked = answers(tmp_path / "out", ["The [MASK] sat."], top=2)
    assert [len(mask) for mask in asked[0]["masks"]] == [2]


def test_a_file_without_a_post_processor_is_given_the_familys_frame(family, tmp_path):
    name, theirs, source = family
    (tmp_path / "bare").mkdir()
    content = json.loads((source / "tokenizer.json").read_text())
    _, specials = special_ids_of(source / "tokenizer.json")
    content["post_processor"] = None
    path = tmp_path / "bare/tokenizer.json"
    path.write_text(json.dumps(content))
    vocab_size = len(theirs)
    tokenizer = read_tokenizer(path, specials, vocab_size=vocab_size)
    for first, second in zip(TEXTS, TEXTS[1:]):
        assert tokenizer.encode(first).ids == theirs(first)["input_ids"]
        assert tokenizer.encode(first, second).ids == theirs(first, second)["input_ids"]


def test_a_model_with_segments_has_them_of_a_tokenizer_that_has_none(tmp_path):
    theirs = train("bert", tmp_path / "bert")
    path = tmp_path / "bert/tokenizer.json"
    content = json.loads(path.read_text())
    for part in content["post_processor"]["pair"]:
        next(iter(part.values()))["type_id"] = 0
    path.write_text(json.dumps(content))
    ours = exported(tmp_path / "out", tmp_path / "bert", segments=True)
    assert ours(TEXTS[0], TEXTS[1]).data == theirs(TEXTS[0], TEXTS[1]).data


def test_another_frame_than_the_models_is_refused(tmp_path):
    train("xlnet", tmp_path / "xlnet")
    path = tmp_path / "xlnet/tokenizer.json"
    vocab_size, specials = special_ids_of(path)
    assert specials.frame == "end" and specials.behind == (specials.sep_id, specials.cls_id)
    content = json.loads(path.read_text())
    content["post_processor"]["single"].reverse()
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"needed: <sep> and <cls>, \[4, 3\]"):
        read_tokenizer(path, specials, vocab_size=vocab_size)
