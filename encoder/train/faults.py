"""Being asked to stop: a signal sets a flag, the step finishes, all ranks agree, save, and leave."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1. The third one of them ends the process at once."""

    def __init__(self) -> None:
        self.signal: int = 0
        self._seen = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        self._before = {s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # a terminal's Ctrl-C reaches a rank twice: from the terminal, and as SIGTERM from the launcher
        self.signal = self.signal or number
        self._seen += 1
        if self._seen >= 3:
            os._exit(128 + number)
