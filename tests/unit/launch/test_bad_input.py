"""Mistakes at the commands: one line, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.base.command import as_user_error
from encoder.base.files import write_json
from encoder.data.shard_format import CARD
from launch import export_hf, fill_mask, import_hf, plan, pretrain, report
from tests.helpers.denied import denied
from tests.helpers.shards import random_documents, write_source

RUN = """
name: t
out: {out}
seed: 1
model: {{system: modernbert, vocab_size: {vocab}, hidden_size: 64, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {source}}}], row_tokens: 64, window_documents: 16}}
objective: {{name: mlm}}
optimizer: {{}}
phases:
  - {{name: a, tokens: 1K, max_tokens_per_document: 64, batch_tokens: {batch}, model: {{global_rope_theta: 10000}},
     lr: {{schedule: constant, peak: 1e-3}}}}
checkpoints: {{every_tokens: 1K}}
loader: {{workers: 0}}
"""


@pytest.fixture
def source(tmp_path) -> Path:
    return write_source(tmp_path / "shards" / "s" / "train", random_documents(20), vocab_size=64)


def run_file(tmp_path: Path, source: Path, *, vocab: int = 64, batch: int = 128) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(out=tmp_path / "run", source=source, vocab=vocab, batch=batch))
    return path


def refused(capsys, command, *words: object) -> str:
    """Runs a command that must refuse; returns its one line."""
    assert command.main([str(w) for w in words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize(
    "command, words, said",
    [
        (
            pretrain,
            ["run.yaml", "--engine.zero_stage=2"],
            (
                "--engine.zero_stage is unknown. Settings are given without dashes:"
                " engine.zero_stage=2. See"
            ),
        ),
        (pretrain, [], "the following arguments are required: RUN.yaml. See"),
        (plan, ["run.yaml", "--rank", "2"], "--rank is unknown. Did you mean --ranks? See"),
        (
            plan,
            ["run.yaml", "--ranks", "two"],
            "argument --ranks: 'two'; needed: a whole number of at least 1. See",
        ),
        (report, ["a", "--fast"], "--fast is unknown. Known: -h, --help, --out. See"),
        (export_hf, ["a"], "the following arguments are required: OUT. See"),
    ],
)
def test_a_wrong_option_is_one_line_and_names_its_neighbour(command, words, said, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(words)
    line = capsys.readouterr().err
    assert (
        left.value.code == 2
        and line.startswith(f"error: {said} ")
        and line.endswith(" --help.\n")
        and line.count("\n") == 1
    )


def test_a_missing_run_file_names_its_neighbour(tmp_path, source, capsys):
    run_file(tmp_path, source)
    assert "Did you mean run.yaml?" in refused(capsys, pretrain, tmp_path / "rum.yaml")
    assert "Did you mean run.yaml?" in refused(capsys, plan, tmp_path / "rum.yaml")


def test_a_folder_without_shards_is_told_from_a_folder_above_them(tmp_path, source, capsys):
    (tmp_path / "empty").mkdir()
    said = refused(capsys, pretrain, run_file(tmp_path, tmp_path / "empty"))
    assert "holds no shards" in said and "data-prep prepare" in said
    assert f"Did you mean {source}?" in refused(capsys, pretrain, run_file(tmp_path, source.parent))
    assert "does not exist" in refused(capsys, pretrain, run_file(tmp_path, tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit_the_card(tmp_path, source, capsys):
    said = refused(capsys, pretrain, run_file(tmp_path, source, vocab=32))
    assert "64" in said and "32" in said and not (tmp_path / "run").exists()


def test_cuda_graphs_on_a_cpu(tmp_path, source, capsys):
    said = refused(
        capsys, pretrain, run_file(tmp_path, source), "device=cpu", "engine.graphs=micro_step"
    )
    assert (
        "engine.graphs is micro_step and the device a CPU" in said
        and not (tmp_path / "run").exists()
    )


def test_a_damaged_card(tmp_path, source, capsys):
    (source / CARD).write_text("{ no json")
    assert "cannot be read" in refused(capsys, pretrain, run_file(tmp_path, source))
    write_json(source / CARD, {"format": 2, "source": "x"})
    assert "missing" in refused(capsys, pretrain, run_file(tmp_path, source))


def test_a_cut_or_missing_shard_is_found_before_anything_is_written(tmp_path, source, capsys):
    shard = sorted(source.glob("*.mds"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} has" in refused(capsys, pretrain, run_file(tmp_path, source))
    shard.unlink()
    assert f"{shard} is missing" in refused(capsys, pretrain, run_file(tmp_path, source))
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_a_file(tmp_path, source, capsys):
    (tmp_path / "run").write_text("mine")
    refused(capsys, pretrain, run_file(tmp_path, source))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_misspelt_key_and_a_batch_that_is_no_whole_number_of_rows(tmp_path, source, capsys):
    said = refused(capsys, pretrain, run_file(tmp_path, source), "data.row_token=64")
    assert "data.row_token is unknown. Did you mean row_tokens?" in said
    assert "is not a whole number of rows of 64. Nearest: 64, 128" in refused(
        capsys, pretrain, run_file(tmp_path, source, batch=100)
    )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_run_names_the_setting_that_changed(tmp_path, source, capsys):
    from encoder.base.schema import to_yaml
    from encoder.runs.config import read_run

    path = run_file(tmp_path, source)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").write_text(to_yaml(read_run(path)))
    said = refused(capsys, pretrain, path, "model.hidden_size=128", "model.num_attention_heads=2")
    assert (
        "model.hidden_size was 64, now 128 (also model.num_attention_heads)" in said
        and "out=ANOTHER_FOLDER" in said
    )


def test_the_other_commands_refuse_what_is_not_there(tmp_path, source, capsys):
    assert "does not exist" in refused(capsys, export_hf, tmp_path / "no", tmp_path / "hf")
    (tmp_path / "run").mkdir()
    assert "is empty; needed: a run folder" in refused(
        capsys, export_hf, tmp_path / "run", tmp_path / "hf"
    )
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert "holds no checkpoint yet" in refused(
        capsys, export_hf, tmp_path / "begun", tmp_path / "hf"
    )
    assert "has begun" in refused(capsys, report, tmp_path / "run")
    assert "no config.json" in refused(capsys, fill_mask, tmp_path / "run", "a [MASK]")


def test_an_import_that_cannot_be_leaves_no_folder(tmp_path, capsys):
    out, bert = tmp_path / "weights", tmp_path / "bert"
    bert.mkdir()
    write_json(bert / "config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    assert "is of a GPT2LMHeadModel; needed: ModernBertForMaskedLM" in refused(
        capsys, import_hf, bert, out
    )
    assert "is of a GPT2LMHeadModel" in refused(capsys, export_hf, bert, tmp_path / "hf")
    assert "--heads has no effect on a folder" in refused(
        capsys, import_hf, bert, out, "--heads", 2
    )
    assert "has no config.json" in refused(capsys, import_hf, tmp_path, out)
    assert "does not exist" in refused(capsys, import_hf, tmp_path / "no.pt", out)
    (tmp_path / "a.pt").write_text("text")
    assert "a.pt cannot be read" in refused(capsys, import_hf, tmp_path / "a.pt", out)
    assert "a.pt cannot be read" in refused(
        capsys, import_hf, tmp_path / "a.pt", out, "--global-rope-theta", 1e4
    )
    write_json(bert / "config.json", {"model_type": "modernbert", "local_rope_theta": -1})
    assert "local_rope_theta is -1; needed: above 0" in refused(capsys, import_hf, bert, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "bert"]


def test_an_import_takes_a_flexbert_file_with_a_tokenizer(tmp_path, capsys):
    import torch

    from encoder.models.stored import read_stored
    from tests.helpers.hf import stored, write_tokenizer_json
    from tests.unit.models.test_hf_import import flexbert

    torch.save(flexbert(stored().weights), tmp_path / "a.pt")
    words = [
        tmp_path / "a.pt",
        tmp_path / "weights",
        "--global-rope-theta",
        1e4,
        "--heads",
        2,
        "--tokenizer",
    ]
    assert "cannot be used as a tokenizer.json" in refused(
        capsys, import_hf, *words, tmp_path / "a.pt"
    )
    assert not (tmp_path / "weights").exists()
    assert (
        import_hf.main(
            [str(w) for w in (*words, write_tokenizer_json(tmp_path / "tokenizer.json"))]
        )
        == 0
    )
    assert (
        "4 layers of 32, 2 heads, vocabulary 280, RoPE theta 10,000, of local layers 10,000"
        in capsys.readouterr().out
    )
    assert read_stored(tmp_path / "weights").tokenizer_json is not None
    assert "is not empty and holds no origin.json" in refused(
        capsys, import_hf, tmp_path / "a.pt", tmp_path, "--global-rope-theta", 1e4, "--heads", 2
    )


def test_an_input_without_rights_is_told_apart_from_a_place_to_write(tmp_path, monkeypatch):
    path = tmp_path / "lab.csv"
    path.write_text("text\nx\n")
    denied(monkeypatch, path)
    said = str(as_user_error(PermissionError(13, "Permission denied", str(path))))
    assert said.startswith(f"{path}: Permission denied. Needed: rights to read it.")
    absent = PermissionError(13, "Permission denied", str(tmp_path / "new.yaml"))
    assert "can be read and written" in str(as_user_error(absent))
