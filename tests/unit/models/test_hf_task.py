"""A fine-tuned model's folder: transformers reads names, labels and pooling from it; a wrong one gets no name."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch

from encoder.base.errors import ExportError
from encoder.models.hf import task as hf_task
from encoder.models.hf.task import TrainedTask, export_task
from tests.helpers.hf import write_tokenizer_json
from tests.helpers.tasks import BODIES, drawn_task


def ready(tmp_path: Path, family: str, *, kind: str = "text", **changes) -> TrainedTask:
    return dataclasses.replace(
        drawn_task(family, kind=kind),
        tokenizer_json=write_tokenizer_json(tmp_path / "tokenizer.json"),
        results={"dev": {"accuracy": 0.5}},
        **changes,
    )


def run_example(card: str, folder: Path):
    """What the Python of a card answers, where FOLDER is the folder."""
    example = folder.parent / "example.py"
    example.write_text(card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder)))
    return runpy.run_path(str(example))["answer"]


@pytest.mark.parametrize("family", BODIES)
def test_a_folder_of_each_family_is_proven_and_says_its_labels(tmp_path, family):
    import transformers

    proofs = export_task(ready(tmp_path, family), tmp_path / "out")
    assert proofs["transformers"].max_abs_difference < 1e-4
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert theirs.config.model_type == family and theirs.config.problem_type
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "| dev | accuracy | 0.5000 |" in card
    assert json.loads((tmp_path / "out" / "export_proof.json").read_text())["transformers"]
    assert run_example(card, tmp_path / "out")[0]["label"] in "abc"


@pytest.mark.parametrize("kind", ["token", "span", "choice"])
@pytest.mark.parametrize("family", BODIES)
def test_other_heads_have_their_classes_and_are_proven_at_every_token(tmp_path, family, kind):
    import transformers

    proofs = export_task(ready(tmp_path, family, kind=kind), tmp_path / "out")
    assert proofs["transformers"].max_abs_difference < 1e-4
    form = hf_task.FORMS[kind]
    theirs = getattr(transformers, form.auto_class).from_pretrained(tmp_path / "out")
    assert type(theirs).__name__.endswith(form.suffix)
    if kind == "token":
        assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline_tag: {form.pipeline}" in card and form.usage in card
    answer = run_example(card, tmp_path / "out")
    assert {"token": list, "span": str, "choice": torch.Tensor}[kind] is type(answer)


@pytest.mark.parametrize(
    ("family", "kind", "outputs"),
    [
        ("bert", "choice", ["logits"]),
        pytest.param(
            "modernbert", "span", ["start_logits", "end_logits"], marks=pytest.mark.matrix
        ),
        pytest.param("roberta", "token", ["logits"], marks=pytest.mark.matrix),
        pytest.param("distilbert", "text", ["logits"], marks=pytest.mark.matrix),
    ],
)
def test_onnxruntime_answers_as_each_kind_of_head_does(tmp_path, family, kind, outputs):
    """Padded, with the segments of a pair where the body has them, and with other numbers of choices than the example's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    task = ready(tmp_path, family, kind=kind)
    proofs = export_task(task, tmp_path / "out", onnx=True)
    assert proofs["onnxruntime"].max_abs_difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    assert [of.name for of in session.get_outputs()] == outputs
    names = [of.name for of in session.get_inputs()]
    assert ("token_type_ids" in names) == (family == "bert")
    ids = torch.randint(5, 40, (3, 5, 7) if kind == "choice" else (3, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in names:
        given["token_type_ids"] = (torch.arange(7) > 3).long().expand_as(ids)
    import transformers

    auto = getattr(transformers, hf_task.FORMS[kind].auto_class)
    theirs = auto.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(**given)
    found = session.run(None, {name: x.numpy() for name, x in given.items()})
    for name, value in zip(outputs, found, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(value), getattr(expected, name), rtol=1e-4, atol=1e-4
        )


@pytest.mark.matrix
def test_a_graph_of_a_head_that_differs_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    whole = hf_task._graph_of

    def wrong(task, theirs, folder):
        theirs.classifier.bias.data += 1.0
        return whole(task, theirs, folder)

    monkeypatch.setattr(hf_task, "_graph_of", wrong)
    with pytest.raises(ExportError, match="the logits of onnxruntime differ from ours by"):
        export_task(ready(tmp_path, "distilbert"), tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_a_card_says_the_dataset_and_that_a_result_is_no_finite_number(tmp_path):
    task = ready(tmp_path, "distilbert")
    results = {"dev": {"loss": None, "accuracy": 0.5}}
    broken = dataclasses.replace(task, results=results, dataset="someone/letters")
    export_task(broken, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| dev | loss | not finite |" in card and "| dev | accuracy | 0.5000 |" in card
    head = card.split("---")[1]
    assert "accuracy" in head and "type: loss" not in head
    assert "datasets:\n- someone/letters\n" in head


@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", "head.dense"), ("roberta", "classifier"), ("distilbert", "head.dense")],
)
def test_a_head_that_went_elsewhere_leaves_nothing_behind(tmp_path, monkeypatch, family, name):
    names = hf_task.FORMS["text"].names[family]
    whole = hf_task.their_weights

    def wrong(task, bridge):
        found = whole(task, bridge)
        stem = f"{names[name]}.bias"
        return {**found, stem: found[stem] + 1.0}

    monkeypatch.setattr(hf_task, "their_weights", wrong)
    with pytest.raises(ExportError, match="the logits of transformers differ from ours by"):
        export_task(ready(tmp_path, family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_segments_of_a_pair_are_compared_as_well(tmp_path, monkeypatch):
    task = ready(tmp_path, "bert")
    whole = hf_task.their_weights

    def wrong(task, bridge):
        found = whole(task, bridge)
        name = "bert.embeddings.token_type_embeddings.weight"
        # the second segment's row alone: texts by themselves do not meet it
        return {**found, name: found[name] + torch.tensor([[0.0], [0.1]]) * torch.arange(16.0)}

    monkeypatch.setattr(hf_task, "their_weights", wrong)
    with pytest.raises(ExportError, match="the logits of transformers differ from ours by"):
        export_task(task, tmp_path / "out")
