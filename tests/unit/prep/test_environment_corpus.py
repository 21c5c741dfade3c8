"""The corpus from a Python environment, on a made-up one."""

from __future__ import annotations

import json
import sysconfig

import pytest

from data_prep.environment_corpus import _paragraphs, _without_licence
from tests.helpers.prep import bytes_of, run

SENTENCE = (
    "This function reads the file of {} and returns all of its lines in a list that the caller may"
    " change."
)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A standard library and site-packages with good files and with files that must be left out."""
    library, packages = tmp_path / "lib", tmp_path / "lib/site-packages"
    module = f'''"""{SENTENCE}\n\n{SENTENCE}\n"""\n\n\ndef read(path):\n    """{SENTENCE}"""\n    return open(path)\n'''
    files = {
        library / "good.py": module.format(1, 2, 3),
        packages / "pack/one.py": module.format(4, 5, 6),
        packages / "pack/copy.py": module.format(4, 5, 6),
        packages / "pack/two.py": module.format(7, 8, 9),
        packages / "pack/three.py": module.format(10, 11, 12),
        packages / "pack/made.py": "# auto-generated, do not edit\n" + module.format(13, 14, 15),
        packages / "pack/table.py": "x = [" + ", ".join(map(str, range(2000))) + "]\n",
        packages / "pack/tests/test_one.py": module.format(16, 17, 18),
        packages / "encoder/own.py": module.format(19, 20, 21),
        packages / "__editable___own_finder.py": module.format(22, 23, 24),
        packages / "pack-1.0.dist-info/METADATA": (
            "Name: pack\n\n" + "\n\n".join(SENTENCE.format(i) for i in range(30, 34))
        ),
        packages / "pack/LICENSE.txt": SENTENCE.format(40) * 5,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(
        sysconfig,
        "get_paths",
        lambda: {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)},
    )
    return packages


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_code_and_prose_come_from_different_files_and_bad_files_are_left_out(
    environment, tmp_path, capsys
):
    assert run("environment-corpus", "--out", tmp_path / "out", "--size-mb", "0.0015") == 0
    code, prose = (read(tmp_path / f"out/{name}.jsonl") for name in ("code", "prose"))
    names = [d["source"] for d in code + prose]
    assert len(set(names)) == len(names) and all(set(d) == {"text", "source"} for d in code + prose)
    assert set(names) <= {
        "python/good.py",
        "pack/one.py",
        "pack/copy.py",
        "pack/two.py",
        "pack/three.py",
        "pack-1.0.dist-info/METADATA",
    }
    assert "pack-1.0.dist-info/METADATA" in names and code and str(tmp_path) not in "".join(names)
    assert all("def read" in d["text"] for d in code) and not any(
        "def read" in d["text"] for d in prose
    )
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["sources"]["code"]["documents"] == len(code)


def test_the_corpus_is_the_same_bytes_and_not_made_twice(environment, tmp_path, capsys):
    for name in ("one", "two", "one"):
        assert run("environment-corpus", "--out", tmp_path / name, "--size-mb", "0.0015") == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert "made before" in capsys.readouterr().out


def test_an_environment_with_far_less_text_than_asked_for_is_refused_and_leaves_nothing_that_counts_as_made(
    environment, tmp_path, capsys
):
    assert run("environment-corpus", "--out", tmp_path / "out", "--size-mb", "1") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "MB of code; needed: 50% of the 0.5 MB asked for" in said and "--size-mb" in said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_only_paragraphs_that_read_as_english_are_prose():
    text = "\n\n".join(
        [
            SENTENCE.format("x"),
            ">>> f(1)\n2",
            "Parameters\n----------\nx : int\n    The value of it.",
            "Short one.",
            "    indented code that is long enough to be a sentence of the file.",
            ":param x: the value that is given to the function and to the other one.",
            (
                "See ``name`` and :class:`~a.Name` in the [guide](http://x.y) for what this is and"
                " does."
            ),
        ]
    )
    assert list(_paragraphs(text)) == [
        SENTENCE.format("x"),
        "See name and a.Name in the guide for what this is and does.",
    ]


def test_a_first_comment_about_copyright_goes_and_another_stays():
    assert (
        _without_licence("# Copyright 2020 X\n# All rights reserved.\n\nimport os\n")
        == "import os\n"
    )
    assert _without_licence("# What this does\nimport os\n") == "# What this does\nimport os\n"
