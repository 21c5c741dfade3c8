"""Texts encoded word by word have the ids that tokenizers gives to the whole, whatever they hold and however they are batched."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep import words
from data_prep.tokenization import HOSTILE, TextEncoder, choose_encoder
from encoder.base.errors import ShardError
from tests.helpers.charsmap import charsmap
from tests.helpers.prep import tokenizer_bytes
from tests.helpers.tokenizers_of import TEXTS, train

# what a cache of words may get wrong: neighbours that join, vanish, or become spaces
PARTS = [
    *["the", "The", "THE", "cat", "unhappily", "naïve", "É", "ǰ", "T\u0308", "İ", "ẞ", "Σ"],
    *["日本", "語", "한국", "ｶﾞ", "กำ", "العربية", "हिन्दी", "Привет", "\u0d4e", "\u1100\u1161"],
    *[" ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\u0085"],
    *["\u0301", "\u0338", " \u0301", "e\u0301", "=\u0338", "<\u0338", "\u3099", "\uff9e", "\ufe0f"],
    *["\u200b", "\u200c", "\u200d", "\u00ad", "\ufeff", "\ufffd", "\u0000", "\u0001", "\u007f"],
    *["👨\u200d👩", "🇩🇪", "👍🏽", "😀", "\U0010fffd", "\U000e0001", "ﬁ", "①", "¨", "½", "Ａ"],
    *[".", ",", "``", "''", "`", "...", "…", "—", "’", "!?", "_", "#", "3.14", "10,000", "x1y2"],
    *["[MASK]", "[UNK]", "<unk>", "[unused1]", "[UNUSED1]", "\u2581", " \u2581", "\u2581cat"],
    *["a" * 99, "a" * 101, "b" * 300, "self.foo(bar)[0]", "//", "-----", "\x0b", "\x0c", "\x1c"],
]

TABLE = charsmap(
    {
        **dict.fromkeys("\n\t\r\u00a0\u200b\u3000", " "),
        **{" \u0301": "X", "e\u0301": "é", "\u00ad": "", "ﬁ": "fi", "Ａ": "A", "①": "1 "},
    }
)


def documents(*, seed: int, count: int = 100) -> list[str]:
    chance = random.Random(seed)
    made = ["".join(chance.choices(PARTS, k=chance.randint(0, 40))) for _ in range(count)]
    return [*made, "", " ", *TEXTS, *HOSTILE]


def trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([*TEXTS, *PARTS], trainer)
    return tokenizer


def wordpiece(normalizer: Any, pre_tokenizer: Any = None) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=["[UNK]", "[MASK]"], show_progress=False
    )
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, normalizer, pre_tokenizer or pre_tokenizers.BertPreTokenizer())


def unigram(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, normalizer, pre_tokenizer)


def bpe(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<unk>"], show_progress=False, end_of_word_suffix="</w>"
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return trained(model, trainer, normalizer, pre_tokenizer)


def precompiled(*others: Any) -> Any:
    return normalizers.Sequence([normalizers.Precompiled(TABLE), *others])


ONE_SPACE = normalizers.Replace(Regex(" {2,}"), " ")
ANY_SPACE = normalizers.Replace(Regex(r"\s+"), " ")
BARE = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
METASPACE = pre_tokenizers.Metaspace()
SPLIT = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE])
CLIP = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])

STRUCTURES = {
    "bert": lambda: wordpiece(normalizers.BertNormalizer()),
    "bert, cased": lambda: wordpiece(normalizers.BertNormalizer(lowercase=False)),
    "bert, accents kept": lambda: wordpiece(normalizers.BertNormalizer(strip_accents=False)),
    "bert, nothing cleaned": lambda: wordpiece(
        normalizers.BertNormalizer(False, False, None, True)
    ),
    "composed": lambda: wordpiece(normalizers.Sequence([normalizers.NFC(), *BARE[2:]])),
    "plain": lambda: wordpiece(None),
    "replaced": lambda: wordpiece(normalizers.Replace("``", '"')),
    "t5": lambda: unigram(precompiled(ONE_SPACE), METASPACE),
    "t5, split": lambda: unigram(precompiled(ONE_SPACE), SPLIT),
    "albert": lambda: unigram(precompiled(*BARE, ONE_SPACE), METASPACE),
    "ours": lambda: unigram(
        normalizers.Sequence([*BARE, ANY_SPACE, normalizers.Strip()]), METASPACE
    ),
    "ours, cased": lambda: unigram(
        normalizers.Sequence([normalizers.NFKC(), ANY_SPACE, normalizers.Strip()]), METASPACE
    ),
    "clip": lambda: bpe(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), CLIP),
    "bpe by letters": lambda: bpe(BARE[1], pre_tokenizers.BertPreTokenizer()),
}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Known words are forgotten all the time."""
    monkeypatch.setattr(words, "MOST_WORDS", 500)
    monkeypatch.setattr(words, "NEW_CHARS", 200)


def agree(path: Path, texts: list[str]) -> None:
    """Both ways, over several batches, the last of which meets known words."""
    judge = TextEncoder(path, "tokenizers")
    fast = TextEncoder(path, "words")
    for batch in (texts[:70], texts[70:], texts, texts[::-1]):
        ids_T, lengths_D = fast.encode(batch)
        wanted_T, wanted_D = judge.encode(batch)
        differ = np.flatnonzero(lengths_D != wanted_D)
        assert not len(differ), ascii(batch[differ[0]])
        assert np.array_equal(ids_T, wanted_T)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_words_give_the_ids_of_the_whole_text(structure, tmp_path):
    path = tmp_path / "tokenizer.json"
    STRUCTURES[structure]().save(str(path))
    agree(path, documents(seed=len(structure)))


@pytest.mark.parametrize("family", ["bert", "albert", "xlnet"])
def test_tokenizers_of_families_are_encoded_by_words(family, tmp_path):
    train(family, tmp_path)
    path = tmp_path / "tokenizer.json"
    agree(path, documents(seed=1))
    assert choose_encoder(path, lambda: TEXTS) == "words"


def test_added_tokens_are_found_in_text_as_by_the_library(tmp_path):
    train("bert", tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    about = {"special": False, "normalized": False, "single_word": False}
    for name, lstrip in (("[unused1]", False), ("the cat", True), ("cat", False)):
        number = len(content["model"]["vocab"])
        content["model"]["vocab"][name] = number
        sides = {"lstrip": lstrip, "rstrip": lstrip}
        content["added_tokens"].append({"id": number, "content": name, **about, **sides})
    path.write_text(json.dumps(content))
    agree(path, [*documents(seed=2), "the  The cat cats", "THE CAT sat [unused1]", "Cat"])


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Prepend", "prepend": "\u2581"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "a b"}, "content": "c"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "-"}},
        # its marks are no white space to this split
        {
            "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
        },
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "\u2581",
                "prepend_scheme": "first",
                "split": True,
            }
        },
    ],
    ids=lambda change: str(change)[:60],
)
def test_structures_that_are_not_known_are_refused(change, tmp_path):
    content = {**json.loads(tokenizer_bytes()), **change}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError):
        TextEncoder(path, "words")


def test_what_is_remembered_is_bounded_and_the_frequent_stays(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 100)
    known = words._KnownWords()
    for batch in range(20):
        new = [b"%d-%d" % (batch, number) for number in range(40)]
        if not batch:
            new[0] = b"the"
        lengths = np.arange(40) % 3
        known.add(new, np.repeat(np.arange(40), lengths).astype(np.uint32), lengths)
        # `the` is in every batch
        known.count(np.array([known.numbers[b"the"]]), np.array([9]))
        known = known.shrunk()
        assert len(known.numbers) <= 100
        for word, number in known.numbers.items():
            place = 0 if word == b"the" else int(word.split(b"-")[1])
            begin = known.starts_W[number]
            ids = known.ids[begin : begin + known.lengths_W[number]]
            assert ids.tolist() == [place] * (place % 3)
    assert b"the" in known.numbers


def test_words_that_are_counted_are_all_words(tmp_path):
    train("bert", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def pieces(text: str) -> list[str]:
        normal = tokenizer.normalizer.normalize_str(text)
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]

    texts = documents(seed=3)
    found: Counter[str] = Counter()
    for word, count in words.WordCounter(tokenizer)(texts):
        for piece in pieces(word):
            found[piece] += count
    assert found == Counter(piece for text in texts for piece in pieces(text))
