"""launch/grow.py and init_from: what is written can be trained on, and mistakes are one line that leave nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from encoder.base.schema import read_mapping
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.models.stored import StoredModel, read_stored, read_stored_config, write_stored
from encoder.runs.config import read_run
from encoder.runs.defaults import initializer_range_of
from encoder.runs.initial import read_fitting, weights_sha256
from encoder.runs.vocabulary import edits_of
from encoder.tools.weights.grow import new_config
from launch import average, grow, plan, pretrain, shrink
from tests.helpers.shards import random_documents, write_source, write_tokenizer
from tests.unit.launch.test_bad_input import refused

SMALL = ModernBertConfig(
    vocab_size=64,
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    num_hidden_layers=4,
    max_position_embeddings=64,
)
LARGE = replace(
    SMALL, hidden_size=32, num_attention_heads=4, intermediate_size=40, num_hidden_layers=7
)
RUN = """
name: t
out: {root}/run
seed: 1
init_from: {root}/grown
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 40, num_hidden_layers: 7,
        num_attention_heads: 4, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/source}}], row_tokens: 64, window_documents: 16}}
objective: {{name: mlm}}
optimizer: {{}}
phases: [{{name: a, tokens: 1K, max_tokens_per_document: 64, batch_tokens: 128, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 1K}}
loader: {{workers: 0}}
"""


@pytest.fixture
def root(tmp_path) -> Path:
    """A small model, shards of its tokenizer, and the run file of a larger one."""
    write_source(tmp_path / "source", random_documents(20), vocab_size=64)
    write_stored(
        StoredModel(
            config=SMALL,
            weights=ModernBertForMaskedLM(SMALL, seed=5).state_dict(),
            origin="small",
            tokenizer_json=tmp_path / "source" / "tokenizer.json",
        ),
        tmp_path / "small",
    )
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_model_to_be_is_a_run_files_a_presets_or_the_sources_with_settings_put_over(
    root, capsys
):
    sizes = [
        "hidden_size=32",
        "num_attention_heads=4",
        "intermediate_size=40",
        "num_hidden_layers=7",
    ]
    assert grow.main([str(root / "small"), str(root / "by_settings"), *sizes]) == 0
    said = capsys.readouterr().out
    assert (
        "hidden_size                  16 -> 32" in said
        and "source         0   1   1   2   2   3   3" in said
    )
    assert "not inherited" not in said
    assert (
        grow.main([str(root / "small"), str(root / "by_run"), "--run", str(root / "run.yaml")]) == 0
    )
    by_settings, by_run = (read_stored(root / name) for name in ("by_settings", "by_run"))
    assert by_settings.config == LARGE
    assert by_run.config == replace(
        LARGE, initializer_range=initializer_range_of(LARGE.hidden_size)
    )
    assert weights_sha256(by_settings.weights) == weights_sha256(by_run.weights)
    assert (
        by_run.origin
        == "grown (mode middle, layer_map modernbert, final_norm copy, seed 0) from small"
    )
    assert (root / "by_run" / "tokenizer.json").read_bytes() == (
        root / "small" / "tokenizer.json"
    ).read_bytes()
    assert "vocab_size is 64 in the source and 50368" in refused(
        capsys,
        grow,
        root / "small",
        root / "out",
        "--preset",
        "modernbert_large",
        "attention_head_width=8",
    )


def test_a_preset_leaves_thetas_window_and_kinds_of_layers_as_the_source_has_them():
    old = ModernBertConfig(
        global_rope_theta=160000.0,
        local_rope_theta=20000.0,
        window_radius_tokens=32,
        global_attn_every_n_layers=2,
        norm_eps=1e-6,
        max_position_embeddings=1024,
    )
    new = new_config(
        old, preset="modernbert_large", run=None, overrides=["window_radius_tokens=16"]
    )
    assert new == replace(
        old,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=2624,
        num_hidden_layers=28,
        window_radius_tokens=16,
    )


def test_the_words_of_the_command_reach_the_growth(root, capsys):
    words = ["--mode", "centre", "--layer-map", "same_kind", "--final-norm", "ones", "--seed", "3"]
    assert (
        grow.main([str(root / "small"), str(root / "out"), "--run", str(root / "run.yaml"), *words])
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "not inherited: model.final_norm.weight" in said
        and "source         0   1   1   3   2   2   3" in said
    )
    assert (
        read_stored(root / "out").origin
        == "grown (mode centre, layer_map same_kind, final_norm ones, seed 3) from small"
    )


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (grow, ["a", "b", "seed=1"]),
        (shrink, ["a", "b", "--layers", "0,1"]),
        (average, ["a", "b", "--out", "out"]),
    ],
    ids=["grow", "shrink", "average"],
)
def test_links_that_lead_in_a_circle_are_one_line(tmp_path, monkeypatch, capsys, verb, words):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refused(capsys, verb, *words)


def test_what_cannot_grow_is_refused_and_leaves_nothing(root, capsys):
    before = names_in(root)
    out = root / "out"
    for words, said in (
        (["num_attention_heads=5", "hidden_size=40"], "shifts by 1.5 of them (8 features each"),
        (["vocab_size=65"], "vocab_size is 64 in the source and 65"),
        (["hiden_size=32"], "model.hiden_size is unknown. Did you mean hidden_size?"),
        (["hidden_size"], "has no '='"),
        (["--preset", "modernbert_larg"], "Did you mean modernbert_large?"),
        (["--run", root / "rum.yaml"], "Did you mean run.yaml?"),
        ([], "the new model is as large as the source"),
    ):
        assert said in refused(capsys, grow, root / "small", out, *words)
    assert "does not exist" in refused(capsys, grow, root / "smal", out, "--run", root / "run.yaml")
    assert "is the source itself" in refused(
        capsys, grow, root / "small", root / "small", "--run", root / "run.yaml"
    )
    assert "not empty" in refused(
        capsys, grow, root / "small", root / "source", "--run", root / "run.yaml"
    )
    with pytest.raises(SystemExit) as left:
        grow.main([str(root / "small"), str(out), "--mode", "center"])
    assert left.value.code == 2 and names_in(root) == before


def test_a_start_from_another_shape_names_the_settings_and_the_way(root, capsys):
    said = refused(capsys, pretrain, root / "run.yaml", f"init_from={root / 'small'}")
    assert "hidden_size 16 there, 32 in the run, intermediate_size 24 there, 40 in the run" in said
    assert "and 1 more. To train it on as it is, leave model out of the run file" in said
    assert f"Grow it: tessera grow {root / 'small'} OUT --run RUN.yaml" in said
    grow.main([str(root / "small"), str(root / "grown"), "--run", str(root / "run.yaml")])
    capsys.readouterr()
    assert "mlp geglu there, swiglu in the run. Leave model out of the run file" in refused(
        capsys, pretrain, root / "run.yaml", "model.mlp=swiglu"
    )
    assert "attention_head_width 8 there, 4 in the run" in refused(
        capsys, pretrain, root / "run.yaml", "model.num_attention_heads=8"
    )  # every shape would fit
    assert "does not exist; needed: a run folder, a checkpoint, a weights folder" in refused(
        capsys, pretrain, root / "run.yaml", f"init_from={root / 'nowhere'}"
    )
    assert not (root / "run").exists()
    read_fitting(
        read_run(root / "run.yaml", ["model.window_radius_tokens=3"])
    )  # free: the weights mean the same


def test_a_start_from_another_tokenizer_is_refused_by_id_but_edits_of_how_text_is_cut_are_not(
    root, capsys
):
    grow.main([str(root / "small"), str(root / "grown"), "--run", str(root / "run.yaml")])
    capsys.readouterr()
    path, shards = root / "grown" / "tokenizer.json", root / "source" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][4]["lstrip"] = True
    path.write_text(json.dumps(content))
    edits_of(path, shards, None)
    content["model"]["vocab"]["other"] = content["model"]["vocab"].pop("t7")
    path.write_text(json.dumps(content))
    said = refused(capsys, pretrain, root / "run.yaml")
    assert f"id 7 is 'other' in {path}, 't7' in {shards}" in said and not (root / "run").exists()
    write_tokenizer(path, vocab_size=60)
    assert "id 55 is '[UNK]' in" in refused(capsys, pretrain, root / "run.yaml")


def test_the_plan_says_where_the_weights_come_from(root, capsys):
    assert plan.main([str(root / "run.yaml")]) == 0
    assert f"weights     from {root / 'grown'}, which is not there yet" in capsys.readouterr().out
    grow.main([str(root / "small"), str(root / "grown"), "--run", str(root / "run.yaml")])
    assert plan.main([str(root / "run.yaml")]) == 0
    assert f"weights     from {root / 'grown'}: grown (mode middle" in capsys.readouterr().out
    assert "hidden_size 16 there" in refused(
        capsys, plan, root / "run.yaml", f"init_from={root / 'small'}"
    )
    assert read_mapping(root / "run.yaml")["init_from"] == str(root / "grown")
    assert plan.main([str(root / "run.yaml"), "init_from="]) == 0
    assert "weights     drawn from seed 1" in capsys.readouterr().out


def test_a_run_file_to_grow_by_leaves_out_what_a_run_may(root, capsys):
    """As pretrain reads it: the system and the initial weights' sigma follow."""
    run = read_mapping(root / "run.yaml")
    run["model"] = {
        k: v for k, v in run["model"].items() if k not in ("system", "initializer_range")
    }
    (root / "short.yaml").write_text(yaml.safe_dump(run))
    assert (
        grow.main(
            [str(root / "small"), str(root / "short_grown"), "--run", str(root / "short.yaml")]
        )
        == 0
    )
    found = read_stored_config(root / "short_grown")
    assert found.hidden_size == 32 and found.initializer_range == initializer_range_of(32)
