"""Standard output that may be closed before its end, as by `| head`: what is printed then goes nowhere, and the work goes on."""

from __future__ import annotations

from typing import Any, TextIO

from encoder.base.log import let_go


class Outlet:
    """Stands for a stream; a reader that leaves decides nothing about what is submitted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's own."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            let_go(self._stream)
            return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            let_go(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
