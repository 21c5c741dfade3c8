"""Choices are documents of one example: they stay together, however many there are, and the softmax is over them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from encoder.base.errors import ConfigError
from encoder.base.world import World
from encoder.data.examples import ExampleDealing, in_order
from encoder.data.labelled import DataError
from encoder.finetune.kinds.choice import ChoiceConfig, ChoiceSet
from encoder.objectives.text_tasks import TERM
from launch import finetune
from tests.helpers.tasks import bpe, encoder_of, rows_of, write_rows, write_task

RACE = {"texts": ("article", "question"), "choices": ("options",), "label": "answer"}
ROWS = [
    {
        "article": "John ran home.",
        "question": "Who ran?",
        "options": ["John", "Jane"],
        "answer": "A",
    },
    {
        "article": "He slept.",
        "question": "Who?",
        "options": ["I", "He", "You", "They"],
        "answer": "B",
    },
    {
        "article": "It is late. " * 9,
        "question": "When?",
        "options": ["now", "soon", "x"],
        "answer": 2,
    },
]


def encoded(kind: ChoiceConfig, rows: list[dict], *, max_tokens: int = 40) -> ChoiceSet:
    encoder = encoder_of(bpe(), max_tokens=max_tokens, segments=True)
    return kind.encode(rows_of(rows), encoder, name="dev")


def test_a_choice_is_a_pair_whose_text_gives_way():
    asked = encoded(ChoiceConfig(**RACE, max_choice_tokens=16), ROWS)
    examples = asked.examples
    assert len(examples) == 3 and examples.places.starts_N1.tolist() == [0, 2, 6, 9]
    (batch,) = in_order(
        examples,
        term=TERM,
        dealing=ExampleDealing(
            world=World(rank=0, size=1, local_rank=0, local_size=1), micro_batch_tokens=4096
        ),
    )
    starts = batch.batch.cu_seqlens_S1.tolist()
    assert len(starts) == 10 and batch.batch.targets[TERM].count == 3
    tokenizer = bpe()
    texts = [tokenizer.decode(batch.batch.ids_T[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    assert texts[0] == "John ran home.Who ran? John" and texts[3] == "He slept.Who? He"
    assert all(text.startswith("It is") and len(text) < 60 for text in texts[6:])
    assert batch.batch.positions_T[starts[:-1]].tolist() == [0] * 9
    assert batch.batch.max_seqlen == 40 and examples.cut == 3
    assert "the text before the choice is cut" in asked.notes()[0]


def test_choices_of_a_row_are_never_in_two_micro_batches():
    examples = encoded(ChoiceConfig(**RACE, max_choice_tokens=16), ROWS).examples
    for rank in range(2):
        world = World(rank=rank, size=2, local_rank=rank, local_size=2)
        for made in in_order(
            examples, term=TERM, dealing=ExampleDealing(world=world, micro_batch_tokens=8)
        ):
            groups = made.batch.targets[TERM].group_M
            expected = np.diff(examples.places.starts_N1)[made.numbers_M]
            assert torch.bincount(groups).tolist() == expected.tolist()


def test_a_long_choice_keeps_its_end_and_two_columns_are_two_choices():
    row = {
        "premise": "It rained.",
        "one": "so he stayed at home",
        "two": "x y z " * 9 + "end",
        "right": 1,
    }
    kind = ChoiceConfig(
        texts=("premise",), choices=("one", "two"), label="right", max_choice_tokens=8
    )
    asked = encoded(kind, [row])
    ids = asked.examples.ids_A[asked.examples.places.token_P[1] :]
    segments = asked.examples.segments_A[asked.examples.places.token_P[1] :]
    second = bpe().decode(ids[segments == 1].tolist())
    assert second.endswith("z end") and (segments == 1).sum() <= 9
    assert asked.cut_choices == 2 and asked.examples.value_P[:, 0].tolist() == [0, 1]


def test_loss_and_accuracy_are_over_the_choices_of_each_row():
    asked = encoded(ChoiceConfig(**RACE, max_choice_tokens=16), ROWS)
    logits = np.random.default_rng(1).normal(size=(9, 1))
    rows = [logits[a:b, 0] for a, b in ((0, 2), (2, 6), (6, 9))]
    losses = [
        cross_entropy(torch.from_numpy(row)[None], torch.tensor([right])).item()
        for row, right in zip(rows, (0, 1, 2))
    ]
    scores = asked.scores(logits, ["accuracy"])
    assert scores.loss == pytest.approx(np.mean(losses))
    hits = [row.argmax() == right for row, right in zip(rows, (0, 1, 2))]
    assert scores.metrics["accuracy"] == pytest.approx(np.mean(hits))
    lines = [*asked.lines(logits)]
    assert [line["target"] for line in lines] == [0, 1, 2]
    assert lines[1]["text"] == ROWS[1]["options"][lines[1]["choice"]]


def test_there_are_letters_for_26_choices():
    row = {"article": "x", "question": "y", "options": ["a"] * 40, "answer": "40"}
    with pytest.raises(DataError, match="needed: 0 to 39, or A to Z, as there are 40 choices"):
        encoded(ChoiceConfig(**RACE, max_choice_tokens=16), [row])


def test_settings_without_room_or_choices_are_refused():
    with pytest.raises(ConfigError, match="data.max_tokens is 132; needed: at least 133, for"):
        ChoiceConfig(**RACE).check_length(132)
    with pytest.raises(ConfigError, match="choices names no column"):
        ChoiceConfig(texts=("a",), choices=(), label="b")
    with pytest.raises(ConfigError, match="two columns are called 'a'"):
        ChoiceConfig(texts=("a",), choices=("a",), label="b")


TASK = [
    "task={kind: choice, texts: [article, question], choices: [options], label: answer, max_choice_tokens: 12}",
    "data.test={}",
]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": ["John"]}, "options has 1 choice; needed: a list of at least two"),
        ({"options": "John"}, "options is 'John'; needed: a list of at least two"),
        ({"options": ["John", " "]}, "a choice is ' '; needed: a text"),
        ({"answer": "C"}, "answer is 'C'; needed: 0 to 1, or A to B, as there are 2 choices"),
        ({"answer": 2}, "answer is '2'; needed: 0 to 1"),
        ({"article": ""}, "article is empty; needed: a text"),
    ],
)
def test_a_mistake_in_a_row_is_one_line_with_file_and_row(tmp_path, capsys, change, said):
    write_task(tmp_path)
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "dev.jsonl", [ROWS[0], {**ROWS[0], **change}])
    assert finetune.main([str(tmp_path / "task.yaml"), *TASK]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(f"dev.jsonl line 2: {said}", lines[0]), lines
    assert not (tmp_path / "run").exists()
