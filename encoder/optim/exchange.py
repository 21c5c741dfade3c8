"""Matrices that lie in slices on many ranks come together, each on one rank, and go back: two all-to-alls.

rank 0   | a a a a b b |         rank 0   a a a a a a              rank 0   | A A A A B B |
rank 1   | a a b b c c |   ->    rank 1   b b b b           ->     rank 1   | A A B B C C |
rank 2   | c c         |         rank 2   c c c c                  rank 2   | C C         |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from encoder.base.dist import exchange
from encoder.optim.slices import ParamSlice


class Held(NamedTuple):
    """A slice, and the flat tensor that it lies in on its rank (by number)."""

    part: int
    slice: ParamSlice


class Exchange:
    """Who works on which matrix, and what each rank sends to each; the same on every rank.

    held: [ranks], what lies on each, in one order that all ranks know. costs: the matrices by name, and their work.
    """

    def __init__(
        self, held: Sequence[Sequence[Held]], *, costs: Mapping[str, float], rank: int
    ) -> None:
        self.owners = deal(costs, ranks=len(held))
        self._numels = {h.slice.name: h.slice.numel for h in chain.from_iterable(held)}

        # _mine[r] lies here and goes to rank r; _others[r] lies on rank r and comes here
        self._mine = [self._owned_by(r, held[rank]) for r in range(len(held))]
        self._others = [self._owned_by(rank, own) for own in held]

    def _owned_by(self, rank: int, held: Sequence[Held]) -> list[Held]:
        return [h for h in held if self.owners[h.slice.name] == rank]

    def bring_together(self, flats: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The whole matrices that this rank works on, flattened."""
        # all ranks know the order of `held`, so values alone are sent, end to end
        like = next(iter(flats.values()))
        sent = []
        for some in self._mine:
            sent.append(_joined([h.slice.of(flats[h.part]) for h in some], like))
        received = exchange(sent, receive=list(map(_elements, self._others)))

        wholes: dict[str, Tensor] = {}
        for h in chain.from_iterable(self._others):
            wholes[h.slice.name] = like.new_empty(self._numels[h.slice.name])
        for h, values in _split(received, self._others):
            _place(wholes, h).copy_(values)
        return wholes

    def give_back(self, wholes: Mapping[str, Tensor], flats: Mapping[int, Tensor]) -> None:
        """Writes every rank's slices of the matrices into its flat tensors."""
        like = next(iter(flats.values()))

        # the same way back: what came is sent, what was sent comes
        sent = []
        for some in self._others:
            sent.append(_joined([_place(wholes, h) for h in some], like))
        received = exchange(sent, receive=list(map(_elements, self._mine)))
        for h, values in _split(received, self._mine):
            h.slice.of(flats[h.part]).copy_(values)


def _elements(held: Sequence[Held]) -> int:
    return sum(h.slice.length for h in held)


def deal(costs: Mapping[str, float], *, ranks: int) -> dict[str, int]:
    """The rank of each matrix: the most expensive first, each to the rank with the least to do."""
    load, owners = [0.0] * ranks, {}
    # equal costs by name: every rank must deal alike
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return owners


def _place(wholes: Mapping[str, Tensor], h: Held) -> Tensor:
    return wholes[h.slice.name].narrow(0, h.slice.start, h.slice.length)


def _joined(tensors: list[Tensor], like: Tensor) -> Tensor:
    if tensors:
        return torch.cat(tensors)
    return like.new_empty(0)


def _split(
    received: Sequence[Tensor], held: Sequence[Sequence[Held]]
) -> Iterator[tuple[Held, Tensor]]:
    for values, some in zip(received, held, strict=True):
        yield from zip(some, values.split([h.slice.length for h in some]), strict=True)
