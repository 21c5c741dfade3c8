"""What the demo is told with: commands that can be pasted, a ledger that must go on, and how it ends."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from encoder.base.errors import UserError
from encoder.runs.config import read_run
from encoder.tools.report.compare import compare_ledgers, keep_ledger
from launch import demo
from launch.shown_commands import COLUMNS, ShownCommands, folded
from launch.smaller_demo import ROOT, RUN_FILE, preparation_settings, run_settings

LONG = (
    f"tessera fill-mask 'my demo'/hf {shlex.join(demo.QUESTIONS)} --json 'my demo'/answers.json"
    " out=$HOME"
)


def test_a_long_command_is_pasted_as_several_lines_that_a_shell_takes_for_one():
    text = folded(LONG)
    assert len(text.splitlines()) > 3 and all(len(line) <= COLUMNS for line in text.splitlines())
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-1] == shlex.split(LONG)


def test_a_command_is_shown_then_run_in_its_folder_and_timed(tmp_path, capfd):
    shell = ShownCommands(folder=tmp_path, settings={"WORD": "hello"})
    shell.chapter("First", "What happens.")
    shell.run("bash -c 'echo $WORD > made'", made=tmp_path / "made")
    said = capfd.readouterr().out
    assert said.startswith(
        "\n1. First\nWhat happens.\n$ bash -c 'echo $WORD > made'\n("
    ) and said.endswith("s)\n")
    assert (tmp_path / "made").read_text() == "hello\n"
    shell.run("bash -c 'exit 1'", made=tmp_path / "made")
    assert "(done already: made is there)" in capfd.readouterr().out


def test_a_command_that_fails_ends_the_demo_with_2_and_its_own_code(tmp_path, capfd, monkeypatch):
    shell = ShownCommands(folder=tmp_path, settings={})
    with pytest.raises(UserError, match="this command ended with exit code 7: bash -c 'exit 7'"):
        shell.run("bash -c 'exit 7'")
    monkeypatch.setattr(demo, "tell", lambda out, shrink: shell.run("bash -c 'exit 7'"))
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    assert "error: this command ended with exit code 7" in capfd.readouterr().err


def test_ctrl_c_ends_the_demo_with_130_and_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    def stopped(out: Path, *, shrink: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "tell", stopped)
    assert demo.main(["--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "\nstopped; make demo goes on from here\n"


def test_a_ledger_that_does_not_go_on_from_the_killed_one_is_refused(tmp_path):
    lines = [{"step": 1, "batch": "a"}, {"step": 2, "batch": "b"}]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep_ledger(tmp_path, tmp_path / "killed.json")
    assert json.loads((tmp_path / "killed.json").read_text()) == {"steps": 2, "ledger": lines}
    lines[1]["batch"] = "c"
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        SystemExit, match="the ledger of the resumed run does not continue the first one's"
    ):
        compare_ledgers(tmp_path, tmp_path / "killed.json")


def test_the_usual_demo_needs_no_settings_but_its_run_folder():
    """The configurations name demo/ themselves, so that the commands are short."""
    assert preparation_settings(ROOT / "demo") == []
    assert run_settings(ROOT / "demo", shrink=1.0) == ["out=demo/run"]


def test_a_smaller_demo_elsewhere_has_its_own_shards_and_a_tenth_of_each_amount(tmp_path):
    settings = run_settings(tmp_path, shrink=10.0)
    small, whole = read_run(RUN_FILE, settings), read_run(RUN_FILE)
    assert [10 * p.tokens for p in small.phases] == [p.tokens for p in whole.phases]
    assert 10 * small.checkpoints.every_tokens == whole.checkpoints.every_tokens
    assert 10 * small.evaluation.every_tokens == whole.evaluation.every_tokens
    assert (small.evaluation.rows, whole.evaluation.rows) == (4, 32)
    assert [p.batch_tokens for p in small.phases] == [p.batch_tokens for p in whole.phases]
    assert all(s.path.startswith(f"{tmp_path}/shards/") for s in small.all_sources())
    assert preparation_settings(tmp_path)[0] == f"root={tmp_path}/corpus"
