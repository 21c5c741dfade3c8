"""One step of training: micro-batches in, one update out, the same update on any number of ranks and any ZeRO stage.

    loss of the step = sum of the losses of all predicted positions, over all micro-batches and ranks
                       / their number, known before the first forward

so neither the micro-batch nor the rank a row lands in has a say in its weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from encoder.base.batch import IGNORE, SummedLoss, TokenBatch, packed_documents
from encoder.base.dist import World, max_over_ranks, sum_over_ranks
from encoder.engine.graphed import GraphedForward
from encoder.engine.precision import precision_on
from encoder.engine.transfers import on_device
from encoder.engine.zero_config import EngineConfig, forget_former_groups, import_deepspeed, initialize, zero_config
from encoder.engine.zero_layout import (
    check_cover,
    flat_parts,
    forget_gradients,
    refresh_parameters,
    share_of,
    whole_shape,
)
from encoder.engine.zero_partition import Values, partition_, weights_may_go
from encoder.optim.catalog import build_optimizer
from encoder.optim.slices import FlatPart, Stretch
from encoder.optim.whole_tensors import MomentsConfig, WholeTensorOptimizer

__all__ = ["Engine", "EngineConfig", "LossSum", "Piece", "StepResult", "start_engine"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float            # cross entropy in nats per predicted position; nan where none was
    grad_norm: float       # of the mean loss's gradient, before clipping; inf if not finite
    masked_tokens: int
    applied: bool          # False: nothing moved, for the gradient was not finite or nothing was predicted


class LossSum(NamedTuple):
    """A sum of losses over all ranks, how many positions are in it, and at how many the target had the highest logit."""

    loss_sum: float
    masked_tokens: int
    correct: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a parameter that this rank answers for in a checkpoint, and its part of the optimizer's state."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]     # by kind: master and what the optimizer keeps; 1-d views, writing to them counts

    @property
    def master(self) -> torch.Tensor:
        """The weights themselves."""
        return self.tensors["master"]


def start_engine(model: torch.nn.Module, *, config: EngineConfig, optimizer: MomentsConfig, world: World,
                 device: torch.device) -> Engine:
    """Puts a model under DeepSpeed; torch.distributed must run (encoder.base.dist.join). `model(batch)` gives a SummedLoss.

    Every rank brings the same weights (a function of the seed); for stage 3 a model on the meta device, whose
    `initial_values(name, shape)` gives its weights, one whole parameter at a time.
    """
    config = replace(config, precision=precision_on(config.precision, device))
    steps = build_optimizer(model, optimizer)         # grouped by dimensions, which stage 3 takes away
    deepspeed = import_deepspeed(device)
    forget_former_groups()
    if config.activation_checkpointing == "blocks":
        model.recompute_blocks_()
    if config.fp8 == "layers":
        model.fp8_blocks_()
    if config.zero_stage == 3:
        partition_(model, deepspeed=deepspeed, device=device,
                   dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
        first = model.initial_values
    else:
        model.to(device=device, dtype=torch.float64 if config.precision == "fp64" else None)
        whole = {name: p.detach().clone() for name, p in model.named_parameters()} if config.precision == "bf16" else {}
        first = lambda name, _shape: whole[name]      # noqa: E731
    ds_engine = initialize(deepspeed, model=model, optimizer=steps, config=zero_config(config, world_size=world.size))
    ds_engine.enable_backward_allreduce = config.zero_stage > 0   # stage 0: ours, because DeepSpeed's refuses fp64
    engine = Engine(ds_engine, optimizer=steps, config=config, world=world, device=device)
    if config.precision == "bf16":
        engine.set_masters(first)      # the bf16 parameters would start them 3 digits short
    return engine


class Engine:
    """A model under training: the weights, their optimizer state, and the step that moves them."""

    def __init__(self, ds_engine: Any, *, optimizer: WholeTensorOptimizer, config: EngineConfig, world: World,
                 device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.module: torch.nn.Module = ds_engine.module        # the bare model
        self.optimizer = optimizer
        if config.graphs == "micro_step":
            self.module.forward = GraphedForward(self.module)
        self.module.forward = self._in_mode(self.module.forward)
        self.shapes = {name: whole_shape(p) for name, p in self.module.named_parameters() if p.requires_grad}
        self._ds = ds_engine
        self._parts = flat_parts(ds_engine)
        self._plain_norm = torch.zeros(())                     # stage 0: DeepSpeed measures no norm there
        check_cover([s for _, s in self._owned()], numels={name: math.prod(shape) for name, shape in self.shapes.items()},
                    world=world, device=device)
        if config.zero_stage:
            optimizer.set_stretches(self._parts, shapes=self.shapes)
        else:
            optimizer.register_step_pre_hook(self._before_plain_step)
        optimizer.init_state()

    def step(self, micro_batches: Sequence[TokenBatch], *, masked_tokens: int, lr: float, max_lr: float,
             weight_decay: float | None = None) -> StepResult:
        """One update from this rank's micro-batches (equally many on every rank).

        `masked_tokens` is the number of predicted positions of the whole step, over all ranks; `max_lr` the rate at which
        a step loses the whole `weight_decay` (None: the optimizer's). A step in which nothing is predicted moves nothing, neither
        weights nor averages nor the optimizer's counter, on all ranks alike: `masked_tokens` is the same number on each.
        """
        if masked_tokens < 1:
            return StepResult(loss=math.nan, grad_norm=0.0, masked_tokens=0, applied=False)
        assert max_lr > 0.0, "the decay is relative to the peak rate"
        for group in self.optimizer.param_groups:
            group.update(lr=lr, max_lr=max_lr)
            if weight_decay is not None and group["decays"]:
                group["weight_decay"] = weight_decay
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)      # of losses, of positions: one all-reduce
        for batch in on_device(micro_batches, self.device):
            loss = self._ds(batch)
            # DeepSpeed divides the gradients' sum by the number of ranks
            self._ds.backward(loss.total * (self.world.size / masked_tokens), scale_wrt_gas=False)
            sums[0] += loss.cross_entropy
            sums[1] += loss.count
        self._ds.step()
        norm = self._plain_norm if self.config.zero_stage == 0 else self._ds.get_global_grad_norm()
        norm = float(norm)
        if not norm < float("inf"):
            forget_gradients(self._ds)
        loss_sum, counted = sum_over_ranks(sums).tolist()
        assert counted == masked_tokens, f"the batches announced {masked_tokens} positions, the model counted {counted:.0f}"
        return StepResult(loss=loss_sum / masked_tokens, masked_tokens=masked_tokens,
                          grad_norm=norm if norm == norm else float("inf"), applied=norm < float("inf"))

    def evaluate(self, batches: Sequence[TokenBatch]) -> LossSum:
        """Loss and hits without dropout and without gradients; ranks may bring different numbers of batches, also none."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        forwards = [*batches]
        if self.config.zero_stage == 3:      # weights are gathered layer by layer, by all ranks or by none
            most = int(max_over_ranks(torch.tensor([len(batches)], device=self.device)))
            forwards += [_nothing_to_predict()] * (most - len(batches))
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                for batch in on_device(forwards, self.device):
                    loss = self.module(batch)
                    sums[0] += loss.cross_entropy
                    sums[1] += loss.count
                    sums[2] += loss.correct
        finally:
            self.module.train(training)
        loss_sum, masked_tokens, correct = sum_over_ranks(sums).tolist()
        return LossSum(loss_sum, int(masked_tokens), int(correct))

    def pieces(self) -> list[Piece]:
        """All the state that lies on this rank, to be written to."""
        return [self._piece(part, s) for part in self._parts for s in part.stretches]

    def owned_pieces(self) -> list[Piece]:
        """The state this rank answers for when all ranks save: every element on exactly one rank."""
        return [self._piece(part, s) for part, s in self._owned()]

    @property
    def parameter_count(self) -> int:
        """Trained numbers; a tied matrix counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def optimizer_steps(self) -> int:
        """Updates the optimizer has made: what its bias correction counts."""
        return max(self.optimizer.state[part.tensor]["step"] for part in self._parts)

    def state_was_loaded(self, *, optimizer_steps: int) -> None:
        """After the pieces were written from a checkpoint: sets the counter, and the model's weights from the masters."""
        for part in self._parts:
            self.optimizer.state[part.tensor]["step"] = optimizer_steps
        refresh_parameters(self._ds)

    def set_masters(self, values: Values) -> None:
        """Writes whole weights, `values(name, shape)`, into the masters and from there into the model."""
        with torch.no_grad():
            for piece in self.pieces():
                whole = values(piece.name, self.shapes[piece.name]).reshape(-1)
                piece.master.copy_(whole[piece.start:piece.start + piece.master.numel()])
        refresh_parameters(self._ds)

    def _owned(self) -> Iterator[tuple[FlatPart, Stretch]]:
        for part in self._parts:
            for s in part.stretches:
                s = share_of(s, self.world) if self.config.zero_stage == 0 else s   # stage 0: all lies on every rank
                if s.length:
                    yield part, s

    def _piece(self, part: FlatPart, s: Stretch) -> Piece:
        kept = {kind: s.of(value) for kind, value in self.optimizer.state[part.tensor].items() if kind != "step"}
        return Piece(name=s.name, start=s.start, tensors={"master": s.of(part.tensor.detach()), **kept})

    @contextlib.contextmanager
    def forward_mode(self) -> Iterator[None]:
        """What a forward runs in."""
        with contextlib.ExitStack() as forward:
            # layers that are computed again keep no weight, and theirs must not be replaced while they are in their backward
            if self.config.zero_stage == 3 and self.config.activation_checkpointing == "off":
                forward.enter_context(weights_may_go())
            if self.config.precision == "autocast":      # our own: DeepSpeed's reduces the gradients of Linear modules in bf16
                forward.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            yield

    def _in_mode(self, forward: Callable[[TokenBatch], SummedLoss]) -> Callable[[TokenBatch], SummedLoss]:
        """Inside DeepSpeed's own forward, which switches an autocast off that it finds around itself. It looks for CUDA's alone:
        a GPU would have trained in fp32, a CPU in bf16."""
        def in_mode(batch: TokenBatch) -> SummedLoss:
            with self.forward_mode():
                return forward(batch)
        return in_mode

    def _before_plain_step(self, optimizer: WholeTensorOptimizer, _args: Any, _kwargs: Any) -> None:
        """Stage 0, what ZeRO's optimizers do before they step: the mean over ranks, its norm, clipping, and no update from
        a gradient that is not finite."""
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        flat = sum_over_ranks(torch.cat([p.grad.view(-1) for p in tensors])).div_(self.world.size)
        self._plain_norm = _norm(flat)
        if self.config.gradient_clipping:     # the formula of ZeRO's unscale_and_clip_grads
            flat.div_(((self._plain_norm + 1e-6) / self.config.gradient_clipping).clamp(min=1.0).to(flat.dtype))
        finite = bool(torch.isfinite(self._plain_norm))
        for p, grad in zip(tensors, flat.split([p.numel() for p in tensors]), strict=True):
            p.grad = grad.view_as(p) if finite else None


def _norm(flat: torch.Tensor) -> torch.Tensor:
    """fp64: of pieces of 4,096 elements in their own precision, together in fp64 (all in fp64: 23 ms against 1 for 6 M
    fp32 elements on one core)."""
    whole = len(flat) // 4096 * 4096
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1), torch.linalg.vector_norm(flat[whole:]).view(1)
    return torch.cat(parts).double().square().sum().sqrt()


def _nothing_to_predict() -> TokenBatch:
    """One document of two tokens and no question: a forward of a rank whose batches are done while others go on."""
    one = torch.zeros(1, dtype=torch.int64)
    return replace(packed_documents([one.repeat(2)]), predict_index_M=one, predict_target_M=one + IGNORE)
