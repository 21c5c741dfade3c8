"""Answers as stretches of a text: windows, the tokens of an answer, EM and F1 and the threshold of SQuAD's own scripts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import namedtuple

import numpy as np
import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.base.units import Progress
from encoder.base.world import World
from encoder.data.examples import micro_batch
from encoder.finetune import course as course_module
from encoder.finetune.config import read_task
from encoder.finetune.course import FineTuning
from encoder.finetune.encoding import read_encoder
from encoder.finetune.kinds import squad
from encoder.finetune.kinds.answers import (
    AnswerRule,
    WindowLogits,
    best_answer,
    best_span,
    most_context,
)
from encoder.finetune.kinds.spans import SpansConfig, SpanSet
from encoder.finetune.prepare import prepare, read_start
from encoder.models.hf.task import export_task, task_model
from encoder.objectives.text_tasks import TERM
from launch import finetune
from tests.helpers.hf import task_pipeline, write_tokenizer_json
from tests.helpers.tasks import bpe, drawn_task, encoder_of, rows_of, write_rows, write_task

CONTEXT = (
    "Peter Blackburn rejects German lamb. He went to Brussels in 1996, and came back to London."
)
ROWS = [
    {"question": "Who rejects lamb?", "answer": "Peter Blackburn"},
    {"question": "Where did he go to?", "answer": "Brussels"},
    {"question": "When?", "answer": "1996"},
    {"question": "Where is he now?", "answer": "London"},
]
SHORT = {"max_question_tokens": 8, "overlap_tokens": 6}


def rows(*, none: bool = False) -> list[dict]:
    found = []
    for row in ROWS:
        start = CONTEXT.index(row["answer"])
        answers = {"text": [row["answer"]], "answer_start": [start]}
        found.append({"question": row["question"], "context": CONTEXT, "answers": answers})
    if none:
        empty = {"text": [], "answer_start": []}
        found.append({"question": "Why?", "context": CONTEXT, "answers": empty})
    return found


def encoded(kind: SpansConfig, *, max_tokens: int = 30, none: bool = False) -> SpanSet:
    return kind.encode(
        rows_of(rows(none=none)), encoder_of(bpe(), max_tokens=max_tokens), name="dev"
    )


def logits_of(asked: SpanSet, *, high: float = 9.0) -> np.ndarray:
    """Of a model that knows."""
    return asked.examples.value_P * high


def test_windows_share_their_overlap_and_have_all_of_the_context():
    asked = encoded(SpansConfig(**SHORT))
    examples, windows = asked.examples, asked.windows
    whole = bpe().encode(CONTEXT, add_special_tokens=False)
    assert examples.lengths_N.max() == 30 and len(examples) > 8
    for window in range(len(examples)):
        span_L2 = windows.span_L2(window)
        context = span_L2[span_L2[:, 0] >= 0]
        begin = windows.begin_N[window]
        assert context.tolist() == [list(x) for x in whole.offsets[begin : begin + len(context)]]
        if window and windows.row_N[window] == windows.row_N[window - 1]:
            before = windows.span_L2(window - 1)
            assert before[before[:, 0] >= 0][-6:].tolist() == context[:6].tolist()
    for row in range(4):
        (last,) = np.flatnonzero(windows.row_N == row)[-1:]
        assert windows.span_L2(last).max() == len(CONTEXT)


def test_an_answer_is_at_its_own_characters_and_elsewhere_at_the_first_token():
    asked = encoded(SpansConfig(**SHORT))
    texts: dict[int, set[str]] = {}
    for window, row in enumerate(asked.windows.row_N):
        begin, end = asked.examples.starts_N1[window : window + 2]
        value_L2 = asked.examples.value_P[begin:end]
        assert value_L2.sum(0).tolist() == [1, 1]
        first, last = value_L2.argmax(0)
        span_L2 = asked.windows.span_L2(window)
        if first == 0:
            assert last == 0
            continue
        texts.setdefault(row, set()).add(CONTEXT[span_L2[first, 0] : span_L2[last, 1]].strip())
    assert texts == {row: {one["answer"]} for row, one in enumerate(ROWS)} and not asked.lost


@pytest.mark.parametrize("max_context", [False, True])
def test_a_model_that_knows_has_every_answer_of_the_text_itself(max_context):
    asked = encoded(SpansConfig(**SHORT, max_context=max_context))
    lines = [*asked.lines(logits_of(asked))]
    assert [line["answer"] for line in lines] == [row["answer"] for row in ROWS]
    assert [CONTEXT[line["start"] :].lstrip()[:4] for line in lines] == [
        row["answer"][:4] for row in ROWS
    ]
    scores = asked.scores(logits_of(asked, high=50.0), ["f1", "exact_match"])
    assert scores.metrics == {"f1": 1.0, "exact_match": 1.0} and scores.loss < 1e-6


def test_the_loss_of_logits_is_that_of_torch():
    from torch.nn.functional import cross_entropy

    asked = encoded(SpansConfig(**SHORT))
    examples = asked.examples
    logits = np.random.default_rng(1).normal(size=(len(examples.value_P), 2))
    losses = []
    for begin, end in zip(examples.starts_N1, examples.starts_N1[1:]):
        one, right = torch.from_numpy(logits[begin:end].T), examples.value_P[begin:end].argmax(0)
        losses.append(cross_entropy(one, torch.from_numpy(right)).item())
    assert asked.scores(logits, ["f1"]).loss == pytest.approx(np.mean(losses))


def test_without_an_answer_the_threshold_of_the_dev_set_decides():
    kind = SpansConfig(**SHORT, no_answer=True)
    asked = encoded(kind, none=True)
    logits = logits_of(asked)
    decided = asked.decided(logits)
    scores = asked.scores(logits, kind.metric_names())
    assert scores.metrics == {"f1": 1.0, "exact_match": 1.0, **decided}
    assert [line["answer"] for line in asked.lines(logits)][-1] == ""
    # a threshold from elsewhere holds: here nothing is ever left out
    always = asked.scores(logits, ["exact_match"], {"no_answer_threshold": 1e9})
    assert always.metrics["exact_match"] == 4 / 5
    told = SpansConfig(**SHORT, no_answer=True, no_answer_threshold=-3.0)
    assert encoded(told, none=True).decided(logits) == {"no_answer_threshold": -3.0}


def test_a_test_set_never_chooses_its_threshold(tmp_path, monkeypatch):
    write_task(tmp_path)
    for name in ("train", "more"):
        write_rows(tmp_path / f"{name}.jsonl", rows(none=True))
    kind = "kind: spans, max_question_tokens: 8, overlap_tokens: 6, no_answer: true"

    told: list[object] = []
    for name in ("_take_kept", "_predicted", "_say_end"):
        monkeypatch.setattr(FineTuning, name, lambda *_args: None)
    monkeypatch.setattr(FineTuning, "_tell", lambda *_args, decided: told.append(decided))
    monkeypatch.setattr(course_module, "write_result", lambda *_args, **_settings: None)

    def undecided(settings: str, *overrides: str) -> tuple[dict | None, str]:
        task = read_task(tmp_path / "task.yaml", [f"task={{{settings}}}", *overrides])
        start = read_start(task)
        course = FineTuning(
            prepare(task, start), world=World(), device=torch.device("cpu"), start=start
        )
        course.finish(None, Progress())
        return told[-1], " ".join(course.warnings())

    found, said = undecided(kind, "data.dev={}")
    assert found == {"no_answer_threshold": 0.0}
    assert "no dev set chooses no_answer_threshold: test sets are measured at 0." in said
    # what the task gives holds on every set
    assert undecided(f"{kind}, no_answer_threshold: 2.0", "data.dev={}")[0] is None


def judge(name):
    """The published scripts, which transformers has up to some version 5."""
    return pytest.importorskip(f"transformers.data.{name}")


@pytest.mark.parametrize(
    ("answer", "golds"),
    [
        ("The Eiffel Tower!", ["Eiffel tower"]),
        ("Denver Broncos team", ["Denver Broncos", "the Broncos"]),
        ("an apple a day", ["apple  day."]),
        ("x", [""]),
        ("", ["x"]),
        ("", []),
        ("the", ["x"]),
        ("a b b c", ["b b d", "c"]),
    ],
)
def test_em_and_f1_are_those_of_the_published_scripts(answer, golds):
    squad_metrics = judge("metrics.squad_metrics")
    real = [gold for gold in golds if squad_metrics.normalize_answer(gold)] or [""]
    assert squad.normalized(answer) == squad_metrics.normalize_answer(answer)
    exact = max(squad_metrics.compute_exact(gold, answer) for gold in real)
    assert squad.exact_match(answer, golds) == exact
    expected = max(squad_metrics.compute_f1(gold, answer) for gold in real)
    assert squad.f1(answer, golds) == pytest.approx(expected)


def test_f1_of_a_worked_case():
    # 2 of 3 words are right, 2 of 2 were found
    assert squad.f1("Denver Broncos team", ["Denver Broncos"]) == pytest.approx(0.8)


def test_the_best_threshold_gives_the_best_mean_of_the_published_search():
    draw = np.random.default_rng(1)
    has = draw.random(40) < 0.6
    missing = draw.normal(size=40).round(1) - has
    score = np.where(has, draw.random(40), 0.0)
    threshold = squad.best_threshold(score, (~has).astype(float), missing)
    mean = np.where(missing > threshold, ~has, score).mean()
    every = [np.where(missing > t, ~has, score).mean() for t in [*missing, missing.min() - 1]]
    assert mean == pytest.approx(max(every))
    # theirs tries the same order, but may cut between equal values
    squad_metrics = judge("metrics.squad_metrics")
    names = [str(k) for k in range(40)]
    best, _ = squad_metrics.find_best_thresh(
        {name: "x" for name in names},
        dict(zip(names, score)),
        dict(zip(names, missing)),
        dict(zip(names, has)),
    )
    assert 100 * mean <= best + 1e-9 and 100 * mean > best - 5.0


def test_the_best_threshold_lies_on_no_row():
    """The same model by other kernels has logits that differ in the last digits; what it answers must not."""
    few = np.array([0.0, 1.0, 3.0])
    assert squad.best_threshold(np.array([1, 1, 0]), 1 - np.array([1, 1, 0]), few) == 2.0
    assert squad.best_threshold(np.ones(3), np.zeros(3), few) == 4.0
    assert squad.best_threshold(np.zeros(3), np.ones(3), few) == -1.0
    draw = np.random.default_rng(3)
    for _ in range(20):
        missing = draw.normal(size=12).round(1)
        score, empty = draw.random((2, 12))
        threshold = squad.best_threshold(score, empty, missing)
        tried = [np.where(missing > t, empty, score).mean() for t in [*missing, missing.min() - 1]]
        for noise in (-1e-6, 0.0, 1e-6):
            found = np.where(missing + noise > threshold, empty, score).mean()
            assert found == pytest.approx(max(tried))
    # between neighbours of fp64 there is no middle
    low = np.nextafter(1.0, 2.0)
    near = np.array([low, np.nextafter(low, 2.0)])
    threshold = squad.best_threshold(np.array([1, 0]), np.array([0, 1]), near)
    assert near[0] <= threshold < near[1]


def test_a_best_span_is_that_of_all_pairs():
    draw = np.random.default_rng(2)
    for _ in range(20):
        logits = draw.normal(size=(12, 2))
        may = draw.random(12) < 0.7
        found = best_span(logits, may_start_L=may, may_end_L=may, candidates=12, most_tokens=4)
        pairs = [(a, b) for a in range(12) for b in range(a, min(12, a + 4)) if may[a] and may[b]]
        score = {(a, b): logits[a, 0] + logits[b, 1] for a, b in pairs}
        best = max(score, key=score.get)
        assert found == (pytest.approx(score[best]), *best)


def test_there_is_no_answer_where_that_scores_higher_by_more_than_the_threshold():
    """Of all windows the best sum of two logits, against the lowest sum at the first token (SQuAD 2.0, Devlin et al. 2019)."""
    draw = np.random.default_rng(5)
    for _ in range(20):
        logits = draw.normal(size=(3, 9, 2))
        inside = np.arange(9) >= 3
        windows = [WindowLogits(logits_L2=one, inside_L=inside, begin=0) for one in logits]
        pairs = [
            (one[a, 0] + one[b, 1], number, a, b)
            for number, one in enumerate(logits)
            for a in range(3, 9)
            for b in range(a, 9)
        ]
        score, *place = max(pairs)
        none = min(one[0, 0] + one[0, 1] for one in logits)
        best = best_answer(windows, AnswerRule(candidates=9))
        assert (best.score, best.none) == (pytest.approx(score), pytest.approx(none))
        assert [best.window, best.first, best.last] == place
        for threshold in (none - score - 0.1, none - score + 0.1):
            rule = AnswerRule(no_answer_threshold=threshold)
            assert rule.gives_none(best.missing) == (none - score > threshold)
    assert not AnswerRule().gives_none(1e9)
    # no stretch of a window without the context
    nothing = WindowLogits(logits_L2=np.zeros((4, 2)), inside_L=np.zeros(4, dtype=bool), begin=0)
    assert best_answer([nothing], AnswerRule()).window is None


def test_a_token_counts_in_the_window_that_the_published_rule_names():
    squad_processor = judge("processors.squad")
    span = namedtuple("span", ["start", "length"])
    lengths, begins = [10, 10, 7], [0, 6, 12]
    spans = [span(begin, length) for begin, length in zip(begins, lengths)]
    best = most_context(lengths, begins)
    assert len(best) == 19
    for position, window in enumerate(best):
        there = [k for k, s in enumerate(spans) if s.start <= position < s.start + s.length]
        theirs = [k for k in there if squad_processor._check_is_max_context(spans, k, position)]
        assert theirs == [window]


def test_a_long_question_is_cut_and_a_window_too_small_is_refused():
    row = {**rows()[0], "question": "Who " * 40}
    kind = SpansConfig(**SHORT)
    asked = kind.encode(rows_of([row]), encoder_of(bpe(), max_tokens=30), name="dev")
    second = asked.windows.span_L2(0)[:, 0] >= 0
    assert second.argmax() == 2 + 8 and asked.cut_questions == 1
    assert "1 question of dev longer than task.max_question_tokens 8: cut" in asked.notes()
    with pytest.raises(ConfigError, match="data.max_tokens is 18; needed: at least 19, for"):
        kind.check_length(18)


def test_answers_are_those_of_transformers_pipeline(tmp_path):
    pipeline = task_pipeline("question-answering")

    tokenizer_json = write_tokenizer_json(tmp_path / "tokenizer.json")
    # without one of its own it gets the export's, which has the pair form
    content = {**json.loads(tokenizer_json.read_text()), "post_processor": None}
    tokenizer_json.write_text(json.dumps(content))
    task = dataclasses.replace(
        drawn_task("bert", kind="span"), tokenizer_json=tokenizer_json, max_tokens=60
    )
    export_task(task, tmp_path / "hf")

    contexts = ["the cat sat", "a dog ran home at one", "no one was here, they say"]
    given = [
        {
            "question": "who?",
            "context": text,
            "answers": {"text": ["a"], "answer_start": [text.index("a")]},
        }
        for text in contexts
    ]
    encoder = read_encoder(
        tmp_path / "hf" / "tokenizer.json",
        vocab_size=280,
        max_tokens=60,
        segments=True,
        pairs=True,
    )
    kind = SpansConfig(max_question_tokens=16, overlap_tokens=4, candidates=60)
    asked = kind.encode(rows_of(given), encoder, name="dev")
    made = micro_batch(asked.examples, np.arange(len(contexts)), term=TERM)
    with torch.no_grad():
        logits = kind.objective.answers(task_model(task), made.batch).double().numpy()
    answer = pipeline(model=str(tmp_path / "hf"), device="cpu", max_seq_len=60)
    for line, row in zip(asked.lines(logits), given, strict=True):
        theirs = answer(
            question=row["question"],
            context=row["context"],
            doc_stride=4,
            max_answer_len=30,
            align_to_words=False,
        )
        assert line["answer"] == theirs["answer"].strip()


TASK = ["task={kind: spans, max_question_tokens: 8, overlap_tokens: 6}", "data.test={}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"answers": {"text": ["1996"], "answer_start": [0]}},
            "answers has '1996' at 0, where context has",
        ),
        ({"answers": {"text": ["1996"], "answer_start": [-4]}}, "answers has '1996' at -4, where"),
        (
            {"answers": {"text": ["1996"], "answer_start": []}},
            r"answers is .*needed: {text: \[...\], answer_st",
        ),
        ({"answers": {"text": [], "answer_start": []}}, "answers has no answer. Set task.no_answ"),
        ({"answers": "1996"}, "answers is '1996'; needed: {text"),
        ({"context": " "}, "context is empty; needed: a text"),
        ({"question": None}, "question is empty; needed: a text"),
    ],
)
def test_a_mistake_in_a_row_is_one_line_with_file_and_row(tmp_path, capsys, change, said):
    write_task(tmp_path)
    write_rows(tmp_path / "train.jsonl", rows())
    write_rows(tmp_path / "dev.jsonl", [rows()[0], {**rows()[2], **change}])
    assert finetune.main([str(tmp_path / "task.yaml"), *TASK]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(f"dev.jsonl line 2: {said}", lines[0]), lines
    assert not (tmp_path / "run").exists()


def test_the_published_files_are_read_as_they_are(tmp_path):
    from encoder.data.labelled import DataError, read_rows

    flat = rows(none=True)
    questions = [
        {
            "id": str(k),
            "question": row["question"],
            "is_impossible": not row["answers"]["text"],
            "answers": [
                {"text": text, "answer_start": start}
                for text, start in zip(*row["answers"].values())
            ],
        }
        for k, row in enumerate(flat)
    ]
    paragraphs = [{"context": CONTEXT, "qas": questions}]
    path = tmp_path / "dev-v2.0.json"
    path.write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "x", "paragraphs": paragraphs}]})
    )
    kind = SpansConfig(**SHORT, no_answer=True)
    found = kind.encode(read_rows(path, kind.columns), encoder_of(bpe(), max_tokens=30), name="dev")
    assert np.array_equal(found.examples.value_P, encoded(kind, none=True).examples.value_P)
    path.write_text('{"rows": []}')
    with pytest.raises(DataError, match="is no file of SQuAD .*needed: data, paragraphs, qas"):
        read_rows(path, kind.columns)
