"""Muon: the momentum of a hidden matrix, made orthogonal, is its update (Jordan et al. 2024); StableAdamW moves the rest.

    M <- mu M + (1 - mu) G          U = mu M + (1 - mu) G       Nesterov; the sum's length does not matter
    O = newton_schulz(U)            all singular values of U become about 1
    theta <- theta (1 - eta_t / max_lr * lambda) - eta_t s O

The scale s of a matrix of r rows and c columns: 0.2 sqrt(max(r, c)) gives the update the size of Adam's, so that both take
the same rates (Liu et al. 2025, arXiv 2502.16982, section 2.2); sqrt(max(1, r / c)) is Jordan's, whose rates are about 50
times Adam's. Hidden matrices are those of the layers. Query, key and value are three of them, and both halves of a gated
Wi two: nothing mixes their features before they are used. Embeddings, the head and the decoder are StableAdamW's.

Newton-Schulz needs whole matrices. Under ZeRO each is brought together on one rank (exchange.py), a share of them on each;
at stage 0 every rank does all of them. It computes in bf16 on CUDA, as published, and on a CPU in the weights' own precision or,
where `matrix_precision` says so, in bf16 as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.base.dist import collective_device, gather_rows, rank_and_size
from encoder.base.errors import ConfigError
from encoder.optim.exchange import Exchange, Held
from encoder.optim.slices import FlatPart, ParamSlice
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from encoder.optim.whole_tensors import Live

# x -> a x + b x^3 + c x^5: the steepest start that stays near 1 (Jordan)
NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class MuonConfig(StableAdamWConfig):
    """StableAdamW's settings are those of the rest; the decay is everybody's."""

    momentum: float = 0.95  # of the matrices
    matrix_scale: Literal["adam", "jordan"] = "adam"  # size of an update: AdamW's, or Jordan's own
    matrix_lr: float = 1.0  # rate of the matrices over that of the rest
    # of Newton-Schulz; auto: bf16 on CUDA, as published, the weights' own on a CPU; model: bf16 where the model's products are
    matrix_precision: Literal["auto", "model", "bf16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0 or not self.matrix_lr > 0.0:
            raise ConfigError(
                f"momentum {self.momentum} must lie in [0, 1), matrix_lr {self.matrix_lr} above 0."
            )

    def beside_bf16(self) -> MuonConfig:
        """Newton-Schulz in bf16, too, where it is to be as the model's."""
        if self.matrix_precision != "model":
            return self
        return replace(self, matrix_precision="bf16")

    @property
    def text(self) -> str:
        """The settings in a line for people, but for the decay."""
        return (
            f"Muon momentum {self.momentum}, {self.matrix_scale} scale, {self.matrix_lr:g} times"
            f" the rate, for the layers' matrices; {super().text} for the rest"
        )


class Muon(StableAdamW):
    """The rule above. `orthogonalized` counts the matrices that this rank has put through Newton-Schulz."""

    config: MuonConfig

    def __init__(self, groups: Any, config: MuonConfig, **rates: float) -> None:
        super().__init__(groups, config, **rates)
        self.orthogonalized = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._held: list[list[Held]] = []  # of matrices, on all ranks
        self._matrices: dict[str, int] = {}  # in each parameter
        self._exchanges: dict[tuple[int, ...], Exchange] = {}

    def set_slices(self, parts: Sequence[FlatPart], *, shapes: dict[str, tuple[int, ...]]) -> None:
        """As StableAdamW's; the ranks also tell each other where the matrices lie."""
        super().set_slices(parts, shapes=shapes)
        self._shapes, names = shapes, list(shapes)

        # slices as rows of six integers: names become row numbers, the same on all ranks
        row = {name: i for i, name in enumerate(names)}
        mine = []
        for i, part in enumerate(parts):
            matrices = self._groups[part.group]["matrices"]
            if matrices:
                for s in part.slices:
                    mine.append((i, matrices, row[s.name], s.start, s.length, s.flat_start))

        # by rank, in the order in which each rank has them: what Exchange asks for
        self._held, self._exchanges = [], {}
        for table in gather_rows(
            torch.tensor(mine, dtype=torch.int64, device=parts[0].tensor.device).view(-1, 6)
        ):
            self._held.append([])
            for part, matrices, i, start, length, flat_start in table.tolist():
                self._matrices[names[i]] = matrices
                self._held[-1].append(
                    Held(
                        part,
                        ParamSlice(
                            name=names[i],
                            numel=math.prod(shapes[names[i]]),
                            start=start,
                            length=length,
                            flat_start=flat_start,
                        ),
                    )
                )

    def kinds_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """A matrix has its momentum alone."""
        if group["matrices"]:
            return ("momentum",)
        return super().kinds_of(group)

    def _apply_update(self, live: Live) -> None:
        rest = [(group, p) for group, p in live if not group["matrices"]]
        if rest:
            super()._apply_update(rest)
        hidden = [(group, p) for group, p in live if group["matrices"]]
        if not hidden:
            return

        # M <- mu M + (1 - mu) G in place, and U = mu M + (1 - mu) G of the new M
        mu = self.config.momentum
        updates: dict[Tensor, Tensor] = {}
        for _, p in hidden:
            assert p.grad is not None, "only what has a gradient is live"
            updates[p] = p.grad.lerp(self.state[p]["momentum"].lerp_(p.grad, 1.0 - mu), mu)

        # flat tensors have slices of matrices; at stage 0 each is whole on every rank
        if self._parts:
            self._orthogonalize_cut(updates)
        else:
            for group, p in hidden:
                self._orthogonalize_(updates[p], matrices=group["matrices"])
        for group, p in hidden:
            self._subtract(
                [p], [updates[p]], group["lr"], decay=group["weight_decay"] / group["max_lr"]
            )

    def _orthogonalize_cut(self, updates: dict[Tensor, Tensor]) -> None:
        """The updates of flat tensors, each matrix by the rank that it was dealt to."""
        flats = {i: updates[tensor] for i, tensor in enumerate(self._parts) if tensor in updates}
        live = tuple(flats)  # all ranks step the same parts: groups, or sub-groups

        # who sends what depends on the stepped parts alone: planned once for each set of them
        if live not in self._exchanges:
            held: list[list[Held]] = []
            costs: dict[str, float] = {}
            for own in self._held:
                held.append([h for h in own if h.part in flats])
                for name in (h.slice.name for h in held[-1]):
                    costs[name] = _cost(self._shapes[name], self._matrices[name])
            self._exchanges[live] = Exchange(held, costs=costs, rank=rank_and_size()[0])
        exchange = self._exchanges[live]
        wholes = exchange.bring_together(flats)
        for name, whole in wholes.items():
            self._orthogonalize_(whole.view(self._shapes[name]), matrices=self._matrices[name])
        exchange.give_back(wholes, flats)

    def _orthogonalize_(self, values: Tensor, *, matrices: int) -> None:
        """Each of the matrices, one above another, becomes orthogonal, and as large as its scale says."""
        for matrix in values.chunk(matrices):
            near = matrix
            if not matrix.is_cuda:  # offloaded: to the GPU and back
                near = matrix.to(collective_device())
            asked = self.config.matrix_precision
            low = asked == "bf16" or near.is_cuda and asked == "auto"
            matrix.copy_(newton_schulz(near, in_bf16=low)).mul_(
                self.config.matrix_lr * _scale(matrix.shape, self.config.matrix_scale)
            )
            self.orthogonalized += 1


def newton_schulz(matrix: Tensor, *, in_bf16: bool) -> Tensor:
    """U S' V^T of a matrix U S V^T, with S' near 1 (0.7 to 1.2) unless the singular value is below about 1e-3 of the norm.

    in_bf16: whether its products are; else they have the matrix's own precision
    """
    a, b, c = NEWTON_SCHULZ
    # the shorter side first, for the smaller Gram matrix. Over its Frobenius norm a matrix has no
    # singular value above 1, which the iteration needs
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix
    if tall:
        x = matrix.T
    x = x / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    if in_bf16:
        x = x.to(torch.bfloat16)

    # x <- a x + (b G + c G^2) x with G = x x^T
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if tall:
        return x.T
    return x


def _scale(shape: Sequence[int], kind: str) -> float:
    rows, columns = shape
    if kind == "adam":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _cost(shape: Sequence[int], matrices: int) -> float:
    """FLOP of one Newton-Schulz step on the matrices of a parameter."""
    # G = x x^T and the product with x: 2 n^2 w each; G^2: 2 n^3
    narrow, wide = sorted((shape[0] // matrices, shape[1]))
    return matrices * (4.0 * narrow**2 * wide + 2.0 * narrow**3)
