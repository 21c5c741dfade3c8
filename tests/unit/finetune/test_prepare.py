"""What is wrong in a task file or in its rows is one line with file and row, exit code 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from encoder.base.errors import UserError
from encoder.base.schema import to_yaml
from encoder.finetune.config import read_task
from encoder.finetune.prepare import prepare, read_start
from encoder.models.stored import TOKENIZER
from encoder.train import loop
from launch import finetune
from tests.helpers.tasks import write_rows, write_start, write_task

PAIR = ["task.texts=[text, other]"]


def prepared(root: Path, overrides: list[str]):
    task = read_task(root / "task.yaml", overrides)
    return prepare(task, read_start(task))


def test_texts_are_framed_cut_and_counted_and_labels_are_numbers(tmp_path):
    write_task(tmp_path)
    write_rows(
        tmp_path / "train.jsonl",
        [
            {"text": "abc", "label": "a"},
            {"text": "x" * 99, "label": 1},
            {"text": "[SEP]", "label": "b"},
        ],
    )
    train = prepared(tmp_path, ["data.max_tokens=24"]).train
    assert train.lengths_N.tolist() == [5, 24, 7] and train.cut == 1
    assert train.value_P.tolist() == [0, 1, 1]
    ids = [train.ids_A[a:b].tolist() for a, b in zip(train.starts_N1, train.starts_N1[1:])]
    assert all(one[0] == 1 and one[-1] == 2 for one in ids)
    # a special token that a text spells is text
    assert 2 not in ids[2][1:-1]


def test_a_dry_run_says_steps_and_tokens_and_writes_nothing(tmp_path, capsys):
    path = write_task(tmp_path)
    assert finetune.main([str(path), "--dry-run", "batch_examples=10"]) == 0
    said = capsys.readouterr().out
    train = prepared(tmp_path, []).train
    assert "letters: classify, 2 outputs: a, b\n" in said
    assert f"train: 42 examples, {len(train.ids_A)} tokens" in said
    assert "10 steps of 10 examples: 2 epochs of 5\n" in said
    assert f"padded to data.max_tokens {24 * 42 / len(train.ids_A):.2f} times" in said
    assert "dev: 11 examples" in said and "more: 5 examples" in said
    assert not (tmp_path / "run").exists()

    assert finetune.main([str(path), f"data.train={tmp_path}/none.jsonl", "--dry-run"]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err


def test_a_dry_run_of_choices_counts_padding_by_their_documents(tmp_path, capsys):
    path = write_task(tmp_path)
    # documents of 5 and of 11 tokens, each row has both
    rows = [{"text": "x", "options": ["b", "b" * 7], "label": 0}] * 4
    write_rows(tmp_path / "train.jsonl", rows)
    task = (
        "task={kind: choice, texts: [text], choices: [options], label: label, max_choice_tokens: 8}"
    )
    overrides = [task, "data.dev={}", "data.test={}", "batch_examples=2"]
    assert finetune.main([str(path), "--dry-run", *overrides]) == 0
    said = capsys.readouterr().out
    train = prepared(tmp_path, overrides).train
    short, long = train.lengths_N[0] - max(train.document_lengths_D), max(train.document_lengths_D)
    assert short == long - 6 and len(train.document_lengths_D) == 8
    assert f"in 8 documents, {(short + long) / 2:.0f} at the median, {long} at most" in said
    assert f"it would be {2 * long / (short + long):.2f} times" in said
    assert f"to data.max_tokens {2 * 24 / (short + long):.2f} times" in said


def test_a_dry_run_of_a_run_that_has_begun_says_what_a_start_would(tmp_path, capsys, monkeypatch):
    path = write_task(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.yaml").write_text(to_yaml(prepared(tmp_path, []).task))
    (out / "ledger.jsonl").write_text("{}\n")
    assert finetune.main([str(path), "--dry-run"]) == 0
    assert "42 examples" in capsys.readouterr().out
    assert finetune.main([str(path), "--dry-run", "seed=6"]) == 2
    assert "seed" in capsys.readouterr().err
    monkeypatch.setattr(loop, "is_done", lambda folder: (folder == out, ""))
    assert finetune.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "is done already" in said.out and "42 examples" not in said.out
    assert finetune.main([str(path), "--dry-run", "seed=6"]) == 2
    said = capsys.readouterr()
    assert "seed was 5, now 6" in said.err and "is done already" not in said.out


def test_a_run_that_goes_on_keeps_the_order_of_the_labels_that_it_began_with(tmp_path, monkeypatch):
    path = write_task(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    begun = prepared(tmp_path, ["task.labels=[b, a]"]).task
    (out / "run.yaml").write_text(to_yaml(begun))
    (out / TOKENIZER).write_bytes((tmp_path / "start" / TOKENIZER).read_bytes())
    monkeypatch.setattr("encoder.finetune.prepare.committed_folders", lambda _: [out])
    assert path.is_file() and prepared(tmp_path, ["task.labels=null"]).task == begun


def test_a_pair_has_its_form_and_the_second_text_its_segment(tmp_path):
    write_task(tmp_path)
    write_start(tmp_path / "bert", family="bert")
    rows = [{"text": "ab", "other": "c", "label": label} for label in "ab"]
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    train = prepared(tmp_path, [*PAIR, f"start_from={tmp_path}/bert", "dropout={}"]).train
    assert train.ids_A[:6].tolist()[0] == 1 and train.ids_A[:6].tolist().count(2) == 2
    assert train.segments_A[:6].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_body_whose_layers_share_weights_has_one_rate_for_all(tmp_path):
    write_task(tmp_path)
    write_start(tmp_path / "albert", family="albert")
    started = [f"start_from={tmp_path}/albert"]
    with pytest.raises(UserError, match="layer_decay 0.5: the layers of this model share"):
        prepared(tmp_path, started)
    head = prepared(tmp_path, [*started, "layer_decay=1.0"]).head
    assert head.family == "albert" and head.dropout == 0.1


def test_labels_left_out_are_those_of_the_training_rows(tmp_path):
    write_task(tmp_path)
    rows = [{"text": "x", "label": label} for label in (10, 9, 10)]
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    found = prepared(tmp_path, ["task.labels=null"])
    assert found.task.task.labels == ("9", "10") and found.train.value_P.tolist() == [1, 0, 1]


def test_where_classes_are_called_by_numbers_a_number_is_a_name(tmp_path):
    write_task(tmp_path)
    rows = [{"text": "x", "label": label} for label in (1, 2.0, "3")]
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    found = prepared(tmp_path, ["task.labels=null"])
    assert found.task.task.labels == ("1", "2", "3") and found.train.value_P.tolist() == [0, 1, 2]
    # stars counted from 0 are no stars counted from 1
    write_rows(tmp_path / "dev.jsonl", [{"text": "x", "label": 0}])
    with pytest.raises(UserError, match="dev.jsonl line 1: label is '0', which is none"):
        prepared(tmp_path, ["task.labels=null"])


def test_several_labels_and_numbers_become_targets(tmp_path):
    write_task(tmp_path)
    rows = [
        {"text": "x", "label": ["b", "a"]},
        {"text": "y", "label": "b"},
        {"text": "z", "label": []},
    ]
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    task = "task={kind: labels, texts: [text], label: label}"
    assert prepared(tmp_path, [task]).train.value_P.tolist() == [[1, 1], [0, 1], [0, 0]]
    # numbers by their size
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "x", "label": [10, 9]}])
    assert prepared(tmp_path, [task]).task.task.labels == ("9", "10")

    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "x", "label": n} for n in (0.5, "2", 3)])
    task = "task={kind: regress, texts: [text], label: label}"
    assert np.array_equal(prepared(tmp_path, [task]).train.value_P, [[0.5], [2], [3]])


@pytest.mark.parametrize(
    ("name", "row", "overrides", "said"),
    [
        (
            "dev",
            {"text": "x", "label": "c"},
            [],
            r"dev.jsonl line 12: label is 'c', which is none of task.labels",
        ),
        ("train", {"text": "x", "label": None}, [], r"train.jsonl line 43: the label is None"),
        ("train", {"text": " ", "label": "a"}, [], r"train.jsonl line 43: text is empty"),
        ("train", {"text": "x \ud83d", "label": "a"}, [], r"line 43 holds half a surrogate pair"),
        ("train", {"text": "x", "label": "\ud83d"}, [], r"line 43 holds half a surrogate pair"),
        ("train", {"text": "x", "label": 0.5}, [], r"line 43: the label is 0.5; needed: a name or"),
        (
            "train",
            {"text": "x", "label": "a"},
            ["task.texts=[text, text]"],
            r"the column 'text' twice",
        ),
        ("train", {"text": "x", "label": "a"}, ["task.texts=[label]"], r"column 'label' twice"),
        ("train", {"label": "a"}, [], r"train.jsonl line 43 has no text. Known: label"),
        (
            "train",
            {"text": "x", "label": "a"},
            ["task.labels=[a, b, z]"],
            r"train.jsonl: no row has the class 'z'",
        ),
        (
            "train",
            {"text": "x", "label": "a"},
            ["data.max_tokens=65"],
            r"data.max_tokens is 65; needed: 3 to 64",
        ),
        ("train", {"text": "x", "label": "a"}, PAIR, r"train.jsonl line 1 has no other"),
        (
            "train",
            {"text": "x", "label": "a"},
            ["task.kind=regress", "task.labels=null"],
            "labels is unknown",
        ),
        (
            "train",
            {"text": "x", "label": "a"},
            ["dropout.mlp_output=0.1"],
            "this model has no mlp_output_dropout",
        ),
        (
            "train",
            {"text": "x", "label": "a"},
            ["decay_at_peak=1e-5", "optimizer.weight_decay=0.1"],
            "both say the decay",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, name, row, overrides, said):
    write_task(tmp_path)
    with open(tmp_path / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, overrides)
    if name == "dev":
        assert finetune.main([str(tmp_path / "task.yaml"), *overrides]) == 2
        said_at = capsys.readouterr().err.strip().splitlines()
        assert len(said_at) == 1 and said_at[0].startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", '"much"', "true", "null", "1e300", "9" * 400, '"-1e39"'],
    ids=lambda value: value[:8],
)
def test_a_target_that_is_no_finite_number_is_refused_with_its_row(tmp_path, value):
    write_task(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        f'{{"text": "x", "label": 1}}\n{{"text": "x", "label": {value}}}\n'
    )
    with pytest.raises(UserError, match=r"train.jsonl line 2: label is .*needed: a finite number"):
        prepared(tmp_path, ["task={kind: regress, texts: [text], label: label}"])


@pytest.mark.parametrize(
    "task",
    [
        "{kind: classify, texts: [text], label: label, labels: [a, b]}",
        "{kind: labels, texts: [text], label: label, labels: [a, b]}",
        "{kind: tags, words: words, label: tags, labels: [O, B-X]}",
        "{kind: choice, texts: [text], choices: [words], label: label, max_choice_tokens: 4}",
    ],
)
def test_a_label_of_very_many_digits_is_refused_in_a_line(tmp_path, task):
    write_task(tmp_path)
    row = {"text": "x", "words": ["a", "b"], "label": "9" * 5000, "tags": ["O", "9" * 5000]}
    write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match="train.jsonl line 1: (label|tags) is '9999") as told:
        prepared(tmp_path, [f"task={task}"])
    assert len(str(told.value)) < 400 + len(str(tmp_path))


def test_labels_of_very_many_digits_are_names(tmp_path):
    write_task(tmp_path)
    rows = [{"text": "x", "label": label} for label in ("9" * 5000, "1")]
    for name in ("train", "dev", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    assert prepared(tmp_path, ["task.labels=null"]).task.task.labels == ("1", "9" * 5000)


def test_a_paragraph_is_on_one_side_of_a_share(tmp_path):
    write_task(tmp_path)
    rows = [
        {
            "question": f"who {number}?",
            "context": f"cat {number % 9}",
            "answers": {"text": ["cat"], "answer_start": [0]},
        }
        for number in range(90)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    task = "task={kind: spans, max_question_tokens: 10, overlap_tokens: 2}"
    ready = prepared(tmp_path, [task, "data.dev={}", "data.test={}", "data.dev_share=0.4"])
    (dev,) = ready.dev
    assert {*dev.contexts} and not {*dev.contexts} & {*ready.train_set.contexts}


def test_a_tokenizer_without_pair_form_or_of_another_vocabulary_is_refused(tmp_path):
    write_task(tmp_path)
    path = tmp_path / "start" / TOKENIZER
    content = json.loads(path.read_text())
    special = {
        name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("[CLS]", 1), ("[SEP]", 2))
    }
    frame = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    frame.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    both = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    post = {"type": "TemplateProcessing", "single": frame, "pair": both, "special_tokens": special}
    path.write_text(json.dumps({**content, "post_processor": post}))
    write_rows(tmp_path / "train.jsonl", [{"text": "x", "other": "y", "label": n} for n in "ab"])
    with pytest.raises(
        UserError, match=r"makes \[\] of a pair of empty texts, which is no pair form"
    ):
        prepared(tmp_path, PAIR)

    added = [
        *content["added_tokens"],
        {**content["added_tokens"][0], "id": 300, "content": "[MORE]"},
    ]
    path.write_text(json.dumps({**content, "added_tokens": added}))
    with pytest.raises(UserError, match="has 301 ids, the model 280; needed: the tokenizer"):
        prepared(tmp_path, [])


def test_a_share_of_the_training_rows_is_a_dev_set(tmp_path):
    write_task(tmp_path)
    whole = prepared(tmp_path, ["data.dev={}"])
    ready = prepared(tmp_path, ["data.dev={}", "data.dev_share=0.3"])
    (dev,) = ready.dev
    assert dev.examples.name == "dev" and 5 <= len(dev.examples) <= 20
    assert len(ready.train) + len(dev.examples) == len(whole.train)
    for wrong, said in (("0", "between 0 and 1"), ("0.2", "there is one of that name")):
        overrides = [f"data.dev_share={wrong}"]
        with pytest.raises(UserError, match=said):
            read_task(tmp_path / "task.yaml", overrides)
