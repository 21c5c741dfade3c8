"""The work of wheelhouse.sh: wheels of all requirements, round after round, for another Python and platform.

pip download alone will not do: it judges conditions such as `python_version < "3.11"` by the Python that runs it, and stops
at a package that has no wheel. So each round fetches what the wheels of the round before require of the target, without
their own requirements, and what has no wheel is built here, if that makes a pure one.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "configs" / "constraints.txt"
OLDEST_GLIBC = 5  # manylinux_2_5 is the first of its kind
BUILDS = ("setuptools>=77", "wheel")  # pip install -e . builds with them


@dataclass(frozen=True)
class Target:
    """The cluster's Python and platform, such as 3.12 and manylinux_2_28_x86_64."""

    python: str
    platform: str

    @property
    def environment(self) -> dict[str, str]:
        """By which a requirement's condition is judged."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.machine,
            "platform_release": "",
            "platform_version": "",
        }

    @property
    def machine(self) -> str:
        found = re.fullmatch(r"manylinux_2_\d+_(\w+)", self.platform)
        assert found is not None, f"{self.platform} was checked before"
        return found[1]

    @property
    def pip_options(self) -> list[str]:
        """All platforms that the target can run: pip takes each tag by its name alone."""
        # manylinux_2_28 runs everything built for an older glibc, and three tags have names of
        # their own
        glibc = int(self.platform.split("_")[2])
        old = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
        tags = [
            f"manylinux_2_{minor}_{self.machine}" for minor in range(glibc, OLDEST_GLIBC - 1, -1)
        ]
        tags += [f"{name}_{self.machine}" for minor, name in old.items() if minor <= glibc] + [
            f"linux_{self.machine}"
        ]
        return [
            "--only-binary=:all:",
            f"--python-version={self.python}",
            "--implementation=cp",
            *(f"--abi={abi}" for abi in (f"cp{self.python.replace('.', '')}", "abi3", "none")),
            *(f"--platform={tag}" for tag in tags),
        ]


class Refused(Exception):
    """Found, needed, what to do."""


def main() -> int:
    """Parses, collects, says how to install; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="slurm/wheelhouse.sh", description=__doc__
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the wheels go")
    parser.add_argument(
        "--python",
        default="{}.{}".format(*sys.version_info),
        metavar="3.X",
        help="the cluster's Python",
    )
    parser.add_argument(
        "--platform",
        default=f"manylinux_2_28_{platform.machine()}",
        metavar="TAG",
        help="the cluster's platform",
    )
    parser.add_argument(
        "--extras", default="", metavar="NAMES", help="optional parts too, such as onnx,tensorboard"
    )
    parser.add_argument(
        "--without",
        default="",
        metavar="NAMES",
        help="what the cluster has itself, such as torch,nvidia-*",
    )
    args = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", args.python):
        parser.error(f"--python {args.python}: needed is such as 3.12")
    if not re.fullmatch(r"manylinux_2_\d+_\w+", args.platform):
        parser.error(
            f"--platform {args.platform}: needed is such as manylinux_2_28_x86_64 or"
            " manylinux_2_34_aarch64"
        )
    try:
        needs = [*own_requirements([e for e in args.extras.split(",") if e]), *BUILDS]
        collect(
            args.folder,
            Target(args.python, args.platform),
            needs,
            without=[
                canonicalize_name(n.strip()).replace("\\*", "*")
                for n in args.without.split(",")
                if n.strip()
            ],
        )
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wheels = list(args.folder.glob("*.whl"))
    print(
        f"{len(wheels)} wheels, {sum(w.stat().st_size for w in wheels) / 1e9:.2f} GB in"
        f" {args.folder}, for Python {args.python} on {args.platform}\nCopy them and the repository"
        f" to the cluster; there, in the repository:\n\n    python{args.python} -m venv .venv\n   "
        f" .venv/bin/pip install --no-index --find-links {args.folder} -c configs/constraints.txt"
        " -e ."
    )
    return 0


def collect(
    folder: Path, target: Target, needs: Iterable[str], *, without: Iterable[str] = ()
) -> None:
    """Fills the folder with what `needs` lead to. Raises Refused."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [Requirement(text) for text in needs]
    asked: dict[str, SpecifierSet] = {}
    # (package, extra or nothing) whose requirements are known
    walked: set[tuple[str, str]] = set()
    # a round: fetch what is wanted, then ask those wheels what they require of the target
    while wanted:
        for pattern in without:
            wanted = [n for n in wanted if not fnmatch(canonicalize_name(n.name), pattern)]
        # all that was asked of a package so far must hold
        for need in wanted:
            name = canonicalize_name(need.name)
            asked[name] = asked.get(name, SpecifierSet()) & need.specifier

        # a version fetched earlier may be too old or too new for what was asked since
        have = wheels_by_name(folder)
        for name in {canonicalize_name(need.name) for need in wanted} & set(have):
            if not asked[name].contains(parse_wheel_filename(have[name].name)[1], prereleases=True):
                have.pop(name).unlink()  # what was asked later does not take this version
                walked = {known for known in walked if known[0] != name}
        names = dict.fromkeys(canonicalize_name(need.name) for need in wanted)
        fetch(folder, target, {name: asked[name] for name in names if name not in have})
        have, following = wheels_by_name(folder), []
        # a package's requirements are followed once, and those of each of its extras
        for need in wanted:
            name = canonicalize_name(need.name)
            for extra in ("", *need.extras):
                if (name, extra) not in walked:
                    walked.add((name, extra))
                    following += requirements_of(have[name], target, extra)
        wanted = following


def own_requirements(extras: Iterable[str]) -> list[str]:
    """Of pyproject.toml, with some of its optional parts. Raises Refused for a part that is not there."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in parts]:
        raise Refused(f"there is no extra {unknown[0]}. Known: {', '.join(parts)}.")
    needs = list(project["dependencies"])
    for extra in extras:
        needs += parts[extra]
    return needs


def fetch(folder: Path, target: Target, needs: dict[str, SpecifierSet]) -> None:
    """The wheels of some packages, without what they require. Raises Refused."""
    needs = dict(needs)
    while needs:
        print(f"fetching {len(needs)}: {', '.join(needs)}", flush=True)
        words = [f"{name}{specifier}" for name, specifier in needs.items()]
        done = pip(
            "download",
            "--dest",
            folder,
            "--no-deps",
            "--constraint",
            CONSTRAINTS,
            *target.pip_options,
            *words,
        )
        if done.returncode == 0:
            return
        # pip names the package without a wheel: it is built here, the others are fetched again
        absent = re.search(
            r"(?:No matching distribution found for|Cannot install) ([A-Za-z0-9_.-]+)", done.stderr
        )
        name = canonicalize_name(absent[1]) if absent else ""
        if name not in needs:
            raise Refused(f"pip could not fetch them: {' '.join(done.stderr.split())[-400:]}")
        build(folder, name, needs.pop(name))


def build(folder: Path, name: str, specifier: SpecifierSet) -> None:
    """A pure wheel of a package that has none for the target. Raises Refused where it comes out for this machine alone."""
    print(f"building {name}: it has no wheel", flush=True)
    before = set(folder.glob("*.whl"))
    done = pip(
        "wheel",
        "--wheel-dir",
        folder,
        "--no-deps",
        "--constraint",
        CONSTRAINTS,
        f"{name}{specifier}",
    )
    made = set(folder.glob("*.whl")) - before
    if done.returncode or len(made) != 1:
        raise Refused(
            f"{name} has no wheel for the target and cannot be built here:"
            f" {' '.join(done.stderr.split())[-400:]}. Build it on the cluster, put it into"
            f" {folder}, and run this again."
        )
    wheel = made.pop()
    # a wheel with compiled code is for this machine
    if not wheel.name.endswith("-none-any.whl"):
        wheel.unlink()
        raise Refused(
            f"{name} has no wheel for the target, and one built here would hold this machine's"
            f" code. Build it on the cluster, put it into {folder}, and run this again; or leave it"
            f" out: --without {name}."
        )


def requirements_of(wheel: Path, target: Target, extra: str) -> list[Requirement]:
    """What a wheel requires of the target, for itself or for one of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(
            n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)
        )
        lines = (
            Parser().parsestr(archive.read(metadata).decode("utf-8")).get_all("Requires-Dist", [])
        )
    found = []
    for line in lines:
        need = Requirement(line)
        if need.marker is None:
            holds = not extra
        else:
            # of an extra, what is required without it, too, is known from the package itself
            holds = need.marker.evaluate({**target.environment, "extra": extra}) and (
                not extra or not need.marker.evaluate({**target.environment, "extra": ""})
            )
        if holds:
            found.append(need)
    return found


def wheels_by_name(folder: Path) -> dict[str, Path]:
    """The wheels that are there, by package."""
    return {str(parse_wheel_filename(path.name)[0]): path for path in sorted(folder.glob("*.whl"))}


def pip(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs pip; DeepSpeed's build makes no operators, so that its wheel is pure."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "DS_BUILD_OPS": "0"},
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
