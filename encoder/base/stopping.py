"""Asked to end: the signals by which terminals, launchers and schedulers do that, and a launcher that is gone.

    with StopFlag() as stop:       # in the main thread
        ...
        if stop.asked: save, leave

A thread of its own reads what the signal handler of the system wrote, so that it answers also while the main
thread waits inside a collective or a compiler.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import psutil

from encoder.base.log import let_go_of_lost_streams, note, print_line

# "there is little time left" (submitit, SLURM --signal, CPU limits), and "end now"
NOTICES = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
DEMANDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STOP_SIGNALS = (*DEMANDS, *NOTICES)

# a terminal's Ctrl-C reaches a rank twice: from the terminal, and from
# the launcher that heard it, too
ECHO_SECONDS = 1.5
LAUNCHER_LOOK_SECONDS = 1.0
# programs that start ranks and are there as long as these are
LAUNCHERS = (
    "deepspeed",
    "torchrun",
    "accelerate",
    "slurmstepd",
    "mpirun",
    "mpiexec",
    "orterun",
    "prterun",
    "orted",
    "prted",
    "hydra_pmi_proxy",
)
LAUNCHER_MODULES = (
    "deepspeed.launcher",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands",
)

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers


class StopFlag:
    """Set by the first of STOP_SIGNALS, or when the launcher is gone; a second demand ends the process at once.

    Until `begin` is called nothing is there to save, and the process ends at once by the first, with a line that
    says so. A notice and the demand after it are one wish, not two: the scheduler's last word follows its first.
    """

    def __init__(self, *, asked_before: StopFlag | None = None) -> None:
        """`asked_before`: the flag of an outer block, whose wish holds here, too."""
        self.signal = 0  # the first one's number; 0: none, or the launcher
        self.cause = ""  # in words: SIGTERM, or which launcher is gone
        self.begun = False
        self.on_asked: Callable[[], None] | None = None  # called once by the thread
        self._heard: dict[str, float] = {}
        self._announced = False  # that it finishes the step and saves
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._launchers = launchers_above()
        self._before: dict[int, Handler | None] = {}

    @property
    def asked(self) -> bool:
        """Whether the process is to save and leave."""
        return bool(self.cause)

    def begin(self) -> None:
        """From now on there is something to save."""
        self.begun = True

    def __enter__(self) -> StopFlag:
        # the C-level handler writes each signal's number here, whatever the main thread does
        self._ear, self._mouth = socket.socketpair()
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        # Python lets only the main thread set handlers
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # nohup's stays ignored; a batch script's trap '' USR1 shields its launcher
                # alone, a shell's & the keyboard
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._on_signal)
            self._wakeup_before = signal.set_wakeup_fd(
                self._mouth.fileno(), warn_on_full_buffer=False
            )

        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # a byte wakes the thread from its select
        self._over.set()
        with contextlib.suppress(OSError):
            self._mouth.send(b"\0")
        self._thread.join()
        self._ear.close()
        self._mouth.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """In the main thread, between two of Python's steps; the thread has often heard it before."""
        if number == signal.SIGINT and not self.begun:
            self.cause = self.cause or "SIGINT"
            raise KeyboardInterrupt
        # before, the thread ends the process
        if self.begun:
            self._note(number)

    def _note(self, number: int) -> None:
        if not self.cause:
            self.signal = number
            self.cause = signal.Signals(number).name

    def _listen(self) -> None:
        looked = time.monotonic()
        while not self._over.is_set():
            readable = select.select([self._ear], [], [], LAUNCHER_LOOK_SECONDS)[0]
            with contextlib.suppress(BlockingIOError):
                for number in self._ear.recv(64) if readable else b"":
                    if number in STOP_SIGNALS and not self._over.is_set():
                        self._hear(number)
            if time.monotonic() - looked >= LAUNCHER_LOOK_SECONDS:
                looked = time.monotonic()
                self._look_for_launchers()

    def _hear(self, number: int) -> None:
        kind = "demand" if number in DEMANDS else "notice"
        now = time.monotonic()
        again = kind in self._heard and now - self._heard[kind] > ECHO_SECONDS
        self._heard.setdefault(kind, now)
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            let_go_of_lost_streams()
        # a limit of CPU seconds is signalled once a second
        if again and number != signal.SIGXCPU:
            self._leave(
                f"asked a second time, by {name}: ends at once; the last checkpoint stays", number
            )
        # the main thread answers Ctrl-C itself: a notebook lives on
        if not self.begun and number != signal.SIGINT:
            self._leave(
                f"stopped by {name} before the first step of this start; the same command starts"
                " again",
                number,
            )
        # the main thread may have noted it already: what is said does not depend on that
        if self.begun and not self._announced:
            self._announced = True
            note(
                f"{name}: finishes the step that it is in, and saves; a second one ends at once,"
                " without"
            )
        self._note(number)
        self._tell()

    def _look_for_launchers(self) -> None:
        gone = next((text for text, process in self._launchers if not _runs(process)), "")
        if not gone or self.cause:
            return
        if not self.begun:
            self._leave(
                f"ended before the first step: {gone} is gone, which started this rank",
                signal.SIGTERM,
            )
        self.cause = f"its launcher: {gone} is gone"
        self._tell()

    def _tell(self) -> None:
        if self.on_asked is not None:
            act, self.on_asked = self.on_asked, None
            act()

    def _leave(self, line: str, number: int) -> None:
        print_line(line, sys.stderr, survive=True)
        os._exit(128 + number)


def launchers_above() -> list[tuple[str, psutil.Process]]:
    """The programs above this process that start ranks, with their names for people; none where a shell started it."""
    with contextlib.suppress(psutil.Error, OSError):
        return [
            (f"{name} (process {process.pid})", process)
            for process in psutil.Process().parents()
            if (name := _launcher_name(process))
        ]
    return []


def _launcher_name(process: psutil.Process) -> str:
    try:
        words = process.cmdline()[:6]
    except (psutil.Error, OSError):
        return ""
    programs = [os.path.basename(word).rstrip(":") for word in words[:2]]
    for name in LAUNCHERS:
        if name in programs or any(word.startswith(f"{name}:") for word in words[:1]):
            return name
    return next((word for word in words if word.startswith(LAUNCHER_MODULES)), "")


def _runs(process: psutil.Process) -> bool:
    """Whether it lives; a process that has ended and that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True
