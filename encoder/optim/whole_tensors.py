"""What every optimizer here does: its rule looks at whole parameters, though ZeRO may hand it stretches of them.

Adam's two averages with the bias correction folded into the betas, at step t = 1, 2, ...:

    b1 = beta1 (1 - beta1^(t-1)) / (1 - beta1^t), b2 likewise      m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2

so that m / (sqrt(v) + eps) is Adam's direction as published. Each rank sums its stretches, one all-reduce adds the sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from encoder.base.dist import sum_over_ranks
from encoder.base.errors import ConfigError
from encoder.optim.slices import FlatPart

Live = list[tuple[dict[str, Any], Tensor]]      # (group, tensor) of the tensors that one step moves


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """What all of them are told of Adam's two averages."""

    rule: ClassVar[str]
    decay_at_peak: ClassVar[bool] = False      # weight_decay is the share lost in a step at the peak rate, max_lr

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas {self.betas[0]}, {self.betas[1]} must each lie in [0, 1).")
        if not self.eps > 0.0:
            raise ConfigError(f"eps {self.eps} must be above 0.")
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"weight_decay {self.weight_decay} must be at least 0.")

    @property
    def text(self) -> str:
        """The settings in a line for people, but for the decay."""
        return f"{self.rule} betas {self.betas[0]}, {self.betas[1]}, eps {self.eps:g}"


class WholeTensorOptimizer(torch.optim.Optimizer, ABC):
    """An update rule for fp32 and fp64 parameters, whole or cut over ranks (then `set_stretches` says how).

    State of a tensor: what `kinds_of` its group names, and its own `step`, because ZeRO calls step() once per group. Groups
    come from encoder.optim.groups and carry `lr` and `max_lr`, too, which the caller sets before each step.
    """

    def __init__(self, groups: Any, config: MomentsConfig, *, lr: float = 0.0, max_lr: float = 1.0) -> None:
        super().__init__(groups, {"lr": lr, "max_lr": max_lr, "weight_decay": config.weight_decay, "decays": True, "matrices": 0})
        self.config = config
        self._groups = list(self.param_groups)               # ZeRO empties the list and what is in it, not the groups
        self._parts: dict[Tensor, FlatPart] = {}             # empty: the tensors are whole
        self._rows: dict[Tensor, Tensor] = {}                # int64 [stretches]: which parameter each stretch is of
        self._numels = torch.empty(0)                        # fp64 [parameters]

    def set_stretches(self, parts: Sequence[FlatPart], *, shapes: dict[str, tuple[int, ...]]) -> None:
        """How the parameters (name -> shape, the same dict on every rank) lie in this rank's flat tensors."""
        device = parts[0].tensor.device
        row = {name: i for i, name in enumerate(shapes)}
        self._parts = {part.tensor: part for part in parts}
        self._rows = {part.tensor: torch.tensor([row[s.name] for s in part.stretches], dtype=torch.int64, device=device)
                      for part in parts}
        self._numels = torch.tensor([torch.Size(s).numel() for s in shapes.values()], dtype=torch.float64, device=device)

    def init_state(self) -> None:
        """Zero averages for every tensor, as they are before the first step; what is there stays."""
        for part in self._parts.values():
            self._state_of(part.tensor, self._groups[part.group])
        for group in [] if self._parts else self._groups:
            for p in group["params"]:
                self._state_of(p, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every tensor that has a gradient. No host synchronisation; few collectives if the tensors are cut."""
        assert closure is None, "gradients are made by the engine"
        live = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in live:
            self._state_of(p, group)["step"] += 1
        if live:
            self._move(live)

    def kinds_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state tensors of a group's parameters."""
        return "exp_avg", "exp_avg_sq"

    @abstractmethod
    def _move(self, live: Live) -> None:
        """The rule: takes the gradients in and moves the tensors."""

    def _take_in(self, p: Tensor) -> None:
        """Moves Adam's averages of one tensor on."""
        state, grad = self.state[p], p.grad
        beta1, beta2 = (_debiased(beta, state["step"]) for beta in self.config.betas)
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)

    def _direction(self, p: Tensor, out: Tensor) -> Tensor:
        """m / (sqrt(v) + eps), written to `out`."""
        torch.sqrt(self.state[p]["exp_avg_sq"], out=out).add_(self.config.eps)
        return torch.div(self.state[p]["exp_avg"], out, out=out)

    def _views(self, p: Tensor, values: Tensor) -> list[Tensor]:
        """`values`, laid out like the tensor p, parameter by parameter: the stretches in it, or all of it."""
        return [s.of(values) for s in self._parts[p].stretches] if self._parts else [values]

    def _per_view(self, p: Tensor, numbers: list[list[Tensor]], *, width: int) -> Tensor:
        """`width` numbers of each view of p -> fp64 [views, width]; a rank's part of a group may be nothing but padding."""
        return torch.stack([torch.stack(one) for one in numbers]).double() if numbers else p.new_zeros(0, width).double()

    def _whole_sums(self, tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> list[Tensor]:
        """fp64 [views, width] of each tensor -> the same added up over whole parameters, over all ranks."""
        if not self._parts:
            return list(numbers)
        # one collective for all parameters: 140 numbers, against 140 collectives of one number
        total = self._numels.new_zeros(len(self._numels), numbers[0].shape[1])
        for p, some in zip(tensors, numbers):
            total.index_add_(0, self._rows[p], some)
        sum_over_ranks(total)
        return [total[self._rows[p]] for p in tensors]

    def _numels_of(self, p: Tensor) -> Tensor:
        """fp64 [views]: elements of the whole parameters that the views of p belong to."""
        # new_full is a kernel; new_tensor copies a number of the host's, which on CUDA waits for all that was launched before it
        return self._numels[self._rows[p]] if self._parts else p.new_full((1,), p.numel(), dtype=torch.float64)

    def _subtract(self, p: Tensor, update: Tensor, rates: Tensor, *, decay: float = 0.0) -> None:
        """theta <- theta - rate (update + decay theta) for each view of p and its rate [views]; `update` is used up."""
        rates = rates.to(p.dtype).unbind()
        for part, part_update, rate in zip(self._views(p, p), self._views(p, update), rates, strict=True):
            part_update.mul_(rate)
            if decay:     # added to the update first: 1 - 1e-5 in fp32 would be off by 0.3 % of the decay
                part_update.addcmul_(part, rate * decay)
            part.sub_(part_update)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(step=0, **{kind: torch.zeros_like(p) for kind in self.kinds_of(group)})
        return state


def _debiased(beta: float, step: int) -> float:
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)
