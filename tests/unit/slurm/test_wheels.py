"""The wheelhouse, with a small index of its own on disk: another Python's conditions, later limits, sources without a wheel."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.process.ranks import ROOT

spec = importlib.util.spec_from_file_location("wheels", ROOT / "slurm" / "wheels.py")
wheels = sys.modules["wheels"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wheels)
TARGET = wheels.Target("3.10", "manylinux_2_28_x86_64")
HERE = f"cp3{sys.version_info[1]}-cp3{sys.version_info[1]}-linux_{platform.machine()}"


def write_wheel(
    folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any"
) -> Path:
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            + "".join(f"Requires-Dist: {need}\n" for need in requires),
        )
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    for key, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(tmp_path / "index")),
        ("CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(f"PIP_{key}", value)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def house(tmp_path: Path, *needs: str, **options) -> list[str]:
    wheels.collect(tmp_path / "house", TARGET, needs, **options)
    return sorted(
        path.name.split("-py3")[0].split("-cp3")[0] for path in (tmp_path / "house").iterdir()
    )


def test_conditions_are_those_of_the_targets_python_and_of_the_extras_that_are_asked(
    index, tmp_path
):
    write_wheel(
        index,
        "a",
        "1",
        'b; python_version < "3.11"',
        'c; python_version >= "3.11"',
        'd; extra == "more"',
        'e; extra == "most"',
        'f; sys_platform == "win32"',
        "g[fast]",
    )
    for name in "bcdef":
        write_wheel(index, name, "1")
    write_wheel(index, "g", "1", 'b; extra == "fast"', 'c; extra == "slow"')
    assert house(tmp_path, "a[more]>=1") == ["a-1", "b-1", "d-1", "g-1"]


def test_a_limit_that_comes_later_takes_another_version_and_what_that_one_requires(index, tmp_path):
    write_wheel(index, "a", "1", "c<2")
    write_wheel(index, "c", "1", "d")
    write_wheel(index, "c", "2", "e")
    for name in "de":
        write_wheel(index, name, "1")
    assert house(tmp_path, "c>=1", "a") == [
        "a-1",
        "c-1",
        "d-1",
        "e-1",
    ]  # what is no longer needed does no harm


def test_what_the_cluster_has_is_left_out_with_what_it_alone_requires(index, tmp_path):
    write_wheel(index, "a", "1", "torch", "nvidia_nccl_cu13")
    write_wheel(index, "torch", "1", "b")
    assert house(tmp_path, "a", without=["torch", "nvidia-*"]) == ["a-1"]


def test_the_wheel_of_the_target_is_taken_not_that_of_this_python(index, tmp_path):
    write_wheel(index, "a", "1", tag="cp310-cp310-manylinux_2_17_x86_64.manylinux2014_x86_64")
    write_wheel(index, "a", "2", tag="cp311-cp311-manylinux_2_17_x86_64")
    write_wheel(index, "a", "3", tag="cp310-cp310-manylinux_2_34_x86_64")  # a newer glibc
    assert house(tmp_path, "a") == ["a-1"]


BACKEND = """
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, info = "{name}-1-{tag}.whl", "{name}-1.dist-info"
    with zipfile.ZipFile(folder + "/" + name, "w") as archive:
        archive.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1\\n")
        archive.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {tag}\\n")
        archive.writestr(info + "/RECORD", "")
    return name
"""


def write_source(index: Path, name: str, *, tag: str) -> None:
    """A source distribution that builds to a wheel of that tag, with nothing but itself."""
    folder = index.parent / f"{name}-1"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "backend.py").write_text(BACKEND.format(name=name, tag=tag))
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    subprocess.run(
        ["tar", "czf", str(index / f"{name}-1.tar.gz"), "-C", str(index.parent), f"{name}-1"],
        check=True,
    )


def test_a_source_without_a_wheel_is_built_if_it_is_pure(index, tmp_path):
    write_source(index, "p", tag="py3-none-any")
    write_wheel(index, "a", "1", "p")
    assert house(tmp_path, "a") == ["a-1", "p-1"]


def test_a_source_with_machine_code_is_refused_and_leaves_nothing(index, tmp_path):
    write_source(index, "q", tag=HERE)
    with pytest.raises(wheels.Refused, match="q has no wheel for the target"):
        house(tmp_path, "q")
    assert list((tmp_path / "house").iterdir()) == []


def test_own_requirements_are_those_of_pyproject_and_an_unknown_extra_is_said():
    assert any(need.startswith("deepspeed>=") for need in wheels.own_requirements([]))
    assert any(need.startswith("onnxruntime") for need in wheels.own_requirements(["onnx"]))
    with pytest.raises(wheels.Refused, match="Known: .*onnx"):
        wheels.own_requirements(["onx"])
