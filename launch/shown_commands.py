"""Commands that are shown as a person types them, then run and timed: what launch/demo.py is told with.

1. Text
Pretraining needs plain text.
$ data-prep environment-corpus --out demo/corpus --size-mb 20
...
(4.1s)
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from encoder.base.errors import UserError
from encoder.base.units import short_seconds

COLUMNS = 100


class ShownCommands:
    """Runs commands in one folder, with the programs of this Python's environment."""

    def __init__(self, *, folder: Path, settings: Mapping[str, str]) -> None:
        """Nothing runs yet.

        folder: that the commands are typed in.
        settings: variables of the environment that the commands run with.
        """
        self.folder = folder
        self.chapters = 0
        programs = Path(sys.executable).parent
        self.env = {**os.environ, **settings, "PATH": f"{programs}:{os.environ.get('PATH', '')}"}
        # a test's or a shell's one thread is not meant for ranks, which share out the cores themselves
        self.env.pop("OMP_NUM_THREADS", None)

    def chapter(self, title: str, text: str) -> None:
        """A numbered title, and what happens there."""
        self.chapters += 1
        say(f"\n{self.chapters}. {title}")
        say(textwrap.fill(text, COLUMNS))

    def show(self, command: str) -> None:
        """The command, as it can be pasted into a shell."""
        say(f"$ {folded(command)}")

    def run(self, command: str, *, made: Path | None = None) -> None:
        """Shows and runs a command, unless `made`, its last file, is there. Raises UserError where it fails."""
        self.show(command)
        if made is not None and made.exists():
            done_already(made)
            return
        with timed():
            done = subprocess.run(shlex.split(command), env=self.env, cwd=self.folder)
            check_code(done.returncode, command)


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Says afterwards how long it took."""
    begun = time.monotonic()
    yield
    say(f"({short_seconds(time.monotonic() - begun)})")


def check_code(code: int, command: str) -> None:
    """Raises UserError for a command that failed; it has said why."""
    if code != 0:
        raise UserError(f"this command ended with exit code {code}: {command.strip()}")


def say(text: str) -> None:
    """At once, also where standard output is a file that the commands write to, too."""
    print(text, flush=True)


def done_already(made: Path) -> None:
    """Why a command is left out."""
    say(f"(done already: {made.name} is there)")


def folded(command: str) -> str:
    """A long command in several lines, which a shell takes for one; an option stays beside its value."""
    parts: list[str] = []
    for word in shlex.split(command):
        is_value = bool(parts) and parts[-1].startswith("--") and " " not in parts[-1]
        # an option takes the word behind it onto its line
        if is_value:
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = [""]
    for part in parts:
        # room for the indent and for the backslash
        if lines[-1] and len(lines[-1]) + len(part) > COLUMNS - 4:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)
