"""The words of the bench's command line: mistakes are one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from encoder.base.command import complain
from encoder.base.errors import nearest


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, with the nearest word that it knows."""

    def error(self, message: str) -> NoReturn:
        """Found, needed."""
        unknown = [word.split("=")[0] for word in message.removeprefix("unrecognized arguments: ").split()] \
            if message.startswith("unrecognized arguments: ") else []
        if unknown:
            unknown = [word for word in unknown if word.startswith("-")] or unknown
            known = [word for action in self._actions for word in action.option_strings]
            message = f"{' '.join(unknown)} is unknown. {nearest(unknown[0], known)}"
        sys.exit(complain(message))


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; needed: a whole number of at least 1")
    return int(text)


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """'1,2,4' -> [1, 2, 4]."""
    def read(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",")]
    read.__name__ = f"list of {getattr(kind, '__name__', 'words')}"
    return read


def several_of(*choices: str) -> Callable[[str], list[str]]:
    """'a,b' -> ['a', 'b'], each one of the choices."""
    def read(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"{word!r} is unknown. {nearest(word, [*choices])}")
        return words
    return read
