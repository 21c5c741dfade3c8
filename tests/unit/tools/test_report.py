"""A report says what was trained and how it stands, of any run folder, and takes names for text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from encoder.runs.folder import EVENTS, LEDGER, METRICS, RUN_FILE
from encoder.runs.ledger import chain
from encoder.tools.report.curves import Curves, draw, running_mean
from launch import report

RUN = """
name: {name}
out: runs/x
seed: 1
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 24, num_hidden_layers: 1,
        num_attention_heads: 2, max_position_embeddings: 64}}
data: {{sources: [{{path: nowhere, name: web}}], row_tokens: 64, window_documents: 16}}
objective: {{name: mlm, mask_share: 0.3}}
phases:
  - {{name: "{phase}", tokens: 1K, max_tokens_per_document: 64, batch_tokens: 128,
     model: {{global_rope_theta: 10000, local_rope_theta: 10000}}, lr: {{schedule: constant, peak: 1e-3}}}}
checkpoints: {{every_tokens: 1K}}
"""
ABOUT = {
    "parameters": 123456,
    "sources": [{"name": "web", "documents": 90, "tokens": 5000, "trained": 1000}],
    "device": "CPU (x86_64)",
    "ranks": 2,
    "versions": {"python": "3.12.1", "torch": "2.11.0", "commit": "abcdef"},
}
HOSTILE = "<img src=x onerror=alert(1)> $\\\\frac{$ _"


def write_run(folder, *, name="small", phase="main", events=(), held_out=3.25, steps=30):
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(RUN.format(name=json.dumps(name), phase=phase))
    link, ledger, metrics = "", [], []
    for step in range(1, steps + 1):
        link = chain(link, step=step, tokens=100 * step, masked_tokens=30, batch_hash=step)
        ledger.append(
            {
                "step": step,
                "tokens": 100,
                "tokens_seen": 100 * step,
                "masked_tokens": 30,
                "batch": f"{step:016x}",
                "chain": link,
            }
        )
        spent = dict.fromkeys(
            ("starting", "training", "waiting", "evaluating", "saving"), 0.1 * step
        )
        metrics.append(
            {
                "step": step,
                "phase": phase,
                "tokens": 100 * step,
                "loss": 5.0,
                "lr": 1e-3,
                "step_tokens": 100,
                "start": 1,
                "tokens_per_second": 2000.0,
                "spent": spent,
            }
        )
    metrics[-1] |= {
        "held_out_loss": held_out,
        "held_out_accuracy": None if held_out is None else 0.25,
    }
    began = {
        "event": "start",
        "step": 0,
        "ranks": 2,
        "zero_stage": 1,
        "precision": "fp32",
        "began": 1.7e9,
        "start": 1,
    }
    lines = [
        {**began, "about": ABOUT, "spent": dict.fromkeys(spent, 0.0)},
        *({**e, "start": 1, "spent": spent} for e in events),
    ]
    for path, rows in ((LEDGER, ledger), (METRICS, metrics), (EVENTS, lines)):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_of(folder, out):
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    return (out / "report.html").read_text()


def test_a_page_says_what_was_trained_and_how_fast(tmp_path):
    page = page_of(write_run(tmp_path / "run"), tmp_path / "page")
    for words in (
        "What was trained",
        "123,456 parameters",
        "data web",
        "5K tokens in 90 documents",
        "fp32, ZeRO stage 1",
        "2, on CPU (x86_64)",
        "python 3.12.1, torch 2.11.0, commit abcdef",
        "2K tokens/s",
        "3.250 nats",
        "25.00%",
    ):
        assert words in page, words


@pytest.mark.parametrize(
    ("events", "left", "state"),
    [
        ([], {}, "under way, or killed: not done yet"),
        (
            [{"event": "stopped", "step": 30, "signal": 15}],
            {},
            "stopped after step 30, not done yet",
        ),
        ([], {"errors/1.txt": "Traceback"}, "failed, see errors/1.txt; not done yet"),
        ([], {"hangs/rank00000.txt": "stands"}, "failed, see hangs/rank00000.txt; not done yet"),
    ],
)
def test_a_page_says_how_a_run_stands_that_is_not_done(tmp_path, events, left, state):
    folder = write_run(tmp_path / "run", events=events, held_out=None)
    for name, text in left.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    page = page_of(folder, tmp_path / "page")
    assert state in page and "not finite" in page


def test_events_are_told_with_units_and_heads_are_counted(tmp_path):
    saved = {
        "event": "checkpoint",
        "time": "2026-11-29T09:23:28Z",
        "step": 30_000,
        "bytes": 3 * 2**20,
        "stall_seconds": 0.126,
    }
    page = page_of(write_run(tmp_path / "run", events=[saved]), tmp_path / "page")
    assert "<td>2026-11-29 09:23:28</td>" in page
    assert "step 30,000, 3.0 MiB, stall 0.126 s" in page
    assert "held-out loss" in page and "1 layer of 32, 2 heads" in page


def test_names_of_runs_are_text_in_page_and_picture(tmp_path):
    one = write_run(tmp_path / "a", name=HOSTILE, phase="$x^{")
    assert (
        report.main([str(one), str(write_run(tmp_path / "b")), "--out", str(tmp_path / "page")])
        == 0
    )
    page = (tmp_path / "page" / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_a_page_or_picture_of_somebody_else_is_not_written_over(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    for name in ("report.html", "loss.png"):
        out = tmp_path / name.replace(".", "_")
        out.mkdir()
        (out / name).write_text("mine")
        assert report.main([str(folder), "--out", str(out)]) == 2
        assert f"{name} was not written by this command" in capsys.readouterr().err
        assert [p.name for p in out.iterdir()] == [name] and (out / name).read_text() == "mine"
    page_of(folder, tmp_path / "page")
    page_of(folder, tmp_path / "page")
    # nor was the page of an earlier version marked
    (tmp_path / "page" / "report.html").write_text(
        "<h1>small</h1><img alt='curves over tokens seen' src=''>"
    )
    page_of(folder, tmp_path / "page")


def test_a_running_mean_has_no_bias_at_its_beginning():
    assert running_mean(np.array([1.0, 3.0, 5.0]), over=3) == pytest.approx([1.0, 7 / 3, 27 / 7])
    assert running_mean(np.full(50, 4.0), over=8) == pytest.approx(np.full(50, 4.0))


def test_every_axis_of_the_picture_has_its_unit(monkeypatch):
    from matplotlib.axes import Axes

    said = {"x": [], "y": []}
    monkeypatch.setattr(Axes, "set_xlabel", lambda axis, text, **how: said["x"].append(text))
    monkeypatch.setattr(Axes, "set_ylabel", lambda axis, text, **how: said["y"].append(text))
    metrics = [
        {"step": i, "phase": "a", "tokens": 10 * i, "loss": 5.0, "tokens_per_second": 3.0}
        for i in range(1, 40)
    ]
    draw([Curves(name="a", metrics=metrics, entropy=None, vocab_size=64)])
    assert said["x"] == ["tokens seen"] * 6 and len(said["y"]) == 6
    assert "nats a masked token" in said["y"] and "tokens/s, all ranks" in said["y"]
