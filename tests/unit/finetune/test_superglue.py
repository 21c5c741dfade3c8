"""SuperGLUE's tasks of several texts, of several right answers to a question, and of gaps: documents, targets and metrics."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn import functional as F

from encoder.base.batch import packed_documents
from encoder.base.errors import ConfigError
from encoder.base.schema import from_mapping, to_plain
from encoder.base.world import World
from encoder.data.examples import ExampleDealing, in_order
from encoder.data.labelled import DataError, held_out_rows
from encoder.finetune.config import FineTuneConfig, changed_settings, read_task
from encoder.finetune.kinds.cloze import ClozeConfig, ClozeSet
from encoder.finetune.kinds.texts import ClassifyConfig
from encoder.models.with_task import HeadShape, build_task_model
from encoder.objectives.text_tasks import TERM
from launch import finetune
from tests.helpers.tasks import (
    BODIES,
    bpe,
    drawn_places,
    encoder_of,
    rows_of,
    write_rows,
    write_task,
)

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "finetune" / "superglue"


def documents(examples) -> list[str]:
    """The texts of all documents, `|` between two of a pair."""
    alone = ExampleDealing(world=World(), micro_batch_tokens=10**6)
    (made,) = in_order(examples, term=TERM, dealing=alone)
    starts, tokenizer = made.batch.cu_seqlens_S1.tolist(), bpe()
    ids = [made.batch.ids_T[a:b].tolist() for a, b in zip(starts, starts[1:])]
    return [
        "|".join(tokenizer.decode(part) for part in np.split(one, np.flatnonzero(one == 2)))
        for one in map(np.array, ids)
    ]


def encoded(kind, rows: list[dict], *, max_tokens: int = 200):
    return kind.encode(rows_of(rows), encoder_of(bpe(), max_tokens=max_tokens), name="dev")


# a row of each as the hub has it
HUB_ROWS = {
    "wic": (
        {
            "word": "bed",
            "sentence1": "The bed of a river.",
            "sentence2": "Next to my bed.",
            "start1": 4,
            "end1": 7,
            "start2": 11,
            "end2": 14,
            "idx": 0,
            "label": 0,
        },
        ["bed: The *bed* of a river.|Next to my *bed*.|"],
    ),
    "wsc": (
        {
            "text": "Mark told Pete lies; he ran.",
            "span1_index": 0,
            "span1_text": "Mark",
            "span2_index": 4,
            "span2_text": "he",
            "idx": 0,
            "label": 1,
        },
        ["Mark told Pete lies; *he* ran.|he refers to Mark.|"],
    ),
    "multirc": (
        {
            "paragraph": "Anna ran home.",
            "question": "Who ran?",
            "answer": "Anna",
            "idx": {"paragraph": 3, "question": 7, "answer": 0},
            "label": 1,
        },
        ["Anna ran home.|Who ran? Anna|"],
    ),
    "record": (
        {
            "passage": "Anna wrote to Carl.",
            "query": "@placeholder got a letter.",
            "entities": ["Anna", "Carl"],
            "answers": ["Carl"],
            "idx": {"passage": 1, "query": 2},
        },
        ["Anna wrote to Carl.|Anna got a letter.|", "Anna wrote to Carl.|Carl got a letter.|"],
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_shipped_file_makes_its_documents_of_the_hubs_row(name):
    row, expected = HUB_ROWS[name]
    examples = encoded(read_task(CONFIGS / f"{name}.yaml").task, [row]).examples
    assert documents(examples) == expected
    assert examples.value_P.ravel().tolist() == {"wic": [0], "record": [0, 1]}.get(name, [1])


def test_a_text_of_several_columns_is_what_a_column_of_it_would_be():
    rows = [{"a": "x y", "b": "{c}", "label": "n"}, {"a": "{b}", "b": "\\1 z", "label": "m"}]
    whole = [{**row, "whole": f"see {row['b']}, {row['a']}"} for row in rows]
    kind = {"label": "label", "labels": ("n", "m")}
    of_parts = encoded(ClassifyConfig(texts=("see {b}, {a}",), **kind), rows).examples
    of_column = encoded(ClassifyConfig(texts=("whole",), **kind), whole).examples
    assert of_parts.sha256 == of_column.sha256


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (4, 7, "The *bed* of it, a bed."),
        ("4", "7", "The *bed* of it, a bed."),
        (3, "it", "The bed of *it*, a bed."),
        ("5", "bed", "The bed of it, a *bed*."),
        (1, "bed of", "The *bed of* it, a bed."),
        (19, 99, None),
        (7, 4, None),
        (6, "bed", None),
        (None, 4, None),
        (-3, 4, None),
        (2, "", None),
    ],
)
def test_marks_are_characters_or_words(first, last, expected):
    kind = ClassifyConfig(
        texts=("a",), label="label", labels=("n", "m"), marks={"a": ("first", "last")}
    )
    row = {"a": "The bed of it, a bed.", "label": "n", "first": first, "last": last}
    if expected is None:
        with pytest.raises(
            DataError, match="line 1: first .* and last .* are no place in a, of 21"
        ):
            encoded(kind, [row])
    else:
        assert documents(encoded(kind, [row]).examples) == [f"{expected}|"]
        assert {"first", "last"} < {*kind.columns}


WSC = 'Mark told Pete lies; "he ran (it\'s far), big dog."'


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (4, "he", '"he -> "*he*'),
        (4, "He", '"he -> "*he*'),
        (6, "it", "(it's -> (*it*'s"),
        (8, "big dog", "big dog -> *big dog*"),
        (8, "Big dog.", "big dog -> *big dog*"),
        (3, "he", "'lies'.* needed: 'he', as words says"),
        (5, "ran (its", "\"ran .it's\".* needed: 'ran .its'"),
    ],
)
def test_words_that_are_marked_are_those_that_a_column_names(number, words, expected):
    kind = ClassifyConfig(
        texts=("a",), label="label", labels=("n", "m"), marks={"a": ("number", "words")}
    )
    row = {"a": WSC, "label": "n", "number": number, "words": words}
    if " -> " in expected:
        shown = WSC.replace(*expected.split(" -> "))
        assert documents(encoded(kind, [row]).examples) == [f"{shown}|"]
        return
    with pytest.raises(DataError, match=f"line 1: number {number} is {expected}"):
        encoded(kind, [row])


def test_marks_are_of_a_texts_column_and_name_two():
    kind = {"texts": ("{a} b",), "label": "label"}
    with pytest.raises(ConfigError, match="marks has b, which is no column of texts; needed: a"):
        ClassifyConfig(**kind, marks={"b": ("x", "y")})
    with pytest.raises(ConfigError, match="marks.a names 1 columns; needed: two"):
        ClassifyConfig(**kind, marks={"a": ("x",)})


def test_columns_inside_of_a_text_are_checked_as_columns_are():
    with pytest.raises(ConfigError, match="name the column 'label' twice"):
        ClassifyConfig(texts=("is it {label}? {a}",), label="label")
    kind = ClassifyConfig(texts=("{a} {b}",), label="label", labels=("n", "m"))
    with pytest.raises(DataError, match="a.jsonl line 2: b is empty; needed: a text"):
        encoded(kind, [{"a": "x", "b": "y", "label": "n"}, {"a": "x", "b": "", "label": "n"}])


def answer_rows() -> list[dict]:
    """Two paragraphs with questions 0, 1 and 0: of 3, 2 and 1 answers."""
    places = [(0, 0), (0, 0), (0, 0), (0, 1), (0, 1), (1, 0)]
    right = [1, 0, 1, 0, 0, 1]
    return [
        {
            "paragraph": f"text {p}",
            "question": "who",
            "answer": f"a{n}",
            "idx": {"paragraph": p, "question": q, "answer": n},
            "label": value,
        }
        for n, ((p, q), value) in enumerate(zip(places, right))
    ]


def test_multirc_counts_answers_and_questions_as_its_script_does():
    kind = read_task(CONFIGS / "multirc.yaml").task
    asked = encoded(kind, answer_rows())
    # the second question has a false positive, the others are right
    guessed = np.array([1, 0, 1, 1, 0, 1])
    found = asked.scores(np.eye(2)[guessed], kind.metric_names()).metrics
    true = [row["label"] for row in answer_rows()]
    assert found["f1"] == pytest.approx(f1_score(true, guessed))
    # EM of (p0 q0), (p0 q1), (p1 q0): 1, 0, 1
    assert found["group_exact_match"] == pytest.approx(2 / 3)
    # equal numbers of questions in two paragraphs are two questions
    wrong = asked.scores(np.eye(2)[np.array([0, 0, 1, 0, 0, 1])], kind.metric_names()).metrics
    assert wrong["group_exact_match"] == pytest.approx(2 / 3)


def test_groups_need_their_part_and_the_metric_needs_groups():
    kind = read_task(CONFIGS / "multirc.yaml").task
    rows = answer_rows()
    rows[2]["idx"] = {"paragraph": 0}
    with pytest.raises(
        DataError, match="line 3: idx is .* an object with question, as task.groups"
    ):
        encoded(kind, rows)
    with pytest.raises(ConfigError, match="group_exact_match is unknown"):
        ClassifyConfig(
            texts=("a",), label="b", metrics=("accuracy", "group_exact_match")
        ).metric_names()
    assert (
        "group_exact_match" in ClassifyConfig(texts=("a",), label="b", groups=("c",)).metric_names()
    )


def test_runs_from_before_groups_and_marks_go_on(tmp_path):
    task = read_task(write_task(tmp_path))
    before = to_plain(task)
    for key in ("groups", "marks"):
        del before["task"][key]
    del before["data"]["hub"]
    assert changed_settings(before, task) == []
    assert from_mapping(FineTuneConfig, before) == task


def test_all_answers_about_a_paragraph_are_on_one_side_of_a_share():
    kind = read_task(CONFIGS / "multirc.yaml").task
    rows = [{**row, "paragraph": f"p{k}"} for k in range(9) for row in answer_rows()[:3]]
    kept, held = held_out_rows(rows_of(rows), share=0.4, by=kind.kept_together)
    sides = [{*side.columns["paragraph"]} for side in (kept, held)]
    assert len(sides[0] | sides[1]) == 9 and not sides[0] & sides[1]


GAPS = [
    {
        "passage": "The Anna Smith wrote to Carl, and Anna to Bob.",
        "query": "@placeholder wrote, says @placeholder.",
        "entities": ["Anna Smith", "Anna", "Carl"],
        "answers": ["Anna Smith", "Anna"],
    },
    {
        "passage": "Bob ran. " * 40,
        "query": "It was @placeholder who ran.",
        "entities": ["Bob", "Carl"],
        "answers": ["The Bob!", "Robert"],
    },
]


def gaps(**more) -> ClozeSet:
    return encoded(ClozeConfig(max_query_tokens=40, **more), GAPS, max_tokens=80)


def test_each_candidate_is_asked_in_a_document_of_its_own():
    asked = gaps()
    texts = documents(asked.examples)
    assert [text.split("|")[1] for text in texts[:3]] == [
        "Anna Smith wrote, says Anna Smith.",
        "Anna wrote, says Anna.",
        "Carl wrote, says Carl.",
    ]
    assert texts[3].endswith("|It was Bob who ran.|")
    # both spellings are right; that of the second row is in no candidate
    assert asked.examples.value_P[:, 0].tolist() == [1, 1, 0, 0, 0]
    assert (len(asked.examples), asked.examples.asked) == (2, 5)
    notes = "\n".join(asked.notes())
    assert "2 documents of dev longer than data.max_tokens: the text before" in notes
    assert "1 row of dev with no answer among the candidates" in notes


def test_a_rows_candidates_are_in_one_micro_batch_and_counted_each():
    examples = gaps().examples
    alone = ExampleDealing(world=World(), micro_batch_tokens=8)
    made = in_order(examples, term=TERM, dealing=alone)
    targets = [one.batch.targets[TERM] for one in made]
    assert sorted(one.count for one in targets) == [2, 3]
    assert all(one.group_M is None for one in targets)


def test_the_loss_of_packed_candidates_is_that_of_each_document_alone():
    drawn = drawn_places(4, kind="choice")
    right = drawn.value_P.astype(np.float32)
    places = dataclasses.replace(drawn.places, grouped=False)
    examples = dataclasses.replace(drawn, value_P=right, places=places)
    config, _ = BODIES["modernbert"]
    head = HeadShape(family="modernbert", kind="choice", outputs=1, pooling="cls", dropout=0.0)
    model = build_task_model(config, head, attention="sdpa", seed=3).double()
    objective = ClozeConfig().objective
    (made,) = in_order(
        examples, term=TERM, dealing=ExampleDealing(world=World(), micro_batch_tokens=10**6)
    )
    term = objective.loss(model, made.batch)[TERM]
    starts = made.batch.cu_seqlens_S1.tolist()
    alone = [packed_documents([made.batch.ids_T[a:b]]) for a, b in zip(starts, starts[1:])]
    logits = torch.cat([model.answers(batch, torch.zeros(1, dtype=torch.int64)) for batch in alone])
    expected = F.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(right).double(), reduction="sum"
    )
    assert int(term.count) == len(right) > len(examples)
    assert term.sum.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_likeliest_candidate_is_scored_as_squads_script_does():
    # up to some version 5
    judge = pytest.importorskip("transformers.data.metrics.squad_metrics")
    asked = gaps()
    logits = np.array([[0.3], [-0.1], [1.5], [-2.0], [-3.0]])
    found = asked.scores(logits, ["f1", "exact_match"])
    answers = [("Carl", GAPS[0]["answers"]), ("Bob", GAPS[1]["answers"])]
    for name, theirs in (("f1", judge.compute_f1), ("exact_match", judge.compute_exact)):
        best = [max(theirs(gold, text) for gold in golds) for text, golds in answers]
        assert found.metrics[name] == pytest.approx(np.mean(best))
    assert found.metrics["exact_match"] == 0.5
    expected = F.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(asked.examples.value_P).double()
    )
    assert found.loss == pytest.approx(expected.item())
    lines = [*asked.lines(logits)]
    assert [line["answer"] for line in lines] == ["Carl", "Bob"]
    assert lines[0]["logits"] == logits[:3, 0].tolist()


# of the two answers of the first row one candidate has a part, as ReCoRD's script would count it: F1 of 1 word of 2
def test_part_of_an_answer_counts_by_its_words():
    row = {**GAPS[0], "answers": ["Anna Smith"]}
    asked = encoded(ClozeConfig(), [row], max_tokens=300)
    found = asked.scores(np.array([[0.0], [1.0], [0.0]]), ["f1", "exact_match"]).metrics
    assert found == {"f1": pytest.approx(2 * 1 * 0.5 / (1 + 0.5)), "exact_match": 0.0}


CLOZE = ["task={kind: cloze, max_query_tokens: 12}", "data.test={}", "data.max_tokens=40"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": "no gap"}, "query has no @placeholder; needed: one"),
        ({"entities": "Anna"}, "entities is 'Anna'; needed: a list"),
        ({"answers": []}, "answers is '\\[\\]'; needed: a list of at least one"),
        ({"entities": ["a", ""]}, "entities has ''; needed: texts"),
    ],
)
def test_a_mistake_in_a_gaps_row_is_one_line(tmp_path, capsys, change, said):
    write_task(tmp_path)
    write_rows(tmp_path / "train.jsonl", GAPS)
    write_rows(tmp_path / "dev.jsonl", [GAPS[0], {**GAPS[0], **change}])
    assert finetune.main([str(tmp_path / "task.yaml"), *CLOZE]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(f"dev.jsonl line 2: {said}", lines[0]), lines


def test_training_rows_without_any_right_candidate_are_refused():
    asked = encoded(ClozeConfig(), [GAPS[1]], max_tokens=300)
    with pytest.raises(DataError, match="no candidate is one of answers; needed: candidates that"):
        ClozeConfig().check_training(asked.examples, rows_of(GAPS))
