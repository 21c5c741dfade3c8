"""The house is in order: imports, names, style, and every shipped file loads."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from encoder.base.schema import from_mapping, parse_yaml, to_yaml
from encoder.finetune.config import read_task
from encoder.runs.config import RunConfig, read_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
PYTHON_FILES = [
    p
    for folder in ("encoder", "data_prep", "launch", "slurm", "tests", "benchmarks")
    for p in sorted((ROOT / folder).rglob("*.py"))
]
DOCUMENTS = [
    p
    for pattern in ("*.md", "docs/*.md", "slurm/*.md", "benchmarks/results/*.md")
    for p in sorted(ROOT.glob(pattern))
]


def test_rooms_import_only_downwards():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_style_is_clean():
    ruff = Path(sys.executable).parent / "ruff"
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([ruff, *words, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]


def test_no_script_bears_the_name_of_a_library():
    """A script's folder comes first on sys.path: launch/inspect.py would break torch."""
    installed = _installed_top_levels()
    stems = {p.stem for folder in ("launch", "data_prep") for p in (ROOT / folder).glob("*.py")} - {
        "__init__",
        "__main__",
    }
    assert stems & (set(sys.stdlib_module_names) | installed) == set()


def test_the_top_level_is_the_agreed_one():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in done.stdout.splitlines()}
    agreed = {
        "README.md",
        "pyproject.toml",
        "encoder",
        "data_prep",
        "launch",
        "configs",
        "tests",
        "slurm",
        "Makefile",
        "benchmarks",
        "docs",
        ".ci",
        ".gitignore",
        "LICENSE",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }
    assert top <= agreed


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_shipped_run_file_loads_and_comes_back_the_same(path):
    run = read_run(path)
    assert from_mapping(RunConfig, parse_yaml(to_yaml(run), where="round trip")) == run


def test_every_shipped_preparation_file_loads():
    from data_prep.config import PrepareConfig

    for path in sorted((ROOT / "configs" / "prep").glob("*.yaml")):
        from encoder.base.schema import read_settings

        read_settings(PrepareConfig, path)


def test_readme_names_only_files_and_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:launch|configs|docs)/[\w/]+\.(?:py|yaml|md|txt)", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake (\w+)", text)) <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short_and_its_files_are_settings(tmp_path):
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    run, task = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "first.yaml").write_text(run)
    assert read_run(tmp_path / "first.yaml").out == "runs/first"
    (tmp_path / "reviews.yaml").write_text(task)
    assert read_task(tmp_path / "reviews.yaml").out == "runs/reviews"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(path):
    """A file that is there, and a heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found), target


def _anchors(path: Path) -> set[str]:
    """Of every heading, as GitHub makes them: small letters and digits, a hyphen for each space."""
    headings = re.findall(r"^#+ (.*)$", _without_code(path.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def test_every_shell_script_passes_bash_and_shellcheck():
    patterns = ("slurm/*.sbatch", "slurm/*.sh", "tests/cluster/testbed/*.sh", ".ci/run")
    scripts = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(scripts) >= 8
    for command in (["bash", "-n"], ["shellcheck", "-x", "-P", "SCRIPTDIR"]):
        if shutil.which(command[0]):
            for script in scripts:
                done = subprocess.run([*command, script], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_pickled_or_trusted_from_afar():
    bad = re.compile(
        r"import"
        r" pickle|pickle\.load|trust_remote_code\s*=\s*True|weights_only\s*=\s*False|shell\s*=\s*True|(?<![.\w])eval\("
    )
    for path in PYTHON_FILES:
        if (ROOT / "tests") not in path.parents:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not bad.search(line), f"{path}:{number}: {line.strip()}"


def test_nothing_names_a_machine_or_a_place():
    bad = re.compile("/" + r"root/|/" + r"work/|/" + r"home/\w")
    for path in [
        *PYTHON_FILES,
        *sorted(ROOT.glob("configs/**/*.*")),
        *sorted(ROOT.glob("docs/*")),
        *DOCUMENTS,
        ROOT / "Makefile",
    ]:
        if path.suffix in (".py", ".yaml", ".md", ".txt", ".json") or path.name == "Makefile":
            found = bad.search(path.read_text())
            assert not found, f"{path}: {found}"


def _installed_top_levels() -> set[str]:
    from importlib.metadata import packages_distributions

    return {
        name
        for name, owners in packages_distributions().items()
        if not {*owners} <= {"tessera", "tessera-encoders"}
    }


def test_a_wheel_has_all_that_a_clone_has_beside_its_tests():
    """Every package, the configurations, the job scripts, the benchmarks, the licence; under a name of its own."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    listed = set(setuptools["packages"])
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for room in ("encoder", "data_prep", "launch")
        for p in ROOT.glob(f"{room}/**/__init__.py")
    }
    shipped = {f"launch.shipped.{name}" for name in ("launch", "configs", "slurm", "benchmarks")}
    assert listed == found | shipped and set(setuptools["package-dir"]) == shipped
    for package in sorted(shipped):
        folder = ROOT / setuptools["package-dir"][package]
        patterns = setuptools["package-data"].get(package, [])
        taken = (
            {p for pattern in patterns for p in folder.glob(pattern)}
            | set(folder.glob("*.py"))
            | set(folder.glob("py.typed"))
        )
        lost = [
            p
            for p in folder.rglob("*")
            if p.is_file() and p not in taken and "__pycache__" not in p.parts
        ]
        assert not lost, lost
    assert (
        project["project"]["name"] == "tessera-encoders"
        and "Apache License" in (ROOT / "LICENSE").read_text()
    )
    assert setuptools["package-data"]["*"] == ["py.typed"]
    assert all((ROOT / room / "py.typed").is_file() for room in ("encoder", "data_prep", "launch"))


def test_the_reference_of_settings_is_what_the_classes_say():
    """Every key with its type, its default and a meaning."""
    from launch.reference import pages

    for name, text in pages().items():
        empty = [
            line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")
        ]
        assert not empty, f"write a comment behind these settings: {empty}"
        assert (ROOT / "docs" / name).read_text() == text, (
            f"docs/{name} is behind: run python launch/reference.py"
        )


MOST_PARAMETERS = 8
MORE_PARAMETERS = {
    "backward": "encoder/nn/attend/flash.py: an operator's backward takes what its forward saved",
    "turn": "encoder/nn/loss_kernel.py: a Triton kernel takes pointers and numbers one by one",
}


def test_a_function_with_many_parameters_takes_a_box():
    """A frozen dataclass says what belongs together, as DataOrder of the loader does."""
    many = {}
    for path in sorted((ROOT / "encoder").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                names = [a.arg for a in given if a.arg not in ("self", "cls")]
                if len(names) > MOST_PARAMETERS:
                    many[node.name] = f"{path.relative_to(ROOT)}: {', '.join(names)}"
    allowed = {name: place for name, place in many.items() if name in MORE_PARAMETERS}
    assert many == allowed, "put what belongs together into a frozen dataclass"
    for name, place in many.items():
        assert MORE_PARAMETERS[name].startswith(place.partition(":")[0])
