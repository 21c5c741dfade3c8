"""Standard output that may be closed before its end, as by `| head`: what is printed then goes nowhere, and the work goes on."""

from __future__ import annotations

import os
from typing import Any, TextIO


class Outlet:
    """Stands for a stream; a reader that leaves decides nothing about what is submitted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's own."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._go_nowhere()
            return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._go_nowhere()

    def _go_nowhere(self) -> None:
        # what is still in the buffer would be tried again when Python ends
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
