"""StableAdamW: AdamW whose step shrinks, tensor by tensor, when a gradient is larger than its history (arXiv 2304.13013).

For each parameter with gradient g, Adam's moments m and v, rate eta_t, and the peak rate max_lr:

    RMS = sqrt(mean over the WHOLE parameter of g^2 / max(v, eps^2))
    eta = eta_t / max(1, RMS)
    theta <- theta (1 - eta / max_lr * lambda) - eta m / (sqrt(v) + eps)

The decay is fully decoupled: lambda per step at the peak, whatever the rate. ModernBERT kept `max_lr` of its first phase for
ever, so its later phases decayed less than they said; here it is the peak of the phase that runs, unless the phase says another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoder.base.errors import ConfigError
from encoder.optim.whole_tensors import Bundle, Live, MomentsConfig, WholeTensorOptimizer


@dataclass(frozen=True, kw_only=True)
class StableAdamWConfig(MomentsConfig):
    """The published values of ModernBERT-base."""

    rule: ClassVar[str] = "StableAdamW"
    decay_at_peak: ClassVar[bool] = True

    weight_decay: float = 1e-5  # per step at the peak rate; AdamW's number is weight_decay / peak

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight_decay < 1.0:
            raise ConfigError(
                f"weight_decay {self.weight_decay} must lie in [0, 1): it is the share lost in one"
                " step at the peak rate."
            )

    @property
    def decay_text(self) -> str:
        """The decay in words."""
        return f"{self.weight_decay:g} a step at the peak rate (fully decoupled)"


class StableAdamW(WholeTensorOptimizer):
    """The rule above."""

    config: StableAdamWConfig

    def _apply_update(self, live: Live) -> None:
        # first pass: moments, and sums of g^2 / max(v, eps^2) over whole parameters
        sums, bundles = self._zeros(width=1), self._bundles(live)
        for bundle in bundles:
            self._update_moments(bundle)
            self._add_squares(sums, 0, bundle, self._roots_of_ratios(bundle))

        # RMS over the whole parameter; at most 1 it leaves the step as it is
        rms = (self._whole(sums)[:, 0] / self._numels).sqrt()
        factors = rms.clamp(min=1.0).reciprocal()
        for bundle in bundles:
            # relative to the rate, which _subtract multiplies with: eta / max_lr * lambda in all
            decay = bundle.group["weight_decay"] / bundle.group["max_lr"]
            self._subtract(
                bundle.weights, self._direction(bundle), self._rates(bundle, factors), decay=decay
            )

    def _roots_of_ratios(self, bundle: Bundle) -> list[Tensor]:
        """g / max(sqrt(v), eps), element by element."""
        below = self._roots(bundle.state["exp_avg_sq"])
        torch._foreach_clamp_min_(below, self.config.eps)
        return self._quotients(bundle.grads, below)
