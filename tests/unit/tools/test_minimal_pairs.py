"""Minimal pairs against transformers, one mask at a time; and the command on a folder of each kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM

from encoder.base.errors import ConfigError
from encoder.models.stored import write_stored
from encoder.runs.weights import read_model
from encoder.tools import notebook
from encoder.tools.evaluation import minimal_pairs
from encoder.tools.evaluation.evaluate import Answers, Questions, as_json
from encoder.tools.evaluation.minimal_pairs import framed, pair_scores, read_pairs, sums_of_logs
from launch import evaluate as command
from tests.helpers.pages import write_page_folder
from tests.helpers.tasks import write_rows
from tests.reference.pseudo_likelihood import pseudo_log_likelihood

PAIRS = [
    ("the cats sleep", "the cats sleeps"),
    ("who ran", "who run ran"),
    ("ünï [MASK]", "[MASK] ünï"),
    ("a b c", "a c b"),
    ("no one ever", "one no ever"),
]
GROUPS = ["agree", "agree", "order", "order", "order"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A BERT of letters as transformers writes it, the same as a weights folder, and a file of pairs."""
    root = tmp_path_factory.mktemp("models")
    write_page_folder(root / "hf", "BertForMaskedLM")
    write_stored(read_model(root / "hf"), root / "weights")
    rows = [
        {"sentence_good": good, "sentence_bad": bad, "UID": group}
        for (good, bad), group in zip(PAIRS, GROUPS)
    ]
    write_rows(root / "pairs.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def bert(place):
    return notebook.load(place / "hf")


@pytest.fixture(scope="module")
def slow(place, bert):
    """later_of_word -> sums of the good and of the bad sentences, by transformers."""
    theirs = AutoModelForMaskedLM.from_pretrained(place / "hf", attn_implementation="eager").eval()
    found = {}
    for later in (False, True):
        sides = []
        for side in (0, 1):
            sentences = framed(bert, [pair[side] for pair in PAIRS])
            sides.append(
                [
                    pseudo_log_likelihood(
                        theirs,
                        ids_T.tolist(),
                        word_T.tolist(),
                        mask_id=bert.specials.mask_id,
                        later_of_word=later,
                    )
                    for ids_T, word_T in zip(sentences.ids, sentences.words, strict=True)
                ]
            )
        found[later] = np.array(sides)
    return found


@pytest.mark.parametrize("together", [2, 64])
def test_packed_sums_are_those_of_one_mask_at_a_time(bert, slow, monkeypatch, together):
    monkeypatch.setattr(minimal_pairs, "SENTENCES_TOGETHER", together)
    for later, sides in slow.items():
        for side in (0, 1):
            sentences = framed(bert, [pair[side] for pair in PAIRS])
            found = sums_of_logs(bert, sentences, later_of_word=later)
            np.testing.assert_allclose(found, sides[side], atol=1e-4)
    # masking the rest of a word is another question
    assert np.abs(slow[False] - slow[True]).max() > 0.01


def test_the_share_is_of_pairs_whose_good_sentence_is_likelier(bert, slow):
    good, bad = (framed(bert, [pair[side] for pair in PAIRS]) for side in (0, 1))
    right = {later: sides[0] > sides[1] for later, sides in slow.items()}
    found = pair_scores(bert, good, bad, GROUPS)
    assert found.right == right[False].mean() and found.right_of_words == right[True].mean()
    by_group = {"agree": right[False][:2].mean(), "order": right[False][2:].mean()}
    assert found.by_group == by_group
    assert found.numbers()["pairs_right_by_group"] == np.mean([*by_group.values()])
    # turned round, what was right is wrong; of the same sentences none is right
    turned = pair_scores(bert, bad, good, None)
    assert turned.right == 1 - found.right
    assert "pairs_right_by_group" not in turned.numbers()
    assert pair_scores(bert, good, good, None).right == 0.0


def test_a_sum_that_is_no_number_leaves_no_share(bert, monkeypatch):
    """nan > nan is false: a broken model would have 0 %, and not be told from a bad one."""
    sums = {"good": np.array([-1.0, np.nan, -1.0, -1.0, -3.0]), "bad": np.full(5, -2.0)}
    monkeypatch.setattr(minimal_pairs, "sums_of_logs", lambda _bert, side, **_settings: sums[side])
    found = pair_scores(bert, "good", "bad", GROUPS)
    assert np.isnan([found.right, found.right_of_words, found.by_group["agree"]]).all()
    assert found.by_group["order"] == pytest.approx(2 / 3)
    answers = Answers(name="x", origin="", parameters=1, numbers=found.numbers(), pairs=found)
    (told,) = as_json([answers], Questions(measures=("pairs",)))["models"]
    assert {*told["numbers"].values(), told["pairs"]["by_group"]["agree"]} == {None}


def test_the_command_asks_pairs_of_folders_of_both_kinds(place, slow, tmp_path, capsys):
    words = [str(place / "hf"), str(place / "weights"), "--pairs", str(place / "pairs.jsonl")]
    assert command.main([*words, "--by", "UID", "--out", str(tmp_path / "out")]) == 0
    assert "minimal pairs right, mean over groups" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    share = float((slow[False][0] > slow[False][1]).mean())
    for model in result["models"]:
        assert model["numbers"]["pairs_right"] == share
        assert [*model["pairs"]["by_group"]] == ["agree", "order"]
    assert result["questions"]["pairs"] == len(PAIRS)


def test_a_sentence_must_be_whole(bert):
    with pytest.raises(ConfigError, match="'x{40}' has 999 tokens; needed: 1 to"):
        framed(bert, ["ab", "x" * 999])


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        ({"sentence_good": "a", "sentence_bad": "a"}, [], "line 1: sentence_good and sentence_bad"),
        ({"sentence_good": "a", "bad": "b"}, [], "line 1 has no sentence_bad"),
        ({"sentence_good": "a", "bad": " "}, ["--bad", "bad"], "line 1: bad is empty"),
        (None, ["--by", "UID"], "--by names a column of pairs. Give --pairs FILE"),
        (None, ["--measures", "pairs"], "needs sentences. Give --pairs FILE"),
    ],
)
def test_a_mistake_about_pairs_is_one_line(place, tmp_path, capsys, row, words, said):
    if row is not None:
        words = [*words, "--pairs", str(write_rows(tmp_path / "pairs.jsonl", [row]))]
    assert command.main([str(place / "hf"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_columns_and_groups_may_have_other_names(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"right": "a b", "wrong": "b a", "kind": 3}])
    found = read_pairs(path, good="right", bad="wrong", by="kind")
    assert (found.good, found.bad, found.groups) == (["a b"], ["b a"], ["3"])
