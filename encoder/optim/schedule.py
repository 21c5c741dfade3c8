"""Learning rate and batch size as pure functions of the tokens seen in a phase.

`at(tokens, phase_tokens=...)` gives the rate at one point of the token clock; which point stands for a step is the
caller's choice (encoder.train takes the middle of the step, so that no step runs at rate 0).
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

from encoder.base.errors import ConfigError
from encoder.base.schema import Settings, Tokens


class Schedule(Settings, Protocol):
    """A learning rate over the token clock of a phase; a phase's `lr`."""

    @property
    def peak(self) -> float:
        """The highest rate."""

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the parts do not fit."""


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, flat, linear decay at the end of the phase (ModernBERT, section 2.2; MiniCPM, arXiv 2404.06395).

        peak        ________
                   /        \\
        0   ______/          \\ floor
              warm-up     decay
    """

    peak: float  # the highest rate
    warmup_tokens: Tokens = 0  # rising from 0 on a straight line
    decay_tokens: Tokens = 0  # at the end, on a straight line to the floor
    floor_share: float = 0.0  # of the peak, reached at the end of the decay

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the parts do not fit."""
        _check_fits(
            warmup_tokens=self.warmup_tokens,
            decay_tokens=self.decay_tokens,
            phase_tokens=phase_tokens,
        )
        return (
            self.peak
            * _warmup(tokens, self.warmup_tokens)
            * (
                1.0
                - (1.0 - self.floor_share) * _decay_share(tokens, self.decay_tokens, phase_tokens)
            )
        )


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then flat."""

    peak: float  # the highest rate
    warmup_tokens: Tokens = 0  # rising from 0 on a straight line

    def __post_init__(self) -> None:
        _check(peak=self.peak)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen."""
        _check_fits(warmup_tokens=self.warmup_tokens, decay_tokens=0, phase_tokens=phase_tokens)
        return self.peak * _warmup(tokens, self.warmup_tokens)


@dataclass(frozen=True, kw_only=True)
class OneMinusSqrt:
    """Flat, then falling with 1 - sqrt(share of the decay that is over) (arXiv 2405.18392); ModernBERT's last phase."""

    peak: float  # the highest rate
    decay_tokens: Tokens | None = None  # falling, at the end; default: the whole phase
    floor_share: float = 0.001  # as published for ModernBERT

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the decay does not fit."""
        decay_tokens = phase_tokens if self.decay_tokens is None else self.decay_tokens
        _check_fits(warmup_tokens=0, decay_tokens=decay_tokens, phase_tokens=phase_tokens)
        return self.peak * (
            1.0
            - (1.0 - self.floor_share) * math.sqrt(_decay_share(tokens, decay_tokens, phase_tokens))
        )


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to the floor at the end of the phase (arXiv 1608.03983)."""

    peak: float  # the highest rate
    warmup_tokens: Tokens = 0  # rising from 0 on a straight line
    floor_share: float = 0.1  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the warm-up does not fit."""
        _check_fits(warmup_tokens=self.warmup_tokens, decay_tokens=0, phase_tokens=phase_tokens)
        share = _decay_share(tokens, phase_tokens - self.warmup_tokens, phase_tokens)
        return (
            self.peak
            * _warmup(tokens, self.warmup_tokens)
            * (
                self.floor_share
                + (1.0 - self.floor_share) * 0.5 * (1.0 + math.cos(math.pi * share))
            )
        )


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up, then a straight line from the peak down to the floor at the end of the phase: RoBERTa's; XLNet's has
    floor_share 0.001."""

    peak: float  # the highest rate
    warmup_tokens: Tokens = 0  # rising from 0 on a straight line
    floor_share: float = 0.0  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the warm-up does not fit."""
        _check_fits(warmup_tokens=self.warmup_tokens, decay_tokens=0, phase_tokens=phase_tokens)
        share = _decay_share(tokens, phase_tokens - self.warmup_tokens, phase_tokens)
        return (
            self.peak
            * _warmup(tokens, self.warmup_tokens)
            * (1.0 - (1.0 - self.floor_share) * share)
        )


@dataclass(frozen=True, kw_only=True)
class Bert:
    """A straight line from the peak at the phase's begin to the floor at its end; the warm-up stands in place of its beginning.

        peak \\. . .
              /\\    .            the rate falls from peak to peak (1 - W / T) where the warm-up ends: google-research/bert,
        0    /  '-.._ floor       optimization.py; ALBERT's code is the same
              W           T

    BERT has one line over both of its lengths: phases of 90 and 10 % are `bert` with floor_share 0.1, then `linear` from there.
    """

    peak: float  # of the line, which stands there at the phase's begin
    warmup_tokens: Tokens = 0  # rising from 0 to the peak on a straight line
    floor_share: float = 0.0  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the warm-up does not fit."""
        _check_fits(warmup_tokens=self.warmup_tokens, decay_tokens=0, phase_tokens=phase_tokens)
        if tokens < self.warmup_tokens:
            return self.peak * _warmup(tokens, self.warmup_tokens)
        return self.peak * _line_down(tokens, phase_tokens, floor_share=self.floor_share)


@dataclass(frozen=True, kw_only=True)
class Electra:
    """The product of a warm-up and of a straight line from the phase's begin to its end, as ELECTRA's code has it.

    peak min(1, t / W) (1 - (1 - f) t / T): the highest rate is peak (1 - (1 - f) W / T), where the warm-up ends.
    """

    peak: float  # of the line, which stands there at the phase's begin
    warmup_tokens: Tokens = 0  # rising from 0 to 1 on a straight line
    floor_share: float = 0.0  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the warm-up does not fit."""
        _check_fits(warmup_tokens=self.warmup_tokens, decay_tokens=0, phase_tokens=phase_tokens)
        line = _line_down(tokens, phase_tokens, floor_share=self.floor_share)
        return self.peak * _warmup(tokens, self.warmup_tokens) * line


@dataclass(frozen=True, kw_only=True)
class CosineInverseSqrt:
    """Linear warm-up, half of a cosine's way down, on as 1 / sqrt(tokens), linear decay (Stable LM 2, arXiv 2402.17834).

    With u tokens after the warm-up, C = cosine_tokens and f = floor_share, the inverse square root takes over at u = C, where
    the cosine stands at (1 + f) / 2, with the same slope:

        u <= C    f + (1 - f) (1 + cos(pi u / (2 C))) / 2
        u > C     (1 + f) / 2 * sqrt((C + d) / (u + d))        C + d = C (1 + f) / (pi (1 - f))

    ModernBERT tried it and saw no difference to wsd over 100 B tokens.
    """

    peak: float  # the highest rate
    warmup_tokens: Tokens = 0  # rising from 0 on a straight line
    cosine_tokens: Tokens | None = None  # after the warm-up; default: a quarter of the phase
    decay_tokens: Tokens = 0  # at the end, on a straight line to the floor
    floor_share: float = 0.1  # of the peak, at the end

    def __post_init__(self) -> None:
        _check(peak=self.peak, floor_share=self.floor_share)
        if self.floor_share == 1.0 or self.cosine_tokens == 0:
            raise ConfigError(
                f"floor_share {self.floor_share:g} must be below 1 and cosine_tokens at least 1."
                " For a flat rate use schedule: constant."
            )

    def at(self, tokens: int, *, phase_tokens: int) -> float:
        """Learning rate when `tokens` of the phase's `phase_tokens` were seen. Raises ConfigError if the parts do not fit."""
        _check_fits(
            warmup_tokens=self.warmup_tokens,
            decay_tokens=self.decay_tokens,
            phase_tokens=phase_tokens,
        )

        # in the decay the curve stands still: a line falls from where it stood to the floor
        decay_start = phase_tokens - self.decay_tokens
        high = self._share(min(tokens, decay_start) - self.warmup_tokens, phase_tokens)
        share = high - (high - self.floor_share) * _decay_share(
            tokens, self.decay_tokens, phase_tokens
        )
        return self.peak * _warmup(tokens, self.warmup_tokens) * share

    def _share(self, after_warmup: int, phase_tokens: int) -> float:
        """Of the peak, before the decay."""
        u = max(0, after_warmup)
        f = self.floor_share
        cosine = phase_tokens / 4 if self.cosine_tokens is None else self.cosine_tokens
        if u <= cosine:
            return f + (1.0 - f) * 0.5 * (1.0 + math.cos(math.pi * u / (2.0 * cosine)))

        # C + d of the class's formula; u + d = u - C + reach
        reach = cosine * (1.0 + f) / (math.pi * (1.0 - f))
        return max(f, 0.5 * (1.0 + f) * math.sqrt(reach / (u - cosine + reach)))


SCHEDULES: dict[str, type[Schedule]] = {
    "wsd": WarmupStableDecay,
    "constant": Constant,
    "one_minus_sqrt": OneMinusSqrt,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_inverse_sqrt": CosineInverseSqrt,
    "bert": Bert,
    "electra": Electra,
}


def highest_at(schedule: object, *, phase_tokens: int) -> int:
    """The tokens of a phase at which a schedule is highest: the end of its warm-up, and before it where ELECTRA's turns."""
    warmup_tokens = getattr(schedule, "warmup_tokens", 0)
    if isinstance(schedule, Electra) and schedule.floor_share < 1.0:
        # t (1 - (1 - f) t / T) rises until T / (2 (1 - f))
        turn = phase_tokens / (2.0 * (1.0 - schedule.floor_share))
        return min(warmup_tokens, int(turn))
    return warmup_tokens


@dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """A staircase of batch sizes with the same number of steps on every stair (ModernBERT, section 2.2).

    Sizes are from, from + increase, ... below the full batch. Tokens spent at a size are proportional to it, and add
    up to `over_tokens`; from there on the batch is full. Counted over all ranks.
    """

    from_tokens: Tokens  # batch at the start of the phase
    over_tokens: Tokens  # length of the whole warm-up
    increase_tokens: Tokens | None = None  # height of a stair; default: from_tokens, as published

    def __post_init__(self) -> None:
        if self.from_tokens < 1 or self.over_tokens < 1 or self.increase_tokens == 0:
            raise ConfigError(
                "from_tokens, over_tokens and increase_tokens must be at least 1. "
                "Leave batch_warmup out to start with the full batch."
            )


def rows_at(
    phase_tokens: int, *, batch_tokens: int, row_tokens: int, warmup: BatchWarmup | None
) -> int:
    """Rows of the next step when `phase_tokens` were seen in the phase. Raises ConfigError for sizes that are not whole rows."""
    full = whole_rows(batch_tokens, row_tokens, name="batch_tokens")
    if warmup is None:
        return full
    stairs = _stairs_of(warmup, full=full, batch_tokens=batch_tokens, row_tokens=row_tokens)
    at = stairs.index_at(phase_tokens)
    if at < len(stairs.sizes):
        return stairs.sizes[at]
    return full


def next_rise(
    phase_tokens: int, *, batch_tokens: int, row_tokens: int, warmup: BatchWarmup | None
) -> int | None:
    """The first tokens of the phase, beyond `phase_tokens`, at which a step has more rows; None where it is full already."""
    if warmup is None:
        return None
    full = whole_rows(batch_tokens, row_tokens, name="batch_tokens")
    stairs = _stairs_of(warmup, full=full, batch_tokens=batch_tokens, row_tokens=row_tokens)
    at = stairs.index_at(phase_tokens)
    if at < len(stairs.sizes):
        return stairs.end_of(at)
    return None


@dataclass(frozen=True)
class _Stairs:
    """A warm-up in rows. Whole numbers throughout; there may be millions of stairs."""

    sizes: range
    over_tokens: int

    def passed(self, stairs: int) -> int:
        """The sum of the first sizes."""
        # an arithmetic series: n a + s n (n - 1) / 2
        return stairs * self.sizes.start + self.sizes.step * stairs * (stairs - 1) // 2

    def index_at(self, phase_tokens: int) -> int:
        """The first stair with phase_tokens < over_tokens * passed / weight; their number behind the last one."""
        # both sides times the weight (the sum of all sizes): integers, nothing is rounded
        return bisect.bisect_right(
            range(1, len(self.sizes) + 1),
            phase_tokens * self.passed(len(self.sizes)),
            key=lambda stairs: self.over_tokens * self.passed(stairs),
        )

    def end_of(self, stair: int) -> int:
        """The first tokens that are not on it any more."""
        # rounded up: the first whole token at which index_at gives the next stair
        return -(-self.over_tokens * self.passed(stair + 1) // self.passed(len(self.sizes)))


def _stairs_of(warmup: BatchWarmup, *, full: int, batch_tokens: int, row_tokens: int) -> _Stairs:
    first = whole_rows(warmup.from_tokens, row_tokens, name="batch_warmup.from_tokens")
    stair = first
    if warmup.increase_tokens is not None:
        stair = whole_rows(warmup.increase_tokens, row_tokens, name="batch_warmup.increase_tokens")
    if first >= full:
        raise ConfigError(
            f"batch_warmup.from_tokens {warmup.from_tokens:,} is not below batch_tokens"
            f" {batch_tokens:,}. Lower it, or leave batch_warmup out."
        )
    return _Stairs(range(first, full, stair), warmup.over_tokens)


def whole_rows(tokens: int, row_tokens: int, *, name: str) -> int:
    """Rows in an amount of tokens. Raises ConfigError naming the nearest whole amounts."""
    if tokens >= row_tokens and tokens % row_tokens == 0:
        return tokens // row_tokens

    # less than a row has no lower neighbour: 0 rows are no batch
    below = tokens // row_tokens * row_tokens
    near = ", ".join(f"{n:,}" for n in (below, below + row_tokens) if n)
    raise ConfigError(
        f"{name} {tokens:,} is not a whole number of rows of {row_tokens:,}. Nearest: {near}."
    )


def _warmup(tokens: int, warmup_tokens: int) -> float:
    if warmup_tokens:
        return min(1.0, tokens / warmup_tokens)
    return 1.0


def _decay_share(tokens: int, decay_tokens: int, phase_tokens: int) -> float:
    """0 before the decay, 1 at the end of the phase and after it."""
    start = phase_tokens - decay_tokens
    if tokens > start and decay_tokens:
        return min(1.0, (tokens - start) / decay_tokens)
    return 0.0


def _line_down(tokens: int, phase_tokens: int, *, floor_share: float) -> float:
    """1 at the phase's begin, the floor at its end and after it."""
    return 1.0 - (1.0 - floor_share) * _decay_share(tokens, phase_tokens, phase_tokens)


def _check(*, peak: float, floor_share: float = 0.0) -> None:
    if not peak > 0.0:
        raise ConfigError(f"peak {peak} must be above 0.")
    if not 0.0 <= floor_share <= 1.0:
        raise ConfigError(
            f"floor_share {floor_share} must lie between 0 and 1: it is a share of the peak."
        )


def _check_fits(*, warmup_tokens: int, decay_tokens: int, phase_tokens: int) -> None:
    if warmup_tokens + decay_tokens > phase_tokens:
        raise ConfigError(
            f"warmup_tokens {warmup_tokens:,} and decay_tokens {decay_tokens:,} are more than the"
            f" phase's {phase_tokens:,} tokens. Shorten them, or lengthen the phase."
        )
