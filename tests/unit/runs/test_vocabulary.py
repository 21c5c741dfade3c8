"""A run over shards whose tokenizer was edited: what may differ, and the rows of renamed and added tokens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from encoder.base.errors import ConfigError, ModelError
from encoder.base.schema import to_plain
from encoder.base.tokenizer_json import read_tokenizer_json
from encoder.data.shard_format import TOKENIZER
from encoder.models.catalog import SYSTEMS, build_model
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, write_stored
from encoder.models.vocabulary import NewRows, with_new_rows
from encoder.runs.config import changed_settings, read_run
from encoder.runs.facts import DataFacts
from encoder.runs.initial import read_initial
from encoder.runs.vocabulary import VocabularyConfig, edits_of
from tests.helpers.prep import run as data_prep
from tests.helpers.prep import write_jsonl
from tests.helpers.shards import random_documents, write_source
from tests.helpers.tokenizers_of import TEXTS

CONFIG = ModernBertConfig(
    vocab_size=208,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A stored model with a WordPiece of 200 tokens, 99 of them unused, and 8 rows of padding."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_jsonl(folder / "a.jsonl", TEXTS * 20)
    words = ("--kind", "wordpiece", "--lowercase", "--unused", 99, "--vocab-size", 200)
    files = ("--files", folder / "a.jsonl", "--out", folder / "t.json")
    assert data_prep("tokenizer", "train", *words, *files) == 0
    made = build_model(CONFIG, seed=3)
    with torch.no_grad():
        made.decoder.bias.copy_(torch.arange(208.0))
    stored = StoredModel(
        config=CONFIG,
        weights={name: w.detach() for name, w in made.state_dict().items()},
        tokenizer_json=folder / "t.json",
        origin="a test",
        max_tokens=None,
    )
    write_stored(stored, folder / "model")
    return folder / "model"


def edited(model: Path, out: Path, *, renamed=None, added=()) -> Path:
    """The model's tokenizer.json with some tokens renamed, and others added behind the last."""
    content = json.loads((model / TOKENIZER).read_text())
    vocab = content["model"]["vocab"]
    for old, new in (renamed or {}).items():
        vocab[new] = vocab.pop(old)
    for number, token in enumerate(added, start=200):
        vocab[token] = number
    out.mkdir(exist_ok=True)
    (out / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False))
    return out / TOKENIZER


def run_of(model: Path, folder: Path, *, vocab_size: int, vocabulary: dict | None):
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "t",
                "init_from": str(model),
                "vocabulary": vocabulary,
                "data": str(folder / "shards"),
                "model": {"vocab_size": vocab_size},
                "phases": {
                    "tokens": "1K",
                    "max_tokens_per_document": 32,
                    "batch_tokens": 256,
                    "lr": 1e-3,
                },
            }
        )
    )
    return read_run(path)


def initial(model, folder, tokenizer_json, *, vocabulary, vocab_size=208):
    run = run_of(model, folder, vocab_size=vocab_size, vocabulary=vocabulary)
    facts = DataFacts(specials=None, vocab_size=0, tokenizer_json=tokenizer_json, card_sha256={})
    return read_initial(run, facts, hashed=False)


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(model.glob("*.safetensors")))


ROWS = ("model.embeddings.tok_embeddings.weight", "decoder.weight", "decoder.bias")


def test_renamed_tokens_keep_their_rows_and_nothing_else_changes(model, tmp_path):
    path = edited(model, tmp_path / "t", renamed={"[unused3]": "covid", "[unused4]": "##icu"})
    renamed = {"[unused3]": "covid", "[unused4]": "##icu"}
    found = initial(model, tmp_path, path, vocabulary={"renamed": renamed})
    before = weights_of(model)
    assert all(torch.equal(found.weights[name], before[name]) for name in before)
    assert "tokens renamed: 2, with the rows that they had" in found.lines[-1]


@pytest.mark.parametrize("rows", [208, 256])
def test_added_tokens_get_the_mean_of_the_rows_of_their_pieces(rows, model, tmp_path):
    path = edited(model, tmp_path / "t", added=["readers", "##numbers", "日"])
    found = initial(model, tmp_path, path, vocabulary={"added": "mean"}, vocab_size=rows)
    before = weights_of(model)
    ids = read_tokenizer_json(model / TOKENIZER).ids
    # by WordPiece, longest first, as its published algorithm finds them
    pieces = {200: pieces_of("readers", ids), 201: pieces_of("numbers", ids)}
    drawn = build_model(dataclasses.replace(CONFIG, vocab_size=rows), seed=17).state_dict()
    for name in ROWS:
        ours = found.weights[name]
        assert len(ours) == rows
        assert torch.equal(ours[:200], before[name][:200])
        for number, some in pieces.items():
            mean = torch.stack([before[name][i] for i in some]).mean(dim=0)
            torch.testing.assert_close(ours[number], mean)
        # one that the old tokenizer cannot write, and rows beyond
        assert torch.equal(ours[202], drawn[name][202])
        assert torch.equal(ours[203:208], before[name][203:208])
        assert torch.equal(ours[208:], drawn[name][208:])
    others = set(before) - set(ROWS)
    assert all(torch.equal(found.weights[name], before[name]) for name in others)
    said = "tokens added: 3, rows of 2 the mean of their pieces, of 1 drawn"
    assert said in found.lines[-1]
    assert ("vocab_size is 208 there, 256 in the run" in found.lines[-2]) == (rows == 256)


def pieces_of(word: str, ids: dict[str, int]) -> list[int]:
    found, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next(e for e in range(len(word), start, -1) if prefix + word[start:e] in ids)
        found.append(ids[prefix + word[start:end]])
        start = end
    return found


def test_added_tokens_may_get_rows_as_a_new_model_has_them(model, tmp_path):
    path = edited(model, tmp_path / "t", added=["readers"])
    found = initial(model, tmp_path, path, vocabulary={"added": "drawn"})
    drawn = build_model(CONFIG, seed=17).state_dict()
    for name in ROWS:
        assert torch.equal(found.weights[name][200], drawn[name][200])
    assert "tokens added: 1, rows of 0 the mean of their pieces, of 1 drawn" in found.lines[-1]


@pytest.mark.parametrize(
    ("edit", "vocabulary", "said"),
    [
        (
            {"renamed": {"[unused3]": "covid"}},
            None,
            r"vocabulary: \{renamed: \{'\[unused3\]': 'cov",
        ),
        ({"added": ["x"]}, None, "no token in .* 'x' in .* vocabulary: {added: mean}, or drawn"),
        ({"renamed": {"the": "covid"}}, {"added": "mean"}, "is 'the' in .* 'covid' in"),
        ({}, {"renamed": {"[unused3]": "covid"}}, "but no id is the one in .* and the other in"),
        (
            {"renamed": {"[unused3]": "b"}},
            {"renamed": {"[unused3]": "c"}},
            r"is '\[unused3\]' in .*, 'b' in",
        ),
    ],
)
def test_an_edit_that_the_run_does_not_name_is_refused(edit, vocabulary, said, model, tmp_path):
    path = edited(model, tmp_path / "t", **edit)
    config = VocabularyConfig(**vocabulary) if vocabulary else None
    with pytest.raises(ModelError, match=said):
        edits_of(model / TOKENIZER, path, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "vocabulary says nothing"),
        ({"renamed": {"the": "covid"}}, "'the' is no unused token, such as .unused1.: its row"),
    ],
)
def test_a_vocabulary_that_makes_no_sense_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        VocabularyConfig(**settings)


def test_it_decides_the_curve_and_needs_init_from(model, tmp_path):
    plain = run_of(model, tmp_path, vocab_size=208, vocabulary=None)
    other = run_of(model, tmp_path, vocab_size=208, vocabulary={"added": "mean"})
    old = to_plain(plain)
    del old["vocabulary"]
    assert changed_settings(old, plain) == []
    assert [key for key, _, _ in changed_settings(old, other)] == ["vocabulary"]
    with pytest.raises(ConfigError, match="vocabulary has no effect without init_from"):
        dataclasses.replace(other, init_from=None)


def test_the_runs_vocabulary_follows_the_edited_shards_in_whole_64s(model, tmp_path):
    documents = random_documents(30, vocab_size=212)
    write_source(tmp_path / "shards", documents, vocab_size=212)
    path = tmp_path / "run.yaml"
    run_of(model, tmp_path, vocab_size=208, vocabulary=None)
    content = yaml.safe_load(path.read_text())
    del content["model"]
    for vocabulary, rows in (({"added": "drawn"}, 256), ({"renamed": {"[unused1]": "x"}}, 208)):
        path.write_text(yaml.safe_dump({**content, "vocabulary": vocabulary}))
        run = read_run(path)
        assert run.model.vocab_size == rows
        why = next(d.why for d in run.derived if d.key == "model")
        assert ("vocab_size 256: the shards' 212 tokens in whole 64s" in why) == (rows == 256)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_family_says_where_its_rows_are(system):
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    names = {field.name for field in dataclasses.fields(SYSTEMS[system])}
    old = SYSTEMS[system](**{k: v for k, v in {**settings, **more}.items() if k in names})
    new = dataclasses.replace(old, vocab_size=64)
    weights = build_model(old, seed=1).state_dict()
    grown = with_new_rows(weights, new, NewRows(means={41: (1, 3)}), seed=2)
    needed = build_model(new, seed=2).state_dict()
    assert {n: w.shape for n, w in grown.items()} == {n: w.shape for n, w in needed.items()}
    changed = [name for name in weights if weights[name].shape != grown[name].shape]
    assert changed
    for name in changed:
        mean = weights[name][[1, 3]].mean(dim=0)
        torch.testing.assert_close(grown[name][41], mean)
        assert torch.equal(grown[name][42], needed[name][42])


def test_fewer_rows_than_the_model_has_are_refused(model, tmp_path):
    path = edited(model, tmp_path / "t", added=["x"])
    with pytest.raises(ModelError, match="vocab_size 208 there, 201 in the run"):
        initial(model, tmp_path, path, vocabulary={"added": "mean"}, vocab_size=201)


def test_a_model_without_tokenizer_cannot_be_edited(model, tmp_path):
    shutil.copytree(model, tmp_path / "bare")
    (tmp_path / "bare" / TOKENIZER).unlink()
    path = edited(model, tmp_path / "t", added=["x"])
    with pytest.raises(ModelError, match="has no tokenizer.json, so what vocabulary says"):
        initial(tmp_path / "bare", tmp_path, path, vocabulary={"added": "mean"})
