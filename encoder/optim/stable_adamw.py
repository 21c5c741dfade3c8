"""StableAdamW: AdamW whose step shrinks, tensor by tensor, when a gradient is larger than its history (arXiv 2304.13013).

For each parameter with gradient g at its step t (1, 2, ...), rate eta_t, and max_lr the phase's peak rate:

    b1 = beta1 (1 - beta1^(t-1)) / (1 - beta1^t), b2 likewise      bias correction folded into the betas
    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    RMS = sqrt(mean over the WHOLE parameter of g^2 / max(v, eps^2))
    eta = eta_t / max(1, RMS)
    theta <- theta (1 - eta / max_lr * lambda) - eta m / (sqrt(v) + eps)

The decay is fully decoupled: lambda per step at the peak, whatever the rate. ModernBERT kept `max_lr` of its first
phase for ever, so its later phases decayed less than they said; here it is the peak of the phase that runs.

Under ZeRO a parameter is cut over ranks: each rank sums its stretches, one all-reduce adds the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from encoder.base.dist import sum_over_ranks
from encoder.base.errors import ConfigError
from encoder.optim.slices import FlatPart


@dataclass(frozen=True, kw_only=True)
class StableAdamWConfig:
    """The published values of ModernBERT-base."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-5        # per step at the peak rate; AdamW's number is weight_decay / peak
    update_clipping: bool = True      # false: plain AdamW

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas {self.betas[0]}, {self.betas[1]} must each lie in [0, 1).")
        if not self.eps > 0.0 or not 0.0 <= self.weight_decay < 1.0:
            raise ConfigError(f"eps {self.eps} must be above 0, weight_decay {self.weight_decay} in [0, 1): it is the share "
                              "lost in one step at the peak rate.")


class StableAdamW(torch.optim.Optimizer):
    """The rule above for fp32 and fp64 parameters, whole or cut over ranks (then `set_stretches` says how).

    State of a tensor: exp_avg, exp_avg_sq and its own `step`, because ZeRO calls step() once per group. Groups carry
    `lr`, `max_lr` and `weight_decay`; the caller sets the first two before each step.
    """

    def __init__(self, params: Any, config: StableAdamWConfig, *, lr: float = 0.0, max_lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "max_lr": max_lr, "weight_decay": config.weight_decay})
        self.config = config
        self._parts: dict[torch.Tensor, FlatPart] = {}
        self._numels = torch.empty(0)
        self._index: dict[str, int] = {}

    def set_stretches(self, parts: Sequence[FlatPart], *, numels: dict[str, int]) -> None:
        """How the parameters (name -> elements, the same dict on every rank) lie in this rank's flat tensors."""
        self._parts = {part.tensor: part for part in parts}
        self._index = {name: i for i, name in enumerate(numels)}
        self._numels = torch.tensor(list(numels.values()), dtype=torch.float64, device=parts[0].tensor.device)
        for part in parts:
            self._state_of(part.tensor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every tensor that has a gradient. No host synchronisation; one all-reduce if the tensors are cut."""
        assert closure is None, "gradients are made by the engine"
        live = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        ratios = [self._take_in(p) for _, p in live]
        rates = self._rates([p for _, p in live], ratios)
        for (group, p), ratio, rate in zip(live, ratios, rates):
            state = self.state[p]
            update = torch.sqrt(state["exp_avg_sq"], out=ratio).add_(self.config.eps)
            torch.div(state["exp_avg"], update, out=update)
            for part, part_update, scale in self._cut(p, update, rate):
                lr_scale = scale * group["lr"]
                if group["weight_decay"]:
                    part.mul_(1.0 - lr_scale * (group["weight_decay"] / group["max_lr"]))
                part.sub_(part_update.mul_(lr_scale))

    def _take_in(self, p: torch.Tensor) -> torch.Tensor:
        """Moves the averages of one tensor on; returns g^2 / max(v, eps^2), element by element."""
        state, grad = self._state_of(p), p.grad
        state["step"] += 1
        beta1, beta2 = (_debiased(beta, state["step"]) for beta in self.config.betas)
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        ratio = state["exp_avg_sq"].clamp(min=self.config.eps**2)
        return torch.div(grad.square(), ratio, out=ratio)

    def _rates(self, tensors: list[torch.Tensor], ratios: list[torch.Tensor]) -> list[Any]:
        """What each tensor's rate is multiplied with: a 0-d tensor, or [parameters] for tensors that are cut."""
        if not self.config.update_clipping:
            return [None] * len(tensors)
        if not self._parts:
            return [_scale(ratio.sum(dtype=torch.float64) / ratio.numel()).to(ratio.dtype) for ratio in ratios]
        # one collective for all parameters: 140 numbers, against 140 collectives of one number
        sums = torch.zeros_like(self._numels)
        for p, ratio in zip(tensors, ratios):
            stretches = self._parts[p].stretches
            if stretches:
                index = torch.tensor([self._index[s.name] for s in stretches])
                found = torch.stack([s.of(ratio).sum(dtype=torch.float64) for s in stretches])
                sums.index_add_(0, index.to(sums.device, non_blocking=True), found)
        scales = _scale(sum_over_ranks(sums) / self._numels)
        return [scales.to(ratio.dtype) for ratio in ratios]

    def _cut(self, p: torch.Tensor, update: torch.Tensor, rate: Any) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
        """(view of the tensor, view of its update, multiplier) per parameter."""
        if rate is None or not self._parts:
            return [(p, update, 1.0 if rate is None else rate)]
        return [(s.of(p), s.of(update), rate[self._index[s.name]]) for s in self._parts[p].stretches]

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return state


def _debiased(beta: float, step: int) -> float:
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)


def _scale(mean_ratio: torch.Tensor) -> torch.Tensor:
    """1 / max(1, RMS) of the mean of g^2 / max(v, eps^2)."""
    return mean_ratio.sqrt().clamp(min=1.0).reciprocal()
