"""Words of a byte-level BPE are counted as the library splits them, whatever stands beside them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import tokenizer_training
from data_prep.tokenizer_training import TrainingConfig
from tests.helpers.prep import run, texts, write_jsonl
from tests.unit.prep.test_tokenizer_kinds import Texts

# white space of each kind, what only Python takes for it, marks, contractions, digits, letters that change alone or
# together, halves of other splits
PARTS = [
    *" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000'\"(=_-.",
    *"aZsSté日ß5²½",
    *("'s", "'T", "'re", "'ll", "n't", "  ", "\n\n", " '", "ab", "12"),
    *(
        "\u0301",
        "\ufe0f",
        "e\u0301",
        "=\u0338",
        "\u1112\u1161\u11ab",
        "🙂",
        "\u200b",
        "\ufb01",
        "\x00",
        "\x7f",
    ),
]


@pytest.mark.parametrize("lowercase", [False, True])
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(given=st.lists(st.lists(st.sampled_from(PARTS), max_size=24).map("".join), max_size=3))
@example(given=["'s 's\n's.'s I's a'sun", "x  y \n z\t", " \u00a0 a \x1c b é\x1cé"])
@example(given=["x \ufe0f\n\n y", "Danger ⚠\n\ufe0f\n\n x", "a \u0301\n\n b"])
def test_words_are_those_of_the_librarys_split(lowercase, given):
    config = TrainingConfig(kind="bpe", lowercase=lowercase)
    tokenizer = tokenizer_training._untrained(config)
    ours = tokenizer_training._words(tokenizer, Texts(given), config)
    theirs: Counter[str] = Counter()
    for text in given:
        normal = tokenizer.normalizer.normalize_str(text)
        theirs.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    assert ours.is_whole and ours.counts == theirs


def test_text_without_spaces_is_counted_by_its_words_and_not_by_its_texts():
    """A bound on what is kept is one on words: a text of another script is not a word."""
    given = [f"日本語の文章、{number % 50}番目。" * 40 for number in range(300)]
    config = TrainingConfig(kind="bpe")
    tokenizer = tokenizer_training._untrained(config)
    ours = tokenizer_training._words(tokenizer, Texts(given), config)
    assert ours.is_whole and len(ours.counts) == 54 and max(ours.counts.values()) == 300 * 40


def test_the_trained_file_is_the_one_that_the_library_trains_on_the_texts(tmp_path):
    given = [*texts(200), "naïve café, it's 12 e\u0301\n\n\tx = [1, 2]  # don't"] * 2
    write_jsonl(tmp_path / "a.jsonl", given)
    out = tmp_path / "t.json"
    options = ("--kind", "bpe", "--vocab-size", 400, "--files", tmp_path / "a.jsonl")
    assert run("tokenizer", "train", *options, "--out", out) == 0

    tokenizer = tokenizer_training._untrained(TrainingConfig(kind="bpe"))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=395,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(given, trainer)
    model = json.loads(out.read_text())["model"]
    assert model["merges"] == json.loads(tokenizer.to_str())["model"]["merges"]


def test_endlessly_many_words_stay_in_bounds(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tokenizer_training.MOST_WORD_CHARS, "bpe", 900)
    given = [f"the cat sat in the house of rat{number:03}x" for number in range(300)]
    write_jsonl(tmp_path / "a.jsonl", given)
    options = ("--vocab-size", 290, "--files", tmp_path / "a.jsonl", "--out", tmp_path / "t.json")
    assert run("tokenizer", "train", *options) == 0
    assert "all frequent ones" in capsys.readouterr().out
