"""How a command ends: 0 done, 2 a mistake in the input (one line on standard error), 130 stopped by Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from encoder.base.errors import UserError


def run_command(body: Callable[[], int | None], *, stopped: str = "stopped") -> int:
    """Runs a command's body and returns its exit code; mistakes, full disks and Ctrl-C become one line, never a traceback."""
    try:
        return body() or 0
    except (UserError, OSError) as error:
        return complain(str(as_user_error(error)))
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr, flush=True)
        return 130


def complain(text: str) -> int:
    """`error: TEXT` on standard error; returns exit code 2."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return 2


def as_user_error(error: UserError | OSError) -> UserError:
    """The error itself, or a file's problem as found, needed, what to do."""
    if isinstance(error, UserError):
        return error
    place = f"{os.fspath(error.filename)}: " if error.filename else ""
    return UserError(f"{place}{error.strerror or error}. "
                     "Needed: a place that can be read and written, with room. Mend it, or name another.")
