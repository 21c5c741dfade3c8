"""What every optimizer here does: its rule looks at whole parameters, though ZeRO may hand it slices of them.

Adam's first and second moments with the bias correction folded into the betas, at step t = 1, 2, ...:

    b1 = beta1 (1 - beta1^(t-1)) / (1 - beta1^t), b2 likewise      m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2

so that m / (sqrt(v) + eps) is Adam's direction as published. Each rank sums its slices, one all-reduce adds the sums.

Without bias correction b1 = beta1 and b2 = beta2, as in the code of BERT, ALBERT, ELECTRA and XLNet. With betas 0.9, 0.999 a
constant gradient then moves a weight (1 - 0.9^t) / sqrt(1 - 0.999^t) times as far: 3.16 at t = 1, 6.57 at 12, 1.26 at 1,000.

The arithmetic is that of torch's own optimizers, operations on lists of tensors (torch._foreach_*): on CUDA a kernel takes 48 to
110 of them, or 21 M elements; on a CPU a list is a few small tensors, or a large one, so that what is computed meanwhile is small.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from encoder.base.dist import sum_over_ranks
from encoder.base.errors import ConfigError
from encoder.base.pieces import piece_elements
from encoder.optim.groups import parameters_of
from encoder.optim.slices import FlatPart

# moved together at most, unless one tensor is larger: what is computed on the way takes twice that, 0.5 GB in fp32. It costs few
# kernels (32 more at base), each of which takes 320 x 65,536 elements at most
TOGETHER_ELEMENTS = 2**26

# (group, tensor) of the tensors that one step moves
Live = list[tuple[dict[str, Any], Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """Tensors, or parts of them, of one group that are moved together: the n-th of each list is of the same elements."""

    group: dict[str, Any]
    step: int
    weights: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    rows: list[int]  # which parameter each part is of


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """What all of them are told of Adam's two moments."""

    rule: ClassVar[str]
    # weight_decay is the share lost in a step at the peak rate, max_lr
    decay_at_peak: ClassVar[bool] = False

    betas: tuple[float, float] = (
        0.9,
        0.98,
    )  # decay of the first and second moments
    eps: float = 1e-6  # added to the root of the second
    weight_decay: float = 0.0
    # false: the moments as they are, as in the code of BERT, ALBERT, ELECTRA and XLNet: larger first steps
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas {self.betas[0]}, {self.betas[1]} must each lie in [0, 1).")
        if not self.eps > 0.0:
            raise ConfigError(f"eps {self.eps} must be above 0.")
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"weight_decay {self.weight_decay} must be at least 0.")

    def beside_bf16(self) -> MomentsConfig:
        """What they are where the model's own products are in bf16."""
        return self

    @property
    def decay_text(self) -> str:
        """The decay in words."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        """The settings in a line for people, but for the decay."""
        bare = "" if self.bias_correction else ", without bias correction"
        return f"{self.rule} betas {self.betas[0]}, {self.betas[1]}, eps {self.eps:g}{bare}"


class WholeTensorOptimizer(torch.optim.Optimizer, ABC):
    """An update rule for fp32 and fp64 parameters, whole or cut over ranks (then `set_slices` says how).

    State of a tensor: what `kinds_of` its group names, and its own `step`, because ZeRO calls step() once per group. Groups
    come from encoder.optim.groups and carry `lr` and `max_lr`, too, which the caller sets before each step.
    """

    def __init__(
        self, groups: Any, config: MomentsConfig, *, lr: float = 0.0, max_lr: float = 1.0
    ) -> None:
        super().__init__(
            groups,
            {
                "lr": lr,
                "max_lr": max_lr,
                "weight_decay": config.weight_decay,
                "decays": True,
                "matrices": 0,
                "gradient": 1.0,
            },
        )
        self.config = config
        self._room = torch.empty(0)  # of a CPU's bundle

        # ZeRO empties the list and what is in it, not the groups
        self._groups = list(self.param_groups)
        self._parts: dict[Tensor, FlatPart] = {}  # empty: the tensors are whole

        # by tensor, or by name where they are cut over ranks
        whole = parameters_of(self._groups)
        self._row: dict[Tensor | str, int] = {p: i for i, p in enumerate(whole)}
        self._set_sizes(
            torch.tensor([p.numel() for p in whole], dtype=torch.float64, device=whole[0].device)
        )

    def add_param_group(self, group: dict[str, Any]) -> None:
        """As torch's, without its wrapper, which imports torch's compiler: 1.5 s of CPU at the start of every rank."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, group)

    def set_slices(self, parts: Sequence[FlatPart], *, shapes: dict[str, tuple[int, ...]]) -> None:
        """How the parameters (name -> shape, the same dict on every rank) lie in this rank's flat tensors."""
        self._parts = {part.tensor: part for part in parts}
        self._row = {name: i for i, name in enumerate(shapes)}
        self._set_sizes(
            torch.tensor(
                [torch.Size(s).numel() for s in shapes.values()],
                dtype=torch.float64,
                device=parts[0].tensor.device,
            )
        )

    def _set_sizes(self, numels: Tensor) -> None:
        self._numels = numels  # fp64 [parameters]
        # made on the CPU: on the meta device, where stage 3 starts, arange imports torch's compiler
        self._rows = torch.arange(len(numels), device="cpu").to(numels.device).unbind()

    def init_state(self) -> None:
        """Zero moments for every tensor, as they are before the first step; what is there stays."""
        for part in self._parts.values():
            self._state_of(part.tensor, self._groups[part.group])
        if self._parts:
            return
        for group in self._groups:
            for p in group["params"]:
                self._state_of(p, group)

    # torch's gives the loss of a closure; a closure is refused here
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient. No host synchronisation; few collectives if the tensors are cut."""
        assert closure is None, "gradients are made by the engine"
        live: Live = []
        for group in self.param_groups:
            live += [(group, p) for p in group["params"] if p.grad is not None]
        for group, p in live:
            self._state_of(p, group)["step"] += 1
            if group["gradient"] != 1.0:
                assert p.grad is not None, "only what has a gradient is live"
                p.grad.mul_(group["gradient"])
        if live:
            # stage 0: the model went to its device after this was made
            if self._numels.device != live[0][1].device:
                self._set_sizes(self._numels.to(live[0][1].device))
            self._apply_update(live)

    def kinds_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state tensors of a group's parameters."""
        return "exp_avg", "exp_avg_sq"

    @abstractmethod
    def _apply_update(self, live: Live) -> None:
        """The rule: takes the gradients in and moves the tensors."""

    def _bundles(self, live: Live) -> list[Bundle]:
        """All that a step moves, once: on CUDA many tensors together, on a CPU a few small ones or a large one."""
        bundles: list[Bundle] = []
        # of one group and one count of steps: rate, decay and bias correction are the bundle's
        alike: dict[tuple[int, int], Live] = {}
        for group, p in live:
            alike.setdefault((id(group), self.state[p]["step"]), []).append((group, p))
        for (_, step), members in alike.items():
            group, device = members[0][0], members[0][1].device
            limit, kinds = min(piece_elements(device), TOGETHER_ELEMENTS), self.kinds_of(group)
            rows: list[int] = []
            columns: list[list[Tensor]] = []
            elements = 0

            # a bundle is full before it would pass the limit; a larger tensor is one by itself
            for row, views in self._views(members, kinds):
                if rows and elements + views[0].numel() > limit:
                    bundles.append(_bundle(group, step, kinds, rows, columns))
                    rows, columns, elements = [], [], 0
                rows.append(row)
                columns.append(views)
                elements += views[0].numel()
            if rows:
                bundles.append(_bundle(group, step, kinds, rows, columns))
        return bundles

    def _views(self, members: Live, kinds: Sequence[str]) -> Iterator[tuple[int, list[Tensor]]]:
        """(row; weights, gradients and states) of each slice, or whole tensor; padding of flat tensors is in none."""
        for _, p in members:
            assert p.grad is not None, "only what has a gradient is live"
            assert p.is_contiguous(), "weights and moments are moved as they lie in memory"
            values = [p, p.grad.contiguous(), *(self.state[p][kind] for kind in kinds)]
            if not self._parts:
                yield from _pieces(self._row[p], values)
                continue
            for s in self._parts[p].slices:
                yield from _pieces(self._row[s.name], [s.of(x) for x in values])

    def _betas(self, step: int) -> tuple[float, float]:
        """b1 and b2 of a step: the settings' betas with the bias correction in them."""
        beta1, beta2 = self.config.betas
        if self.config.bias_correction:
            return _debiased(beta1, step), _debiased(beta2, step)
        return beta1, beta2

    def _update_moments(self, bundle: Bundle) -> None:
        """Takes the gradients into Adam's moments."""
        beta1, beta2 = self._betas(bundle.step)
        m, v = bundle.state["exp_avg"], bundle.state["exp_avg_sq"]

        # m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
        torch._foreach_lerp_(m, bundle.grads, 1.0 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, bundle.grads, bundle.grads, value=1.0 - beta2)

    def _direction(self, bundle: Bundle) -> list[Tensor]:
        """m / (sqrt(v) + eps); on a CPU it lasts until the next one is asked for."""
        below = self._roots(bundle.state["exp_avg_sq"])
        torch._foreach_add_(below, self.config.eps)
        return self._quotients(bundle.state["exp_avg"], below)

    def _roots(self, values: list[Tensor]) -> list[Tensor]:
        """sqrt of each, in new memory; on a CPU in the same memory each time."""
        if not self._on_cpu(values):
            return [*torch._foreach_sqrt(values)]

        # memory that is new to a process costs a CPU more than the roots
        elements = sum(x.numel() for x in values)
        if self._room.numel() < elements or self._room.dtype != values[0].dtype:
            self._room = torch.empty(elements, dtype=values[0].dtype)
        views = self._room[:elements].split([x.numel() for x in values])
        return [torch.sqrt(x, out=view.view_as(x)) for x, view in zip(values, views, strict=True)]

    def _quotients(self, above: list[Tensor], below: list[Tensor]) -> list[Tensor]:
        """above / below, which is used up on a CPU."""
        if not self._on_cpu(below):
            return [*torch._foreach_div(above, below)]
        return [torch.div(x, y, out=y) for x, y in zip(above, below, strict=True)]

    @staticmethod
    def _on_cpu(values: Sequence[Tensor]) -> bool:
        """Where lists are no faster than their tensors one by one, and new memory is dear."""
        return values[0].device.type == "cpu"

    def _zeros(self, *, width: int) -> Tensor:
        """fp64 [parameters, width] of zeros, for sums over whole parameters."""
        return self._numels.new_zeros(len(self._numels), width)

    def _add_squares(
        self, sums: Tensor, column: int, bundle: Bundle, values: Sequence[Tensor]
    ) -> None:
        """Adds the squares of what belongs to the parts to the sums of their parameters."""
        sums[:, column].index_add_(0, self._rows_of(bundle), _squares(values))

    def _whole(self, sums: Tensor) -> Tensor:
        """The sums over all ranks: one collective for all parameters, 140 numbers, against 140 of one number."""
        if self._parts:
            sum_over_ranks(sums)
        return sums

    def _rows_of(self, bundle: Bundle) -> Tensor:
        # a number of the host's would be copied to the device, for which CUDA waits; these are there
        return torch.stack([self._rows[row] for row in bundle.rows])

    def _rates(self, bundle: Bundle, factors: Tensor) -> list[Tensor]:
        """The group's rate times the factor [parameters] of each part's parameter."""
        rates = factors[self._rows_of(bundle)] * bundle.group["lr"]
        return [*rates.to(bundle.weights[0].dtype).unbind()]

    @staticmethod
    def _subtract(
        weights: list[Tensor],
        updates: list[Tensor],
        rates: float | list[Tensor],
        *,
        decay: float = 0.0,
    ) -> None:
        """theta <- theta - rate (update + decay theta), of one rate or one for each; `updates` are used up."""
        # added to the update first: 1 - 1e-5 in fp32 would be off by 0.3 % of the decay
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
        torch._foreach_mul_(updates, rates)
        torch._foreach_sub_(weights, updates)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(step=0, **{kind: torch.zeros_like(p) for kind in self.kinds_of(group)})
        return state


def _pieces(row: int, values: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """A parameter's tensors, cut where a CPU's cache ends: an update has 7 operations, each of which would read all of it."""
    limit = piece_elements(values[0].device)
    if values[0].numel() <= limit:
        yield row, values
        return
    cut = [x.view(-1).split(limit) for x in values]
    for piece in zip(*cut, strict=True):
        yield row, [*piece]


def _debiased(beta: float, step: int) -> float:
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)


def _bundle(
    group: dict[str, Any],
    step: int,
    kinds: Sequence[str],
    rows: list[int],
    columns: list[list[Tensor]],
) -> Bundle:
    weights, grads, *states = (list(column) for column in zip(*columns, strict=True))
    return Bundle(
        group=group,
        step=step,
        weights=weights,
        grads=grads,
        state=dict(zip(kinds, states, strict=True)),
        rows=rows,
    )


def _squares(values: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each, fp64 [parts]."""
    if values[0].is_cuda:
        return torch.stack(torch._foreach_norm([*values], 2, torch.float64)).square()
    # torch's norm in fp32 is 1.6e-4 off over 4 million elements, its sum 2e-8; a norm in fp64 makes a copy
    return torch.stack([x.square().sum() for x in values]).double()
