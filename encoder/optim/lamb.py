"""LAMB: Adam's direction, as long as the weights that it moves (You et al. 2019, arXiv 1904.00962, algorithm 2).

    u = m / (sqrt(v) + eps) + lambda theta
    trust = |theta| / |u| over the WHOLE parameter; 1 where either is 0, and for vectors
    theta <- theta - eta_t trust u

m and v as in whole_tensors; the norm of theta is taken as it is (phi(z) = z). Vectors and biases do not decay either, as in
the authors' code for BERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoder.optim.whole_tensors import Bundle, Live, MomentsConfig, WholeTensorOptimizer


@dataclass(frozen=True, kw_only=True)
class LambConfig(MomentsConfig):
    """The published values for BERT in 76 minutes."""

    rule: ClassVar[str] = "LAMB"

    betas: tuple[float, float] = (
        0.9,
        0.999,
    )  # decay of the first and second moments
    weight_decay: float = 0.01  # of the weights, inside the direction whose length is normed

    @property
    def decay_text(self) -> str:
        """The decay in words."""
        return f"{self.weight_decay:g} of the weights in the direction, before its length is set"


class Lamb(WholeTensorOptimizer):
    """The rule above."""

    config: LambConfig

    def _apply_update(self, live: Live) -> None:
        # sums of squares of the weights and of the update, both over whole parameters
        sums, bundles = self._zeros(width=2), self._bundles(live)
        for bundle in bundles:
            self._update_moments(bundle)
            self._add_squares(sums, 0, bundle, bundle.weights)
            self._add_squares(sums, 1, bundle, self._update(bundle))

        # |theta| and |u| of each parameter
        weights, lengths = self._whole(sums).sqrt().unbind(dim=1)
        one = torch.ones_like(weights)
        trust = torch.where((weights > 0) & (lengths > 0), weights / lengths, one)

        # the update is computed again: kept from above it would take as much memory as the weights
        for bundle in bundles:
            self._subtract(
                bundle.weights,
                self._update(bundle),
                self._rates(bundle, trust if bundle.group["decays"] else one),
            )

    def _update(self, bundle: Bundle) -> list[Tensor]:
        update = self._direction(bundle)
        torch._foreach_add_(update, bundle.weights, alpha=bundle.group["weight_decay"])
        return update
