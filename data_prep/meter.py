"""How far a long command is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from encoder.base.log import say
from encoder.base.units import short_count, short_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 10.0


class Meter:
    """Counts bytes, documents and tokens of one source and shows them. Use as a context manager."""

    def __init__(self, name: str, total_bytes: int) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.bytes = self.documents = self.tokens = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begin = self._said = time.monotonic()

    def __enter__(self) -> Meter:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total_bytes, counts="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, *, file_bytes: int, documents: int, tokens: int) -> None:
        """Count what one block brought."""
        self.bytes += file_bytes
        self.documents += documents
        self.tokens += tokens
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.bytes, counts=self.counts())
        # no terminal: lines now and then, as a log takes them
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            share = 100 * self.bytes / max(1, self.total_bytes)
            say(f"{self.name}: {share:.0f} % of {self.total_bytes / 1e6:,.0f} MB, {self.counts()}")

    def counts(self) -> str:
        """'12,345 documents, 6.1M tokens, 45 MB/s, 12.3 Mtok/s, 3.2s'"""
        seconds = max(1e-9, self.seconds)
        rates = f"{self.bytes / seconds / 1e6:.0f} MB/s, {self.tokens / seconds / 1e6:.1f} Mtok/s"
        return (
            f"{self.documents:,} documents, {short_count(self.tokens)} tokens, {rates},"
            f" {short_seconds(seconds)}"
        )

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return time.monotonic() - self._begin
