"""Gradients are summed over the ranks while the backward pass still computes others.

    backward    | head | layers 21-15 | layers 14-8 | layers 7-1 | embedding |
    link               |     bucket 0   |    bucket 1   |    bucket 2   |  3  |     then the update

A bucket is sent when its last gradient is there and the bucket before it was sent: the same order on every rank, whatever order
autograd takes. What a bucket's sum is, and who keeps it, is the stage's (encoder.engine.zero.ways).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from encoder.base.dist import World, sum_over_ranks

# gradients that travel together: at most so many, a share of the model's, and so many for each rank, whose part of a bucket is a
# message
BUCKET_ELEMENTS = 2**22
BUCKETS = 64
PART_ELEMENTS = 2**16
# that wait for the link at once; then the backward pass waits, too
WAITING_ELEMENTS = 2**26

Parameter = Any  # a Tensor with attributes of DeepSpeed's


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """Parameters whose gradients travel together: neighbours in the flat order of their optimizer group."""

    group: int
    start: int  # first element, in the group's flat order
    numel: int
    parameters: tuple[Parameter, ...]
    starts: tuple[int, ...]  # of each parameter, in the bucket


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A bucket on its way."""

    bucket: Bucket
    buffer: torch.Tensor  # what is sent: kept until then
    sums: torch.Tensor  # where they will be, once all works are done
    works: Sequence[dist.Work]


class Way(Protocol):
    """How a ZeRO stage sums a bucket over the ranks, and what it keeps of it."""

    # of each optimizer group, in its flat order
    groups: Sequence[Sequence[Parameter]]
    # whether every backward pass sends, not that of a step's last micro-batch alone
    every_backward: bool

    def begin_step(self) -> None:
        """Before the first bucket of a step."""

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        """Where the bucket's gradients are put."""

    def put(self, bucket: Bucket, buffer: torch.Tensor, index: int, grad: torch.Tensor) -> None:
        """Copies the gradient of the bucket's parameter `index`."""

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> Sent:
        """Begins the sum over ranks. The same bucket of an earlier backward pass may still be on its way."""

    def receive(self, sent: Sent) -> None:
        """Keeps what is this rank's, once the sum is there; called in the order of sending."""

    def end_step(self) -> None:
        """After the last bucket of a step: the update may begin."""


def bucket_elements(parameters: int, *, ranks: int) -> int:
    """Gradients of a bucket: few enough for the first to leave early, enough for its parts to take longer to send than to arrive.

    parameters: trained numbers
    ranks: that sum them
    """
    return max(PART_ELEMENTS * ranks, min(BUCKET_ELEMENTS, parameters // BUCKETS))


def buckets_of(groups: Sequence[Sequence[Parameter]], *, elements: int) -> list[Bucket]:
    """Whole parameters, from the end of each group to its start, at most `elements` together unless one alone has more."""
    found = []
    for number, group in enumerate(groups):
        end = sum(_numel(p) for p in group)
        some: list[Parameter] = []
        for p in [*reversed(group), None]:
            size = sum(_numel(q) for q in some)
            if some and (p is None or size + _numel(p) > elements):
                found.append(_bucket(number, end - size, some))
                end -= size
                some = []
            if p is not None:
                some.insert(0, p)
    return found


def _bucket(group: int, start: int, parameters: Sequence[Parameter]) -> Bucket:
    starts = [0]
    for p in parameters:
        starts.append(starts[-1] + _numel(p))
    return Bucket(
        group=group,
        start=start,
        numel=starts[-1],
        parameters=tuple(parameters),
        starts=tuple(starts[:-1]),
    )


def _numel(p: Parameter) -> int:
    # stage 3 has cut the parameter itself
    return int(getattr(p, "ds_numel", p.numel()))


class Overlap:
    """Sends the gradients of an engine's backward passes, a bucket at a time."""

    def __init__(self, way: Way, *, parameters: Sequence[Parameter], world: World) -> None:
        """Hangs a hook on every parameter.

        way: of the stage
        parameters: of the model, as it was made: until a backward pass was seen, those made last are expected first
        world: this rank among the others
        """
        self.way = way
        self._world = world
        elements = bucket_elements(sum(_numel(p) for p in parameters), ranks=world.size)
        buckets = buckets_of(way.groups, elements=elements)
        self._place = {p: (b, i) for b in buckets for i, p in enumerate(b.parameters)}
        made = {p: number for number, p in enumerate(parameters)}
        self._order = sorted(
            buckets, key=lambda b: min(made[p] for p in b.parameters), reverse=True
        )
        # which gradient came when, in the first backward pass that sent
        self._arrived: dict[Parameter, int] | None = {}

        self._sending = False
        self._in_step = False
        self._failed = False
        self._missing: dict[Bucket, set[Parameter]] = {}
        self._buffers: dict[Bucket, torch.Tensor] = {}
        self._sent = 0  # buckets of this backward pass, in order
        self._waiting: deque[Sent] = deque()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._gradient_is_there) for p in self._place
        ]

    @contextlib.contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch.

        last: of its step. Stages that keep whole gradients add up those of the others first
        """
        assert not self._failed, "a backward pass failed: what it had sent is lost"
        self._sending = self.way.every_backward or last
        if self._sending and not self._in_step:
            self.way.begin_step()
            self._in_step = True
        self._sent = 0
        self._missing = {bucket: set(bucket.parameters) for bucket in self._order}
        try:
            yield
            if self._sending:
                self._send_the_rest()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._sending = False

    def finish(self) -> None:
        """Waits for all that is under way: after the last backward pass of a step."""
        while self._waiting:
            self._receive()
        if self._arrived is not None:
            self._order = self._learned_order(self._arrived)
            self._arrived = None
        self.way.end_step()
        self._in_step = False

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _gradient_is_there(self, p: Parameter) -> None:
        if not self._sending:
            return
        bucket, index = self._place[p]
        assert p in self._missing[bucket], "a gradient came twice in one backward pass"
        self._put(bucket, index)
        if self._arrived is not None:
            self._arrived.setdefault(p, len(self._arrived))

        # buckets go in order: one that is full waits for those before it
        while self._sent < len(self._order) and not self._missing[self._order[self._sent]]:
            self._send(self._order[self._sent])

    def _send_the_rest(self) -> None:
        """Buckets of parameters that this backward pass did not reach."""
        for bucket in self._order[self._sent :]:
            for index, p in enumerate(bucket.parameters):
                if p in self._missing[bucket]:
                    self._put(bucket, index)
            self._send(bucket)

    def _put(self, bucket: Bucket, index: int) -> None:
        p = bucket.parameters[index]
        if bucket not in self._buffers:
            self._buffers[bucket] = self.way.buffer(bucket)
        grad = p.grad
        if grad is None:
            grad = torch.zeros(_numel(p), dtype=p.dtype, device=p.device)
        self.way.put(bucket, self._buffers[bucket], index, grad)
        # its memory goes as the bucket's comes
        p.grad = None
        self._missing[bucket].remove(p)

    def _send(self, bucket: Bucket) -> None:
        buffer = self._buffers.pop(bucket)
        self._waiting.append(self.way.send(bucket, buffer))
        self._sent += 1
        while (
            sum(sent.bucket.numel for sent in self._waiting) > WAITING_ELEMENTS
            and len(self._waiting) > 1
        ):
            self._receive()

    def _receive(self) -> None:
        sent = self._waiting.popleft()
        for work in sent.works:
            work.wait()
        self.way.receive(sent)

    def _learned_order(self, arrived: Mapping[Parameter, int]) -> list[Bucket]:
        """Buckets as rank zero's first backward pass completed them. It decides how early a sum begins, and nothing else.

        arrived: parameter -> when its gradient came
        """
        completed = [
            max(arrived.get(p, len(arrived)) for p in bucket.parameters) for bucket in self._order
        ]
        order = torch.tensor(completed).argsort(stable=True)
        if not self._world.first:
            order.zero_()
        return [self._order[i] for i in sum_over_ranks(order).tolist()]
