"""Masked language modelling: shares, what may be asked, what may be shown, and settings that are refused."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from encoder.base.errors import ConfigError
from encoder.base.rng import generator
from encoder.base.schema import from_mapping
from encoder.base.tokenizer_json import unused_ids
from encoder.objectives.catalog import OBJECTIVES, build_objective
from encoder.objectives.contract import MaskShare
from encoder.objectives.mlm import MlmConfig
from encoder.objectives.words import LONGEST_WORD, WordEdges, read_word_edges
from tests.helpers.shards import write_tokenizer

V, UNK, CLS, SEP, PAD, MASK = 105, 100, 101, 102, 103, 104
SPECIALS = SimpleNamespace(mask_id=MASK, pad_id=PAD, all_special=(UNK, CLS, SEP, PAD, MASK))


def objective(*, vocab_size=V, **settings):
    return build_objective(MlmConfig(**settings), vocab_size=vocab_size, specials=SPECIALS)


def long_row(tokens=200_000, seed=0):
    """Ordinary tokens with [CLS], [SEP], [UNK] and [PAD] strewn in."""
    ids = np.random.default_rng(seed).integers(0, 100, tokens)
    for at, special in enumerate((CLS, SEP, UNK, PAD)):
        ids[at::50] = special
    return ids


def within_five_sigma(count, total, share):
    return abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share))


def test_shares_are_those_of_the_settings():
    ids = long_row()
    question = objective(mask_share=0.3).mask(ids, generator(1, "a"))
    ordinary = int((ids < 100).sum())
    asked = len(question.targets["mlm"].index)
    shown = question.ids[question.targets["mlm"].index]
    assert within_five_sigma(asked, ordinary, 0.3)
    assert within_five_sigma((shown == MASK).sum(), asked, 0.8)
    # kept, or replaced by chance with itself (one in 100)
    assert within_five_sigma((shown == question.targets["mlm"].value).sum(), asked, 0.1 + 0.1 / 100)


def test_targets_are_the_clean_ids_and_nothing_else_is_changed():
    ids = long_row()
    before = ids.copy()
    question = objective().mask(ids, generator(1, "a"))
    assert (ids == before).all()
    assert (question.targets["mlm"].value == ids[question.targets["mlm"].index]).all()
    assert (np.diff(question.targets["mlm"].index) > 0).all()
    untouched = np.ones(len(ids), dtype=bool)
    untouched[question.targets["mlm"].index] = False
    assert (question.ids[untouched] == ids[untouched]).all()


def test_special_tokens_are_neither_asked_nor_drawn():
    ids = long_row()
    question = objective().mask(ids, generator(1, "a"))
    assert (question.targets["mlm"].value < 100).all()
    shown = question.ids[question.targets["mlm"].index]
    assert set(shown[shown != MASK]) == set(
        range(100)
    )  # every ordinary id is drawn, no special one


def test_replacements_are_uniform_over_the_ordinary_ids():
    question = objective(mask_share=0.9, random_share=1.0, keep_share=0.0).mask(
        np.full(100_000, 7), generator(1, "a")
    )
    counts = np.bincount(question.ids[question.targets["mlm"].index], minlength=V)
    assert counts[100:].sum() == 0
    assert all(within_five_sigma(c, counts.sum(), 0.01) for c in counts[:100])


def test_the_released_objective_asks_cls_and_sep_and_draws_up_to_the_mask():
    ids = long_row()
    question = objective(mask_special_tokens=True).mask(ids, generator(1, "a"))
    for special in (CLS, SEP, UNK):
        assert within_five_sigma(
            (question.targets["mlm"].value == special).sum(), (ids == special).sum(), 0.3
        )
    assert (question.targets["mlm"].value != PAD).all()
    drawn = objective(
        mask_special_tokens=True, mask_share=0.9, random_share=1.0, keep_share=0.0, vocab_size=120
    ).mask(np.full(100_000, 7), generator(1, "a"))
    assert set(drawn.ids[drawn.targets["mlm"].index]) == set(
        range(MASK + 1)
    )  # not 105 to 119, which no text has


def test_padding_is_never_asked_nor_changed():
    for released in (False, True):
        question = objective(mask_special_tokens=released).mask(
            np.full(1000, PAD), generator(1, "a")
        )
        assert len(question.targets["mlm"].index) == 0 and (question.ids == PAD).all()


def test_the_same_address_gives_the_same_question_and_another_gives_another():
    ids = long_row(500)
    one, same, other = (objective().mask(ids, generator(1, "mlm", 0, 3, row)) for row in (5, 5, 6))
    assert (one.ids == same.ids).all() and (
        one.targets["mlm"].index == same.targets["mlm"].index
    ).all()
    assert set(one.targets["mlm"].index) != set(other.targets["mlm"].index)


def test_the_capacity_holds_every_question_and_little_more():
    ask = objective(mask_share=0.3)
    assert ask.capacity("mlm", 4096) == 1405  # 1228.8 + 6 * 29.33 = 1404.8
    assert ask.capacity("mlm", 3) == 3  # never above the tokens there are
    ids = np.random.default_rng(0).integers(0, 100, 256)
    assert max(
        len(ask.mask(ids, generator(1, i)).targets["mlm"].index) for i in range(2000)
    ) <= ask.capacity("mlm", 256)


def test_the_question_maker_survives_pickling():
    ask, ids = objective(), long_row(500)
    again = pickle.loads(pickle.dumps(ask))  # noqa: S301
    assert (again.mask(ids, generator(1, "a")).ids == ask.mask(ids, generator(1, "a")).ids).all()


def test_a_share_that_falls_is_that_of_the_rows_place_and_its_room_that_of_the_highest():
    ask = build_objective(
        MlmConfig(),
        vocab_size=V,
        specials=SPECIALS,
        share=MaskShare(start=0.3, end=0.15, over_tokens=1000),
    )
    ids = np.zeros(100_000, dtype=np.int64)
    for seen, share in ((0, 0.3), (500, 0.225), (1000, 0.15), (10**9, 0.15)):
        question = ask.mask(ids, generator(1, "a"), phase_tokens=seen)
        assert within_five_sigma(len(question.targets["mlm"].index), len(ids), share)
        shown = question.ids[question.targets["mlm"].index]
        assert within_five_sigma((shown == MASK).sum(), len(shown), 0.8)
    assert ask.capacity("mlm", 4096) == objective(mask_share=0.3).capacity("mlm", 4096)


def of_two_tokens():
    """Words of the even ids 0 to 98, each gone on with by any odd ids."""
    begins_V, open_V = np.ones(V, dtype=bool), np.ones(V, dtype=bool)
    begins_V[1:100:2], open_V[100:] = False, False
    return WordEdges(begins_V, open_V)


def test_words_end_where_the_next_begins_or_nothing_may_follow_and_after_eight_tokens():
    edges = of_two_tokens()
    assert edges.words(np.array([CLS, 0, 1, 3, 4, SEP, 1, 1, 6])).tolist() == [
        0,
        1,
        1,
        1,
        2,
        3,
        4,
        4,
        5,
    ]
    assert np.bincount(edges.words(np.array([0] + [1] * 19))).tolist() == [
        LONGEST_WORD,
        LONGEST_WORD,
        4,
    ]
    assert (
        edges.words(np.array([1])).tolist() == [0]
        and len(edges.words(np.empty(0, dtype=np.int64))) == 0
    )


def test_a_word_is_asked_whole_or_not_at_all_at_the_shares_of_the_settings():
    ids, edges = long_row(), of_two_tokens()
    ask = build_objective(MlmConfig(whole_words=True), vocab_size=V, specials=SPECIALS, words=edges)
    question = ask.mask(ids, generator(1, "a"))
    asked = np.zeros(len(ids), dtype=bool)
    asked[question.targets["mlm"].index] = True
    words = edges.words(ids)
    ordinary, count = np.bincount(words, weights=ids < 100), np.bincount(words, weights=asked)
    assert ((count == 0) | (count == ordinary)).all() and not asked[ids >= 100].any()
    total = int((ids < 100).sum())
    spread = np.sqrt((ordinary**2).sum() * 0.3 * 0.7)
    assert abs(asked.sum() - 0.3 * total) < 5 * spread
    shown = question.ids[question.targets["mlm"].index]
    assert within_five_sigma((shown == MASK).sum(), len(shown), 0.8)
    assert within_five_sigma(
        (shown == question.targets["mlm"].value).sum(), len(shown), 0.1 + 0.1 / 100
    )
    assert set(shown[shown != MASK]) == set(range(100))
    assert (
        0.3 * total + spread * 6
        < ask.capacity("mlm", len(ids))
        == 0.3 * len(ids) + 6 * np.sqrt(len(ids) * 0.21 * 4) // 1 + 1
    )


@pytest.mark.parametrize(
    "content, edges",
    [
        (
            {
                "model": {
                    "type": "BPE",
                    "vocab": {
                        "Ġthe": 0,
                        "cat": 1,
                        "(": 2,
                        "Ċ": 3,
                        "Ġ(": 4,
                        "'s": 5,
                        "Ã": 6,
                        "¤x": 7,
                        "ĠÃ": 8,
                    },
                },
                "pre_tokenizer": {"type": "ByteLevel"},
            },
            ["wo", "-o", "w-", "w-", "w-", "wo", "-o", "-o", "wo"],
        ),
        (
            {
                "model": {"type": "BPE", "vocab": {"▁the": 0, "cat": 1, ".": 2}},
                "pre_tokenizer": {"type": "Metaspace"},
            },
            ["wo", "-o", "w-"],
        ),
        (
            {
                "model": {
                    "type": "WordPiece",
                    "vocab": {"the": 0, "##ir": 1, "[CLS]": 2},
                    "continuing_subword_prefix": "##",
                },
                "added_tokens": [{"id": 2, "content": "[CLS]", "special": True}],
            },
            ["wo", "-o", "w-"],
        ),
        ({"model": {"type": "WordLevel", "vocab": {"the": 0, "cat": 1}}}, ["w-", "w-"]),
        (
            {
                "model": {
                    "type": "Unigram",
                    "vocab": [
                        ["<s>", 0.0],
                        ["▁the", -1.0],
                        ["cat", -2.0],
                        [".", -3.0],
                        ["▁", -4.0],
                    ],
                },
                "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
            },
            ["w-", "wo", "-o", "w-", "wo"],
        ),
    ],
)
def test_words_are_told_from_the_tokenizer(tmp_path, content, edges):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = read_word_edges(tmp_path / "tokenizer.json", vocab_size=len(edges))
    assert [
        ("w" if b else "-") + ("o" if o else "-") for b, o in zip(found.begins_V, found.open_V)
    ] == edges


def test_a_tokenizer_whose_words_cannot_be_told_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Hashed", "vocab": {"a": 0}}})
    )
    with pytest.raises(
        ConfigError,
        match=r"its words cannot be told \(a Hashed model; known: BPE, Unigram, WordPiece, WordLevel\)",
    ):
        read_word_edges(tmp_path / "tokenizer.json", vocab_size=1)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"mask_share": 0.0}, "mask_share"),
        ({"mask_share": 1.0}, "mask_share"),
        ({"random_share": -0.1}, "random_share"),
        ({"random_share": 0.6, "keep_share": 0.6}, "together at most 1"),
        ({"mask_prob": 0.3}, "mask_prob is unknown"),
        ({"z_loss_weight": -1e-4}, "z_loss_weight -0.0001 must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        from_mapping(OBJECTIVES["mlm"], settings)


def test_a_special_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="special id 104 is outside the vocabulary of 104"):
        objective(vocab_size=104)


def test_random_replacements_leave_out_unused_ids_unless_asked_for():
    ids = np.arange(100).repeat(200)
    settings = {"mask_share": 0.9, "random_share": 1.0, "keep_share": 0.0}

    def drawn(unused, **more):
        ask = build_objective(
            MlmConfig(**settings, **more), vocab_size=V, specials=SPECIALS, unused=unused
        )
        question = ask.mask(ids, generator(1, "a"))
        return set(question.ids[question.targets["mlm"].index].tolist()), question

    assert drawn((7, 99))[0] == set(range(100)) - {7, 99}
    every, question = drawn((7, 99), random_tokens="all")
    assert every == set(range(100)) and np.array_equal(question.ids, drawn(())[1].ids), (
        "as it was before there was the setting"
    )


def test_unused_ids_are_read_off_the_tokenizer(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", vocab_size=64)
    content = json.loads(path.read_text())
    names = [
        "[unused12]",
        "<unused3>",
        "madeupword0001",
        "<|reserved_special_token_5|>",
        "<extra_id_9>",
        "[UNUSED_7]",
    ]
    content["model"]["vocab"] = {
        names[number - 10] if 10 <= number < 16 else token: number
        for token, number in content["model"]["vocab"].items()
        if number != 20
    }
    content["model"]["vocab"].update({"unused": 70, "[used]": 71})
    path.write_text(json.dumps(content))
    assert unused_ids(path, vocab_size=74) == (*range(10, 16), 20, 64, 65, 66, 67, 68, 69, 72, 73)
