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
        self._parts: dict[torch.Tensor, tuple[FlatPart, torch.Tensor]] = {}   # and which row of the sums each stretch is
        self._numels = torch.empty(0)

    def set_stretches(self, parts: Sequence[FlatPart], *, numels: dict[str, int]) -> None:
        """How the parameters (name -> elements, the same dict on every rank) lie in this rank's flat tensors."""
        device = parts[0].tensor.device
        row = {name: i for i, name in enumerate(numels)}
        self._parts = {part.tensor: (part, torch.tensor([row[s.name] for s in part.stretches], dtype=torch.int64, device=device))
                       for part in parts}
        self._numels = torch.tensor(list(numels.values()), dtype=torch.float64, device=device)

    def init_state(self) -> None:
        """Zero averages for every tensor, as they are before the first step; what is there stays."""
        for p in list(self._parts) or [p for group in self.param_groups for p in group["params"]]:
            self._state_of(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every tensor that has a gradient. No host synchronisation; one all-reduce if the tensors are cut."""
        assert closure is None, "gradients are made by the engine"
        live = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        ratios = [self._take_in(p) for _, p in live]
        scales = self._scales([p for _, p in live], ratios)
        for (group, p), update, scale in zip(live, ratios, scales):
            state = self.state[p]
            torch.sqrt(state["exp_avg_sq"], out=update).add_(self.config.eps)
            torch.div(state["exp_avg"], update, out=update)
            decay = group["weight_decay"] / group["max_lr"]
            for part, part_update, rate in self._cut(p, update, scale * group["lr"]):
                part_update.mul_(rate)
                if decay:     # added to the update first: 1 - 1e-5 in fp32 would be off by 0.3 % of the decay
                    part_update.addcmul_(part, rate * decay)
                part.sub_(part_update)

    def _take_in(self, p: torch.Tensor) -> torch.Tensor:
        """Moves the averages of one tensor on; returns g^2 / max(v, eps^2), element by element."""
        state, grad = self._state_of(p), p.grad
        state["step"] += 1
        beta1, beta2 = (_debiased(beta, state["step"]) for beta in self.config.betas)
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        ratio = state["exp_avg_sq"].clamp(min=self.config.eps**2)
        return torch.div(grad.square(), ratio, out=ratio)

    def _scales(self, tensors: list[torch.Tensor], ratios: list[torch.Tensor]) -> list[torch.Tensor]:
        """1 / max(1, RMS): a number for a whole tensor, one per stretch [stretches] for a tensor that is cut."""
        if not self.config.update_clipping:
            return [ratio.new_ones(()) for ratio in ratios]
        if not self._parts:
            return [_scale(ratio.sum().double() / ratio.numel()).to(ratio.dtype) for ratio in ratios]
        # one collective for all parameters: 140 numbers, against 140 collectives of one number
        sums = torch.zeros_like(self._numels)
        for p, ratio in zip(tensors, ratios):
            part, rows = self._parts[p]
            if part.stretches:
                sums.index_add_(0, rows, torch.stack([s.of(ratio).sum() for s in part.stretches]).double())
        scales = _scale(sum_over_ranks(sums) / self._numels)
        return [scales[self._parts[p][1]].to(ratio.dtype) for p, ratio in zip(tensors, ratios)]

    def _cut(self, p: torch.Tensor, update: torch.Tensor,
             rate: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(view of the tensor, view of its update, rate) for each parameter in it."""
        if rate.ndim == 0:
            return [(p, update, rate)]
        return [(s.of(p), s.of(update), one) for s, one in zip(self._parts[p][0].stretches, rate.unbind())]

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
