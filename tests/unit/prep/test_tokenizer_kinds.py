"""WordPiece, BPE and Unigram tokenizers of each family: trained, taken over whatever their tokens are called, and prepared with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from data_prep import tokenizer_training
from data_prep.shards import ShardSamples, lacking_specials, specials_inside, text_stretches
from data_prep.tokenization import HOSTILE, TextEncoder, choose_encoder
from encoder.base.tokenizer_json import ROLES, special_ids_of, unused_ids
from encoder.data.shard_format import read_card, with_specials
from tests.helpers.prep import ids_of, run, settings, texts, write_jsonl
from tests.helpers.tokenizers_of import NAMES, TEXTS, train

KINDS = {
    "bert": ("--kind", "wordpiece", "--lowercase", "--unused", "99"),
    "roberta": ("--kind", "bpe", "--names", "roberta"),
    "albert": ("--kind", "unigram", "--lowercase"),
    "xlnet": ("--kind", "unigram", "--names", "xlnet"),
}
# fact sheet of the families, 1.2: cls, sep, pad, mask, unk; RoBERTa's mask is the last
IDS = {
    "bert": (101, 102, 0, 103, 100),
    "roberta": (0, 2, 1, 399, 3),
    "albert": (2, 3, 0, 4, 1),
    "xlnet": (3, 4, 5, 6, 0),
}
ENTRIES = {"bert": 200, "roberta": 400, "albert": 80, "xlnet": 90}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer.json of each family, trained by the command."""
    folder = tmp_path_factory.mktemp("trained")
    write_jsonl(folder / "a.jsonl", [*texts(300), *TEXTS, "ÉCOLE naïve"] * 2)

    def make(family: str, name: str) -> Path:
        out = folder / name
        files = ("--files", folder / "a.jsonl", "--vocab-size", ENTRIES[family], "--out", out)
        assert run("tokenizer", "train", *KINDS[family], *files) == 0
        return out

    first = {family: make(family, f"{family}.json") for family in KINDS}
    again = {family: make(family, f"{family}-again.json") for family in KINDS}
    return first, again


@pytest.mark.parametrize("family", NAMES)
def test_a_trained_tokenizer_has_its_familys_ids_and_frame(family, trained):
    path = trained[0][family]
    vocab_size, specials = special_ids_of(path)
    assert vocab_size == ENTRIES[family]
    assert tuple(getattr(specials, f"{role}_id") for role in ROLES) == IDS[family]
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == ENTRIES[family]
    one = tokenizer.encode("the cat", add_special_tokens=False).ids
    assert tokenizer.encode("the cat").ids == [*specials.before, *one, *specials.behind]
    assert path.read_bytes() == trained[1][family].read_bytes(), "training twice"


def test_berts_unused_entries_are_those_of_its_vocabulary(trained):
    assert unused_ids(trained[0]["bert"], vocab_size=200) == tuple(range(1, 100))


def test_trained_pieces_are_those_of_transformers_slow_tokenizers(trained, tmp_path):
    content = json.loads(trained[0]["bert"].read_text())
    vocab = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    for name in ("bert", "roberta"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert/vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    bert = transformers.BertTokenizer.from_pretrained(tmp_path / "bert", do_lower_case=True)
    content = json.loads(trained[0]["roberta"].read_text())["model"]
    (tmp_path / "roberta/vocab.json").write_text(json.dumps({**content["vocab"], "<mask>": 399}))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in content["merges"]), ""])
    (tmp_path / "roberta/merges.txt").write_text(merges, encoding="utf-8")
    roberta = transformers.RobertaTokenizer.from_pretrained(tmp_path / "roberta")
    for judge, family in ((bert, "bert"), (roberta, "roberta")):
        ours = tokenizers.Tokenizer.from_file(str(trained[0][family]))
        for text in [*TEXTS, "ÉCOLE naïve [MASK]", "tabs\tand  spaces 日本語"]:
            if family == "roberta" and "[MASK]" in text:
                continue
            assert ours.encode(text).ids == judge(text)["input_ids"], text
        pair = ours.encode(TEXTS[0], TEXTS[1])
        theirs = judge(TEXTS[0], TEXTS[1])
        assert pair.ids == theirs["input_ids"]


@pytest.mark.parametrize("family", NAMES)
def test_no_text_gives_a_special_id(family, trained):
    path = trained[0][family]
    _, specials = special_ids_of(path)
    names = [token["content"] for token in json.loads(path.read_text())["added_tokens"]]
    asked = [*HOSTILE, *names, " ".join(names), "a<mask>b[SEP]</s><sep>"]
    encoder = TextEncoder(path, choose_encoder(path, lambda: TEXTS))
    ids_T, lengths_D = encoder.encode(asked)
    judge = TextEncoder(path, "tokenizers").encode(asked)
    assert np.array_equal(ids_T, judge[0]) and np.array_equal(lengths_D, judge[1])
    never = {*specials.all_special} - {specials.unk_id}
    assert not never & {*ids_T.tolist()}


def test_ordinary_text_is_encoded_as_by_the_tokenizer_itself(trained):
    for family in NAMES:
        path = trained[0][family]
        encoder = TextEncoder(path, "tokenizers")
        plain = tokenizers.Tokenizer.from_file(str(path))
        for text in TEXTS:
            ids = plain.encode(text, add_special_tokens=False).ids
            assert encoder.encode([text])[0].tolist() == ids


@pytest.mark.parametrize("family", NAMES)
def test_a_familys_own_folder_is_taken_over_as_it_is(family, tmp_path):
    theirs = train(family, tmp_path / "hf")
    out = tmp_path / "t.json"
    assert run("tokenizer", "from-hf", tmp_path / "hf", "--out", out) == 0
    assert out.read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
    vocab_size, specials = special_ids_of(out)
    assert vocab_size == len(theirs)
    for role in ROLES:
        assert getattr(specials, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    assert specials.frame == ("end" if family == "xlnet" else "both_ends")


def renamed(folder: Path) -> dict[str, str]:
    """A folder of BERT's tokenizer whose special tokens have other names; which those are."""
    train("bert", folder)
    names = {role: f"{{{role}}}" for role in ROLES}
    text = (folder / "tokenizer.json").read_text()
    for role, (bracket, *_) in ROLES.items():
        text = text.replace(json.dumps(bracket), json.dumps(names[role]))
    (folder / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        # transformers 5 writes no map
        (folder / name).unlink(missing_ok=True)
    return names


@pytest.mark.parametrize("told", ["tokenizer_config.json", "special_tokens_map.json", "options"])
def test_roles_of_any_names_are_told_by_files_or_options(told, tmp_path, capsys):
    names = renamed(tmp_path / "hf")
    source, out = tmp_path / "hf/tokenizer.json", tmp_path / "t.json"
    assert run("tokenizer", "from-hf", tmp_path / "hf", "--out", out) == 2
    assert "lacks [CLS], [SEP], [PAD], [MASK], [UNK], or names it" in capsys.readouterr().err
    options = []
    if told == "options":
        options = [word for role, name in names.items() for word in (f"--{role}", name)]
    else:
        values = {f"{role}_token": name for role, name in names.items()}
        values["mask_token"] = {"content": names["mask"], "lstrip": True}
        (tmp_path / "hf" / told).write_text(json.dumps(values))
    assert run("tokenizer", "from-hf", tmp_path / "hf", *options, "--out", out) == 0
    assert "with the roles marked: cls {cls}, sep {sep}" in capsys.readouterr().out
    _, specials = special_ids_of(out)
    before = json.loads(source.read_text())
    ids = {token["content"]: token["id"] for token in before["added_tokens"]}
    assert {role: getattr(specials, f"{role}_id") for role in ROLES} == {
        role: ids[name] for role, name in names.items()
    }
    # the mark changes no id, and transformers passes over it
    marked = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source))
    assert marked(TEXTS)["input_ids"] == plain(TEXTS)["input_ids"]
    assert choose_encoder(out, lambda: TEXTS) == choose_encoder(source, lambda: TEXTS)


def test_a_token_that_is_told_a_role_is_special_from_then_on(tmp_path):
    train("bert", tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    content = json.loads(path.read_text())
    plain = {t: i for t, i in content["model"]["vocab"].items() if not t.startswith("[")}
    token, number = max(plain.items(), key=lambda entry: entry[1])
    out = tmp_path / "t.json"
    assert run("tokenizer", "from-hf", path, "--sep", token, "--out", out) == 0
    _, specials = special_ids_of(out)
    assert specials.sep_id == number and number in specials.all_special


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cls", "[NONE]"), "has no token [NONE]. Name one of its own: --cls NAME"),
        (("--cls", "[SEP]"), "[SEP] is the token of cls and sep; needed: a token for each"),
    ],
)
def test_roles_that_cannot_be_are_one_line(options, said, tmp_path, capsys):
    train("bert", tmp_path / "hf")
    out = tmp_path / "t.json"
    assert run("tokenizer", "from-hf", tmp_path / "hf", *options, "--out", out) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not out.exists()


def test_a_folder_of_another_form_is_told_the_way(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/vocab.txt").write_text("[PAD]\n")
    assert run("tokenizer", "from-hf", tmp_path / "old", "--out", tmp_path / "t.json") == 2
    err = capsys.readouterr().err
    assert "has vocab.txt, but no tokenizer.json. Write it once with transformers" in err


@pytest.mark.parametrize("family", NAMES)
def test_shards_have_the_familys_frame_and_verify(family, trained, tmp_path):
    write_jsonl(tmp_path / "corpus/a.jsonl", texts(200, longest=80))
    config = settings(tmp_path / "corpus", max_tokens_per_document=24, held_out_share=0.0)
    (tmp_path / "corpus/tokenizer.json").write_bytes(trained[0][family].read_bytes())
    assert run("prepare", config) == 0
    folder = tmp_path / "corpus/shards/a/train"
    card = read_card(folder)
    assert ("frame" in json.loads((folder / "card.json").read_text())["specials"]) == (
        family == "xlnet"
    )
    plain = TextEncoder(trained[0][family], "tokenizers").encode(texts(200, longest=80))[0]
    before, behind = [*card.specials.before], [*card.specials.behind]
    bodies = []
    for ids in ids_of(folder):
        assert len(ids) <= 24
        assert ids[: len(before)] == before and ids[-len(behind) :] == behind
        bodies += ids[len(before) : -len(behind)]
    assert bodies == plain.tolist()
    assert run("verify", folder) == 0


def test_what_lacks_of_a_frame_at_the_end_is_seen_and_put_there(trained):
    _, specials = special_ids_of(trained[0]["xlnet"])
    cls, sep = specials.cls_id, specials.sep_id
    stored = [[9, 10, sep, cls], [9, 10, sep], [9, 10], [9, cls], [sep, 9, sep, cls], [cls, 9]]
    samples = ShardSamples(
        name="s",
        ids_T=np.concatenate([np.array(ids) for ids in stored]),
        lengths_P=np.array([len(ids) for ids in stored]),
    )
    lacks = lacking_specials(samples, specials)
    assert lacks.cls_P.tolist() == [False, True, True, True, False, True]
    assert lacks.sep_P.tolist() == [False, False, True, True, False, True]
    for ids, added in zip(stored, lacks.cls_P.astype(int) + lacks.sep_P):
        framed = with_specials(np.array(ids), specials).tolist()
        assert framed == ids + [sep, cls][2 - added :] and framed[-2:] == [sep, cls]
    inside = specials_inside(samples, specials)
    assert inside["[CLS] before its last place"].tolist() == [0, 0, 0, 0, 0, 1]
    assert inside["[SEP] inside its text"].tolist() == [0, 0, 0, 0, 1, 0]
    begins_P, ends_P = text_stretches(samples.lengths_P, specials, lacks)
    first = [samples.ids_T[a:b].tolist() for a, b in zip(begins_P, ends_P)][:3]
    assert first == [[9, 10], [9, 10], [9, 10]]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_words_are_counted_as_the_library_counts_them(kind):
    """Its trainer holds the words that it was fed."""
    given = [
        *texts(200),
        *TEXTS,
        *HOSTILE,
        "ÉCOLE naïve, l\u2019\ufb01n",
        "a\u3000b  日本語 ＡＢ\n\tx",
    ]
    config = tokenizer_training.TrainingConfig(kind=kind, lowercase=True)
    tokenizer = tokenizer_training._untrained(config)
    ours = tokenizer_training._words(tokenizer, Texts(given), config)
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=500, show_progress=False)
    tokenizer.model = tokenizers.models.Unigram()
    tokenizer.train_from_iterator(given, trainer)
    # an empty word is none
    theirs = json.loads(trainer.__getstate__())["UnigramTrainer"]["words"]
    assert ours.is_whole and ours.counts == {word: n for word, n in theirs.items() if word}


@dataclass(frozen=True)
class Texts:
    """In the place of a sample."""

    given: list[str]

    def texts(self) -> list[str]:
        return self.given


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_too_many_words_count_for_each_other_and_it_is_said(family, tmp_path, capsys, monkeypatch):
    given = [f"the cat sat in the house of rat{number:03}" for number in range(300)]
    write_jsonl(tmp_path / "a.jsonl", given)
    kind = KINDS[family][1]
    monkeypatch.setitem(tokenizer_training.MOST_WORD_CHARS, kind, 900)
    out = tmp_path / "t.json"
    options = ("--kind", kind, "--vocab-size", 60, "--files", tmp_path / "a.jsonl", "--out", out)
    assert run("tokenizer", "train", *options) == 0
    said = capsys.readouterr().out
    assert "different words" in said and "all frequent ones" in said
    assert special_ids_of(out)[0] == 60


def test_letters_that_a_wordpiece_leaves_out_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "MOST_CHARACTERS", 20)
    # 5 letters twice, 40 others once
    given = ["abcde" * 2 + chr(0x4E00 + number) for number in range(40)]
    write_jsonl(tmp_path / "a.jsonl", given)
    out = tmp_path / "t.json"
    options = ("--kind", "wordpiece", "--files", tmp_path / "a.jsonl", "--out", out)
    assert run("tokenizer", "train", *options, "--vocab-size", 36) == 0
    said = "25 letters are in no entry, 5.68% of the text's: a WordPiece has the 20 most frequent"
    assert said in capsys.readouterr().out
    # more text would not help
    assert run("tokenizer", "train", *options, "--vocab-size", 9000) == 2
    assert said in capsys.readouterr().err
