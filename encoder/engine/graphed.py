"""Forward and backward of a micro-batch as one CUDA graph: one launch instead of some thousand, for models whose kernels are
shorter than the host's time to launch them.

    captured once a shape        ids, positions, cu_seqlens, question -> sums of the loss, d total / d parameter (all of them)
    a micro-batch                copy it to where the graph reads, replay, hand the gradients on, times the caller's scale

The gradients go on through autograd, so that ZeRO's hooks see each parameter's as ever. On a CPU the same work runs without a
graph: what is tested there is all but the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from encoder.base.batch import SummedLoss, TokenBatch
from encoder.nn.loss import scaled

WARM_UP = 3         # micro-steps before a capture, on a stream of their own: kernels are compiled and tuned, libraries loaded
ENDS = "cu_seqlens_S1"
TENSORS = tuple(f.name for f in fields(TokenBatch) if f.type == "torch.Tensor")

Work = Callable[[], tuple[SummedLoss, tuple[Tensor, ...]]]


class GraphedForward:
    """Stands in the place of `model.forward`: its SummedLoss, whose backward is already done.

    One graph is kept. Another shape, theta, mode, precision or place of the weights captures another; phases differ in these,
    micro-batches of a phase do not (encoder.data.assembly, static_shapes). Forwards without gradients run as ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self.captures = 0
        self._model, self._plain = model, model.forward
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = [*self._named.values()]
        self._key: tuple[Any, ...] | None = None
        self._graph: _Graph | None = None

    def __call__(self, batch: TokenBatch) -> SummedLoss:
        """Raises RuntimeError in the backward of a forward that another one has followed."""
        if not torch.is_grad_enabled():
            return self._plain(batch)
        key = (*self._of_batch(batch), *self._of_model(batch.ids_T.device))
        if key != self._key or self._graph is None or not self._graph.has_room(batch):
            self._key = self._graph = None          # its memory first
            self._graph, self._key = _Graph(_Bare(self._model, self._plain), batch, self._named), key
            self.captures += 1
        return SummedLoss(*_Replay.apply(self._graph, batch, *self._parameters))

    @property
    def pool_bytes(self) -> int:
        """What the graph keeps on a CUDA device between micro-steps; torch counts only its results as allocated."""
        pool = getattr(self._graph and self._graph.replay, "pool", None)
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot(pool, include_traces=False)) if pool else 0

    def _of_batch(self, batch: TokenBatch) -> Iterator[Any]:
        """What a graph is bound to, the host's numbers as well: max_seqlen is a launch's argument. Not the length of cu_seqlens."""
        yield batch.max_seqlen
        for name in TENSORS:
            tensor = getattr(batch, name)
            yield tensor.shape if name != ENDS else None, tensor.dtype, tensor.device

    def _of_model(self, device: torch.device) -> Iterator[Any]:
        yield self._model.training
        yield torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        yield from (getattr(self._model, name) for name in ("global_rope_theta", "local_rope_theta"))
        yield from (p.data_ptr() for p in self._parameters)


class _Bare(nn.Module):
    """A model as it was before its forward was replaced."""

    def __init__(self, model: nn.Module, plain: Callable[[TokenBatch], SummedLoss]) -> None:
        super().__init__()
        self.model, self._plain = model, plain

    def forward(self, batch: TokenBatch) -> SummedLoss:
        """The model's own."""
        return self._plain(batch)


class _Graph:
    """One shape's: reads its own copy of a micro-batch, writes its own results."""

    def __init__(self, bare: _Bare, batch: TokenBatch, parameters: dict[str, nn.Parameter]) -> None:
        self.turn = 0
        # leaves of its own on the weights' memory: autograd adds up a parameter's gradient on the stream that was current when
        # somebody (DeepSpeed) first hung a hook on it, the default one, and that must not wait for a capture
        leaves = {f"model.{name}": nn.Parameter(p.detach()) for name, p in parameters.items()}
        self._batch = replace(batch, **{name: getattr(batch, name).clone() for name in TENSORS})
        device = batch.ids_T.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else None

        def work() -> tuple[SummedLoss, tuple[Tensor, ...]]:
            # autocast's own cache would keep the weights of the warm-up in bf16 for ever
            with torch.enable_grad(), torch.autocast(device.type, dtype=dtype, enabled=autocast, cache_enabled=False):
                loss = functional_call(bare, leaves, (self._batch,))
            gradients = torch.autograd.grad(loss.total, [*leaves.values()])
            return SummedLoss(*(x.detach() for x in loss)), gradients

        self.replay = captured(work) if device.type == "cuda" else work

    def has_room(self, batch: TokenBatch) -> bool:
        """For as many documents. The loader makes room for more of them by the power of two, micro-batch by micro-batch: were a
        graph bound to it, rows of short documents among those of long ones would capture again and again."""
        return len(getattr(batch, ENDS)) <= len(getattr(self._batch, ENDS))

    def run(self, batch: TokenBatch) -> tuple[SummedLoss, tuple[Tensor, ...]]:
        """Valid until the next run."""
        self.turn += 1
        for name in TENSORS:
            ours, theirs = getattr(self._batch, name), getattr(batch, name)
            ours[:len(theirs)].copy_(theirs, non_blocking=True)
            if len(theirs) < len(ours):
                ours[len(theirs):] = len(batch.ids_T)       # of cu_seqlens: empty documents
        return self.replay()


def captured(work: Work) -> Work:
    """The work as a CUDA graph; what it returns stays where it is."""
    beside = _stream(torch.cuda.current_device())
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the watchdog of NCCL and the loader's pinning ask the driver things that a capture forbids its own thread
    with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
        results = work()

    def replay() -> tuple[SummedLoss, tuple[Tensor, ...]]:
        graph.replay()
        return results

    replay.pool = graph.pool()
    return replay


@cache
def _stream(_device: int) -> torch.cuda.Stream:
    """One for all captures: torch keeps the workspaces of cuBLAS for every stream that ever multiplied, 64 MiB each."""
    return torch.cuda.Stream()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, batch: TokenBatch, *parameters: Tensor) -> tuple[Tensor, ...]:
        loss, ctx.gradients = graph.run(batch)
        ctx.graph, ctx.turn = graph, graph.turn
        results = tuple(x.clone() for x in loss)            # the caller may keep them
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        graph, gradients = ctx.graph, ctx.gradients
        ctx.graph = ctx.gradients = None            # or a loss that the caller keeps would keep the memory of a graph that is gone
        if graph is None:
            raise RuntimeError("a second backward through one forward: the graph's gradients were handed on by the first.")
        if graph.turn != ctx.turn:
            raise RuntimeError("two forwards before a backward: the graph has written over the gradients of the first.")
        # new tensors: autograd may keep one as a parameter's .grad, and the next replay writes over ours
        return None, None, *(scaled(d, d_total) for d in gradients)
