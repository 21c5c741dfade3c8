"""Where DeepSpeed keeps the weights that the optimizer steps: flat tensors and the parameters in them, stages 0 to 3.

Stages 1 and 2 cut a group over the ranks, wherever the cuts fall. Read from each parameter's `_hp_mapping`
(deepspeed/utils/tensor_fragment.py), which DeepSpeed itself uses for its universal checkpoints.

Stage 3 cuts each parameter into equal parts, the last ones filled up, and steps sub-group by sub-group. No parameter is
in two sub-groups, so the sums of whole tensors are complete when the first of them moves:

    5 elements, 3 ranks    | 0 1 | 2 3 | 4 . |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from encoder.base.dist import World, sum_over_ranks
from encoder.optim.slices import FlatPart, ParamSlice, first_gap


def flat_parts(ds_engine: Any) -> list[FlatPart]:
    """This rank's tensors that are stepped, one per optimizer group (stages 1, 2) or per parameter (stage 0)."""
    names = {p: name for name, p in ds_engine.module.named_parameters() if p.requires_grad}
    optimizer = ds_engine.optimizer

    # stage 0: DeepSpeed leaves our optimizer as it is, one whole tensor a parameter
    if isinstance(optimizer, torch.optim.Optimizer):
        parts = []
        for i, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                numel = p.numel()
                own = ParamSlice(name=names[p], numel=numel, start=0, length=numel, flat_start=0)
                parts.append(FlatPart(tensor=p, group=i, slices=(own,)))
        return parts

    # stage 3: a flat tensor a sub-group, with this rank's part of each of its parameters
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [
            FlatPart(
                tensor=flat,
                slices=tuple(_own_parts(names, params)),
                group=optimizer.sub_group_to_group_id[i],
            )
            for i, (params, flat) in enumerate(
                zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
            )
        ]

    # stages 1 and 2: a slice of a group; without `_hp_mapping` it has nothing of a parameter
    if hasattr(optimizer, "bf16_groups"):  # BF16_Optimizer: bf16 parameters at stage 1
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:  # DeepSpeedZeroOptimizer
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    parts = []
    for i, (params, flat) in enumerate(zip(groups, flats, strict=True)):
        slices = tuple(_slice(names[p], p) for p in params if p._hp_mapping is not None)
        parts.append(FlatPart(tensor=flat, slices=slices, group=i))
    return parts


def refresh_parameters(ds_engine: Any) -> None:
    """The model's parameters become what the master weights say, on all ranks (an all-gather at stages 1 and 2)."""
    optimizer = ds_engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # what is gathered now is old; it is gathered again when used
        ds_engine.empty_partition_cache()
        for weights, masters in zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        ):
            weights.data.copy_(masters.data)
    # at stage 0 nothing is to be done: the masters are the model's own weights
    elif not isinstance(optimizer, torch.optim.Optimizer):
        optimizer.update_lp_params()


def forget_gradients(ds_engine: Any) -> None:
    """After a step whose gradient was not finite. With an offloaded optimizer DeepSpeed 0.19.8 keeps that of bf16 parameters
    at stages 1 and 2, adds the next ones to it, and never moves again."""
    if getattr(ds_engine.optimizer, "cpu_offload", False):
        ds_engine.optimizer.averaged_gradients.clear()


def whole_shape(p: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also while it is cut over ranks."""
    return tuple(getattr(p, "ds_shape", p.shape))


def share_of(whole: ParamSlice, world: World) -> ParamSlice:
    """This rank's part of a parameter that every rank holds whole, near-equal in size."""
    # numel * rank // ranks: the end of a share is the start of the next
    start, end = (whole.numel * (world.rank + i) // world.size for i in (0, 1))
    return dataclasses.replace(whole, start=start, length=end - start, flat_start=start)


def check_cover(
    owned: Sequence[ParamSlice], *, numels: dict[str, int], world: World, device: torch.device
) -> None:
    """Asserts that the slices of all ranks cover every parameter exactly once; one all-reduce of a small table."""
    row = {name: i for i, name in enumerate(numels)}
    # one slice of a parameter on a rank: a partition is contiguous, at stages 1 and 2 of a group, at stage 3 of it alone
    table = torch.zeros(world.size, len(row), 2, dtype=torch.int64)

    # each rank fills its own row of zeros, so the sum is the table of all
    for s in owned:
        table[world.rank, row[s.name]] = torch.tensor([s.start, s.length])
    everywhere = []
    for rows in sum_over_ranks(table.to(device)).tolist():
        for (name, numel), (start, length) in zip(numels.items(), rows):
            if length:
                everywhere.append(
                    ParamSlice(name=name, numel=numel, start=start, length=length, flat_start=0)
                )
    problem = first_gap(numels, everywhere)
    assert problem is None, (
        f"DeepSpeed lays its flat tensors out in a way this code does not know: {problem}"
    )


def _slice(name: str, p: Any) -> ParamSlice:  # a Tensor with attributes of DeepSpeed's
    inside, flat = p._hp_mapping.lp_fragment_address, p._hp_mapping.get_hp_fragment_address()
    assert inside.numel == flat.numel, (
        f"{name}: {inside.numel} elements in the parameter, {flat.numel} in the flat tensor"
    )
    return ParamSlice(
        name=name, numel=p.numel(), start=inside.start, length=flat.numel, flat_start=flat.start
    )


def _own_parts(names: dict[torch.Tensor, str], group: Sequence[Any]) -> Iterator[ParamSlice]:
    flat_start = 0
    for p in group:
        # equal parts: the last ones reach beyond the parameter's end, or lie behind it
        start = p.ds_zero_partition_rank * p.partition_numel()
        length = min(p.partition_numel(), p.ds_numel - start)
        if length > 0:
            yield ParamSlice(
                name=names[p], numel=p.ds_numel, start=start, length=length, flat_start=flat_start
            )

        # padding takes its place in the flat tensor, too
        flat_start += p.partition_numel()
