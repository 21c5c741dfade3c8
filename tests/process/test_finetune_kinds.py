"""Tags, spans and choices through the real loop: one curve on any ranks, predictions in order, folders for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder.base.dist import World
from encoder.base.rng import generator
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.finetune.prepare import start_of
from encoder.runs.folder import LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools.weights.export import export_run
from tests.helpers.tasks import write_rows, write_task
from tests.process.ranks import run_ranks

TASKS = {
    "tags": "{kind: tags, words: words, label: tags, labels: [O, B-X, I-X]}",
    "spans": "{kind: spans, no_answer: true, max_question_tokens: 4, overlap_tokens: 6}",
    "choice": "{kind: choice, texts: [context], choices: [choices], label: right, max_choice_tokens: 8}",
}
# (run, ranks, settings)
RUNS = [
    ("one", 1, []),
    ("three", 3, ["loader.micro_batch_tokens=30"]),
    ("zero3", 2, ["engine.zero_stage=3", "engine.precision=fp32"]),
]


def rows_of_all_kinds(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Words of letters: those with an `a` are tagged, answer the question, and are the right choice."""
    draw = generator(seed, "rows of all kinds")
    rows = []
    for _ in range(count):
        words = [
            "".join(draw.choice(list("abcd"), int(draw.integers(1, 5))))
            for _ in range(draw.integers(2, 9))
        ]
        with_a = [word for word in words if "a" in word]
        context = " ".join(words)
        rows.append(
            {
                "words": words,
                "tags": ["B-X" if "a" in word else draw.choice(["O", "I-X"]) for word in words],
                "question": "an a?",
                "context": context,
                "answers": {
                    "text": with_a[:1],
                    "answer_start": [context.index(word) for word in with_a[:1]],
                },
                "choices": ["bb", "abc", "dd"][: int(draw.integers(2, 4))],
                "right": 1,
            }
        )
    return rows


def train(world: World, *, root: str, run: str, settings: list[str]) -> bool:
    done = []
    for kind, task in TASKS.items():
        overrides = [f"task={task}", f"out={root}/{run}-{kind}", "epochs=1", *settings]
        done.append(finetune(read_task(f"{root}/task.yaml", overrides), world).done)
    return all(done)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    path = write_task(root)
    path.write_text(path.read_text().replace("batch_examples: 8", "batch_examples: 5"))
    for name, count in (("train", 13), ("dev", 7), ("more", 3)):
        write_rows(root / f"{name}.jsonl", rows_of_all_kinds(count, seed=count))
    for run, ranks, settings in RUNS:
        done = run_ranks(train, ranks, root=str(root), run=run, settings=settings)
        assert done == [True] * ranks
    return root


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(("other", "tolerance"), [("three", 1e-10), ("zero3", 1e-5)])
def test_the_curve_of_each_kind_is_one_on_any_ranks(root, kind, other, tolerance):
    runs = [root / f"{run}-{kind}" for run in ("one", other)]
    assert read_jsonl(runs[0] / LEDGER) == read_jsonl(runs[1] / LEDGER)
    for a, b in zip(*(merged_metrics(run / METRICS) for run in runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a.get("dev_loss", 0.0) == pytest.approx(b.get("dev_loss", 0.0), rel=tolerance)
    whole, found = (read_weights(newest_checkpoint(run / "checkpoints")) for run in runs)
    for name, w in whole.items():
        distance = torch.linalg.vector_norm(found[name] - w)
        assert distance <= tolerance * torch.linalg.vector_norm(w) + tolerance, name


@pytest.mark.parametrize("kind", TASKS)
def test_each_row_has_its_line_and_its_target(root, kind):
    given = [json.loads(line) for line in (root / "dev.jsonl").open()]
    target = {"tags": "tags", "spans": "answers", "choice": "right"}[kind]
    one, three = (
        [json.loads(line) for line in (root / f"{run}-{kind}/predictions/dev.jsonl").open()]
        for run in ("one", "three")
    )
    expected = [row[target] if kind != "spans" else row[target]["text"] for row in given]
    assert [line["target"] for line in one] == expected
    assert [line["row"] for line in three] == list(range(7))
    said = {"tags": "tags", "spans": "answer", "choice": "choice"}[kind]
    assert [line[said] for line in three] == [line[said] for line in one]
    if kind == "spans":
        assert all(line["answer"] in row["context"] for line, row in zip(one, given))
        numbers = json.loads((root / "one-spans" / "result.json").read_text())["metrics"]
        # found on the dev set, and the test set's
        assert numbers["dev"]["no_answer_threshold"] == numbers["more"]["no_answer_threshold"]


@pytest.mark.parametrize("kind", TASKS)
def test_each_kind_becomes_a_folder_that_transformers_reads(root, tmp_path, kind):
    import transformers

    proofs = export_run(root / f"one-{kind}", tmp_path / "hf")
    assert proofs["transformers"].max_abs_difference < 1e-4
    carried = json.loads((tmp_path / "hf" / "config.json").read_text()).get("answer_rule")
    if kind == "spans":
        numbers = json.loads((root / "one-spans" / "result.json").read_text())["metrics"]
        assert carried["no_answer_threshold"] == numbers["dev"]["no_answer_threshold"]
        assert carried["overlap_tokens"] == 6
        # it can be the start of another one
        assert start_of(tmp_path / "hf").head.kind == "span"
    if kind != "tags":
        assert kind == "spans" or carried is None
        return
    tagger = transformers.pipeline(
        "token-classification", model=str(tmp_path / "hf"), device="cpu", ignore_labels=[]
    )
    lines = [json.loads(line) for line in (root / "one-tags/predictions/dev.jsonl").open()]
    for line in lines:
        text = " ".join(line["words"])
        if len(text) > 22:
            continue
        by_start = {found["start"]: found["entity"] for found in tagger(text)}
        starts = [len(" ".join(line["words"][:k])) + (k > 0) for k in range(len(line["words"]))]
        assert [by_start[start] for start in starts] == line["tags"]
