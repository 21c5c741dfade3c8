"""What commands print survives every locale and every file name, and what they write is UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from encoder.base.files import write_json
from encoder.base.log import READABLE

ROOT = Path(__file__).resolve().parents[3]
LOCALES = {
    "ascii streams": {"PYTHONIOENCODING": "ascii"},
    "latin-1 streams": {"PYTHONIOENCODING": "iso8859-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
# the hardest of all: neither a file's name nor what is printed may have a letter beyond ASCII
LOCALES["C and ascii streams"] = {**LOCALES["C"], **LOCALES["ascii streams"]}


# all commands in one process, which imports what they share once
ALL = r"""
import importlib, os, sys, traceback
name, odd, where = "l\xe4ufe-\u65e5\u672c", os.fsdecode(b"caf\xe9"), os.fsdecode(os.fsencode(os.getcwd()) + b"/caf\xe9.yaml")
for command, *words in (
        ("launch.plan", "run.yaml", "out=" + name), ("launch.plan", where), ("launch.plan", "run.yaml", "out=" + odd),
        ("launch.plan", "run.yaml", "name=" + name, name + "=1"), ("launch.plan", name + ".yaml"), ("launch.plan", "--" + odd),
        ("launch.export_hf", name, odd), ("launch.report", odd), ("launch.doctor", odd), ("launch.grow", odd, name),
        ("launch.pretrain", name), ("launch.pretrain", odd), ("launch.bench", name), ("launch.fill_mask", odd, "[MASK]"),
        ("data_prep.cli", "report", odd), ("data_prep.cli", "plan", name), ("data_prep.cli", "verify", name),
        ("data_prep.cli", odd)):
    try:
        code = importlib.import_module(command).main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code not in (0, 2):
        print("CODE", code, command, ascii(words), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "locale",
    [
        name if name == "C and ascii streams" else pytest.param(name, marks=pytest.mark.slow)
        for name in LOCALES
    ],
)
def test_no_command_fails_for_a_letter_that_the_terminal_lacks(tmp_path, locale):
    """Names that are not ASCII, and bytes that are no UTF-8, in settings, paths and words."""
    yaml = (ROOT / "configs" / "pretrain" / "tiny_cpu.yaml").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        yaml.replace("name: tiny", "name: tiny-日本-─"), encoding="utf-8"
    )
    with open(os.fsencode(str(tmp_path)) + b"/caf\xe9.yaml", "w", encoding="utf-8") as file:
        file.write(yaml)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "PYTHON"))
    }
    done = subprocess.run(
        [sys.executable, "-c", ALL],
        cwd=tmp_path,
        capture_output=True,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **LOCALES[locale]},
    )
    said = done.stderr.decode("utf-8", "replace")
    assert b"Traceback" not in done.stderr and "CODE" not in said, said
    # in the C locale no file can have the name of that run folder: a sentence says so
    planned = 1 if locale.startswith("C") else 2
    assert said.count("error: ") >= 12 and done.stdout.count(b"run folder") >= planned


def test_lines_are_drawn_with_plain_letters_where_the_terminal_has_no_others():
    assert "│ 3 × 日".encode("ascii", READABLE) == b"| 3 x \\u65e5"
    assert "│ × é".encode("latin-1", READABLE) == b"| \xd7 \xe9"
    assert "caf\udce9".encode("utf-8", READABLE) == b"caf\\udce9"


def test_a_name_that_is_no_utf8_comes_back_from_a_json_file(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\udce9", "other": "日本"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "caf\udce9", "other": "日本"} and "日本" in text
