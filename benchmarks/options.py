"""The words of the bench's command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from encoder.base.errors import nearest


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """'1,2,4' -> [1, 2, 4]."""

    def read(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",")]

    read.__name__ = f"list of {getattr(kind, '__name__', 'words')}"
    return read


def share(text: str) -> float:
    """'0.15' -> 0.15, between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def several_of(*choices: str) -> Callable[[str], list[str]]:
    """'a,b' -> ['a', 'b'], each one of the choices."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in choices:
                raise argparse.ArgumentTypeError(
                    f"{word!r} is unknown. {nearest(word, [*choices])}"
                )
        return words

    return read
