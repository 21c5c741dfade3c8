"""What a run file leaves out follows from its shards, its first weights, its width, its device and its run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from encoder.base.errors import UserError
from encoder.engine.precision import precision_on
from encoder.models.catalog import PRESETS, build_model
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, write_stored
from encoder.runs.config import RunConfig, identity_of, read_run
from encoder.runs.defaults import (
    WINDOW_DOCUMENTS,
    initializer_range_of,
    row_tokens_of,
    window_documents_of,
)
from encoder.tools.plan.forecast import gpu
from encoder.tools.plan.plan import plan_text
from tests.helpers.shards import random_documents, write_source

VOCAB = 100
SHORT = """
name: short
data: {shards}/a/train
model: {{hidden_size: 128, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 2}}
phases: {{tokens: 100K, batch_tokens: 8192, lr: 1e-3}}
"""


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A run file of four lines and its shards."""
    for split in ("train", "held_out"):
        documents = random_documents(30, seed=len(split), vocab_size=VOCAB)
        write_source(tmp_path / "a" / split, documents, vocab_size=VOCAB, split=split)
    (tmp_path / "short.yaml").write_text(SHORT.format(shards=tmp_path))
    return tmp_path / "short.yaml"


def of(path: Path, *overrides: str) -> RunConfig:
    """The run, in a folder of the test."""
    return read_run(path, [f"out={path.parent}/out", *overrides])


def test_a_run_file_of_four_lines_is_a_whole_run(short):
    run = read_run(short)
    assert (run.out, run.seed, run.objective.mask_share, run.data.row_tokens) == (
        "runs/short",
        17,
        0.3,
        1024,
    )
    phase = run.phases[0]
    assert (phase.name, phase.max_tokens_per_document, phase.lr.peak) == ("main", 1024, 1e-3)
    assert (phase.lr.warmup_tokens, phase.lr.decay_tokens) == (2_000, 20_000)
    assert [s.path for s in run.evaluation.sources] == [str(short.parent / "a" / "held_out")]
    assert run.checkpoints.every_tokens == run.evaluation.every_tokens == 10 * 8192


def test_a_plan_says_what_was_left_out_and_why(short):
    said = plan_text(of(short), ranks=1)
    assert "model.initializer_range 0.0559: sqrt(2 / (5 hidden_size))" in said
    assert "data.row_tokens 1,024: divides every batch" in said


def test_settings_that_are_given_stay_as_they_are(short):
    said = [
        "model.initializer_range=0.02",
        "model.vocab_size=4096",
        "phases.0.lr={schedule: wsd, peak: 1e-3}",
        "seed=3",
        "evaluation=null",
        "engine.precision=fp32",
    ]
    run = of(short, *said)
    assert (run.model.initializer_range, run.model.vocab_size, run.seed, run.evaluation) == (
        0.02,
        4096,
        3,
        None,
    )
    assert (
        run.phases[0].lr.warmup_tokens,
        run.phases[0].lr.decay_tokens,
        run.engine.precision,
    ) == (0, 0, "fp32")


@pytest.mark.parametrize(("hidden", "sigma"), [(128, 0.0559), (256, 0.03953), (768, 0.02282)])
def test_initial_weights_follow_the_width(short, hidden, sigma):
    """sqrt(2 / (5 x 128)) = 0.0559."""
    assert (
        of(short, f"model.hidden_size={hidden}").model.initializer_range
        == sigma
        == initializer_range_of(hidden)
    )


def test_a_window_goes_through_no_source_twice(tmp_path):
    """Sources of 300 and 900 documents of one length at equal weights: windows of 600, half of each."""
    for name, count in (("a", 300), ("b", 900)):
        write_source(tmp_path / name, [[1, 5, 6, 2]] * count, vocab_size=VOCAB)
    mapping = {"data": {"sources": [{"path": str(tmp_path / name)} for name in ("a", "b")]}}
    assert window_documents_of(mapping, lanes=1) == 600
    assert window_documents_of(mapping, lanes=2) == 300
    mapping["data"]["sources"][0]["weight"] = 3.0
    assert window_documents_of(mapping, lanes=1) == 400
    mapping["data"]["sources"].append({"path": str(tmp_path / "not_there")})
    assert window_documents_of(mapping, lanes=1) == WINDOW_DOCUMENTS
    run_file = tmp_path / "run.yaml"
    run_file.write_text(SHORT.format(shards=tmp_path).replace("/a/train", "/b"), encoding="utf-8")
    assert read_run(run_file, [f"out={tmp_path}/out"]).data.window_documents == 900
    assert (
        read_run(
            run_file,
            [
                f"out={tmp_path}/out",
                "data={sources: [" + str(tmp_path / "b") + "], window_documents: 8192}",
            ],
        ).data.window_documents
        == 8192
    )


def test_presets_keep_the_published_initial_weights(short):
    for name in ("modernbert_base", "modernbert_large"):
        assert of(short, f"model={{preset: {name}}}").model.initializer_range == 0.02
    for name in ("modernbert_17m", "modernbert_32m", "modernbert_68m"):
        assert PRESETS[name]["initializer_range"] == initializer_range_of(
            PRESETS[name]["hidden_size"]
        )


def test_the_vocabulary_follows_the_shards(short):
    """100 tokens are 128 rows of the embedding."""
    assert (
        of(short).model.vocab_size
        == 128
        == of(short, "model={preset: modernbert_base}").model.vocab_size
    )
    assert "model.vocab_size 4,096 is more than the shards'" in plan_text(
        of(short, "model.vocab_size=4096"), ranks=1
    )
    assert "is more than the shards'" not in plan_text(of(short), ranks=1)


def test_thetas_follow_the_weights_that_a_run_starts_from(short, tmp_path):
    config = ModernBertConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        global_rope_theta=160_000.0,
        local_rope_theta=20_000.0,
    )
    weights = {
        name: p.detach().clone() for name, p in build_model(config, seed=1).state_dict().items()
    }
    write_stored(
        StoredModel(config=config, weights=weights, tokenizer_json=None, origin="a test"),
        tmp_path / "source",
    )
    start = f"init_from={tmp_path}/source"
    shape = (
        "{vocab_size: 128, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,"
        " num_attention_heads: 2}"
    )

    silent = of(short, start, f"model={shape}")
    assert (
        silent.phases[0].model["global_rope_theta"],
        silent.phases[0].model["local_rope_theta"],
    ) == (160_000.0, 20_000.0)
    assert "another one" not in plan_text(silent, ranks=1)
    other = of(short, start, f"model={shape}", "phases.0.model.global_rope_theta=10000")
    assert f"global_rope_theta is 160000 at {tmp_path}/source and 10000 in phase main" in plan_text(
        other, ranks=1
    )

    partial = of(short, start, "model={attention_output_dropout: 0.0}").model
    assert partial == dataclasses.replace(config, attention_output_dropout=0.0)
    assert "gone is not at hand: what follows from it" in plan_text(
        of(short, "init_from=/gone"), ranks=1
    )

    (tmp_path / "no_model.yaml").write_text(
        "\n".join(line for line in short.read_text().splitlines() if "model:" not in line)
    )
    assert of(tmp_path / "no_model.yaml", start).model == config


@pytest.mark.parametrize(("units", "word"), [(True, "autocast"), (False, "fp32")])
def test_precision_follows_the_units_of_the_device(short, monkeypatch, units, word):
    monkeypatch.setattr("encoder.engine.precision.computes_bf16", lambda device: units)
    assert (
        of(short).engine.precision == "auto" and precision_on("auto", torch.device("cpu")) == word
    )
    assert precision_on("fp32", torch.device("cpu")) == "fp32"
    assert f"ZeRO-1, {word} (auto" in plan_text(of(short, "device=cpu"), ranks=1)


def test_a_plan_prices_a_gpu_by_the_precision():
    """An H100 has 989 TFLOP/s in bf16 and 67 in fp32: a forecast for fp32 is many times as long, and warned of."""
    h100, base = gpu("h100"), "configs/pretrain/modernbert_base.yaml"
    assert (h100.peak("autocast"), h100.peak("fp32")) == (989e12, 67e12)
    assert "engine.precision fp32 on CUDA" in plan_text(
        read_run(base, ["engine.precision=fp32"]), ranks=8, machine=h100
    )
    assert "engine.precision fp32" not in plan_text(read_run(base), ranks=8, machine=h100)


def test_a_started_run_keeps_what_it_was_started_with(short, tmp_path):
    """An earlier version's run folder has 0.02 and 50,368 in its run.yaml: the same run file goes on with them."""
    old = dataclasses.asdict(of(short).model) | {
        "system": "modernbert",
        "initializer_range": 0.02,
        "vocab_size": 50368,
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_text(
        yaml.safe_dump({"model": old, "seed": 5, "evaluation": None})
    )
    assert of(short).seed == 17  # a folder without a ledger was not started
    (tmp_path / "out" / "ledger.jsonl").write_text("{}\n")
    run = of(short)
    assert (run.model.initializer_range, run.model.vocab_size, run.seed, run.evaluation) == (
        0.02,
        50368,
        5,
        None,
    )


def test_a_run_file_as_a_run_wrote_it_has_nothing_left_to_work_out(short, tmp_path):
    from encoder.base.schema import to_yaml

    run = of(short)
    (tmp_path / "whole.yaml").write_text(to_yaml(run))
    again = read_run(tmp_path / "whole.yaml")
    assert again.derived == () and identity_of(again) == identity_of(run) and again == run


@pytest.mark.parametrize(
    ("step", "longest", "row"),
    [
        (8192, 512, 1024),
        (8192, 1024, 1024),
        (64_000, 1024, 8000),
        (4_718_592, 8192, 16384),
        (2048, 2048, 2048),
        (100, 512, 512),
    ],
)
def test_rows_divide_the_batch_and_hold_a_document(step, longest, row):
    assert row_tokens_of(step, longest_tokens=longest) == row


WRONG = [
    None,
    [],
    {},
    "",
    "abc",
    -1,
    0,
    1.5,
    True,
    float("nan"),
    1e300,
    [[]],
    [None],
    {"a": 1},
    "\x00",
    [{"path": 3}],
    "2T",
]


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "out",
        "seed",
        "model",
        "model.hidden_size",
        "model.system",
        "data",
        "data.sources",
        "data.lanes",
        "data.row_tokens",
        "phases",
        "phases.0",
        "phases.0.tokens",
        "phases.0.lr",
        "phases.0.batch_tokens",
        "phases.0.batch_warmup",
        "checkpoints",
        "evaluation",
        "init_from",
        "branch_from",
        "objective",
    ],
)
def test_a_wrong_value_is_refused_and_never_stops_the_defaults(short, key):
    for value in WRONG:
        mapping = yaml.safe_load(short.read_text()) | {
            "phases": [{"tokens": "100K", "batch_tokens": 8192, "lr": 1e-3}]
        }
        mapping["data"] = {"sources": [{"path": mapping["data"]}]}
        at = mapping
        *path, last = key.split(".")
        for part in path:
            at = at[int(part)] if part.isdigit() else at[part]
        at[int(last) if last.isdigit() else last] = value
        file = short.parent / "wrong.yaml"
        file.write_text(json.dumps(mapping) if value == value else yaml.safe_dump(mapping))
        try:
            read_run(file)
        except UserError as error:
            assert "\n" not in str(error)


def test_an_evaluation_without_sources_takes_the_held_out_documents(short):
    given = of(short, "evaluation={every_tokens: 20K}").evaluation
    assert [Path(s.path).name for s in given.sources] == [
        "held_out"
    ] and given.every_tokens == 20_000


def test_a_name_alone_chooses_optimizer_and_objective(short):
    assert (
        of(short, "optimizer=lamb", "objective=mlm").optimizer
        == of(short, "optimizer={name: lamb}").optimizer
    )


def test_an_override_without_the_place_in_a_list_is_told_where(short):
    with pytest.raises(UserError, match=r"Did you mean phases\.0\.tokens\?"):
        of(short, "phases.tokens=16K")


def test_a_schedule_that_does_not_fit_is_named_by_its_key(short):
    with pytest.raises(UserError, match=r"phases\.0\.lr of phase main: warmup_tokens 200,000 and"):
        of(short, "phases.0.lr={schedule: wsd, peak: 1e-3, warmup_tokens: 200K}")
