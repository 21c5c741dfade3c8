"""How far a run is, for the person who looks at it: a bar where standard output is a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from encoder.base.log import say


class ProgressDisplay:
    """Shows where a run stands. A terminal has two lines that stay at its end: the last step's numbers, and a bar."""

    def __init__(self, live: Live | None, *, every_steps: int) -> None:
        self._live, self._every_steps = live, every_steps

    def show(self, text: str, *, step: int, share: float, now: bool = False) -> None:
        """A step ended; `share` (0 to 1) of the run is done. In a log a line each `every_steps` steps, or when `now`."""
        if self._live is not None:
            self._live.update(
                Group(Text(f"{text}  {share:.1%}"), ProgressBar(total=1.0, completed=share))
            )
        elif now or step % self._every_steps == 0:
            say(text)


@contextmanager
def open_display(
    *, first_rank: bool, every_steps: int, console: Console | None = None
) -> Iterator[ProgressDisplay]:
    """The board of this rank. What is said meanwhile scrolls above the bar, which is gone at the end."""
    console = console or Console()
    # a dumb terminal cannot move its cursor: it gets the lines of a log
    if not (first_rank and console.is_terminal and not console.is_dumb_terminal):
        yield ProgressDisplay(None, every_steps=every_steps)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield ProgressDisplay(live, every_steps=every_steps)
