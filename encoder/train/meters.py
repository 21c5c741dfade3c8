"""How fast a run goes: tokens per second over the last steps, time left, rows' fill."""

from __future__ import annotations

import time
from collections import deque


class SpeedMeter:
    """Tokens per second over the last `span` steps (evaluation and saving are not counted: call `pause` after them)."""

    def __init__(self, *, span: int = 50) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=span)
        self._since = time.perf_counter()

    def step(self, tokens: int) -> None:
        """A step with this many tokens ended now."""
        now = time.perf_counter()
        self._steps.append((now - self._since, tokens))
        self._since = now

    def pause(self) -> None:
        """What passed since the last step belongs to no step."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(s for s, _ in self._steps)
        return sum(n for _, n in self._steps) / seconds if seconds else 0.0

    def seconds_for(self, tokens: int) -> float:
        """Seconds until this many more tokens are done at the present speed."""
        speed = self.tokens_per_second
        return tokens / speed if speed else 0.0
