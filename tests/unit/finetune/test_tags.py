"""Words are asked at the tokens that running text gives them; rows are split, not cut; entities count as seqeval counts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from encoder.base.errors import ConfigError
from encoder.finetune.kinds.tags import TagsConfig, TagSet
from launch import finetune
from tests.helpers.tasks import bpe, encoder_of, rows_of, write_rows, write_task

WORDS = [
    ["EU", "rejects", "German", "call", "to", "boycott", "British", "lamb", "."],
    ["Peter", "Blackburn", "rejects", "lamb"],
]
TAGS = [["B-ORG", "O", "B-MISC", "O", "O", "O", "B-MISC", "O", "O"], ["B-PER", "I-PER", "O", "O"]]
KIND = TagsConfig(words="words", label="tags", labels=("O", "B-ORG", "B-MISC", "B-PER", "I-PER"))


def encoded(words: list, tags: list, *, max_tokens: int = 64, tokenizer=None) -> TagSet:
    rows = rows_of([{"words": w, "tags": t} for w, t in zip(words, tags)])
    encoder = encoder_of(tokenizer or bpe(), max_tokens=max_tokens)
    return KIND.encode(rows, encoder, name="dev")


def test_a_word_is_asked_at_the_token_that_a_list_with_a_blank_before_each_word_has_first():
    asked = encoded(WORDS, TAGS)
    examples, other = asked.examples, bpe(prefix_space=True)
    for row, words in enumerate(WORDS):
        start, end = examples.starts_N1[row : row + 2]
        assert examples.ids_A[start:end].tolist() == bpe().encode(" ".join(words)).ids
        # with add_prefix_space a list of words has the tokens of running text, the first word apart
        listed = other.encode(words, is_pretokenized=True)
        # a blank that is a token by itself is no letter of the word
        of_word = [k if token != "Ġ" else None for k, token in zip(listed.word_ids, listed.tokens)]
        firsts = [of_word.index(k) for k in range(1, len(words))]
        token_P = examples.places.token_P[examples.places.of(np.array([row]))]
        ids = examples.ids_A[start:end][token_P]
        assert ids[1:].tolist() == [listed.ids[k] for k in firsts] and token_P[0] == 1
    assert [asked.labels[k] for k in examples.value_P] == [tag for tags in TAGS for tag in tags]


def test_a_long_row_is_split_between_words_and_each_is_asked_once():
    asked = encoded(WORDS, TAGS, max_tokens=12)
    examples = asked.examples
    assert examples.lengths_N.max() <= 12 and len(examples) > 2 and asked.split == 2
    assert asked.word_P.tolist() == list(range(13))
    assert examples.value_P.tolist() == asked.tag_W.tolist()
    # nothing is repeated and nothing is lost, but for the blank between two windows
    texts = [
        bpe().decode(examples.ids_A[a:b].tolist())
        for a, b in zip(examples.starts_N1, examples.starts_N1[1:])
    ]
    whole = "".join("".join(words) for words in WORDS)
    assert "".join(texts).replace(" ", "") == whole
    assert asked.notes() == ["2 rows of dev longer than data.max_tokens: split between words"]


def test_a_word_without_a_token_is_read_as_outside_and_said():
    from tokenizers import normalizers

    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    asked = encoded([["lamb", "\u200b", "to"]], [["O", "B-ORG", "B-PER"]], tokenizer=tokenizer)
    assert asked.word_P.tolist() == [0, 2]
    logits = np.eye(5)[[0, 3]]
    assert [*asked.lines(logits)][0]["tags"] == ["O", "O", "B-PER"]
    assert asked.scores(logits, ["accuracy"]).metrics == {"accuracy": pytest.approx(2 / 3)}
    assert asked.notes() == ["1 word of dev without a token of its own: read as O"]


def test_an_entity_counts_where_span_and_type_are_exact():
    asked = encoded(WORDS, TAGS)
    guessed = [["B-ORG", "O", "B-PER", *["O"] * 3, "B-MISC", "O", "O"], ["B-PER", "O", "O", "O"]]
    numbers = [asked.labels.index(tag) for tags in guessed for tag in tags]
    found = asked.scores(np.eye(5)[numbers], KIND.metric_names()).metrics
    # of 4 entities and as many guesses, EU and British are right: German has another type, Peter another end
    assert found["entity_f1"] == found["entity_precision"] == found["entity_recall"] == 0.5
    assert found["accuracy"] == 11 / 13


def test_tags_that_are_no_entities_are_counted_by_word():
    words = TagsConfig(words="w", label="t", labels=("NOUN", "VERB"))
    assert words.metric_names() == ("accuracy", "macro_f1")
    with pytest.raises(ConfigError, match="entity_f1 counts entities, and the tag 'NOUN' is of"):
        TagsConfig(
            words="w", label="t", labels=("NOUN", "VERB"), metrics=("entity_f1",)
        ).metric_names()


TASK = ["task={kind: tags, words: words, label: tags, labels: [O, B-X]}", "data.test={}"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"words": ["a", "b"], "tags": ["O", "B-Y"]},
            "tags is 'B-Y', which is none of task.labels",
        ),
        ({"words": ["a", "b"], "tags": ["O"]}, "words has 2 words, tags 1 tag; needed: a tag for"),
        ({"words": [], "tags": []}, r"words is '\[\]'; needed: a list of words"),
        ({"words": "a b", "tags": ["O", "O"]}, "words is 'a b'; needed: a list of words"),
        ({"words": ["a b"], "tags": ["O"]}, "words has 'a b'; needed: words, each without a blank"),
        ({"words": ["a", None], "tags": ["O", "O"]}, "words has 'None'; needed: words, each"),
        ({"words": ["a"], "tags": [9]}, "tags is '9', which is none of task.labels"),
    ],
)
def test_a_mistake_in_a_row_is_one_line_with_file_and_row(tmp_path, capsys, row, said):
    write_task(tmp_path)
    good = {"words": ["a", "b"], "tags": ["O", 1]}
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.jsonl", [good, row] if name == "dev" else [good])
    assert finetune.main([str(tmp_path / "task.yaml"), *TASK]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(f"dev.jsonl line 2: {said}", lines[0])
    assert not (tmp_path / "run").exists()


def test_a_conll_file_has_its_words_first_and_its_tags_last(tmp_path):
    from encoder.data.labelled import DataError, read_rows

    text = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n"
    path = tmp_path / "a.conll"
    path.write_text(text)
    found = read_rows(path, ["words", "tags", "2"])
    assert found.columns["words"] == [["EU", "rejects"], ["Peter"]]
    assert found.columns["tags"] == [["B-ORG", "O"], ["B-PER"]]
    assert found.columns["2"] == [["NNP", "VBZ"], ["NNP"]]
    assert found.place(1) == f"{path} line 7"
    with pytest.raises(DataError, match="has no column tag. Did you mean tags"):
        read_rows(path, ["tag"])
    path.write_text(text + "Blackburn NNP\n")
    with pytest.raises(DataError, match="a.conll line 8 has 2 columns, the first 4"):
        read_rows(path, ["words"])
