"""Embedding training: numbers are those of formulas and of sentence-transformers, mistakes are one line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from encoder.base.errors import ConfigError, UserError
from encoder.base.schema import from_mapping, to_plain
from encoder.tools.embedding.config import EmbedConfig, NegativesConfig, read_embed
from encoder.tools.embedding.folder import write_folder
from encoder.tools.embedding.lexical import tfidf_scores
from encoder.tools.embedding.negatives import mine
from encoder.tools.embedding.ranking import measure, rank
from encoder.tools.embedding.retrieval import hashes_of, read_corpus, read_pairs, read_questions
from encoder.tools.embedding.train import start_hashes
from launch import embed
from tests.helpers.installed import needs
from tests.helpers.pages import write_page_folder
from tests.helpers.tasks import write_rows

needs("sentence_transformers", "accelerate", "pytrec_eval", extra="embed")
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "embed"
WORDS = ("ada", "bob", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")


def write_beir(folder: Path) -> Path:
    """Ten passages, and questions that name one of them: six to train on, four to test."""
    write_rows(
        folder / "corpus.jsonl",
        [
            {"_id": f"p{n}", "title": word, "text": f"of {word} here"}
            for n, word in enumerate(WORDS)
        ],
    )
    write_rows(
        folder / "queries.jsonl",
        [{"_id": f"q{n}", "text": f"{word}?"} for n, word in enumerate(WORDS)],
    )
    (folder / "qrels").mkdir()
    head = "query-id\tcorpus-id\tscore\n"
    for split, numbers in (("train", range(6)), ("test", range(6, 10))):
        rows = "".join(f"q{n}\tp{n}\t1\n" for n in numbers)
        (folder / "qrels" / f"{split}.tsv").write_text(head + rows)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command changes its process's own; tests that follow have theirs again."""
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", ""))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    write_beir(tmp_path / "data")
    write_page_folder(tmp_path / "start", "BertForMaskedLM")
    (tmp_path / "embed.yaml").write_text(
        f"""
name: letters
out: {tmp_path}/out
start_from: {tmp_path}/start
data: {{beir: {tmp_path}/data, max_tokens: 20, negatives: {{mine: tfidf}}}}
loss: {{mini_batch_examples: 2, matryoshka: [8]}}
prompts: {{query: "q: "}}
batch_examples: 3
epochs: 2
lr: 1.0e-3
device: cpu
"""
    )
    return tmp_path


def test_measures_are_those_of_the_formulas():
    # the answer of the first question is third, of the second eleventh, of the third first
    score_QD = np.zeros((3, 12))
    score_QD[0, [4, 5, 0]] = [3, 2, 1]
    score_QD[1] = -np.arange(12)
    score_QD[1, 0] = -10.5
    score_QD[2, 0] = 1
    answers = [{0: 1}, {0: 1}, {0: 1}]
    found = measure(rank(lambda a, b: score_QD[a:b], answers), answers)
    assert found["ndcg_at_10"] == pytest.approx((1 / math.log2(4) + 0 + 1) / 3)
    assert found["mrr_at_10"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert [found[f"recall_at_{k}"] for k in (1, 10, 100)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_of_equal_scores_the_wrong_passage_comes_first_and_ties_are_counted():
    score_QD = np.array([[0.5, 0.5 + 1e-9, 0.1], [0.9, 0.5, 0.5]])
    answers = [{0: 1}, {0: 1}]
    ranked = rank(lambda a, b: score_QD[a:b], answers)
    assert ranked.passages == [[1, 0, 2], [0, 1, 2]] and ranked.tied == 1
    assert measure(ranked, answers)["mrr_at_10"] == (1 / 2 + 1) / 2


def test_without_ties_the_numbers_are_those_of_their_evaluator(place):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    from encoder.tools.embedding.train import evaluate_embedding

    overrides = ["data.test=train", "tfidf=false", "prompts={}"]
    found = evaluate_embedding(read_embed(place / "embed.yaml", overrides), say=lambda line: None)
    corpus = read_corpus(place / "data")
    questions = read_questions(place / "data", "train", corpus)
    model = SentenceTransformer(str(place / "start"), device="cpu")
    model.max_seq_length = 20
    theirs = InformationRetrievalEvaluator(
        dict(zip(questions.ids, questions.texts)),
        dict(zip(corpus.ids, corpus.texts)),
        {q: {corpus.ids[d] for d in right} for q, right in zip(questions.ids, questions.answers)},
        write_csv=False,
    )(model)
    assert found["start_ties"] == 0
    for ours, name in (
        ("ndcg_at_10", "ndcg@10"),
        ("mrr_at_10", "mrr@10"),
        ("recall_at_1", "recall@1"),
    ):
        assert found["start"][ours] == pytest.approx(theirs[f"cosine_{name}"])


def test_a_negative_is_near_and_no_answer_and_not_too_near():
    # of answer 0 (score 1.0): passage 1 may be an answer itself, 2 is one, 3 is the nearest that is none
    row_D = np.array([1.0, 0.97, 0.9, 0.8, 0.7, 0.1])
    settings = NegativesConfig(mine="model", per_query=2, depth=6)
    score = lambda a, b: row_D[None]  # noqa: E731
    assert mine(score, [{0: 1, 2: 1}], [(0, 0)], settings, seed=1) == [[3, 4]]
    # where the ranking has too few, any passage that is no answer
    settings = NegativesConfig(mine="model", per_query=2, depth=4)
    ((first, second),) = mine(score, [{0: 1, 2: 1}], [(0, 0)], settings, seed=1)
    assert first == 3 and second in (1, 4, 5)


def test_tfidf_finds_the_passage_with_the_rare_word():
    passages = ["the cat of the house", "the dog of the house", "the house"]
    score_QD = tfidf_scores(["the dog"], passages)(0, 1)
    assert score_QD.shape == (1, 3) and score_QD[0].argmax() == 1


def test_a_folder_is_trained_twice_alike_and_reads_back(place, capsys):
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer

    assert embed.main([str(place / "embed.yaml"), "--json", str(place / "first.json")]) == 0
    said = capsys.readouterr().out
    assert "tf-idf  ndcg@10 1.0000" in said and "of the first 8 dimensions" in said
    first = json.loads((place / "out" / "result.json").read_text())
    assert first["steps"] == 4 and first["pairs"] == 6 and first["after_at_8"]
    assert first["losses"][0]["loss"] > 0 and first["read_back_difference"] < 1e-5
    # by names that every version of sentence-transformers reads
    types = [m["type"] for m in json.loads((place / "out" / "modules.json").read_text())]
    assert types == [f"sentence_transformers.models.{n}" for n in ("Transformer", "Pooling")]
    model = SentenceTransformer(str(place / "out"), device="cpu")
    assert model.prompts["query"] == "q: " and model.max_seq_length == 20
    card = (place / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "| after | ndcg" in card

    # a second time: said, and nothing trained
    assert embed.main([str(place / "embed.yaml")]) == 0
    assert "done already" in capsys.readouterr().out
    assert embed.main([str(place / "embed.yaml"), "seed=3"]) == 2
    assert "settings.seed is 17 there, 3 here" in capsys.readouterr().err
    # elsewhere: the same weights, and others than at the start
    assert embed.main([str(place / "embed.yaml"), f"out={place}/again"]) == 0
    one, two = (load_file(place / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = load_file(place / "start" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(one[name], start[f"bert.{name}"])


def test_a_sparse_model_has_a_weight_for_each_token(place, capsys):
    from sentence_transformers import SparseEncoder

    words = ["kind=sparse", "loss={mini_batch_examples: 2}", f"out={place}/splade", "epochs=1"]
    assert embed.main([str(place / "embed.yaml"), *words]) == 0
    types = [m["type"] for m in json.loads((place / "splade" / "modules.json").read_text())]
    assert all(t.startswith("sentence_transformers.sparse_encoder.models.") for t in types)
    x_1V = SparseEncoder(str(place / "splade"), device="cpu").encode(["ada"])
    assert x_1V.shape == (1, 280)


def test_a_start_is_measured_as_it_is_and_the_trained_folder_has_a_tab(place, capsys):
    from encoder.tools.page.folders import open_folder
    from encoder.tools.page.similarity import similarity

    words = [str(place / "embed.yaml"), "--evaluate-only", "--json", str(place / "start.json")]
    assert embed.main(words) == 0
    assert "start   ndcg@10" in capsys.readouterr().out and not (place / "out").exists()
    found = json.loads((place / "start.json").read_text())
    assert embed.main([str(place / "embed.yaml")]) == 0
    trained = json.loads((place / "out" / "result.json").read_text())
    assert trained["before"] == found["start"] and trained["tfidf"] == found["tfidf"]
    opened = open_folder(place / "out")
    assert opened.sentence_transformers and len(similarity(opened, "ada\nbob").cosines) == 2


def test_a_model_trained_in_bf16_is_written_and_reads_back_in_fp32(place):
    words = ["precision=bf16", "epochs=1", "tfidf=false", f"out={place}/half"]
    assert embed.main([str(place / "embed.yaml"), *words]) == 0
    result = json.loads((place / "half" / "result.json").read_text())
    assert result["read_back_difference"] < 1e-5


def test_pairs_of_a_file_are_trained_on_without_an_evaluation(place, capsys, monkeypatch):
    # as a run of this process or a launcher of one rank leaves it; accelerate looks once a process
    for word, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(word, value)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    rows = [{"anchor": f"{w}?", "positive": f"of {w}", "negative": "of no one"} for w in WORDS]
    write_rows(place / "pairs.jsonl", rows)
    words = [f"data={{pairs: {place}/pairs.jsonl}}", f"out={place}/of_pairs", "epochs=1"]
    assert embed.main([str(place / "embed.yaml"), *words]) == 0
    result = json.loads((place / "of_pairs" / "result.json").read_text())
    assert result["pairs"] == 10 and "after" not in result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start_from=nowhere"], "start_from nowhere is no folder"),
        (["batch_examples=7"], "there are 6 pairs and batch_examples is 7. Lower it"),
        (["data.max_tokens=99"], "data.max_tokens 99 is more than the model's 40"),
        (["loss.matryoshka=[64]"], "loss.matryoshka has 64, more than the model's 16"),
        (["data.train=dev"], "dev.tsv does not exist"),
        (["data.pairs=x.jsonl"], "data.negatives.mine needs the corpus"),
        (["kind=sparse"], "kind sparse has one dimension a token"),
        (["lr.peek=1"], "Did you mean"),
        (["data={}"], "data has no beir and no pairs"),
        (["pooling=max"], "pooling"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(place, capsys, words, said):
    assert embed.main([str(place / "embed.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("corpus.jsonl", '{"_id": "p0", "text": "a"}\n', r"line 2: the id 'p0' stands twice"),
        ("queries.jsonl", '{"_id": "q99", "text": " "}\n', r"text is empty"),
        ("qrels/train.tsv", "q0\tp77\t1\n", r"train.tsv line 8: corpus.jsonl has no 'p77'"),
        ("qrels/train.tsv", "q77\tp0\t1\n", r"queries.jsonl has no 'q77'"),
        ("qrels/train.tsv", "q0\tp0\tyes\n", r"score is 'yes'; needed: a whole number"),
    ],
)
def test_a_row_that_does_not_fit_is_named(place, file, text, said):
    path = place / "data" / file
    whole = path.read_text()
    path.write_text(f"{text}{whole}" if file == "corpus.jsonl" else f"{whole}{text}")
    with pytest.raises(UserError, match=said):
        read_questions(place / "data", "train", read_corpus(place / "data"))


def test_negatives_are_read_from_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"anchor": ["a?", "b?"], "positive": ["a", "b"], "negative": ["c", "d"]}
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values())]
    write_rows(tmp_path / "p.jsonl", rows)
    lines = (tmp_path / "p.jsonl").read_text()
    (tmp_path / "blank.jsonl").write_text(f"\n{lines}")
    csv_lines = "\n".join(",".join(row.values()) for row in rows)
    (tmp_path / "p.csv").write_text(f"{','.join(columns)}\n{csv_lines}\n")
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    for name in ("p.jsonl", "blank.jsonl", "p.csv", "p.parquet"):
        assert read_pairs(tmp_path / name).columns == columns
    # several of a row, by number
    more = [{**row, "negative_10": "x", "negative_2": "y"} for row in rows]
    write_rows(tmp_path / "more.jsonl", more)
    found = read_pairs(tmp_path / "more.jsonl").columns
    assert [*found] == ["anchor", "positive", "negative", "negative_2", "negative_10"]
    # a text that says the word is no column
    write_rows(tmp_path / "none.jsonl", [{"anchor": 'a "negative"', "positive": "b"}])
    assert [*read_pairs(tmp_path / "none.jsonl").columns] == ["anchor", "positive"]


@pytest.mark.parametrize("lacking", [0, 1])
def test_negatives_of_some_rows_alone_are_refused(tmp_path, lacking):
    rows = [{"anchor": "a?", "positive": "a", "negative": "c"} for _ in range(2)]
    del rows[lacking]["negative"]
    write_rows(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=f"line {lacking + 1} has no negative, and other rows"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_title_is_read_from_each_row_that_has_one(tmp_path):
    rows = [{"_id": "p0", "text": "a"}, {"_id": "p1", "title": "T", "text": "b"}]
    write_rows(tmp_path / "corpus.jsonl", rows)
    assert read_corpus(tmp_path).texts == ["a", "T b"]


def test_prompts_that_are_left_out_are_those_of_the_start(place):
    from sentence_transformers import SentenceTransformer

    from encoder.tools.embedding.models import open_start

    theirs = SentenceTransformer(
        str(place / "start"), device="cpu", prompts={"query": "ask: ", "document": "say: "}
    )
    theirs.save_pretrained(str(place / "st"))
    for words, expected in (
        (["prompts={}"], {"query": "ask: ", "document": "say: "}),
        (["prompts={}", "pooling=cls"], {"query": "ask: ", "document": "say: "}),
        (['prompts={query: ""}'], {"query": "", "document": "say: "}),
        (["prompts={query: 'q: '}"], {"query": "q: ", "document": "say: "}),
    ):
        settings = read_embed(place / "embed.yaml", words)
        assert open_start(place / "st", settings).prompts == expected
    # written with the trained folder
    words = ["prompts={}", f"start_from={place}/st", "epochs=1", "tfidf=false"]
    assert embed.main([str(place / "embed.yaml"), *words]) == 0
    said = json.loads((place / "out" / "config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "ask: ", "document": "say: "}


def test_a_text_without_a_name_gets_the_default_prompt(place, tmp_path):
    from sentence_transformers import SentenceTransformer

    from encoder.tools.embedding.models import open_start

    theirs = SentenceTransformer(
        str(place / "start"),
        device="cpu",
        prompts={"query": "ask: ", "own": "I: "},
        default_prompt_name="own",
    )
    theirs.save_pretrained(str(tmp_path / "st"))
    for words, expected in (
        ([], "own"),
        (["pooling=cls"], "own"),
        (["prompts.default=none"], None),
        (["prompts.default=document"], "document"),
    ):
        settings = read_embed(place / "embed.yaml", words)
        assert open_start(tmp_path / "st", settings).default_prompt_name == expected

    settings = read_embed(
        place / "embed.yaml", ["prompts={query: 'q: ', default: query}", f"out={tmp_path}/out"]
    )
    model = open_start(place / "start", settings)
    write_folder(model, settings, {"pairs": 1, "steps": 1})
    ours = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert ours.default_prompt_name == "query"
    plain, named, bare = (
        ours.encode("a text", **more)
        for more in ({}, {"prompt": "q: "}, {"prompt_name": "document"})
    )
    np.testing.assert_array_equal(plain, named)
    assert np.abs(plain - bare).max() > 1e-4


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "1_Pooling/config.json", "model.safetensors"]
)
def test_another_file_of_the_start_is_another_training(place, name):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(place / "start"), device="cpu").save_pretrained(str(place / "st"))
    first = start_hashes(place / "st")
    path = place / "st" / name
    path.write_bytes(path.read_bytes() + b" ")
    changed = start_hashes(place / "st")
    assert {key for key in first if first[key] != changed[key]} == {f"start/{name}"}


def test_data_are_known_by_what_they_are_for(place):
    pairs = place / "corpus.jsonl"
    write_rows(pairs, [{"anchor": "a", "positive": "b"}])
    found = hashes_of(str(place / "data"), str(pairs), ("test",))
    assert [*found] == ["corpus", "queries", "qrels/test", "pairs"]


def test_several_gpus_are_refused(place, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert embed.main([str(place / "embed.yaml"), "device=auto"]) == 2
    error = capsys.readouterr().err
    assert "torch sees 2 GPUs" in error and "CUDA_VISIBLE_DEVICES=0" in error
    assert error.count("\n") == 1 and not (place / "out").exists()


def test_several_ranks_are_refused(place, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert embed.main([str(place / "embed.yaml")]) == 2
    assert "runs on one rank" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_settings_file_says_the_same_when_it_is_written_again(path):
    settings = read_embed(path)
    assert from_mapping(EmbedConfig, to_plain(settings)) == settings
    assert settings.out == f"hf/{settings.name}"


def test_the_rate_alone_is_its_peak(place):
    assert read_embed(place / "embed.yaml").lr.peak == 1e-3
    assert read_embed(place / "embed.yaml", ["lr=2e-3"]).lr.peak == 2e-3
    with pytest.raises(ConfigError, match="lr: peak -1"):
        read_embed(place / "embed.yaml", ["lr=-1"])
