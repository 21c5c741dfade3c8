"""Folders of transformers' own classes for tasks and bodies, read as pretrained models and as starts of a fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from encoder.base.batch import packed_documents
from encoder.finetune.config import read_task
from encoder.finetune.prepare import prepare, read_start
from encoder.models.hf.catalog import bridge_of
from encoder.models.hf.other_heads import labels_of, problem_of
from encoder.models.hf.read import prove_import, read_hf, read_task_head
from encoder.models.hf.task import export_task
from encoder.models.with_task import TaskModel, first_weights
from encoder.runs.weights import read_model
from encoder.tools import notebook
from tests.helpers.hf import SPECIALS, write_tokenizer_json
from tests.helpers.tasks import BODIES, drawn_task, write_rows, write_task

CLASSES = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family and task what `save_pretrained` of transformers' own class writes, and of the body alone."""
    import transformers

    root = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(1)
    tokenizer_json = write_tokenizer_json(root / "tokenizer.json")
    export_task(
        dataclasses.replace(drawn_task("modernbert", outputs=2), tokenizer_json=tokenizer_json),
        root / "modernbert",
    )
    for family, (config, specials) in BODIES.items():
        bridge = bridge_of(config, specials)
        auto = transformers.AutoConfig.for_model(**bridge.to_settings(config, specials))
        for name in (*(f"For{kind}" for kind in CLASSES), "Model"):
            made = getattr(transformers, f"Auto{'Model' + name.removeprefix('Model')}")
            model = made.from_config(auto)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(root / f"{family}-{name}")
            shutil.copy(tokenizer_json, root / f"{family}-{name}")
    return root


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("name", [*(f"For{kind}" for kind in CLASSES), "Model"])
def test_the_body_is_theirs_and_the_head_over_masked_tokens_is_drawn(folders, family, name):
    import transformers

    folder = folders / f"{family}-{name}"
    bert = notebook.load(folder)
    # of ELECTRA the head that tells replaced tokens
    pretrained = "classifier.bias" if family == "electra" else "decoder.bias"
    assert pretrained in bert.drawn and "drawn, for it has none" in bert.origin
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(5, 200, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(input_ids=ids)[0][0]
        found = bert.model.hidden_states(packed_documents([ids[0]]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # the whole proof is dear, and the same for every head
    if name == "ForSequenceClassification":
        prove_import(read_hf(folder), folder)


@pytest.mark.parametrize(
    ("named", "labels"),
    [
        ({"0": "bad", "1": "good"}, ("bad", "good")),
        ({"1": "good", "0": "bad"}, ("bad", "good")),
        ({"0": "bad", "2": "good"}, None),
        ({"1": "bad", "2": "good"}, None),
        ({"0": "bad", "1": "bad"}, None),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
    ],
)
def test_labels_are_of_outputs_that_are_told_apart(named, labels):
    assert labels_of({"id2label": named}) == labels


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("number", range(len(CLASSES)))
def test_a_head_of_theirs_is_kept_whole(folders, family, number):
    kind = ("text", "token", "span", "choice")[number]
    folder = folders / f"{family}-For{CLASSES[number]}"
    head = read_task_head(folder, SPECIALS)
    assert head is not None and head.kind == kind
    outputs = head.weights["classifier.weight"].shape[0]
    shape = dataclasses.replace(drawn_task(family).head, kind=kind, outputs=outputs)
    stored = read_model(folder)
    model = TaskModel(stored.config, shape, seed=1)
    own = {name: w for name, w in stored.weights.items() if name not in stored.drawn}
    weights, drawn = first_weights(own | head.weights, model, of_task=True)
    assert not drawn and weights.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("name", "said", "outputs", "problem"),
    [
        ("SequenceClassification", {}, 3, "single_label_classification"),
        ("SequenceClassification", {}, 1, "regression"),
        ("SequenceClassification", {"problem_type": None}, 2, "single_label_classification"),
        ("SequenceClassification", {"problem_type": "regression"}, 2, "regression"),
        ("TokenClassification", {"problem_type": "regression"}, 2, None),
    ],
)
def test_a_head_on_texts_has_its_problem(name, said, outputs, problem):
    settings = {"architectures": [f"BertFor{name}"], **said}
    assert problem_of(settings, {"classifier.weight": torch.empty(outputs, 4)}) == problem


def test_a_classifier_is_kept_for_the_same_labels_alone(folders, tmp_path):
    write_task(tmp_path)
    rows = [{"text": "abc", "label": label} for label in ("b", "a", "a")]
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    start_from = f"start_from={folders}/modernbert"
    classify = "{{kind: classify, texts: [text], label: label, labels: {}}}"

    def kept(labels: str) -> tuple[bool, tuple[str, ...] | None]:
        task = read_task(
            tmp_path / "task.yaml", [start_from, f"task={classify.format(labels)}", "dropout={}"]
        )
        start = read_start(task)
        ready = prepare(task, start).task.task
        return "classifier.weight" in start.weights_for(ready), ready.labels

    assert kept("[a, b]") == (True, ("a", "b"))
    # as many outputs, of other meaning
    assert kept("[b, a]") == (False, ("b", "a"))
    # left out, they are those of the folder in its order
    assert kept("null") == (True, ("a", "b"))
    # the same names of yes and no each are another question
    classify = "{{kind: labels, texts: [text], label: label, labels: {}}}"
    assert kept("[a, b]") == (False, ("a", "b"))
    classify = "{{kind: classify, texts: [text], label: label, labels: {}}}"
    config = json.loads((folders / "modernbert" / "config.json").read_text())
    shutil.copytree(folders / "modernbert", tmp_path / "turned")
    turned = {**config, "id2label": {"0": "b", "1": "a"}, "label2id": {"b": 0, "a": 1}}
    (tmp_path / "turned" / "config.json").write_text(json.dumps(turned))
    start_from = f"start_from={tmp_path}/turned"
    assert kept("null") == (True, ("b", "a"))
