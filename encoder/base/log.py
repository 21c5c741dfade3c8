"""Lines for people: rank zero speaks, the others are silent, and warnings are said once."""

from __future__ import annotations

import sys

_state = {"speaks": True, "said": set()}


def speak_on(first_rank: bool) -> None:
    """Called once, when the rank is known: only rank zero speaks from then on."""
    _state["speaks"] = first_rank


def say(line: str = "") -> None:
    """One line on standard output, rank zero only, flushed at once (a log file is read while it grows)."""
    if _state["speaks"]:
        print(line, flush=True)


def warn_once(line: str) -> None:
    """A warning on standard error, rank zero only, the same text only once in a process."""
    if _state["speaks"] and line not in _state["said"]:
        _state["said"].add(line)
        print(f"warning: {line}", file=sys.stderr, flush=True)
