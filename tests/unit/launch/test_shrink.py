"""launch/shrink.py: a student of some layers starts with its teacher's weights, and mistakes are one line that leave nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoder.models.bert import BertConfig, DistilBertConfig, RobertaConfig
from encoder.models.catalog import build_model
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, read_stored, write_stored
from encoder.runs.config import read_run
from encoder.runs.initial import weights_sha256
from launch import plan, pretrain, shrink
from tests.helpers.shards import random_documents, write_source, write_tokenizer
from tests.unit.launch.test_bad_input import refused

BERT = BertConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=64,
    sentence_head=True,
)
MODERN = ModernBertConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=7,
    num_attention_heads=2,
    max_position_embeddings=64,
)
RUN = """
name: t
out: {root}/run
init_from: {root}/student
data: {{sources: [{{path: {root}/source}}], row_tokens: 64, window_documents: 16}}
objective: {{name: distill, teacher: {root}/modern}}
phases: {{tokens: 1K, max_tokens_per_document: 64, batch_tokens: 128, lr: 1e-3}}
loader: {{workers: 0}}
"""


@pytest.fixture
def root(tmp_path) -> Path:
    """Two teachers and shards of their tokenizer."""
    write_source(tmp_path / "source", random_documents(20), vocab_size=64)
    for name, config in (("bert", BERT), ("modern", MODERN)):
        stored = StoredModel(
            config=config,
            weights=build_model(config, seed=5).state_dict(),
            origin=name,
            tokenizer_json=tmp_path / "source" / "tokenizer.json",
        )
        write_stored(stored, tmp_path / name)
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    return tmp_path


def test_a_distilbert_has_the_layers_that_were_named_and_no_segments(root, capsys):
    words = [str(root / "bert"), str(root / "out"), "--layers", "0,2,3", "--system", "distilbert"]
    assert shrink.main(words) == 0
    said = capsys.readouterr().out
    old, new = read_stored(root / "bert"), read_stored(root / "out")
    assert type(new.config) is DistilBertConfig and new.config.num_hidden_layers == 3
    assert new.config.type_vocab_size == 0 and not new.config.sentence_head
    assert new.config.attention_output_dropout == 0.0
    # what both families have alike is the teacher's
    assert (new.config.hidden_size, new.config.norm_eps) == (16, BERT.norm_eps)
    for i, source in enumerate((0, 2, 3)):
        for name in (n for n in new.weights if n.startswith(f"model.layers.{i}.")):
            there = name.replace(f"layers.{i}.", f"layers.{source}.")
            assert torch.equal(new.weights[name], old.weights[there]), name
    for name in (n for n in new.weights if "layers" not in n):
        assert torch.equal(new.weights[name], old.weights[name]), name
    for name in ("token_type_embeddings.weight", "pooler.dense.weight", "nsp.bias"):
        assert any(line.startswith("left out:") and name in line for line in said.splitlines())
    assert new.tokenizer_json is not None


def test_a_modernbert_keeps_the_kinds_of_its_layers_and_says_which_change(root, capsys):
    # 0 and 3 are global, as the student's 0 and 3
    kept = [str(root / "modern"), str(root / "out"), "--layers", "0,1,2,3"]
    assert shrink.main(kept) == 0
    assert "global here and local there" not in capsys.readouterr().out
    new, old = read_stored(root / "out"), read_stored(root / "modern")
    assert new.config == replace(MODERN, num_hidden_layers=4)
    # the first layer has no norm of its own before attention
    assert "model.layers.0.attn_norm.weight" not in new.weights
    assert torch.equal(
        new.weights["model.layers.3.mlp.Wi.weight"], old.weights["model.layers.3.mlp.Wi.weight"]
    )
    assert shrink.main([*kept[:2], "--layers", "1,2"]) == 0
    said = capsys.readouterr().out
    assert "or the other way round: 0" in said and "left out: model.layers.1.attn_norm" in said


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("0,7", "layers 0, 7; needed: some of 0 to 6"),
        ("2,1", "layers 2, 1; needed"),
        ("1,1", "layers 1, 1; needed"),
    ],
)
def test_layers_that_are_not_there_are_refused_and_nothing_is_written(root, capsys, layers, said):
    found = refused(capsys, shrink, root / "modern", root / "out", "--layers", layers)
    assert said in found and not (root / "out").exists()


def test_another_family_whose_settings_differ_is_refused(root, capsys):
    words = ("--layers", "0,1", "--system", "distilbert")
    assert "its weights do not fit" in refused(
        capsys, shrink, root / "modern", root / "out", *words
    )
    words = ("--layers", "0,1", "--system", "distill")
    assert "no family" in refused(capsys, shrink, root / "bert", root / "out", *words)


def test_positions_that_begin_elsewhere_are_refused_by_name(root, capsys):
    """RoBERTa's table has two rows before a text's first; DistilBERT's has none."""
    shape = {name: getattr(BERT, name) for name in ("vocab_size", "hidden_size")}
    roberta = RobertaConfig(**shape, num_hidden_layers=2, num_attention_heads=2)
    weights = build_model(roberta, seed=5).state_dict()
    stored = StoredModel(config=roberta, weights=weights, origin="x", tokenizer_json=None)
    write_stored(stored, root / "roberta")
    words = ("--layers", "0", "--system", "distilbert")
    said = refused(capsys, shrink, root / "roberta", root / "out", *words)
    assert "begin at row 2 of its table" in said and "at row 0" in said
    assert not (root / "out").exists()
    assert shrink.main([str(root / "roberta"), str(root / "out"), "--layers", "0"]) == 0


def test_a_student_is_planned_with_its_teacher(root, capsys):
    assert shrink.main([str(root / "modern"), str(root / "student"), "--layers", "0,3"]) == 0
    run = read_run(root / "run.yaml")
    assert run.model == replace(MODERN, num_hidden_layers=2)
    capsys.readouterr()
    assert plan.main([str(root / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert f"teacher     {root}/modern: " in said and "7 layers of 16" in said
    assert ", teacher " in said.split("memory a rank")[1].splitlines()[0]
    assert plan.main([str(root / "run.yaml"), f"objective.teacher={root}/gone"]) == 0
    assert "not there yet" in capsys.readouterr().out


def test_a_teacher_that_does_not_fit_is_one_line_and_nothing_is_begun(root, capsys):
    assert shrink.main([str(root / "modern"), str(root / "student"), "--layers", "0,3"]) == 0
    capsys.readouterr()
    short = replace(MODERN, max_position_embeddings=32)
    small = replace(MODERN, vocab_size=50)
    wide = replace(MODERN, hidden_size=32)
    for name, config in (("short", short), ("small", small), ("wide", wide), ("words", MODERN)):
        tokenizer = root / "source" / "tokenizer.json"
        if name == "words":  # as many, others
            tokenizer = write_tokenizer(root / "words.json", vocab_size=64)
            tokenizer.write_text(tokenizer.read_text().replace('"t7"', '"u7"'))
        weights = build_model(config, seed=5).state_dict()
        stored = StoredModel(config=config, weights=weights, origin=name, tokenizer_json=tokenizer)
        write_stored(stored, root / name)
    told = {
        "short": "reads documents of at most 32 tokens, a phase has 64",
        "small": "has a vocabulary of 50, the shards one of 64",
        "wide": "hidden_size is 16 in the run's model and 32 in the teacher",
        "words": "id 7 is 'u7'",
        "gone": "gone does not exist",
    }
    for name, needed in told.items():
        said = refused(capsys, pretrain, root / "run.yaml", f"objective.teacher={root}/{name}")
        assert needed in said, said
        assert not (root / "run").exists()
    said = refused(capsys, plan, root / "run.yaml", "objective.teacher=s3://bucket/big")
    assert "objective.teacher s3://bucket/big begins with s3" in said


def test_a_source_in_place_of_its_own_copy_is_refused(root, capsys):
    said = refused(capsys, shrink, root / "modern", root / "modern", "--layers", "0,3")
    assert "is the source itself" in said
    assert weights_sha256(read_stored(root / "modern").weights)
