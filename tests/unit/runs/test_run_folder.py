"""Nothing that a command did not write itself is written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.base.errors import ConfigError, UserError
from encoder.base.files import refuse_foreign
from encoder.base.schema import to_yaml
from encoder.runs.config import read_run
from encoder.runs.foreign_files import EDITED, check_folder, write_run_file
from launch import plan

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "tests" / "helpers" / "three_phases.yaml"


def test_a_run_file_of_a_persons_own_is_not_replaced_by_the_resolved_one(
    tmp_path, capsys, monkeypatch
):
    mine = tmp_path / "exp1" / "run.yaml"
    mine.parent.mkdir()
    mine.write_text("# mine\n" + RUN.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(
        ConfigError, match="no run wrote it.*Keep your run file elsewhere, or set another out"
    ):
        check_folder(mine.parent)
    assert plan.main([str(mine), f"out={mine.parent}"]) == 2
    monkeypatch.chdir(mine.parent)
    for out in (".", ""):
        assert plan.main([str(mine), f"out={out}"]) == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == 3 and not said.out and "Traceback" not in said.err


@pytest.mark.parametrize(
    "names, allowed",
    [
        ([], True),
        (["train.log", ".lock", "slurm-12.out"], True),
        (["errors", "hangs", "slurm"], True),
        (["a.py"], False),
        (["photos"], False),
        (["done.json"], False),
        (["incarnations", "a.py"], True),
        (["checkpoints", "notes.md"], True),
    ],
)
def test_a_run_begins_only_where_nothing_of_another_kind_lies(tmp_path, names, allowed):
    for name in names:
        (tmp_path / name).mkdir()
    if allowed:
        check_folder(tmp_path)
    else:
        with pytest.raises(ConfigError, match=f"holds {names[0]}, and no run.*Set another out"):
            check_folder(tmp_path)


def test_settings_that_a_person_edited_in_a_run_folder_are_put_aside(tmp_path):
    run, other = read_run(RUN, ["out=x"]), read_run(RUN, ["out=x", "tracking.print_every_steps=77"])
    write_run_file(tmp_path, run)
    write_run_file(tmp_path, other)  # its own: no person has touched it
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    edited = f"{to_yaml(other)}# why 77: see the notebook\n"
    (tmp_path / "run.yaml").write_text(edited, encoding="utf-8")
    write_run_file(tmp_path, run)
    assert (tmp_path / EDITED).read_text(encoding="utf-8") == edited
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == to_yaml(run)


def test_a_picture_or_table_of_somebody_else_is_not_written_over(tmp_path, capsys):
    from benchmarks.command import bench
    from launch import fill_mask

    foreign = tmp_path / "photo.png"
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n a photo")
    assert plan.main([str(RUN), f"out={tmp_path}/run", "--png", str(foreign)]) == 2
    assert fill_mask.main([str(tmp_path), "[MASK]", "--json", str(foreign)]) == 2
    with pytest.raises(UserError, match="this command did not write it"):
        bench(["step", "--json", str(foreign), "--quick"])
    assert foreign.read_bytes().endswith(b"a photo")
    assert capsys.readouterr().err.count("this command did not write it") == 2
    refuse_foreign(tmp_path / "new", ours=lambda _: False)
