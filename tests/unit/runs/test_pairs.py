"""Pairs that cannot be: one line, exit code 2, nothing half-written; and what a run of pairs fills in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from encoder.data.windows import pieces_of
from encoder.runs.config import read_run
from encoder.runs.filling import fill_rows, stored_lengths
from encoder.tools.plan.work import phase_work
from launch import plan, pretrain
from tests.helpers.memory_source import sentences_of
from tests.helpers.shards import random_documents, write_sentences, write_source

RUN = """
name: t
out: {root}/run
data: [{{path: {root}/a/train}}]
model: {{system: bert, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 1,
        max_position_embeddings: 64}}
objective: {{name: mlm_nsp}}
phases: {{tokens: 1K, max_tokens_per_document: 32, batch_tokens: 128, lr: 1e-3}}
loader: {{workers: 0}}
"""
SHARED = (
    "model={system: albert, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,"
    " num_attention_heads: 1, max_position_embeddings: 64, %s}"
)
# a table of positions that is too short for a document
ROBERTA = (
    "model={system: roberta, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,"
    " num_attention_heads: 1, max_position_embeddings: 31}"
)
DOCUMENTS = random_documents(40, longest=60)


@pytest.fixture
def run_file(tmp_path) -> Path:
    for split in ("train", "held_out"):
        write_source(tmp_path / "a" / split, DOCUMENTS, split=split)
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    return tmp_path / "run.yaml"


def with_sentences(run_file: Path, lengths=None) -> None:
    for split in ("train", "held_out"):
        found = lengths or sentences_of([len(ids) for ids in DOCUMENTS])
        write_sentences(run_file.parent / "a" / split, found)


def refused(capsys, command, *words: object) -> str:
    assert command.main([str(w) for w in words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize("command", [plan, pretrain])
def test_shards_without_sentences_are_refused_and_told_how(run_file, capsys, command):
    said = refused(capsys, command, run_file)
    folder = run_file.parent / "a/train"
    assert f"data-prep index {folder} --tokenizer {folder}/tokenizer.json --sentences" in said
    assert not (run_file.parent / "run").exists()


def test_blocks_of_sentences_need_shards_with_sentences(run_file, capsys):
    """One line for the shards without them; `anywhere` asks for none."""
    joined = [run_file, "objective={name: mlm}", "data.join=sentences"]
    said = refused(capsys, pretrain, *joined)
    assert "which data.join sentences needs" in said and "--sentences." in said
    assert not (run_file.parent / "run").exists()
    assert (
        plan.main([str(word) for word in [*joined[:2], "data.join=anywhere", "evaluation="]]) == 0
    )
    assert "of blocks of running text" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["mlm_nsp", "mlm_sop"])
def test_documents_of_one_sentence_are_refused(run_file, capsys, objective):
    with_sentences(run_file, [[len(ids) - 2] for ids in DOCUMENTS])
    said = refused(capsys, pretrain, run_file, f"objective.name={objective}")
    assert "no document of" in said and "has two sentences" in said
    assert not (run_file.parent / "run").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (["model.type_vocab_size=0"], "model.type_vocab_size is 0; this objective needs 2"),
        (["model.sentence_head=false"], "model.sentence_head is false; this objective needs true"),
        (
            ["model={system: modernbert, hidden_size: 64, num_attention_heads: 1}"],
            "needs a model with sentence_head",
        ),
        (["phases.0.max_tokens_per_document=4"], "no room for two sentences; needed: at least 5"),
        (["objective.short_share=2"], "short_share 2.0 must lie between 0 and 1"),
        ([SHARED % "embedding_size: 0"], "embedding_size is 0; needed: at least 1"),
        ([SHARED % "num_hidden_groups: 2"], "num_hidden_groups is 2; needed: 1 to num_hidden_lay"),
        ([SHARED % "embedding_sise: 8"], "embedding_size"),
        (["data.join=anywhere"], "data.join anywhere and an objective of pairs"),
        (
            ["objective={name: mlm}", ROBERTA, "phases.0.max_tokens_per_document=32"],
            "max_tokens_per_document 32 is above model.max_position_embeddings 31",
        ),
    ],
)
def test_a_model_or_phase_without_room_for_pairs_is_refused(run_file, capsys, settings, words):
    with_sentences(run_file)
    assert words in refused(capsys, pretrain, run_file, *settings)
    assert not (run_file.parent / "run").exists()


def test_a_damaged_sentence_file_is_refused(run_file, capsys):
    with_sentences(run_file)
    path = run_file.parent / "a/train/sentences.bin"
    path.write_bytes(path.read_bytes()[:-2])
    said = refused(capsys, pretrain, run_file)
    assert f"{path} has" in said and not (run_file.parent / "run").exists()


def test_the_plan_packs_pairs_and_the_model_gets_a_sentence_head(run_file):
    with_sentences(run_file)
    run = read_run(run_file)
    assert run.model.sentence_head and run.model.type_vocab_size == 2
    assert any(d.key == "model.sentence_head" for d in run.derived)
    filling = fill_rows(run, run.phases[0])
    assert filling.fill > 0.8
    plain = fill_rows(read_run(run_file, ["objective={name: mlm}"]), run.phases[0])
    assert len(filling.pieces_R) and len(plain.pieces_R)


def test_the_plan_counts_the_pooler_and_the_sentence_head(run_file):
    """Of each pair 3 x 2 (16 x 16 + 16 x 2), over the tokens of the phase."""
    with_sentences(run_file)
    run = read_run(run_file)
    work = phase_work(run, run.phases[0])
    assert not work.unknown
    lengths = pieces_of(
        [stored_lengths(run_file.parent / "a/train")],
        [np.arange(len(DOCUMENTS))],
        max_tokens=32,
        pairs=run.objective.pairs,
        chance=np.random.default_rng(0),
    ).tokens_D
    tokens = int(lengths.sum())
    masked = {"mlm": run.objective.mask_share * tokens}
    body = run.model.train_flops(lengths=lengths, targets=masked)
    heads = len(lengths) * 3 * 2 * (16 * 16 + 16 * 2)
    assert work.flops == pytest.approx((body + heads) / tokens * 1000, rel=1e-12)
