"""Which slice of a flat tensor is which parameter.

ZeRO hands the optimizer one flat tensor per group and rank, cut without regard to parameters:

    parameters   | Wqkv            | Wo     | norm |  (padding)
    flat, rank 0 | . . . . . . . . . . . . |
    flat, rank 1                           | . . . . . . . . |
    slices         Wqkv [0, 17)  Wo [0, 7)   Wo [7, 9)  norm [0, 6)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ParamSlice:
    """A contiguous part of one parameter inside one flat tensor; all amounts in elements."""

    name: str
    numel: int  # of the whole parameter
    start: int  # first element, inside the parameter
    length: int
    flat_start: int  # first element, inside the flat tensor

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The slice as a 1-d view of a flat tensor (or of a contiguous tensor of any shape)."""
        return flat.view(-1).narrow(0, self.flat_start, self.length)


@dataclass(frozen=True, kw_only=True)
class FlatPart:
    """A tensor that the optimizer steps, and the parameters that lie in it."""

    tensor: torch.Tensor
    slices: tuple[ParamSlice, ...]
    group: int = 0  # of the optimizer's groups


def first_gap(numels: Mapping[str, int], slices: Sequence[ParamSlice]) -> str | None:
    """What is wrong if the slices (of all ranks) do not cover every parameter exactly once, else None."""
    by_name: dict[str, list[ParamSlice]] = {name: [] for name in numels}
    for part in slices:
        if by_name.get(part.name) is None or part.numel != numels[part.name]:
            return f"{part.name} with {part.numel:,} elements is no parameter of the model"
        by_name[part.name].append(part)

    # sorted by start, each must begin where the one before it ended
    for name, parts in by_name.items():
        end = 0
        for part in sorted(parts, key=lambda s: s.start):
            if part.start < end:
                return f"{name}: element {part.start:,} is covered twice"
            if part.start > end:
                return f"{name}: element {end:,} is covered by no rank"
            end += part.length
        if end != numels[name]:
            return f"{name}: elements from {end:,} to {numels[name]:,} are covered by no rank"
    return None
