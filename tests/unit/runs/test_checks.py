"""Settings that depend on others, on the cards or on the rows are told before a run starts, in one place for all commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from encoder.base.dist import World
from encoder.base.errors import ConfigError, ShardError
from encoder.runs.checks import check_settings, hints_of, mistakes_of
from encoder.runs.config import read_run
from encoder.runs.facts import check_data
from encoder.runs.filling import fill_rows
from encoder.runs.folder import LEDGER
from encoder.tools.plan.plan import plan_text
from encoder.train.build import check_held_out_names
from encoder.train.pretraining import pretrain
from launch.plan import main
from tests.helpers.shards import random_documents, write_source

RUN = """
name: checked
out: {root}/out
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2,
        num_attention_heads: 1, max_position_embeddings: 64, window_radius_tokens: 8}}
data: {{sources: [{{path: {root}/a/train, name: a}}], row_tokens: 256, window_documents: 90}}
objective: {{name: mlm}}
phases: [{{name: one, tokens: 20K, max_tokens_per_document: 64, batch_tokens: 1024, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 10K}}
evaluation: {{sources: [{{path: {root}/a/held_out, name: a}}], every_tokens: 10K, rows: 2}}
engine: {{precision: fp32}}
loader: {{workers: 0}}
"""


@pytest.fixture
def root(tmp_path) -> Path:
    write_source(tmp_path / "a/train", random_documents(200, seed=1, longest=64), vocab_size=64)
    write_source(
        tmp_path / "a/held_out",
        random_documents(60, seed=2, longest=64),
        vocab_size=64,
        split="held_out",
    )
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    return tmp_path


def hints(root: Path, *settings: str, ranks: int = 1) -> str:
    return "\n".join(hints_of(read_run(root / "run.yaml", settings), ranks=ranks))


def test_a_run_whose_settings_all_have_their_effect_is_told_nothing(root):
    assert hints(root) == "" and mistakes_of(read_run(root / "run.yaml")) == []


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            ["checkpoints.every_tokens=1M"],
            "checkpoints.every_tokens 1,000,000 is more than the run's 20,000 tokens",
        ),
        (["evaluation.every_tokens=1M"], "evaluation.every_tokens 1,000,000 is more than"),
        (["checkpoints.every_tokens=5"], "checkpoints.every_tokens 5 is less than a step's"),
        (["evaluation.every_tokens=100"], "evaluation.every_tokens 100 is less than a step's"),
        (
            ["checkpoints.keep_last=50"],
            "checkpoints.keep_last 50 has no effect: the run saves 2 times",
        ),
        (["phases.0.mask_share_end=0.3"], "phases.0.mask_share_end 0.3 has no effect"),
        (
            ["phases.0.max_lr=1e-3", "phases.0.weight_decay=0"],
            "phases.0.max_lr 0.001 has no effect: the phase's weight_decay is 0",
        ),
        (
            ["phases.0.mask_share=0.2", "objective.mask_share=0.4"],
            "objective.mask_share has no effect",
        ),
        (
            ["model.max_position_embeddings=512"],
            "model.max_position_embeddings 512 is above the longest documents of all phases, 64",
        ),
        (
            ["model.window_radius_tokens=63"],
            (
                "model.window_radius_tokens 63 reaches over every document of at most 64 tokens: no"
                " layer"
            ),
        ),
        (["model.global_attn_every_n_layers=1"], "model.window_radius_tokens has no effect"),
        (["data.sources.0.weight=3"], "data.sources.0.weight 3 has no effect: there is one source"),
        (
            ["faults={spike: {over_steps: 50}}"],
            "faults.spike has no effect: it needs 50 fine steps",
        ),
        (
            ["tracking.print_every_steps=500"],
            "tracking.print_every_steps 500 is more than the run's 2",
        ),
        (["phases.0.batch_tokens=40960"], "phase one is one step"),
        (["phases.0.lr.warmup_tokens=300"], "phases.0.lr.warmup_tokens 300 has no effect"),
        (
            ["phases.0.batch_warmup={from_tokens: 256, over_tokens: 200}"],
            "phases.0.batch_warmup is over after one step of 2",
        ),
        (
            ["loader.micro_batch_rows=8"],
            "loader.micro_batch_rows 8 is more than the 4 rows that a rank of 1 has",
        ),
        (["evaluation.rows=500"], "evaluation.rows 500 asks for 128,000 tokens of a, which has"),
        (
            ["data.window_documents=900"],
            "a window goes 4.5 times through the 200 documents of a (data.sources)",
        ),
        (
            ["device=cpu", "engine.offload_optimizer=cpu"],
            "engine.offload_optimizer cpu has no effect on device cpu",
        ),
        (
            [
                "data.row_tokens=512",
                "model.max_position_embeddings=512",
                "phases.0.max_tokens_per_document=512",
            ],
            "phase one cuts documents at 512 tokens, and the longest of",
        ),
        (
            [
                "data.row_tokens=64",
                "phases.0.max_tokens_per_document=64",
                "data.window_documents=3",
            ],
            "rows of phase one will be",
        ),
    ],
)
def test_a_setting_without_effect_is_told_by_its_key(root, settings, said):
    assert (
        said in hints(root, *settings)
        and "\n" not in hints_of(read_run(root / "run.yaml", settings), ranks=1)[0]
    )


def test_sources_that_no_phase_reads_are_told(root):
    write_source(root / "b", random_documents(200, seed=5, longest=64), vocab_size=64)
    assert "data.sources is read by no phase" in hints(
        root, f"phases.0.sources=[{{path: {root}/b, name: b}}]"
    )


def test_a_batch_warm_up_longer_than_its_phase_is_refused(root, capsys):
    told = ["phases.0.batch_warmup={from_tokens: 256, over_tokens: 1M}"]
    said = (
        "phases.0.batch_warmup.over_tokens 1,000,000 is more than the phase's 20,000 tokens: its"
        " batch would end at 256 and never reach batch_tokens 1,024"
    )
    run = read_run(root / "run.yaml", told)
    for asks in (
        check_settings,
        lambda run: plan_text(run, ranks=1),
        lambda run: pretrain(run, World()),
    ):
        with pytest.raises(ConfigError) as caught:
            asks(run)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert (
        main([str(root / "run.yaml"), *told]) == 2
        and said in capsys.readouterr().err
        and not (root / "out").exists()
    )
    assert (
        mistakes_of(
            read_run(
                root / "run.yaml", ["phases.0.batch_warmup={from_tokens: 256, over_tokens: 20K}"]
            )
        )
        == []
    )


def test_a_run_that_began_with_such_settings_may_go_on_and_is_told(root):
    run = read_run(root / "run.yaml", ["phases.0.batch_warmup={from_tokens: 256, over_tokens: 1M}"])
    (root / "out").mkdir()
    (root / "out" / "run.yaml").write_text("name: checked\n")
    (root / "out" / LEDGER).write_text("{}\n")
    assert "never reach" in check_settings(run)[0] and "never reach" in plan_text(run, ranks=1)


def test_training_text_named_as_held_out_text_is_refused(root, capsys):
    (root / "copy").symlink_to(root / "a" / "train")
    for path in (root / "a" / "train", root / "copy", f"{root}/a/../a/train/"):
        run = read_run(root / "run.yaml", [f"evaluation.sources.0.path={path}"])
        with pytest.raises(
            ConfigError,
            match=r"evaluation.sources.0 .* holds the text that data.sources.0 \(a\) trains on",
        ):
            plan_text(run, ranks=1)
    assert main([str(root / "run.yaml"), f"evaluation.sources.0.path={root}/a/train"]) == 2


def test_splits_and_doubles_are_told_by_what_the_cards_know(root):
    swapped = hints(
        root, f"data.sources.0.path={root}/a/held_out", f"evaluation.sources.0.path={root}/a/train"
    )
    assert (
        "data.sources.0" in swapped
        and "is a held_out split by its card, and is trained on" in swapped
    )
    assert "evaluation.sources.0" in swapped and "is a train split by its card" in swapped
    double = hints(
        root,
        f"data.sources=[{{path: {root}/a/train, name: x}}, {{path: {root}/a/train/, name: y}}]",
    )
    assert "data.sources.1 (y) is the same text as data.sources.0 (x): it counts twice" in double


def test_documents_just_above_the_length_are_told_with_what_fills_the_rows(root):
    chunks = [np.concatenate([[60], np.arange(64) % 50, [61]])] * 200
    write_source(root / "chunks", chunks, vocab_size=64)
    run = read_run(
        root / "run.yaml",
        [f"data.sources.0.path={root}/chunks", "data.row_tokens=64", "phases.0.batch_tokens=1024"],
    )
    (said,) = [line for line in hints_of(run, ranks=1) if "just above" in line]
    assert (
        "100% of the documents of phase one are just above max_tokens_per_document 64 and are cut"
        " in two halves" in said
    )
    assert "rows are 53% full" in said
    assert (
        "max_tokens_per_document 66 and data.row_tokens 66 takes them whole and fills rows to 100%"
        in said
    )
    assert said in plan_text(run, ranks=1)


def test_a_plan_says_how_probable_a_step_without_a_masked_token_is(root):
    run = read_run(
        root / "run.yaml",
        ["data.row_tokens=64", "phases.0.batch_tokens=64", "objective.mask_share=0.05"],
    )
    (said,) = [line for line in hints_of(run, ranks=1) if "no masked token" in line]
    filling = fill_rows(run, run.phases[0])
    mean = np.mean(0.95 ** np.maximum(0, filling.tokens_R - 2 * filling.pieces_R))
    steps = 20_000 / (64 * filling.fill)
    told = float(said.split("about ")[1].split(" of")[0])
    assert told == pytest.approx(mean * steps, rel=0.06)
    assert "no masked token" not in hints(root)


def test_windows_of_less_than_a_document_can_be_planned(root):
    run = read_run(
        root / "run.yaml",
        [
            f"data.sources=[{{path: {root}/a/train, name: x}}, {{path: {root}/a/train, name: y}}]",
            "data.window_documents=1",
        ],
    )
    assert 0 < fill_rows(run, run.phases[0]).fill <= 1 and plan_text(run, ranks=1)


def test_doctor_tells_what_plan_tells(root, monkeypatch):
    from encoder.tools.doctor.doctor import Doctor

    doctor = Doctor(world=World(), env={})
    run = read_run(root / "run.yaml", ["checkpoints.every_tokens=1M"])
    doctor._judge_run(run)
    assert any("checkpoints.every_tokens 1,000,000" in line for line in doctor.findings.warnings)
    long = dataclasses.replace(
        run,
        phases=read_run(
            root / "run.yaml", ["phases.0.batch_warmup={from_tokens: 256, over_tokens: 1M}"]
        ).phases,
    )
    doctor._judge_run(long)
    assert any("never reach batch_tokens" in line for line in doctor.findings.mistakes)


def test_a_source_without_a_document_is_planned_and_refused_at_the_start(root):
    write_source(root / "empty", random_documents(3, longest=9), vocab_size=64)
    card = json.loads((root / "empty" / "card.json").read_text())
    (root / "empty" / "lengths.bin").write_bytes(b"")
    (root / "empty" / "card.json").write_text(json.dumps({**card, "documents": 0, "tokens": 0}))
    run = read_run(
        root / "run.yaml",
        [f"data.sources=[{{path: {root}/a/train, name: x}}, {{path: {root}/empty, name: y}}]"],
    )
    assert plan_text(run, ranks=1) and isinstance(hints_of(run, ranks=1), list)
    with pytest.raises(ShardError, match="holds no documents"):
        pretrain(run, World())


def test_a_plan_says_how_local_the_order_is(root):
    text = plan_text(read_run(root / "run.yaml", ["data.shuffle_shards=1"]), ranks=1)
    shards = len(list((root / "a" / "train").glob("*.mds")))
    assert ("order: 1 of" in text) == (shards > 1)
    write_source(
        root / "many", random_documents(400, seed=1, longest=64), vocab_size=64, shard_bytes=1024
    )
    shards = len(list((root / "many").glob("*.mds")))
    text = plan_text(
        read_run(
            root / "run.yaml", [f"data.sources.0.path={root}/many", "data.window_documents=200"]
        ),
        ranks=1,
    )
    assert (
        f"order: 8 of {shards} shards of a are read at a time" in text
        and "data.shuffle_shards sets how many" in text
    )
    with pytest.raises(ConfigError, match="shuffle_shards 0 must be 1 to 256"):
        read_run(root / "run.yaml", ["data.shuffle_shards=0"])


def test_a_step_of_rows_without_end_is_refused_before_it_begins(root, capsys):
    settings = ["phases.0.tokens=2K", f"phases.0.batch_tokens={256 * 10**12}"]
    said = (
        "phases.0.batch_tokens 256,000,000,000,000 makes a step of 1,000,000,000,000 rows of 256"
        " tokens; needed: at most 1,048,576 rows. Lower phases.0.batch_tokens: the whole phase has"
        " 2,000 tokens."
    )
    assert mistakes_of(read_run(root / "run.yaml", settings)) == [said]
    assert main([str(root / "run.yaml"), *settings]) == 2
    assert said in capsys.readouterr().err and not (root / "out").exists()

    # a warm-up that never comes to such a step is read; a step of a million rows, too
    warmed = [*settings, "phases.0.batch_warmup={from_tokens: 256, over_tokens: 2K}"]
    assert said not in mistakes_of(read_run(root / "run.yaml", warmed))
    settings[1] = f"phases.0.batch_tokens={256 * 2**20}"
    assert mistakes_of(read_run(root / "run.yaml", settings)) == []


def test_a_watchdog_that_ends_a_working_run_is_refused(root):
    for minutes in ("1e-300", "0.99"):
        run = read_run(root / "run.yaml", [f"faults.watchdog_minutes={minutes}"])
        with pytest.raises(ConfigError) as caught:
            check_settings(run)
        assert str(caught.value) == (
            f"faults.watchdog_minutes {minutes} would end a run that works; needed: at least 1,"
            " since kernels may compile for so long before the first step. Use"
            " faults.watchdog_minutes: null for none."
        )
    for minutes in ("1", "null"):
        run = read_run(root / "run.yaml", [f"faults.watchdog_minutes={minutes}"])
        assert mistakes_of(run) == []


def test_held_out_sources_named_like_a_loss_term_are_refused(root):
    sources = [{"path": f"{root}/a/held_out", "name": name} for name in ("a", "sop")]
    settings = [
        "model={system: bert, vocab_size: 64, hidden_size: 32, intermediate_size: 32,"
        " num_hidden_layers: 2, num_attention_heads: 1, sentence_head: true}",
        f"evaluation.sources={json.dumps(sources)}",
    ]
    run = read_run(root / "run.yaml", [*settings, "objective={name: mlm_sop}"])
    with pytest.raises(ConfigError) as caught:
        check_held_out_names(run, check_data(run))
    assert str(caught.value) == (
        "evaluation.sources.1 is named sop, as a loss term of the objective is: held_out_loss_sop"
        " would be of both. Give it another name, such as evaluation.sources.1.name=text_sop."
    )

    # no such term, or no name beside it: nothing stands twice
    run = read_run(root / "run.yaml", [*settings, "objective={name: mlm_nsp}"])
    check_held_out_names(run, check_data(run))
    alone = f"evaluation.sources={json.dumps(sources[1:])}"
    run = read_run(root / "run.yaml", [*settings, "objective={name: mlm_sop}", alone])
    check_held_out_names(run, check_data(run))


def test_a_run_of_one_step_at_rate_zero_is_refused(root):
    settings = [
        "phases.0.tokens=500",
        "phases.0.lr={schedule: wsd, peak: 1e-3, warmup_tokens: 10, decay_tokens: 100}",
    ]
    assert mistakes_of(read_run(root / "run.yaml", settings)) == [
        "phases.0.tokens 500 is one step of 1,024 tokens, at a learning rate of 0: nothing would be"
        " learned. Lower phases.0.batch_tokens, for example to 256, or train on more tokens."
    ]
    assert not mistakes_of(read_run(root / "run.yaml", ["phases.0.tokens=500"]))
