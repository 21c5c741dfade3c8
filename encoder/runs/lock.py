"""One start at a time trains in a run folder: RUN/.lock says who, and is free when that process ends, SIGKILL included."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from encoder.base.errors import BusyRun
from encoder.base.locks import Busy, NoLocks, open_lock, take_lock
from encoder.base.log import say, warn_once
from encoder.base.stopping import launchers_above

LOCK = ".lock"


class RunLock:
    """The lock, held until `close`, and what it says about its holder."""

    def __init__(self, folder: Path, holder: dict[str, Any]) -> None:
        self._holder = holder
        self._file = open_lock(folder / LOCK)
        self._path = folder / LOCK
        self.held = False

    def take(self) -> None:
        """Raises Busy while another start has it, NoLocks where the file system knows none."""
        take_lock(self._file, self._path)
        self.held = True
        self._write()

    def other(self) -> dict[str, Any]:
        """What the other start wrote; empty before it did."""
        self._file.seek(0)
        with contextlib.suppress(ValueError, OSError, RecursionError):
            found = json.loads(self._file.read(2**16))
            return found if isinstance(found, dict) else {}
        return {}

    def say_ending(self) -> None:
        """This start saves and leaves: another one need not be refused, it may wait."""
        if self.held and not self._holder.get("ending"):
            self._holder["ending"] = True
            with contextlib.suppress(OSError, ValueError):
                self._write()

    def close(self) -> None:
        """Free for the next start."""
        self.held = False
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        # opened to append: a write goes to the end, which is the beginning now
        self._file.truncate(0)
        self._file.write(json.dumps(self._holder))
        self._file.flush()


def lock_folder(folder: Path, env: Mapping[str, str] = os.environ) -> RunLock:
    """This process alone trains in the folder, on this machine and where the file system knows locks; freed when it ends.

    Waits, aloud, for a start that is leaving: it was asked to, or its launcher is gone. An earlier start of the same
    SLURM job that still holds it, on a node that was cut off, is passed by: its incarnation keeps it from saving.
    Raises BusyRun for any other.
    """
    lock = RunLock(
        folder,
        {
            # job and restart: are two starts of one job; pids with their beginnings: who is gone
            "job": env.get("SLURM_JOB_ID"),
            "restart": int(env.get("SLURM_RESTART_COUNT") or "0"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": psutil.Process().create_time(),
            "launchers": [[process.pid, process.create_time()] for _, process in launchers_above()],
        },
    )
    began = time.monotonic()
    say_at = 0.0
    while True:
        try:
            lock.take()
            return lock
        except NoLocks as error:
            warn_once(
                f"{folder}: {error.strerror}. Two starts of this run at once are not noticed there;"
                " the older one can save no more."
            )
            return lock
        except Busy as error:
            other = lock.other()

            # an earlier start of this job, on a node that was cut off: it cannot save any more
            if (
                env.get("SLURM_JOB_ID")
                and other.get("job") == env["SLURM_JOB_ID"]
                and other["restart"] < lock._holder["restart"]
            ):
                say(
                    f"start {other['restart']} of this job still lives on {other['host']}; it can"
                    " save no more"
                )
                return lock

            if not _is_leaving(other):
                lock.close()
                raise BusyRun(
                    f"another start of this run is training in {folder}. "
                    "Wait for it, end it, or set another out."
                ) from error
        if time.monotonic() - began >= say_at:
            say(
                f"waits for an earlier start of this run, process {other.get('pid')} on"
                f" {other.get('host')}: it saves and leaves"
            )
            # after 0, 10, 30, 70, ... seconds
            say_at = 2 * say_at + 10
        time.sleep(0.2)


def _is_leaving(other: dict[str, Any]) -> bool:
    if other.get("ending"):
        return True
    # processes of another machine cannot be seen from here
    if other.get("host") != socket.gethostname() or "pid" not in other:
        return False

    # one of them is gone: what is left ends by itself
    return not all(
        _is_there(pid, began)
        for pid, began in [[other["pid"], other["began"]], *other["launchers"]]
    )


def _is_there(pid: int, began: float) -> bool:
    try:
        process = psutil.Process(pid)
        # a process number is given anew in time; a number and its beginning are not
        return abs(process.create_time() - began) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
