"""Lines for people: rank zero speaks, the others are silent; warnings are said once, in any locale."""

from __future__ import annotations

import codecs
import errno
import os
import select
import sys
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class _State:
    """Of this process."""

    speaks: bool = True
    said: set[str] = field(default_factory=set)  # warnings
    survives: bool = False


_state = _State()

# what our own tables and sentences are drawn with, in plain letters
_PLAIN = str.maketrans(
    {
        "─": "-",
        "━": "-",
        "│": "|",
        "┃": "|",
        "┌": "+",
        "┐": "+",
        "└": "+",
        "┘": "+",
        "├": "+",
        "┤": "+",
        "┬": "+",
        "┴": "+",
        "┼": "+",
        "╭": "+",
        "╮": "+",
        "╯": "+",
        "╰": "+",
        "═": "=",
        "║": "|",
        "█": "#",
        "▏": "#",
        "▌": "#",
        "░": ".",
        "·": "*",
        "•": "*",
        "–": "-",
        "—": "-",
        "−": "-",
        "→": "->",
        "←": "<-",
        "×": "x",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "…": "...",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "µ": "u",
        "√": "sqrt",
        "✓": "ok",
        "✗": "x",
    }
)
# the name of the error handler, for open() and reconfigure()
READABLE = "tessera.readable"
# nobody reads any more: a closed pipe, a terminal that hung up
_LOST = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


def _readable(error: UnicodeError) -> tuple[str, int]:
    """A character that the stream cannot show: a plain one that looks like it, else its number, as in \\u65e5."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    plain = found.translate(_PLAIN)
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(READABLE, _readable)


def readable_streams() -> None:
    """Standard output and error never fail for a character from here on, whatever locale there is."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors in (
            "strict",
            "surrogateescape",
            "backslashreplace",
        ):
            stream.reconfigure(errors=READABLE)


def print_line(line: str, stream: TextIO, *, survive: bool = False) -> None:
    """One line, flushed at once (a log file is read while it grows); a character that does not fit is no error.

    survive: a stream that nobody reads any more is let go; else its OSError is raised.
    """
    try:
        try:
            print(line, file=stream, flush=True)
        except UnicodeEncodeError:
            # a stream whose error handler was not set: the same replacement by hand
            encoding = stream.encoding or "ascii"
            print(line.encode(encoding, READABLE).decode(encoding), file=stream, flush=True)
    except (OSError, ValueError) as error:
        # ValueError: the stream is closed
        lost = isinstance(error, ValueError) or error.errno in _LOST
        if not (lost and (survive or _state.survives)):
            raise
        let_go(stream)


def outlive_readers() -> None:
    """From now on no line fails for want of a reader: a run goes on, and saves, when its terminal or its pipe is gone."""
    _state.survives = True


def speak_on(first_rank: bool) -> None:
    """Called once, when the rank is known: only rank zero speaks from then on."""
    _state.speaks = first_rank


def say(line: str = "") -> None:
    """One line on standard output, rank zero only."""
    if _state.speaks:
        print_line(line, sys.stdout)


def note(line: str) -> None:
    """One line on standard error, rank zero only: what a person who waits wants to know."""
    if _state.speaks:
        print_line(line, sys.stderr, survive=True)


def warn_once(line: str) -> None:
    """A warning on standard error, rank zero only, the same text only once in a process."""
    if _state.speaks and line not in _state.said:
        _state.said.add(line)
        print_line(f"warning: {line}", sys.stderr)


def forget_warnings() -> None:
    """What was said once may be said again: another run begins in this process."""
    _state.said.clear()


def reader_has_left(stream: TextIO) -> bool:
    """Whether nobody reads the stream any more, as after `| head`, or when its terminal hung up."""
    try:
        handle = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file
        return False
    poll = select.poll()
    poll.register(handle, 0)
    return any(
        event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)
    )


def let_go_of_lost_streams() -> None:
    """What nobody reads any more goes nowhere, without an error."""
    for stream in (sys.stdout, sys.stderr):
        if reader_has_left(stream):
            let_go(stream)


def flush_output() -> None:
    """What standard output still holds is written. Raises OSError, but not in a run that outlives its readers."""
    if _state.survives:
        let_go_unless_written(sys.stdout)
    elif sys.stdout:
        sys.stdout.flush()


def let_go_unless_written(stream: TextIO | None) -> None:
    """What a stream still holds is written, or given up where that fails, as on a full disk."""
    if not stream:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        let_go(stream)


def let_go(stream: TextIO) -> None:
    """What a stream still holds, and is given from now on, goes nowhere; else Python would try again when it ends."""
    try:
        handle = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file
        return

    # the same file number now leads to /dev/null, also for libraries that hold it
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, handle)
    os.close(null)
