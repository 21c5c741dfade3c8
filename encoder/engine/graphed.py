"""Forward and backward of a micro-batch as one CUDA graph: one launch instead of some thousand, for models whose kernels are
shorter than the host's time to launch them.

    captured once a shape        ids, positions, cu_seqlens, targets -> loss terms, d total / d parameter of each term
    a micro-batch                copy it to where the graph reads, replay, hand the gradients on, times the caller's scale

The gradients go on through autograd, so that ZeRO's hooks see each parameter's as ever. On a CPU the same work runs without a
graph: what is tested there is all but the capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from encoder.base.batch import LossTerm, TokenBatch
from encoder.base.model import TrainedModel
from encoder.nn.loss import scaled

# micro-steps before a capture, on its stream: kernels are compiled and tuned, libraries loaded
WARM_UP = 3
ENDS = "cu_seqlens_S1"

Terms = dict[str, LossTerm]
Work = Callable[[], tuple[Terms, list[tuple[Tensor, ...]]]]


class GraphedForward:
    """Stands in the place of `terms_of(batch)`: its loss terms, whose backward is already done.

    One graph is kept. Another shape, theta, mode, precision or place of the weights captures another; phases differ in these,
    micro-batches of a phase do not (encoder.data.assembly, static_shapes). Forwards without gradients run as ever.
    """

    def __init__(self, model: TrainedModel, terms_of: Callable[[TokenBatch], Terms]) -> None:
        self.captures = 0
        self._model, self._plain = model, terms_of
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = [*self._named.values()]
        self._key: tuple[Any, ...] | None = None
        self._graph: _Graph | None = None

    def __call__(self, batch: TokenBatch) -> Terms:
        """Raises RuntimeError in the backward of a forward that another one has followed."""
        if not torch.is_grad_enabled():
            return self._plain(batch)

        # a graph repeats its launches as captured: the key holds what they were bound to
        key = (*self._of_batch(batch), *self._of_model(batch.ids_T.device))
        if key != self._key or self._graph is None or not self._graph.has_room(batch):
            self._key = self._graph = None  # its memory first
            self._graph, self._key = (
                _Graph(_Bare(self._model, self._plain), batch, self._named),
                key,
            )
            self.captures += 1

        # flat, four tensors a term: an autograd function returns tensors alone
        results = iter(_Replay.apply(self._graph, batch, *self._parameters))
        terms: Terms = {}
        for name, weight in self._graph.weights.items():
            total, summed, count, correct = (next(results) for _ in range(4))
            terms[name] = LossTerm(total, summed, count, correct, weight)
        return terms

    @property
    def pool_bytes(self) -> int:
        """What the graph keeps on a CUDA device between micro-steps; torch counts only its results as allocated."""
        # nothing is captured yet, or on a CPU nothing ever is: no pool
        pool = getattr(self._graph and self._graph.replay, "pool", None)
        if pool:
            return sum(
                s["total_size"] for s in torch.cuda.memory_snapshot(pool, include_traces=False)
            )
        return 0

    def _of_batch(self, batch: TokenBatch) -> Iterator[Any]:
        """What a graph is bound to, the host's numbers as well: max_seqlen is a launch's argument. Not the length of cu_seqlens."""
        yield batch.max_seqlen
        for name, tensor in batch.tensors().items():
            yield name, tensor.shape if name != ENDS else None, tensor.dtype, tensor.device

    def _of_model(self, device: torch.device) -> Iterator[Any]:
        yield self._model.training
        # False, or the dtype that autocast computes in
        yield torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        yield from self._model.phase_settings.values()
        # a graph reads weights by address, and does not follow those that move
        yield from (p.data_ptr() for p in self._parameters)


class _Bare(nn.Module):
    """A model with the loss that it had before its forward was replaced."""

    def __init__(self, model: TrainedModel, plain: Callable[[TokenBatch], Terms]) -> None:
        super().__init__()
        self.model, self._plain = model, plain

    def forward(self, batch: TokenBatch) -> Terms:
        """The loss terms."""
        return self._plain(batch)


class _Graph:
    """One shape's: reads its own copy of a micro-batch, writes its own results."""

    def __init__(self, bare: _Bare, batch: TokenBatch, parameters: dict[str, nn.Parameter]) -> None:
        self.turn = 0
        self.weights: dict[str, float] = {}  # of the loss terms, by name
        # leaves of its own on the weights' memory: autograd adds up a parameter's gradient on the stream that was current when
        # somebody (DeepSpeed) first hung a hook on it, the default one, and that must not wait for a capture
        leaves: dict[str, Tensor] = {
            f"model.{name}": nn.Parameter(p.detach()) for name, p in parameters.items()
        }

        # the addresses that the graph reads; run() copies each micro-batch there
        self._batch = batch.with_tensors(
            {name: tensor.clone() for name, tensor in batch.tensors().items()}
        )
        device = batch.ids_T.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = None
        if autocast:
            dtype = torch.get_autocast_dtype(device.type)

        def work() -> tuple[Terms, list[tuple[Tensor, ...]]]:
            # autocast's own cache would keep the weights of the warm-up in bf16 for ever
            with (
                torch.enable_grad(),
                torch.autocast(device.type, dtype=dtype, enabled=autocast, cache_enabled=False),
            ):
                loss = functional_call(bare, leaves, (self._batch,))
            self.weights = {name: term.weight for name, term in loss.items()}
            # of each term by itself: their denominators are the caller's
            # all but the last keep the activations, which the terms share. One term alone must
            # reach every parameter, or torch raises; of several each may leave some out (zeros)
            *others, last = (term.total for term in loss.values())
            gradients = [
                torch.autograd.grad(
                    total, [*leaves.values()], retain_graph=True, materialize_grads=True
                )
                for total in others
            ]
            gradients.append(
                torch.autograd.grad(last, [*leaves.values()], materialize_grads=bool(others))
            )
            return {name: _detached(term) for name, term in loss.items()}, gradients

        self.replay = work
        if device.type == "cuda":
            self.replay = captured(work)

    def has_room(self, batch: TokenBatch) -> bool:
        """For as many documents. The loader makes room for more of them by the power of two, micro-batch by micro-batch: were a
        graph bound to it, rows of short documents among those of long ones would capture again and again.
        """
        return len(getattr(batch, ENDS)) <= len(getattr(self._batch, ENDS))

    def run(self, batch: TokenBatch) -> tuple[Terms, list[tuple[Tensor, ...]]]:
        """Valid until the next run."""
        self.turn += 1
        given = batch.tensors()
        for name, ours in self._batch.tensors().items():
            theirs = given[name]
            ours[: len(theirs)].copy_(theirs, non_blocking=True)
            if len(theirs) < len(ours):
                # cu_seqlens alone may be shorter: empty documents, which end at the last token
                ours[len(theirs) :] = len(batch.ids_T)
        return self.replay()


def captured(work: Work) -> Work:
    """The work as a CUDA graph; what it returns stays where it is."""
    # the default stream cannot be captured; the warm-up runs on the capture's own
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

    return _Captured(graph, results)


class _Captured:
    """A captured work: what it returns stays where it is."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, results: tuple[Terms, list[tuple[Tensor, ...]]]
    ) -> None:
        self._graph = graph
        self._results = results
        self.pool = graph.pool()

    def __call__(self) -> tuple[Terms, list[tuple[Tensor, ...]]]:
        self._graph.replay()
        return self._results


@functools.cache
def _stream(_device: int) -> torch.cuda.Stream:
    """One for all captures: torch keeps the workspaces of cuBLAS for every stream that ever multiplied, 64 MiB each."""
    return torch.cuda.Stream()


def _detached(term: LossTerm) -> LossTerm:
    total, summed, count, correct = (x.detach() for x in term[:4])
    return LossTerm(total, summed, count, correct)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graph: _Graph, batch: TokenBatch, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        loss, ctx.gradients = graph.run(batch)
        ctx.graph, ctx.turn = graph, graph.turn

        # clones: the caller may keep them, and the next replay writes over ours
        of_terms = chain.from_iterable(term[:4] for term in loss.values())
        results = tuple(x.clone() for x in of_terms)
        # of a term's four results only the first, its total, is differentiated
        ctx.mark_non_differentiable(*(x for i, x in enumerate(results) if i % 4))
        return results

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor) -> tuple[Tensor | None, ...]:
        graph, gradients = ctx.graph, ctx.gradients
        # or a loss that the caller keeps would keep the memory of a graph that is gone
        ctx.graph = ctx.gradients = None
        if graph is None:
            raise RuntimeError(
                "a second backward through one forward: the graph's gradients were handed on by the"
                " first."
            )
        if graph.turn != ctx.turn:
            raise RuntimeError(
                "two forwards before a backward: the graph has written over the gradients of the"
                " first."
            )

        # a term's gradients times what the caller multiplied its total with, every fourth result
        # new tensors: autograd may keep one as a parameter's .grad, and the next replay writes over ours
        by_term = []
        for own, d_total in zip(gradients, d_results[::4], strict=True):
            by_term.append([scaled(d, d_total) for d in own])

        # none for the graph and the batch; a parameter's gradient is the sum over terms
        return (
            None,
            None,
            *(
                functools.reduce(torch.add, of_parameter)
                for of_parameter in zip(*by_term, strict=True)
            ),
        )
