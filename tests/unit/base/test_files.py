"""Folders that are whole or absent, also where a process was killed while it renamed."""

from __future__ import annotations

import os

import pytest

from encoder.base import files
from encoder.base.files import atomic_folder, meant_beside, write_atomic, write_json


def written(out, content: str) -> None:
    with atomic_folder(out, mark="mark") as part:
        (part / "mark").write_text(content)


def killed_after_renames(out, count: int) -> None:
    """A process that writes `out` anew and ends as if killed after so many renames."""
    child = os.fork()
    if child == 0:
        rename, done = os.rename, []

        def renamed(*paths):
            if len(done) == count:
                os._exit(9)
            rename(*paths)
            done.append(paths)

        files.os.rename = renamed
        try:
            written(out, "2")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("renames", [0, 1])
def test_after_a_kill_the_next_call_has_the_earlier_folder_and_nothing_beside_it(tmp_path, renames):
    out = tmp_path / "out"
    written(out, "1")
    killed_after_renames(out, renames)
    assert out.exists() == (renames == 0) and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, mark="mark"):
        raise KeyboardInterrupt
    assert (out / "mark").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["out"]
    written(out, "3")
    assert (out / "mark").read_text() == "3"


def test_what_a_living_process_or_another_host_writes_beside_is_left_alone(tmp_path):
    alive = [
        tmp_path / f".out.{files._HOST}.{os.getppid()}.part",
        tmp_path / ".out.elsewhere.1.old",
        tmp_path / ".out.2.part",
    ]
    for folder in alive:
        folder.mkdir()
    written(tmp_path / "out", "1")
    assert sorted(tmp_path.iterdir()) == sorted([*alive, tmp_path / "out"])


@pytest.mark.parametrize("way", ["open", "replace"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch, way):
    def refusing(*names, **_):
        raise PermissionError(13, "Permission denied", str(names[0]))

    if way == "open":
        monkeypatch.setattr("builtins.open", refusing)
    else:
        # as os.replace does, with the name that it gives as well
        def replace(old, new):
            raise PermissionError(13, "Permission denied", str(old), None, str(new))

        monkeypatch.setattr(os, "replace", replace)
    for write, content in ((write_atomic, "x"), (write_json, {})):
        with pytest.raises(PermissionError) as caught:
            write(tmp_path / "a.yaml", content)
        assert caught.value.filename == str(tmp_path / "a.yaml")
        assert ".part" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    def refusing(path, *_, **options):
        if not options.get("exist_ok"):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refusing)
    with pytest.raises(PermissionError) as caught, atomic_folder(tmp_path / "out", mark="m"):
        pass
    assert caught.value.filename == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("labs.csv", " Did you mean {}/lab.csv?"),
        ("lab.csvs", " Did you mean {}/lab.csv?"),
        ("rums", ""),
        ("rums/own/x.csv", " Did you mean {}/runs/own/x.csv?"),
        ("rums/other/x.csv", ""),
        ("zzz.csv", ""),
    ],
)
def test_a_misspelt_name_of_a_path_is_told_with_the_path_that_is_there(tmp_path, asked, meant):
    (tmp_path / "runs" / "own").mkdir(parents=True)
    for name in ("lab.csv", "labs.md", "runs/own/x.csv"):
        (tmp_path / name).touch()
    assert meant_beside(tmp_path / asked, endings=(".csv",)) == meant.format(tmp_path)


def test_a_folder_is_not_meant_by_a_file_nor_by_a_hidden_name(tmp_path):
    (tmp_path / "own").touch()
    (tmp_path / ".own4").mkdir()
    assert meant_beside(tmp_path / "own3", folders=True) == ""
    (tmp_path / "own2x").mkdir()
    assert meant_beside(tmp_path / "own2", folders=True) == f" Did you mean {tmp_path}/own2x?"
