"""How a bucket of gradients is summed at each ZeRO stage, and who keeps it.

stage    sent as                          kept of the sum
0        an all-reduce                    all of it, on every rank
1, 2     a reduce to each of its owners   what this rank steps, at stage 2 after every micro-batch
3        a reduce-scatter                 this rank's part of each parameter, after every micro-batch

DeepSpeed 0.19.8 does the same sums, but waits for each: at stages 0 and 1 after the backward pass, at stages 2 and 3 in the
middle of it. Its hooks are switched off (`_coalesce_grad_reduction`), and its update is handed what it would have reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from encoder.engine.overlap import Bucket, Parameter, Sent, Way


def way_of(ds_engine: Any, *, stage: int) -> Way:
    """What an engine of a stage does with a bucket. Takes DeepSpeed's own reduction away from it."""
    if stage == 0:
        return AllReduced([group["params"] for group in ds_engine.optimizer.param_groups])
    # its hooks do nothing but count
    ds_engine.optimizer._coalesce_grad_reduction = True
    if stage == 3:
        return ReduceScattered(ds_engine)
    # what it would reduce at the end of a backward pass
    ds_engine.enable_backward_allreduce = False
    return ReducedToOwners(ds_engine.optimizer, every_backward=stage == 2)


class AllReduced:
    """Stage 0: the sums of all gradients, one flat tensor on every rank, in the order of the optimizer's groups."""

    every_backward = False

    def __init__(self, groups: Sequence[Sequence[Parameter]]) -> None:
        """The optimizer's groups."""
        self.groups: Sequence[Sequence[Parameter]] = groups
        sizes = [sum(p.numel() for p in group) for group in groups]
        self._group_starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._numel = sum(sizes)
        self._flat: torch.Tensor | None = None

    def begin_step(self) -> None:
        """A flat tensor for the step."""
        first = self.groups[0][0]
        self._flat = torch.empty(self._numel, dtype=first.dtype, device=first.device)

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        """The bucket's own stretch of the flat tensor."""
        assert self._flat is not None
        start = self._group_starts[bucket.group] + bucket.start
        return self._flat[start : start + bucket.numel]

    def put(self, bucket: Bucket, buffer: torch.Tensor, index: int, grad: torch.Tensor) -> None:
        """As it is."""
        start = bucket.starts[index]
        buffer[start : start + grad.numel()].copy_(grad.view(-1))

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> Sent:
        """All of it to all ranks."""
        work = dist.all_reduce(buffer, async_op=True)
        return Sent(bucket=bucket, buffer=buffer, sums=buffer, works=_some(work))

    def receive(self, sent: Sent) -> None:
        """It lies there already."""

    def end_step(self) -> None:
        """The optimizer asks by itself, `take_sums`."""

    def take_sums(self) -> torch.Tensor:
        """The sums of the step, given away."""
        assert self._flat is not None, "the gradients of this step were not sent"
        flat, self._flat = self._flat, None
        return flat


class ReducedToOwners:
    """Stages 1 and 2: an optimizer group is cut into one partition a rank, wherever the cuts fall.

    group        | Wqkv          | Wo    | Wi          |
    partition    | rank 0     | rank 1     | rank 2    |
    a bucket                    | to rank 1 | to rank 2 |
    """

    def __init__(self, optimizer: Any, *, every_backward: bool) -> None:
        """Around DeepSpeed's DeepSpeedZeroOptimizer.

        optimizer: whose partitions are filled
        every_backward: stage 2, whose gradients are cut, too: their sums are added up, not they themselves
        """
        self.groups: Sequence[Sequence[Parameter]] = optimizer.bit16_groups
        self.every_backward = every_backward
        self._optimizer = optimizer
        self._group = optimizer.dp_process_group
        self._ranks = dist.get_world_size(self._group)
        self._rank = dist.get_rank(self._group)
        # in fp32 also of bf16 weights
        self._dtype = optimizer.communication_data_type
        # else it would fill the partitions anew, from gradients that are gone
        optimizer.finalize_gradient_accumulation_boundary = self._set_boundary
        self._own: list[Any] = []

    def begin_step(self) -> None:
        """Zeros for this rank's partition of every group, in the form in which DeepSpeed's step takes them."""
        make = self._optimizer._build_compact_grad_partition_buffer
        self._own = [make(i) for i in range(len(self.groups))]

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        """Its own, until it is received."""
        device = bucket.parameters[0].device
        return torch.empty(bucket.numel, dtype=self._dtype, device=device)

    def put(self, bucket: Bucket, buffer: torch.Tensor, index: int, grad: torch.Tensor) -> None:
        """Divided by the ranks before it is summed, as DeepSpeed does, in the gradient's own precision."""
        start = bucket.starts[index]
        place = buffer[start : start + grad.numel()]
        if grad.dtype == buffer.dtype:
            torch.div(grad.view(-1), self._ranks, out=place)
        else:
            place.copy_(grad.view(-1) / self._ranks)

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> Sent:
        """Each stretch to the rank that steps it."""
        works: list[dist.Work] = []
        for owner, start, end in self._cuts(bucket):
            to = dist.get_global_rank(self._group, owner)
            work = dist.reduce(buffer[start:end], to, group=self._group, async_op=True)
            works += _some(work)
        return Sent(bucket=bucket, buffer=buffer, sums=buffer, works=works)

    def receive(self, sent: Sent) -> None:
        """Added to what earlier micro-batches of the step gave."""
        bucket = sent.bucket
        size = int(self._optimizer.partition_size[bucket.group])
        for owner, start, end in self._cuts(bucket):
            if owner == self._rank:
                own = self._own[bucket.group].flat_partition
                own_start = bucket.start + start - self._rank * size
                own[own_start : own_start + end - start].add_(sent.sums[start:end])

    def end_step(self) -> None:
        """DeepSpeed's step finds its partitions full."""
        self._optimizer.averaged_gradients.update(enumerate(self._own))
        self._own = []

    def _cuts(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """(owner, first element, end) of the stretches of a bucket, inside it."""
        size = int(self._optimizer.partition_size[bucket.group])
        found = []
        start = 0
        while start < bucket.numel:
            owner = (bucket.start + start) // size
            end = min(bucket.numel, (owner + 1) * size - bucket.start)
            found.append((owner, start, end))
            start = end
        return found

    def _set_boundary(self) -> None:
        self._optimizer.set_gradient_accumulation_boundary(True)


class ReduceScattered:
    """Stage 3: each parameter is cut over the ranks, the last parts filled up. A bucket has a row for each rank.

    rank 0     | Wqkv, 1st part | norm, 1st part |
    rank 1     | Wqkv, 2nd part | norm, 2nd part |
    """

    every_backward = True

    def __init__(self, ds_engine: Any) -> None:
        """Around DeepSpeed's engine, whose optimizer is a DeepSpeedZeroOptimizer_Stage3."""
        parameters = [p for p in ds_engine.module.parameters() if p.requires_grad]
        # cut one by one, so that all may travel with their neighbours in the model
        self.groups: Sequence[Sequence[Parameter]] = [parameters]
        optimizer = ds_engine.optimizer
        self._kept = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        self._dtype = optimizer.communication_data_type
        self._group = parameters[0].ds_process_group
        self._ranks = dist.get_world_size(self._group)
        self._begun: set[Bucket] = set()  # that have sums of this step

    def begin_step(self) -> None:
        """Nothing is kept from the step before."""
        self._begun = set()

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        """A row for each rank."""
        row = sum(p.partition_numel() for p in bucket.parameters)
        device = bucket.parameters[0].device
        return torch.empty(self._ranks, row, dtype=self._dtype, device=device)

    def put(self, bucket: Bucket, buffer: torch.Tensor, index: int, grad: torch.Tensor) -> None:
        """A part in every row; zeros where the parameter has ended."""
        part = bucket.parameters[index].partition_numel()
        start = sum(p.partition_numel() for p in bucket.parameters[:index])
        rows = buffer[:, start : start + part]
        flat = grad.view(-1)
        full, rest = divmod(flat.numel(), part)
        rows[:full].copy_(flat[: full * part].view(full, part))
        if full < self._ranks:
            rows[full:].zero_()
            rows[full, :rest].copy_(flat[full * part :])

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> Sent:
        """Each row to its rank."""
        own = torch.empty_like(buffer[0])
        work = dist.reduce_scatter_tensor(
            own, buffer.div_(self._ranks).view(-1), group=self._group, async_op=True
        )
        return Sent(bucket=bucket, buffer=buffer, sums=own, works=_some(work))

    def receive(self, sent: Sent) -> None:
        """Into what DeepSpeed's step reads; added to what earlier micro-batches of the step gave."""
        bucket = sent.bucket
        parts = sent.sums.split([p.partition_numel() for p in bucket.parameters])
        for p, part in zip(bucket.parameters, parts, strict=True):
            # the last ranks may have none of a small parameter
            kept = self._kept[p.ds_id].view(-1)
            if bucket in self._begun:
                kept.add_(part)
            else:
                kept.copy_(part)
        self._begun.add(bucket)

    def end_step(self) -> None:
        """The sums lie where DeepSpeed's step looks for them."""


def _some(work: dist.Work | None) -> list[dist.Work]:
    # None on a rank outside of the group
    return [work] if work is not None else []
