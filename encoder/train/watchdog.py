"""Nobody waits for ever: a thread ends this process where nothing moves any more, or where another rank has failed.

    RUN/hangs/rank00003.txt     the step, the act and the stacks of all threads of a rank that stood still for too long
    RUN/errors/ID.txt           the first error of a start on several ranks, whatever rank met it; ID is the start's own

The thread lives outside of collectives: it also ends a rank whose main thread waits in one for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from encoder.base.dist import World, sum_over_ranks
from encoder.base.errors import PassingError, SilentError, UserError
from encoder.base.files import fsync_path
from encoder.base.peers import peers_of_this_rank
from encoder.runs.folder import ERRORS, HANGS

HANG_CODE, FAILED_CODE = 3, 1
# between two looks for the error of another rank, while this one stands still
LOOK_SECONDS = 5.0


class Watchdog:
    """Watches one rank of a start; `heartbeat` says that it moves. In `with`, on all ranks, once they have joined."""

    def __init__(self, folder: Path, world: World, *, hang_minutes: float | None) -> None:
        self._world, self._hang_seconds = world, 60 * hang_minutes if hang_minutes else float("inf")
        self._hang_file = folder / HANGS / f"rank{world.rank:05d}.txt"

        # the others add 0: all ranks have rank zero's nanoseconds, which no earlier start has
        start = torch.tensor([time.time_ns() if world.first else 0])
        self._error_file = folder / ERRORS / f"{int(sum_over_ranks(start))}.txt"

        self._doing, self._since = "starting", time.monotonic()
        self._hangs = False
        # peer_failed: other ranks may still wait for this one
        self._over, self.peer_failed = (
            threading.Event(),
            False,
        )
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        # who loses a peer ends at once, from another thread; it asks here for what to say
        if peers := peers_of_this_rank():
            peers.last_words = self._last_words
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raises the first error of all ranks in place of what followed from it on this one."""
        self._over.set()
        # another rank that hung has left before this one did: that is no defect here
        if self._hangs and error is not None:
            os._exit(HANG_CODE)

        self.peer_failed = error is not None and self._world.size > 1
        if not self.peer_failed or isinstance(error, SilentError):
            return

        # a mistake of the input needs no traceback
        if isinstance(error, UserError):
            text = f"{error}"
        else:
            text = "".join(traceback.format_exception(error))

        first = self._write_first(
            " ".join(
                f"rank {self._world.rank} failed, {self._doing}: {type(error).__name__}: {error}".split()
            ),
            text,
        )

        if first and not isinstance(error, UserError):
            # losing a peer is an error of every rank, with a traceback that says nothing; rank zero tells what was the cause
            raise (PassingError if self._world.first else SilentError)(
                f"{first} All of it is in {self._error_file}."
            ) from None

    def heartbeat(self, doing: str) -> None:
        """What this rank does from now on."""
        self._doing, self._since = doing, time.monotonic()

    def still_going(self) -> None:
        """A part of what it does is done."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        # a quarter of the limit: a hang is told at most 25 % late
        while not self._over.wait(min(LOOK_SECONDS, self._hang_seconds / 4)):
            still_seconds = time.monotonic() - self._since
            if still_seconds > self._hang_seconds:
                self._say_where(still_seconds)
                # the others look as often: they say where they stand, too, before losing this rank ends them
                time.sleep(2 * min(LOOK_SECONDS, self._hang_seconds / 4) + 2)
                os._exit(HANG_CODE)

            # the rank that failed cannot tell one that waits in a collective: the file does
            if still_seconds > LOOK_SECONDS and self._world.size > 1 and (first := self._first()):
                print(
                    f"rank {self._world.rank} ends, {self._doing}: {first} All of it is in"
                    f" {self._error_file}.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(FAILED_CODE)

    def _last_words(self, gone: str) -> tuple[str, int]:
        """What a rank says that ends since another is gone, and its exit code."""
        # the surest cause first: this rank's own hang, another's error, a peer that was killed
        if self._hangs:
            return f"rank {self._world.rank} hangs, {self._doing}; {gone}", HANG_CODE
        cause = self._first()
        if cause:
            return (
                (
                    f"rank {self._world.rank} ends, {self._doing}: {cause} All of it is in"
                    f" {self._error_file}."
                ),
                FAILED_CODE,
            )
        return (
            (
                f"rank {self._world.rank} ends, {self._doing}: {gone}: killed, out of memory, or"
                " its machine failed. Start again: the run goes on from its last checkpoint."
            ),
            FAILED_CODE,
        )

    def _say_where(self, still_seconds: float) -> None:
        self._hangs = True
        summary = (
            f"rank {self._world.rank} hangs: nothing has moved for {still_seconds:.0f} s,"
            f" {self._doing}."
        )

        # the line that the other ranks print, before the stacks, which may be long
        self._write_first(summary, f"The stacks of its threads are in {self._hang_file}.")
        line = f"{summary} Its threads:\n"
        sys.stderr.write(line)
        sys.stderr.flush()
        with contextlib.suppress(OSError, ValueError):
            # a standard error may have no file
            faulthandler.dump_traceback(sys.stderr)
        with contextlib.suppress(OSError):
            self._hang_file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._hang_file, "w", encoding="utf-8", errors="backslashreplace") as f:
                f.write(line)
                f.flush()
                faulthandler.dump_traceback(f)
                os.fsync(f.fileno())

    def _write_first(self, summary: str, text: str) -> str:
        """Writes an error down, a line and all of it, unless another was there before; that one's line, or nothing."""
        with contextlib.suppress(OSError):
            self._error_file.parent.mkdir(parents=True, exist_ok=True)
            try:
                # O_EXCL: of ranks that fail at once, one wins on the shared file system
                handle = os.open(self._error_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return self._first()
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as f:
                f.write(f"{summary}\n\n{text}\n")
                f.flush()
                os.fsync(f.fileno())
            fsync_path(self._error_file.parent)
        return ""

    def _first(self) -> str:
        """The first line of another rank's error, or nothing."""
        with contextlib.suppress(OSError):
            text = self._error_file.read_text(encoding="utf-8", errors="replace")
            return text.split("\n", 1)[0].rstrip(".") + "."
        return ""
