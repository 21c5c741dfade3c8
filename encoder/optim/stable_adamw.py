"""StableAdamW: AdamW whose step shrinks, tensor by tensor, when a gradient is larger than its history (arXiv 2304.13013).

For each parameter with gradient g, Adam's averages m and v, rate eta_t, and the peak rate max_lr:

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
from encoder.optim.whole_tensors import Live, MomentsConfig, WholeTensorOptimizer


@dataclass(frozen=True, kw_only=True)
class StableAdamWConfig(MomentsConfig):
    """The published values of ModernBERT-base."""

    rule: ClassVar[str] = "StableAdamW"
    decay_at_peak: ClassVar[bool] = True

    weight_decay: float = 1e-5        # per step at the peak rate; AdamW's number is weight_decay / peak

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight_decay < 1.0:
            raise ConfigError(f"weight_decay {self.weight_decay} must lie in [0, 1): it is the share lost in one step at the "
                              "peak rate.")

    @property
    def decay_text(self) -> str:
        """The decay in words."""
        return f"{self.weight_decay:g} a step at the peak rate (fully decoupled)"


class StableAdamW(WholeTensorOptimizer):
    """The rule above."""

    config: StableAdamWConfig

    def _move(self, live: Live) -> None:
        tensors = [p for _, p in live]
        ratios = [self._ratio(p) for p in tensors]
        sums = self._whole_sums(tensors, [self._per_view(p, [[r.sum()] for r in self._views(p, ratio)], width=1)
                                          for p, ratio in zip(tensors, ratios)])
        for (group, p), ratio, ratio_sum in zip(live, ratios, sums):
            rms = (ratio_sum[:, 0] / self._numels_of(p)).sqrt()
            scale = rms.clamp(min=1.0).reciprocal().to(p.dtype)
            self._subtract(p, self._direction(p, out=ratio), scale * group["lr"], decay=group["weight_decay"] / group["max_lr"])

    def _ratio(self, p: Tensor) -> Tensor:
        """Moves the averages of one tensor on; returns g^2 / max(v, eps^2), element by element."""
        self._take_in(p)
        ratio = self.state[p]["exp_avg_sq"].clamp(min=self.config.eps**2)
        return torch.div(p.grad.square(), ratio, out=ratio)
