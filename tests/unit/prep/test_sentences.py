"""Where sentences end: found in stored ids, the same by prepare and by index, held against the lengths by verify."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json

import numpy as np
import pytest
import tokenizers

from data_prep.sentences import SentenceSplitter
from data_prep.tokenization import TextEncoder
from encoder.base.errors import ShardError
from encoder.data.sentences import read_sentences
from encoder.data.shard_format import SENTENCES, read_card, read_lengths
from encoder.data.shards import open_source
from tests.helpers.prep import run, settings, tokenizer_bytes, write_jsonl
from tests.unit.prep.test_bad_input import refused

# sentences as they stand in a text, each with the space before it
SENTENCES_OF = (
    ["It rains.", " We stay in!", " Mr. Dog paid 3.50 for it.", "\n\nA new paragraph", "\n"],
    ["\u65e5\u672c\u8a9e\u306e\u6587\u3002", "\u6b21\u306e\u6587\u3002", " \u041a\u0430\u043a?"],
    ["no mark at its end"],
)


@pytest.fixture
def byte_level(tmp_path):
    path = tmp_path / "bpe.json"
    path.write_bytes(tokenizer_bytes())
    return path


def word_piece(path, words: list[str]):
    vocab = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.save(str(path))
    return path, vocab


def split(tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens of each sentence of each text."""
    ids_T, lengths_D = TextEncoder(tokenizer, "tokenizers").encode(texts)
    ends_D = np.cumsum(lengths_D)
    found = SentenceSplitter(tokenizer)(ids_T, ends_D - lengths_D, ends_D)
    return [part.tolist() for part in np.split(found.tokens_N, np.cumsum(found.counts_P)[:-1])]


def test_a_sentence_has_the_tokens_it_has_alone(byte_level):
    encoder = TextEncoder(byte_level, "tokenizers")
    expected = []
    for sentences in SENTENCES_OF:
        counts = [len(encoder.encode([text])[0]) for text in sentences]
        # white space at the end of a text is no sentence
        if not sentences[-1].strip():
            counts = [*counts[:-2], counts[-2] + counts[-1]]
        expected.append(counts)
    assert split(byte_level, ["".join(sentences) for sentences in SENTENCES_OF]) == expected


def test_a_text_without_tokens_has_no_sentence(byte_level):
    assert split(byte_level, ["", "one.", ""]) == [
        [],
        [len(TextEncoder(byte_level, "tokenizers").encode(["one."])[0])],
        [],
    ]


def test_word_pieces_are_split_without_case_and_spaces(tmp_path):
    words = "it rain ##s . , we paid 3 5 in the u s mr dog ? yes".split()
    path, vocab = word_piece(tmp_path / "wp.json", words)
    text = "It rains. We paid 3.5 in the U.S., Mr. Dog? Yes"
    assert split(path, [text]) == [[4, 16, 1]]


def test_pieces_cut_inside_a_character_keep_every_token(byte_level):
    ids_T, _ = TextEncoder(byte_level, "tokenizers").encode(["\u65e5\u672c\u3002" * 20])
    for at in range(1, len(ids_T)):
        found = SentenceSplitter(byte_level)(ids_T, np.array([0, at]), np.array([at, len(ids_T)]))
        assert found.tokens_N.min() > 0
        assert found.tokens_N[: found.counts_P[0]].sum() == at
        assert found.tokens_N.sum() == len(ids_T)


@pytest.fixture
def text(tmp_path):
    documents = [
        f"A cat sees {i}. The dog runs! Was it quick? {'It was. ' * (i % 7)}" for i in range(80)
    ]
    write_jsonl(tmp_path / "a.jsonl", [*documents, "x"])
    return settings(tmp_path)


def test_prepare_and_index_find_the_same_sentences(tmp_path, text, capsys):
    assert run("prepare", text, "sentences=true", "shard_bytes=2048") == 0
    capsys.readouterr()
    made = {split: tmp_path / "shards/a" / split for split in ("train", "held_out")}
    assert run("verify", tmp_path / "shards") == 0
    card = read_card(made["train"])
    version = importlib.metadata.version("sentencex")
    assert card.sentence_splitter == f"sentencex {version}"
    assert run("prepare", text, "shard_bytes=2048", f"out={tmp_path / 'plain'}") == 0
    for split, folder in made.items():
        plain = tmp_path / "plain/a" / split
        assert (
            not (plain / SENTENCES).exists() and "sentence" not in (plain / "card.json").read_text()
        )
        tokenizer = plain / "tokenizer.json"
        assert run("index", plain, "--tokenizer", tokenizer, "--sentences") == 0
        assert (plain / SENTENCES).read_bytes() == (folder / SENTENCES).read_bytes()
        assert read_card(plain).sentences_sha256 == read_card(folder).sentences_sha256
        said = refused(capsys, "index", plain, "--tokenizer", tokenizer, "--sentences")
        assert "has sentences.bin already" in said
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in [*made["train"].glob("*.mds"), made["train"] / "index.json"]:
        (elsewhere / path.name).write_bytes(path.read_bytes())
    assert (
        run("index", elsewhere, "--tokenizer", text.with_name("tokenizer.json"), "--sentences") == 0
    )
    assert run("verify", elsewhere) == 0
    theirs = read_sentences(elsewhere, read_card(elsewhere)).of(np.arange(card.documents))
    ours = read_sentences(made["train"], card).of(np.arange(card.documents))
    assert np.array_equal(theirs.tokens_N, ours.tokens_N)
    assert np.array_equal(theirs.starts_D1, ours.starts_D1)


def test_a_source_reads_the_sentences_of_the_documents_asked_for(tmp_path, text):
    assert run("prepare", text, "sentences=true") == 0
    folder = tmp_path / "shards/a/train"
    source = open_source(folder, name="a", cache=tmp_path / "cache")
    asked = np.array([5, 0, 7])
    lists = source.sentences_of(asked)
    every = source.sentences_of(np.arange(source.documents))
    for place, document in enumerate(asked.tolist()):
        mine = lists.tokens_N[lists.starts_D1[place] : lists.starts_D1[place + 1]]
        first, end = every.starts_D1[document : document + 2]
        assert mine.tolist() == every.tokens_N[first:end].tolist()
        assert mine.sum() == source.lengths[document] - 2 and len(mine) >= 3


@pytest.mark.parametrize("damage", ["shorter", "other", "moved"])
def test_damaged_sentences_are_told_by_verify(tmp_path, text, capsys, damage):
    assert run("prepare", text, "sentences=true") == 0
    folder = tmp_path / "shards/a/train"
    data = bytearray((folder / SENTENCES).read_bytes())
    if damage == "shorter":
        data = data[:-1]
    if damage == "other":
        data[-1] ^= 1
    if damage == "moved":
        data[-2], data[-4] = data[-4] + 1, data[-2] - 1
    (folder / SENTENCES).write_bytes(bytes(data))
    if damage == "moved":
        card = json.loads((folder / "card.json").read_text())
        card["sentences_sha256"] = hashlib.sha256(bytes(data)).hexdigest()
        (folder / "card.json").write_text(json.dumps(card))
    capsys.readouterr()
    assert run("verify", folder) == 2
    assert SENTENCES in capsys.readouterr().err


def test_shards_without_sentences_say_how_to_make_them(tmp_path, text):
    assert run("prepare", text) == 0
    source = open_source(tmp_path / "shards/a/train", name="a")
    with pytest.raises(ShardError, match="data-prep index .* --sentences"):
        source.sentences_of(np.array([0]))
    assert len(read_lengths(source.path, source.card)) == source.documents


def test_sentences_of_another_language_and_one_that_is_none(tmp_path, capsys):
    """German: `z.B.` and `bzw.` end no sentence. The card says the language; English cards stay as they were."""
    documents = [f"Wir sehen {i} Hunde, z.B. Dackel, bzw. Pudel. Sie bellen." for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", documents)
    text = settings(tmp_path)
    counts = {}
    for language in ("en", "de"):
        out = tmp_path / language
        asked = ["sentences=true", f"sentence_language={language}", f"out={out}"]
        assert run("prepare", text, *asked) == 0
        card = read_card(out / "a/train")
        assert card.sentence_splitter.endswith(", de") == (language == "de")
        counts[language] = read_sentences(out / "a/train", card).count / card.documents
    assert counts["de"] == 2.0 < counts["en"]

    plain = tmp_path / "plain"
    assert run("prepare", text, f"out={plain}") == 0
    asked = [plain / "a/train", "--tokenizer", plain / "a/train/tokenizer.json"]
    capsys.readouterr()
    assert "without --sentences" in refused(capsys, "index", *asked, "--language", "de")
    assert run("index", *asked, "--sentences", "--language", "de") == 0
    ours, theirs = (tmp_path / name / "a/train" / SENTENCES for name in ("plain", "de"))
    assert ours.read_bytes() == theirs.read_bytes()

    said = refused(capsys, "prepare", text, "sentences=true", "sentence_language=deu")
    assert "sentence_language is 'deu'" in said and "Did you mean de?" in said
    assert "without sentences: true" in refused(capsys, "prepare", text, "sentence_language=de")


def test_without_the_library_nothing_is_made(tmp_path, text, capsys, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "pip install sentencex" in refused(capsys, "prepare", text, "sentences=true")
    assert not (tmp_path / "shards").exists()
