"""Settings of what ends a run before its end, and of what it does about bad steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from encoder.base.errors import ConfigError

LEAST_WATCHDOG_MINUTES = 1
MOST = 10_000_000  # hours or minutes: 19 years, which clocks and collectives can count


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """A loss that is a spike: far above the median of the steps before it, in median absolute deviations of those."""

    deviations: float = 20.0  # above the median, in median absolute deviations
    over_steps: int = 100  # so many fine steps must be there first; counted anew in each phase

    def __post_init__(self) -> None:
        if not self.deviations > 0 or self.over_steps < 3:
            raise ConfigError(
                f"deviations {self.deviations:g} and over_steps {self.over_steps} must be above 0"
                " and at least 3."
            )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """When a run goes back, stops in time, or is ended because it hangs."""

    bad_steps: int = 3  # so many in a row: back to the last good checkpoint, past the window
    spike: SpikeConfig | None = None  # set: a spike of the loss is a bad step, too
    max_hours: float | None = None  # from the start of the process; it saves and stops before
    # without a step, an evaluation or a save: the process says where it hangs and ends
    watchdog_minutes: float | None = 30.0

    def __post_init__(self) -> None:
        if self.bad_steps < 1:
            raise ConfigError(
                f"bad_steps {self.bad_steps} must be at least 1. 1 goes back at the first bad step."
            )
        for key in ("max_hours", "watchdog_minutes"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= MOST:
                raise ConfigError(
                    f"{key} {value:g} must be above 0 and at most {MOST:,}. Use {key}: null for none."
                )

    def mistakes(self) -> Iterator[str]:
        """About a watchdog that would end a run which works."""
        minutes = self.watchdog_minutes
        if minutes is not None and minutes < LEAST_WATCHDOG_MINUTES:
            yield (
                f"faults.watchdog_minutes {minutes:g} would end a run that works; needed: at least"
                f" {LEAST_WATCHDOG_MINUTES}, since kernels may compile for so long before the first"
                " step. Use faults.watchdog_minutes: null for none."
            )
