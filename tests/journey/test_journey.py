"""The whole job through the real commands: text, shards, training killed and resumed, Hugging Face folder, answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from encoder.runs.folder import EVENTS, LEDGER, METRICS, read_jsonl
from encoder.tools.report.report import verify_ledger
from launch import demo as launch_demo
from launch import shown_commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo at one 50th of its size, made once by the command that `make demo` runs."""
    out = tmp_path_factory.mktemp("demo")
    done = _demo(out)
    assert done.returncode == 0, (
        done.stdout[-4000:] + done.stderr[-4000:] + _tail(out / "training.log")
    )
    return out, done.stdout


def _demo(out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "demo.py", *_words(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


def _words(out: Path) -> list[str]:
    return ["--out", str(out), "--shrink", "50"]


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-4000:] if path.exists() else ""


def test_the_killed_run_goes_on_and_its_ledger_continues(demo):
    out, said = demo
    killed = json.loads((out / "killed.json").read_text())
    whole = read_jsonl(out / "run" / LEDGER)
    assert 0 < len(killed["ledger"]) < len(whole) == verify_ledger(out / "run")
    assert whole[: len(killed["ledger"])] == killed["ledger"]
    events = [e["event"] for e in read_jsonl(out / "run" / EVENTS)]
    assert events.count("start") == 1 and events.count("resume") == 1 and events[-1] == "done"
    resumed = next(e["step"] for e in read_jsonl(out / "run" / EVENTS) if e["event"] == "resume")
    assert 0 < resumed < killed["steps"], (
        "some steps were done twice, and their hashes were compared"
    )
    assert "unbroken chain" in said


def test_all_three_phases_ran_and_the_model_learned(demo):
    out, _ = demo
    done = json.loads((out / "run" / "done.json").read_text())
    assert {line["phase"] for line in read_jsonl(out / "run" / LEDGER)} == {
        "stable",
        "extension",
        "decay",
    }
    # rows of neighbours begin far from uniform, ln 8192 = 9.01; seen after the 14 steps: 9.2
    evaluated = [line for line in read_jsonl(out / "run" / METRICS) if "held_out_loss" in line]
    assert done["held_out_loss"] < evaluated[0]["held_out_loss"] - 2.0


def test_the_export_answers_in_plain_transformers(demo):
    out, _ = demo
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(out / "hf")
    assert type(model).__name__ == "ModernBertForMaskedLM"
    answers = json.loads((out / "answers.json").read_text())
    assert len(answers) >= 3 and all(len(mask) == 5 for a in answers for mask in a["masks"])


def test_the_report_is_there_to_be_looked_at(demo):
    out, _ = demo
    page = (out / "run" / "report.html").read_text()
    assert (
        (out / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
        and "Killed and resumed" in page
        and "data:image/png" in page
    )


def test_a_second_run_redoes_nothing(demo, monkeypatch, capsys):
    """Here, where torch is imported already; it asks the model again, and that alone."""
    out, _ = demo
    before = {
        p: p.stat().st_mtime_ns
        for p in out.rglob("*")
        if p.is_file() and p.name not in ("report.html", "loss.png")
    }
    ran = []

    def noted(words, **_named):
        ran.append(words[:2])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(shown_commands, "subprocess", SimpleNamespace(run=noted))
    assert launch_demo.main(_words(out)) == 0
    said = capsys.readouterr().out
    assert said.count("done already") == 6, said
    assert ran == [["tessera", "fill-mask"]]
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.matrix
def test_the_launcher_passes_on_the_exit_code_of_a_mistake(tmp_path):
    """`deepspeed` with a misspelt key: one line from rank zero, exit code 2, no traceback, nothing made."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [
            Path(sys.executable).parent / "deepspeed",
            "--num_accelerators",
            "2",
            ROOT / "launch" / "pretrain.py",
            ROOT / "configs" / "pretrain" / "tiny_cpu.yaml",
            "engine.zero_stge=2",
            f"out={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("engine.zero_stge is unknown. Did you mean zero_stage?") == 1
    assert "Traceback" not in done.stderr + done.stdout and not (tmp_path / "run").exists()
