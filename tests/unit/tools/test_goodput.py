"""Where the time went, by a story of three starts that is counted by hand; and what a real tiny run writes down."""

from __future__ import annotations

import io
import json
import os

import pytest
from rich.console import Console

from encoder.base.dist import World
from encoder.base.errors import ConfigError, LedgerError
from encoder.base.log import say
from encoder.runs import config
from encoder.runs.config import TrackingConfig, read_run
from encoder.runs.folder import EVENTS, METRICS, flat, merged_metrics, read_jsonl
from encoder.tools.report import curves
from encoder.tools.report.curves import Curves
from encoder.tools.report.goodput import wall_ms
from encoder.tools.report.report import write_report
from encoder.train.display import open_display
from encoder.train.meters import Clock
from encoder.train.pretraining import pretrain
from launch import report
from tests.helpers.shards import random_documents, write_source

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form of a wandb key
RUN = """
name: tiny
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a, name: a}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
optimizer: {{}}
phases: [{{name: one, tokens: 2K, max_tokens_per_document: 48, batch_tokens: 256, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 1K}}
engine: {{precision: fp32}}
loader: {{workers: 0}}
tracking: {{wandb_project: secrets}}
"""


def spent(**seconds: float) -> dict:
    return dict.fromkeys(Clock.KINDS, 0.0) | seconds


def write_story(folder, events: list[dict], metrics: list[dict]) -> None:
    (folder / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / METRICS).write_text("".join(json.dumps(m) + "\n" for m in metrics))


def test_parts_sum_to_wall_time_over_a_kill_a_resume_and_going_back(tmp_path):
    write_story(
        tmp_path,
        [
            {"event": "start", "step": 0, "began": 1000.0, "start": 1, "spent": spent(starting=5)},
            {
                "event": "checkpoint",
                "step": 1,
                "start": 1,
                "spent": spent(starting=6, training=10, waiting=1, saving=2),
            },
            {"event": "resume", "step": 1, "began": 1050.0, "start": 2, "spent": spent(starting=7)},
            {
                "event": "back",
                "step": 3,
                "weights_of_step": 2,
                "start": 2,
                "spent": spent(starting=8, training=21, waiting=3),
            },
            {
                "event": "done",
                "step": 4,
                "start": 2,
                "spent": spent(starting=8, training=31, waiting=3, evaluating=4.5),
            },
        ],
        [
            {"step": 1, "start": 1, "spent": spent(starting=6, training=10, waiting=1)},
            {
                "step": 2,
                "start": 1,
                "spent": spent(starting=6, training=19, waiting=1.5, saving=2),
            },  # and killed at 1028.5
            {"step": 2, "start": 2, "spent": spent(starting=7, training=10, waiting=2)},
            {
                "step": 3,
                "start": 2,
                "spent": spent(starting=7, training=20, waiting=3),
            },  # undone by going back
            {"step": 4, "start": 2, "spent": spent(starting=8, training=30, waiting=3)},
        ],
    )
    parts = wall_ms(tmp_path)
    assert parts.pop("wall time") == sum(parts.values()) == 96_500
    assert parts == {
        "training": 10_000 + 21_000,
        "waiting": 1_000 + 2_000,
        "evaluating": 4_500,
        "saving": 2_000,
        "starting": 14_000,
        "wasted": 9_500 + 11_000,
        "stopped": 21_500,
        "twice": 0,
    }


def test_a_resume_from_before_another_start_wastes_all_of_that_ones_steps_and_overlap_is_taken_off(
    tmp_path,
):
    write_story(
        tmp_path,
        [
            {"event": "start", "step": 0, "began": 0.5, "start": 1, "spent": spent(starting=1)},
            {"event": "resume", "step": 2, "began": 8.5, "start": 2, "spent": spent(starting=1)},
            {
                "event": "resume",
                "step": 1,
                "began": 14.5,
                "start": 4,
                "spent": spent(starting=1, training=2),
            },
        ],
        [
            {"step": 1, "start": 1, "spent": spent(starting=1, training=4)},
            {"step": 2, "start": 1, "spent": spent(starting=1, training=9)},
            {"step": 3, "start": 2, "spent": spent(starting=1, training=3)},
            {
                "step": 3,
                "start": 3,
                "spent": spent(starting=9, training=9),
            },  # a start without its first event is no start
        ],
    )
    parts = wall_ms(tmp_path)
    assert parts.pop("wall time") == sum(parts.values()) == 17_000
    assert (parts["training"], parts["wasted"], parts["stopped"], parts["twice"]) == (
        6_000,
        8_000,
        2_000,
        -2_000,
    )


def test_a_run_from_before_times_were_written_has_none(tmp_path):
    write_story(tmp_path, [{"event": "start", "step": 0}], [{"step": 1, "loss": 1.0}])
    assert wall_ms(tmp_path) == {}


@pytest.mark.parametrize(
    "line",
    [
        {"spent": 5},
        {"spent": {}, "start": 1},
        {"spent": dict.fromkeys(Clock.KINDS, "x"), "start": 1},
        {"spent": dict.fromkeys(Clock.KINDS, 1e308), "start": "x"},
        {"spent": dict.fromkeys(Clock.KINDS, 0.0), "start": 1, "began": 1e308, "step": 0},
        {"spent": dict.fromkeys(Clock.KINDS, 0.0), "start": 1, "event": "back", "step": [1]},
    ],
)
def test_times_that_cannot_be_read_are_one_sentence(tmp_path, line):
    write_story(tmp_path, [line], [])
    with pytest.raises(LedgerError, match=r"events.jsonl line 1 has times that cannot be read\."):
        wall_ms(tmp_path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with wandb offline, and a key in the environment that must not be written anywhere."""
    root = tmp_path_factory.mktemp("run")
    write_source(root / "a", random_documents(60, seed=1, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_MODE", "offline")
        assert pretrain(read_run(root / "run.yaml", [f"out={root}/out"]), World()).done
    return root / "out"


def test_no_file_of_a_run_holds_the_key_of_wandb(run_folder):
    files = [p for p in run_folder.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and any(
        p.name == "environment.json" for p in files
    )
    assert not [p for p in files if KEY.encode() in p.read_bytes()]


def test_a_run_knows_where_its_time_went_and_one_page_shows_several(run_folder, tmp_path, capsys):
    parts = wall_ms(run_folder)
    assert parts.pop("wall time") == sum(parts.values())
    assert (
        all(parts[kind] > 0 for kind in ("starting", "training", "waiting", "saving"))
        and not parts["wasted"]
    )
    totals = [sum(m["spent"].values()) for m in read_jsonl(run_folder / METRICS)]
    assert (
        totals == sorted(totals)
        and merged_metrics(run_folder / METRICS)[-1]["memory_bytes"] > 10**7
    )
    assert (
        report.main([str(run_folder), str(run_folder)]) == 2
        and "--out FOLDER" in capsys.readouterr().err
    )
    assert report.main([str(run_folder), str(run_folder), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert (
        page.count(f"<th>{run_folder}</th>") == 6 and f"{parts['training'] / 1000:,.3f} s" in page
    )
    assert write_report([run_folder], run_folder) == run_folder / "report.html"


@pytest.mark.parametrize(
    ("env", "logged_in", "mode"),
    [
        ({}, None, "offline"),
        ({}, "k" * 40, "online"),
        ({"WANDB_MODE": "offline"}, "k" * 40, "offline"),
    ],
)
def test_wandb_is_offline_unless_a_key_is_there(env, logged_in, mode, tmp_path, monkeypatch):
    import wandb

    from encoder.train.tracker import Tracker

    asked = {}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(type(wandb.api), "api_key", logged_in)
    monkeypatch.setattr(wandb, "init", lambda **named: asked.update(named))
    Tracker(
        tmp_path,
        TrackingConfig(wandb_project="p"),
        clock=Clock(began=0.0),
        start=1,
        run_name="r",
        settings={},
    ).close()
    assert asked["mode"] == mode and asked["dir"] == str(tmp_path)


def test_tensorboard_without_its_package_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    TrackingConfig().check_packages()
    with pytest.raises(ConfigError, match=r"needs the package tensorboard.*\.\[tensorboard\]"):
        TrackingConfig(tensorboard=True).check_packages()


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from encoder.runs.folder import TENSORBOARD
    from encoder.train.tracker import Tracker

    tracker = Tracker(
        tmp_path,
        TrackingConfig(tensorboard=True),
        clock=Clock(began=0.0),
        start=1,
        run_name="r",
        settings={},
    )
    tracker.metrics(3, phase="one", loss=2.5)
    tracker.close()
    seen = EventAccumulator(os.fspath(tmp_path / TENSORBOARD)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [(3, 2.5)] and seen.Tags()[
        "scalars"
    ] == ["loss"]


@pytest.mark.parametrize(("terminal", "first_rank"), [(True, True), (True, False), (False, True)])
def test_a_terminal_has_a_bar_and_a_log_a_line_each_few_steps(terminal, first_rank, capsys):
    out = io.StringIO()
    with open_display(
        first_rank=first_rank,
        every_steps=2,
        console=Console(file=out, force_terminal=terminal, width=60),
    ) as board:
        for step in (1, 2, 3, 4):
            board.show(f"step {step}", step=step, share=step / 4, now=step == 1)
        say("saved")
    if terminal and first_rank:
        assert (
            "saved\n" in out.getvalue()
            and "step 4  100.0%\n" in out.getvalue()
            and "━" in out.getvalue()
        )
        assert not capsys.readouterr().out
    else:
        assert capsys.readouterr().out == "step 1\nstep 2\nstep 4\nsaved\n" and out.getvalue() == ""


def test_a_branch_is_drawn_from_where_its_parent_was_and_its_phases_under_its_own_name():
    metrics = [
        {"tokens": 10, "phase": "decay", "loss": 3.0},
        {"tokens": 20, "phase": "late", "loss": 2.0},
    ]
    own, branch = (
        Curves(name="x", metrics=metrics, entropy=None, vocab_size=64, tokens_before=n)
        for n in (0, 100)
    )
    assert curves._curve(own, "loss")[0].tolist() == [10, 20] and curves._curve(branch, "loss")[
        0
    ].tolist() == [110, 120]
    assert curves._phase_starts(own) == [("late", 20)] and curves._phase_starts(branch) == [
        ("decay", 110),
        ("late", 120),
    ]


def test_an_event_with_a_table_in_it_is_told_in_words():
    assert flat({"step": 1, "parent": {"run": "a", "seeds": [1]}}) == [
        ("step", 1),
        ("parent.run", "a"),
        ("parent.seeds", [1]),
    ]
