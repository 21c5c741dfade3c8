"""LAMB: Adam's direction, as long as the weights that it moves (You et al. 2019, arXiv 1904.00962, algorithm 2).

    u = m / (sqrt(v) + eps) + lambda theta
    trust = |theta| / |u| over the WHOLE parameter; 1 where either is 0, and for vectors
    theta <- theta - eta_t trust u

m and v as in whole_tensors; the norm of theta is taken as it is (phi(z) = z). Vectors and biases do not decay either, as in
the authors' code for BERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from encoder.optim.whole_tensors import Live, MomentsConfig, WholeTensorOptimizer


@dataclass(frozen=True, kw_only=True)
class LambConfig(MomentsConfig):
    """The published values for BERT in 76 minutes."""

    rule: ClassVar[str] = "LAMB"

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01        # of the weights, inside the direction whose length is normed

    @property
    def decay_text(self) -> str:
        """The decay in words."""
        return f"{self.weight_decay:g} of the weights in the direction, before its length is set"


class Lamb(WholeTensorOptimizer):
    """The rule above."""

    config: LambConfig

    def _move(self, live: Live) -> None:
        tensors = [p for _, p in live]
        updates = [self._update(group, p) for group, p in live]
        squares = self._whole_sums(tensors, [self._per_view(p, [
            [theta.square().sum(), u.square().sum()] for theta, u in zip(self._views(p, p), self._views(p, update), strict=True)],
            width=2) for p, update in zip(tensors, updates)])
        for (group, p), update, square in zip(live, updates, squares):
            weights, lengths = square.sqrt().unbind(dim=1)
            trust = torch.ones_like(weights)
            if group["decays"]:
                trust = torch.where((weights > 0) & (lengths > 0), weights / lengths, trust)
            self._subtract(p, update, trust * group["lr"])

    def _update(self, group: dict[str, Any], p: Tensor) -> Tensor:
        self._take_in(p)
        return self._direction(p, out=torch.empty_like(p)).add_(p, alpha=group["weight_decay"])
