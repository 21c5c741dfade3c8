"""An exported folder serves: fill-mask, AutoModel, sentence-transformers, onnxruntime."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch

from encoder.base.batch import packed_documents
from encoder.base.errors import ExportError
from encoder.models.hf import onnx as hf_onnx
from encoder.models.hf.parity import our_model
from tests.helpers.hf import CONFIG, exported, names_in, stored, write_tokenizer_json

MODEL = stored(dataclasses.replace(CONFIG, num_hidden_layers=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("serves")
    exported(
        write_tokenizer_json(place / "shards" / "tokenizer.json"), place / "hf", MODEL, onnx=True
    )
    return place / "hf"


def our_hidden_states(folder, text):
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    with torch.inference_mode():
        return our_model(MODEL.weights, MODEL.config).hidden_states(
            packed_documents([torch.tensor(ids)])
        )


def test_the_tokenizer_takes_the_space_before_a_mask_and_knows_its_length(folder):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    asked = tokenizer("a [MASK]b")
    assert set(asked) == {"input_ids", "attention_mask"}
    assert tokenizer.convert_ids_to_tokens(asked["input_ids"]) == [
        "[CLS]",
        "a",
        "[MASK]",
        "b",
        "[SEP]",
    ]  # space taken
    assert (tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.mask_token_id) == (
        140,
        3,
        4,
    )


def test_fill_mask_answers_with_our_likeliest_token(folder):
    import transformers

    answers = transformers.pipeline("fill-mask", model=str(folder), device="cpu")(
        "ab[MASK]c", top_k=3
    )
    ours = our_model(MODEL.weights, MODEL.config)
    with torch.inference_mode():
        shares = torch.softmax(ours.decode(our_hidden_states(folder, "ab[MASK]c"))[3], -1)
    assert [a["token"] for a in answers] == shares.topk(3).indices.tolist()
    assert [a["score"] for a in answers] == pytest.approx(shares.topk(3).values.tolist(), rel=1e-4)


def test_automodel_gives_our_hidden_states(folder):
    import transformers

    model, tokenizer = (
        transformers.AutoModel.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    with torch.inference_mode():
        found = model(**tokenizer("every letter", return_tensors="pt")).last_hidden_state[0]
    assert float((found - our_hidden_states(folder, "every letter")).abs().max()) <= 1e-5


def test_sentence_transformers_takes_the_mean_of_whole_documents(folder):
    """Without files of its own: its defaults are the mean over tokens, and the tokenizer's length."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 140
    texts = ["short", "a text of many more letters " * 4]
    for text, vector in zip(texts, model.encode(texts, convert_to_tensor=True), strict=True):
        assert float((vector - our_hidden_states(folder, text).mean(0)).abs().max()) <= 1e-5


def test_onnxruntime_gives_our_logits_at_all_lengths_and_paddings(folder):
    assert names_in(folder / "onnx") == ["model.onnx"]
    proof = json.loads((folder / "export_proof.json").read_text())["onnxruntime"]
    assert proof["lengths"] == [1, 127, 128, 129, 130, 140] and proof["max_abs_difference"] <= 2e-5


def test_an_onnx_graph_that_differs_is_refused_and_nothing_is_left(folder, tmp_path, monkeypatch):
    tokenizer_json = write_tokenizer_json(tmp_path / "shards" / "tokenizer.json")
    graph = (folder / "onnx" / "model.onnx").read_bytes()
    monkeypatch.setattr(
        torch.onnx, "export", lambda model, example, path, **_: path.write_bytes(graph)
    )
    other = stored(MODEL.config, seed=5)
    with pytest.raises(ExportError, match="the logits of onnxruntime differ from ours by"):
        exported(tokenizer_json, tmp_path / "out", other, onnx=True)
    assert names_in(tmp_path) == ["shards"]


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    tokenizer_json = write_tokenizer_json(tmp_path / "shards" / "tokenizer.json")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        hf_onnx.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else found(name),
    )
    with pytest.raises(
        ExportError,
        match=r"--onnx needs packages that are not installed: onnxscript.*pip install -e '.\[onnx\]'",
    ):
        exported(tokenizer_json, tmp_path / "out", MODEL, onnx=True)
    assert names_in(tmp_path) == ["shards"]
