"""An export says what it is and how it is used, is read by sentence-transformers, and goes to the hub as it was proven."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import runpy
from types import SimpleNamespace

import pytest
import yaml

from encoder.base.errors import ExportError, UserError
from encoder.base.units import begun, with_article
from encoder.models.hf.card import Table, Training
from encoder.models.hf.push import push_export
from tests.helpers.hf import CONFIG, exported, stored, write_tokenizer_json

MODEL = stored(dataclasses.replace(CONFIG, num_hidden_layers=2))
HOSTILE = "run`\n# a | <script>alert(1)</script> [x](http://y) ---"


def test_an_article_is_as_it_is_spoken():
    said = [with_article(name) for name in ("BERT", "ALBERT", "ELECTRA", "XLNet", "roberta")]
    assert said == ["a BERT", "an ALBERT", "an ELECTRA", "an XLNet", "a roberta"]
    assert begun("an ALBERT") == "An ALBERT"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    return write_tokenizer_json(tmp_path_factory.mktemp("card") / "tokenizer.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_json):
    place = tmp_path_factory.mktemp("exports") / "my-model"
    training = Training(
        name=HOSTILE,
        facts={"trained": "9 steps", "data web": "3M tokens"},
        tables=(
            Table(title="Held-out text", head=("", "after step 9"), rows=[["loss", "3.100 nats"]]),
        ),
        base_model="someone/model",
    )
    exported(tokenizer_json, place, MODEL, training=training)
    return place


def test_a_card_says_what_was_trained_and_leaves_the_license_open(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["library_name"] == "transformers" and said["pipeline_tag"] == "fill-mask"
    assert said["base_model"] == "someone/model" and "license" not in said and "# license:" in front
    for words in (
        "9 steps",
        "3M tokens",
        "3.100 nats",
        "the same logits within",
        "2, 1 of 3 global",
    ):
        assert words in body, words


def test_names_in_a_card_are_text_and_nothing_else(folder):
    text = (folder / "README.md").read_text()
    assert "<script>" not in text and "\n# a" not in text and "[x](" not in text
    assert text.count("```") == 4


def test_every_snippet_of_a_card_runs_as_it_stands(folder, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(folder.parent)
    for number, snippet in enumerate(snippets):
        script = folder.parent / f"snippet{number}.py"
        script.write_text(snippet)
        runpy.run_path(str(script))
    said = capsys.readouterr().out
    assert "(2, 32)" in said and len(said.splitlines()) == 6


def test_sentence_transformers_reads_an_export_without_making_up_modules(folder, caplog):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with caplog.at_level(logging.INFO, logger="sentence_transformers"):
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert (
        "mean pooling" not in caplog.text.lower()
        and "creating a new one" not in caplog.text.lower()
    )
    assert model.max_seq_length == 140 and model.get_sentence_embedding_dimension() == 32
    modules = [type(module).__name__ for module in model]
    assert modules == ["Transformer", "Pooling"]


def test_an_export_does_not_write_over_what_a_person_put_there(folder, tokenizer_json, tmp_path):
    out = tmp_path / "hf"
    exported(tokenizer_json, out, MODEL)
    exported(tokenizer_json, out, MODEL)  # its own it may replace
    (out / "LICENSE").write_text("mine")
    with pytest.raises(UserError, match="holds LICENSE, which this command did not write"):
        exported(tokenizer_json, out, MODEL)
    (out / "LICENSE").unlink()
    (out / "README.md").write_text("license: mine")
    with pytest.raises(ExportError, match="README.md was edited since"):
        exported(tokenizer_json, out, MODEL)
    assert (out / "README.md").read_text() == "license: mine"


class Hub:
    """What stands for the hub's API: it remembers what was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = []
        self.error = error

    def create_repo(self, name, **how):
        if self.error:
            raise self.error
        self.asked.append(("create_repo", name, how))

    def create_branch(self, name, **how):
        self.asked.append(("create_branch", name, how))

    def upload_folder(self, **how):
        self.asked.append(("upload_folder", how["repo_id"], how))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    return "hf_secretsecret"


def test_a_push_uploads_the_files_of_the_export_and_no_other(folder, token):
    (folder / "notes.txt").write_text("private")
    hub = Hub()
    lines = push_export(folder, "me/model", private=True, revision="v2", api=hub)
    (folder / "notes.txt").unlink()
    assert [a[0] for a in hub.asked] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.asked[0][2]["private"] is True and hub.asked[2][2]["revision"] == "v2"
    names = hub.asked[2][2]["allow_patterns"]
    assert {"README.md", "model.safetensors", "modules.json", "1_Pooling/config.json"} <= set(names)
    assert "notes.txt" not in names and "names no license yet" in lines[1]


def test_only_what_was_proven_is_pushed(folder, tokenizer_json, token, tmp_path):
    with pytest.raises(ExportError, match="no proven export. Make one: tessera export"):
        push_export(tmp_path, "me/model", private=False, revision=None, api=Hub())
    out = tmp_path / "hf"
    exported(tokenizer_json, out, MODEL)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-3}))
    with pytest.raises(ExportError, match="config.json is not what was proven"):
        push_export(out, "me/model", private=False, revision=None, api=Hub())
    with pytest.raises(ExportError, match="'me' is no name on the hub; needed: ORG/NAME"):
        push_export(folder, "me", private=False, revision=None, api=Hub())


def test_a_push_that_fails_is_one_sentence_without_the_token(folder, token, monkeypatch):
    refused = OSError(f"401 for Bearer {token}")
    refused.response = SimpleNamespace(status_code=401)
    for error in (refused, ConnectionError(f"no route, token {token}")):
        with pytest.raises(ExportError) as met:
            push_export(folder, "me/model", private=False, revision=None, api=Hub(error))
        assert token not in str(met.value) and met.value.__cause__ is None
    # no network at all
    with pytest.raises(ExportError, match="cannot be reached"):
        push_export(folder, "me/model", private=False, revision=None)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ExportError, match="no token.*hf auth login"):
        push_export(folder, "me/model", private=False, revision=None, api=Hub())
