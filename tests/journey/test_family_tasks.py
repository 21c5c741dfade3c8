"""ALBERT, ELECTRA and XLNet by the commands: from text over pretraining and labelled rows to a classifier of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep import cli
from encoder.base.dist import World
from encoder.base.errors import ExportError
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.runs.config import read_run
from encoder.tools.page.classify import classify
from encoder.tools.page.folders import open_folder
from encoder.tools.page.similarity import similarity
from encoder.train.pretraining import pretrain
from launch import export_hf, fill_mask, plan
from launch import finetune as finetune_command
from tests.helpers.prep import texts, write_jsonl
from tests.helpers.tasks import write_rows
from tests.journey.test_families import PHASE, RUN, SIZES, said
from tests.process.ranks import run_ranks

TOKENIZERS = {
    "albert": ("--kind", "unigram", "--lowercase", "--vocab-size", 44),
    "electra": ("--kind", "wordpiece", "--lowercase", "--vocab-size", 90),
    "xlnet": ("--kind", "unigram", "--names", "xlnet", "--vocab-size", 44),
}
RUNS = {
    "albert": (
        f"model: {{system: albert, {SIZES}, embedding_size: 16}}",
        "name: mlm_sop, mask_count: round, whole_words: true, spans: ngram",
    ),
    "electra": (
        f"model: {{system: electra, {SIZES}, embedding_size: 16, generator_fraction: 0.5}}",
        "name: rtd",
    ),
    "xlnet": (
        f"model: {{system: xlnet, {SIZES}}}",
        "name: plm, block_tokens: 8, segment_tokens: 16, memory_tokens: 8",
    ),
}
# transformers' class of the pretrained model; whether it fills in masks
CLASSES = {
    "albert": ("AlbertForPreTraining", True),
    "electra": ("ElectraForPreTraining", False),
    "xlnet": ("XLNetLMHeadModel", False),
}
TASK = """
name: {name}
out: {folder}/runs/{name}_task
start_from: {folder}/runs/{name}
task: {{kind: classify, texts: [text], label: label, labels: [one, two]}}
data: {{train: {folder}/rows.jsonl, dev: {{dev: {folder}/dev.jsonl}}, max_tokens: 32}}
batch_examples: 8
epochs: 1
lr: 1.0e-3
engine: {{precision: fp32}}
"""


def from_text_to_classifier(world: World, *, folder: str, name: str) -> dict[str, str]:
    """What its commands printed."""
    root = Path(folder)
    tokenizer = root / f"{name}.json"
    words = (*TOKENIZERS[name], "--files", root / "a.jsonl", "--out", tokenizer)
    said(cli, "tokenizer", "train", *words)
    shards = ("out=" + str(root / name), "sentences=true")
    said(cli, "prepare", root / "prep.yaml", f"tokenizer={tokenizer}", *shards)

    model, objective = RUNS[name]
    run_file = root / f"{name}.yaml"
    filled = dict(name=name, folder=folder, shards=name, join="", model=model, phase=PHASE)
    run_file.write_text(RUN.format(**filled, objective=objective))
    found = {"plan": said(plan, run_file)}
    pretrain(read_run(run_file), world)
    found["export"] = said(export_hf, root / "runs" / name, root / "hf" / name)

    task_file = root / f"{name}_task.yaml"
    task_file.write_text(TASK.format(name=name, folder=folder))
    found["steps"] = said(finetune_command, task_file, "--dry-run")
    finetune(read_task(task_file), world)
    trained, exported = root / "runs" / f"{name}_task", root / "hf" / f"{name}_task"
    found["task"] = said(export_hf, trained, exported)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("family_tasks")
    write_jsonl(root / "a.jsonl", [" ".join(texts(4, seed=i, longest=12)) for i in range(200)])
    source = "{name: text, format: jsonl, files: [a.jsonl]}"
    settings = f"tokenizer: none\nroot: {root}\nout: none\nheld_out_share: 0.1\nprocesses: 1\n"
    (root / "prep.yaml").write_text(f"{settings}sources: [{source}]\n")
    for name, seed, count in (("rows", 1, 32), ("dev", 2, 8)):
        rows = [
            {"text": text, "label": ("one", "two")[i % 2]}
            for i, text in enumerate(texts(count, seed=seed, longest=9))
        ]
        write_rows(root / f"{name}.jsonl", rows)
    return root


@pytest.mark.slow  # three preparations, trainings and exports
@pytest.mark.parametrize("name", RUNS)
def test_a_family_goes_from_text_to_a_classifier_with_equal_logits(root, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    (found,) = run_ranks(from_text_to_classifier, 1, folder=str(root), name=name)
    assert "transformers gives the same logits" in found["export"]
    assert "memory a rank" in found["plan"] and "32 examples" in found["steps"]

    folder = root / "hf" / f"{name}_task"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (root / "dev.jsonl").open()]
    predictions = root / "runs" / f"{name}_task" / "predictions" / "dev.jsonl"
    for row, line in zip(rows, predictions.open(), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        assert logits.tolist() == pytest.approx(json.loads(line)["logits"], abs=1e-4)

    assert set(classify(open_folder(folder), "a cat").probabilities) == {"one", "two"}
    check_pretrained(root / "hf" / name, name)


def check_pretrained(folder: Path, name: str) -> None:
    """Its class; it fills in masks, or compares texts and says that it fills in none."""
    architecture, fills = CLASSES[name]
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    if fills:
        assert said(fill_mask, folder, "the cat [MASK] a dog").count("%") == 5
        return
    cosines = similarity(open_folder(folder), "the cat runs\nthe house was red").cosines
    assert cosines[0][0] == pytest.approx(1.0) and -1 <= cosines[0][1] < 1
    with pytest.raises(ExportError, match="a model for similarity"):
        open_folder(folder, kind="fill_mask")
