"""The learning rate of a fine-tuning, as shares of its examples: linear, cosine, constant.

A step's rate is that of its middle example, so that no step of the warm-up runs at rate 0 (transformers' first one does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from encoder.base.errors import ConfigError
from encoder.base.schema import Settings
from encoder.optim.schedule import Constant, Cosine, Schedule, WarmupStableDecay


class ShareSchedule(Settings, Protocol):
    """`lr` of a task file."""

    @property
    def peak(self) -> float:
        """The highest rate."""

    def over(self, examples: int) -> Schedule:
        """The schedule over so many examples, each counted as a token is elsewhere."""


@dataclass(frozen=True, kw_only=True)
class LinearShares:
    """Linear warm-up, then linear decay to the floor at the end, as BERT, RoBERTa and ModernBERT were fine-tuned."""

    peak: float  # the highest rate
    warmup_share: float = 0.1  # of all examples
    floor_share: float = 0.0  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(self.peak, self.warmup_share)
        self.over(1000)

    def over(self, examples: int) -> Schedule:
        """All that is not warm-up is decay."""
        warmup = _warmup(self.warmup_share, examples)
        return WarmupStableDecay(
            peak=self.peak,
            warmup_tokens=warmup,
            decay_tokens=examples - warmup,
            floor_share=self.floor_share,
        )


@dataclass(frozen=True, kw_only=True)
class CosineShares:
    """Linear warm-up, then half a cosine down to the floor."""

    peak: float  # the highest rate
    warmup_share: float = 0.1  # of all examples
    floor_share: float = 0.0  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(self.peak, self.warmup_share)
        self.over(1000)

    def over(self, examples: int) -> Schedule:
        """As the run's own cosine."""
        return Cosine(
            peak=self.peak,
            warmup_tokens=_warmup(self.warmup_share, examples),
            floor_share=self.floor_share,
        )


@dataclass(frozen=True, kw_only=True)
class ConstantShares:
    """Linear warm-up, then flat; without warm-up as RoBERTa was fine-tuned on RACE."""

    peak: float  # the highest rate
    warmup_share: float = 0.0  # of all examples

    def __post_init__(self) -> None:
        _check(self.peak, self.warmup_share)

    def over(self, examples: int) -> Schedule:
        """Flat behind the warm-up."""
        return Constant(peak=self.peak, warmup_tokens=round(self.warmup_share * examples))


SHARE_SCHEDULES: dict[str, type[ShareSchedule]] = {
    "linear": LinearShares,
    "cosine": CosineShares,
    "constant": ConstantShares,
}


def rate_of_step(schedule: Schedule, *, seen: int, rows: int, examples: int) -> float:
    """The rate of a step, at its middle example.

    schedule: over all examples
    seen: examples before the step
    rows: examples of the step
    examples: of all epochs
    """
    # rounded up: a step of one example is not the schedule's beginning, where the rate is 0
    middle = min(seen + (rows + 1) // 2, examples)
    return schedule.at(middle, phase_tokens=examples)


def _warmup(share: float, examples: int) -> int:
    """Examples of the warm-up: of few of them at least one is left to decay over."""
    return min(round(share * examples), examples - 1)


def _check(peak: float, warmup_share: float) -> None:
    if not peak > 0:
        raise ConfigError(f"peak {peak:g} must be above 0.")
    if not 0.0 <= warmup_share < 1.0:
        raise ConfigError(f"warmup_share {warmup_share:g} must be 0 to below 1.")
