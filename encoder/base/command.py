"""How a command is read and how it ends: 0 done, 2 a mistake in the input (one line on standard error), 130 stopped by Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from encoder.base.errors import ConfigError, UserError, nearest, why_unreadable
from encoder.base.log import (
    flush_output,
    let_go,
    let_go_unless_written,
    print_line,
    readable_streams,
    reader_has_left,
)
from encoder.base.paths import expand_path, local_path
from encoder.base.untrusted import number_in_name

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT, as a shell says it
MOST_COUNT = 2**31 - 1  # what native code takes for a number of things
_UNKNOWN = "unrecognized arguments: "  # argparse's


class CommandLine(argparse.ArgumentParser):
    """argparse with mistakes as one line and exit code 2, and options spelt out: a later one must not change what --sourc means."""

    def __init__(self, **settings: Any) -> None:
        readable_streams()  # here, since every command begins here

        typed = Path(sys.argv[0]).name if sys.argv else ""
        if typed.startswith("tessera ") and settings.get("description"):
            # under a verb the file's own examples are the verb's
            words = re.sub(r"\bpython launch/\w+\.py", typed, settings["description"])
            settings = {**settings, "description": words}
        super().__init__(
            **{
                "allow_abbrev": False,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                **settings,
            }
        )

        # of every option and place with type=Path, also of those of groups
        self.register("type", Path, _path)

    def takes_model_and_out(self) -> None:
        """SOURCE, any stored model, and OUT, the weights folder that is made of it."""
        self.add_argument(
            "source",
            type=Path,
            metavar="SOURCE",
            help="a run folder, a checkpoint, a weights folder or a Hugging Face folder",
        )
        self.add_argument(
            "out",
            type=Path,
            metavar="OUT",
            help="the weights folder to write; replaced only if it is an earlier weights folder",
        )

    def takes_overrides(self, *, example: str) -> None:
        """key=value words over a file's settings, for a command that launchers start."""
        self.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key=value",
            help=f"settings put over the file's, for example {example}",
        )
        # the deepspeed launcher adds it
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Found, needed, where to read on."""
        if message.startswith(_UNKNOWN):
            message = self.unknown(message.removeprefix(_UNKNOWN).split())
        if not message.endswith((".", "?")):
            message += "."
        sys.exit(complain(f"{message} See {self.prog} --help."))

    def unknown(self, words: list[str]) -> str:
        """About words that are no option and have no place: the option they may be."""
        word = next((w for w in words if w.startswith("-")), words[0])
        option, equals, _ = word.partition("=")

        settings = any(action.dest == "overrides" for action in self._actions)
        if settings and equals and word.startswith("--"):
            return f"{option} is unknown. Settings are given without dashes: {word.lstrip('-')}"

        known: list[str] = []
        for action in self._actions:
            if action.help != argparse.SUPPRESS:
                known += action.option_strings
        return f"{option} is unknown. {nearest(option, known)}"


def as_typed(verb: str, *words: object) -> str:
    """A command of ours as it can be pasted into a shell: `tessera VERB WORDS`, quoted where needed."""
    return shlex.join(["tessera", verb, *map(str, words)])


def _path(text: str) -> Path:
    """A path with ~, $NAME and ${NAME} filled in, which a shell leaves in quotes and behind an equals sign."""
    try:
        if not re.match("hf:/", text):
            local_path(text)
        if not text:
            return expand_path("")
        return expand_path(Path(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def place(text: str) -> str:
    """The type of an argument that is a path, a glob or a URL: ~, $NAME and ${NAME} are filled in."""
    try:
        return expand_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def count(text: str) -> int:
    """The type of an option that is a whole number of at least 1, and fits 31 bits."""
    number = number_in_name(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; needed: a whole number of at least 1")
    if number > MOST_COUNT:
        raise argparse.ArgumentTypeError(f"{text}; needed: at most {MOST_COUNT:,}")
    return number


def run_command(body: Callable[[], int | None], *, stopped: str = "stopped") -> int:
    """Runs a command's body and returns its exit code; mistakes, full disks and Ctrl-C become one line, never a traceback."""
    try:
        code = body() or 0
        # an error of what is still buffered is told here, not when Python ends
        flush_output()
        return code
    except BrokenPipeError as error:
        # a pipe of the command's own, not standard output: a mistake like others
        if not reader_has_left(sys.stdout):
            return complain(str(as_user_error(error)))
        let_go(sys.stdout)
        return 141  # 128 + SIGPIPE, as a shell says it
    except (UserError, OSError) as error:
        let_go_unless_written(sys.stdout)
        return complain(str(as_user_error(error)))
    except UnicodeEncodeError as error:
        # a file's name; what is printed always fits
        return complain(
            f"the locale's encoding, {error.encoding}, has no letters for {error.object[:200]!r}. "
            "Needed: names of files that it can spell. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
        )
    except KeyboardInterrupt:
        print_line(stopped, sys.stderr, survive=True)
        return INTERRUPTED


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While it lasts no garbage is looked for. What is there when torch has come is not looked through again.

    Imports make objects that stay, 150,000 of them torch's: looking for garbage among them took a tenth of a start's time.
    Nothing but imports may stand in it: garbage that is there when torch comes would stay.
    """
    on = gc.isenabled()
    torch_was_here = "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if not torch_was_here:
            gc.freeze()
        if on:
            gc.enable()


def complain(text: str) -> int:
    """`error: TEXT` on standard error; returns exit code 2."""
    print_line(f"error: {' '.join(text.split())}", sys.stderr, survive=True)
    return 2


def as_user_error(error: UserError | OSError) -> UserError:
    """The error itself, or a file's problem as found, needed, what to do."""
    if isinstance(error, UserError):
        return error
    place = ""
    if error.filename:
        place = f"{os.fspath(error.filename)}: "
    if isinstance(error, PermissionError) and _may_not_be_read(error.filename):
        return UserError(f"{place}{why_unreadable(error)}")
    return UserError(
        f"{place}{error.strerror or error}. "
        "Needed: a place that can be read and written, with room. Mend it, or name another."
    )


def _may_not_be_read(name: Any) -> bool:
    """Whether what is there may not be read, or not be looked at: most likely an input."""
    if not isinstance(name, (str, bytes, os.PathLike)):
        return False
    if os.path.lexists(name):
        return not os.access(name, os.R_OK)
    # a folder that may not be entered hides what is in it
    return not os.access(os.path.dirname(os.fspath(name)) or os.curdir, os.X_OK)
