"""One step of training: micro-batches in, one update out, the same update on any number of ranks and any ZeRO stage.

    loss of the step = sum over its terms of    weight x sum of the term's losses over all micro-batches and ranks
                                                / number of its targets there, known before the first forward

so neither the micro-batch nor the rank a row lands in has a say in its weight. Each term has its own denominator: a term with few
targets, or with none on some ranks, weighs as much as it should.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from encoder.base.batch import SCORE_BINS, LossTerm, TermSum, TokenBatch, nothing_to_predict
from encoder.base.dist import World, max_over_ranks, sum_over_ranks
from encoder.base.model import TrainedModel
from encoder.base.objective import TrainedObjective
from encoder.engine.graphed import GraphedForward
from encoder.engine.overlap import Overlap
from encoder.engine.precision import precision_on
from encoder.engine.transfers import on_device
from encoder.engine.zero.config import (
    EngineConfig,
    as_run,
    forget_former_groups,
    forget_modules,
    import_deepspeed,
    initialize,
    overlap_on,
    sends_during_backward,
    zero_config,
)
from encoder.engine.zero.layout import (
    check_cover,
    flat_parts,
    forget_gradients,
    refresh_parameters,
    share_of,
    whole_shape,
)
from encoder.engine.zero.partition import Values, partition_, weights_may_go
from encoder.engine.zero.ways import AllReduced, way_of
from encoder.optim.catalog import build_optimizer
from encoder.optim.groups import Factors, parameters_of
from encoder.optim.slices import FlatPart, ParamSlice
from encoder.optim.whole_tensors import MomentsConfig, WholeTensorOptimizer

__all__ = ["Engine", "EngineConfig", "StateShard", "StepResult", "start_engine"]


Forward = Callable[[TokenBatch], Any]  # in training dict[str, LossTerm]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float  # the terms' means by their weights, in nats; nan where nothing was to be predicted
    grad_norm: float  # of the mean loss's gradient, before clipping; inf if not finite
    # False: nothing moved, for the gradient was not finite or nothing was to be predicted
    applied: bool
    means: dict[str, float]  # each term's mean in nats per target; nan where it had none


@dataclass(frozen=True, kw_only=True)
class StateShard:
    """A slice of a parameter that this rank answers for in a checkpoint, and its part of the optimizer's state."""

    name: str
    start: int
    tensors: dict[
        str, torch.Tensor
    ]  # by kind: master and what the optimizer keeps; 1-d views, writing to them counts

    @property
    def master(self) -> torch.Tensor:
        """The weights themselves."""
        return self.tensors["master"]


def start_engine(
    model: TrainedModel,
    *,
    objective: TrainedObjective,
    config: EngineConfig,
    optimizer: MomentsConfig,
    world: World,
    device: torch.device,
    factors: Mapping[str, Factors] | None = None,
) -> Engine:
    """Puts a model under DeepSpeed; torch.distributed must run (encoder.base.dist.join).

    model: with the same weights on every rank (a function of the seed); for stage 3 on the meta device, where its
        `initial_values(name, shape)` gives its weights, one whole parameter at a time
    objective: its loss becomes the model's forward
    config: precision, ZeRO stage and what else decides how a step is computed
    optimizer: the settings of the update
    world: this rank among the others
    device: of this rank
    factors: parameter -> of every step's rate and clipped gradient; 1 for all others
    """
    told = replace(
        config,
        precision=precision_on(config.precision, device),
        overlap=overlap_on(config.overlap, cuda=device.type != "cpu"),
    )
    config = as_run(told, ranks=world.size, device=device)
    if config.precision in ("autocast", "bf16"):
        optimizer = optimizer.beside_bf16()
    # groups go by a parameter's dimensions, which stage 3 takes away
    steps = build_optimizer(model, optimizer, factors=factors)
    deepspeed = import_deepspeed(device)
    forget_former_groups()
    if config.activation_checkpointing == "blocks":
        model.recompute_blocks_()
    # replaces modules, not parameters: these the optimizer holds already
    if config.fp8 == "layers":
        model.fp8_blocks_()

    # stage 3 never has the whole model on a rank; below it every rank starts with all of it
    if config.zero_stage == 3:
        partition_(
            model,
            deepspeed=deepspeed,
            device=device,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        )
        first: Values = model.initial_values
    else:
        model.to(device=device, dtype=torch.float64 if config.precision == "fp64" else None)

        # DeepSpeed casts the parameters to bf16: the masters start from these copies in fp32
        whole = {}
        if config.precision == "bf16":
            whole = {name: p.detach().clone() for name, p in model.named_parameters()}
        first = lambda name, _shape: whole[name]  # noqa: E731
    ds_engine = initialize(
        deepspeed, model=model, optimizer=steps, config=zero_config(config, world_size=world.size)
    )
    # stage 0: ours, because DeepSpeed's refuses fp64
    ds_engine.enable_backward_allreduce = config.zero_stage > 0

    engine = Engine(
        ds_engine,
        objective=objective,
        optimizer=steps,
        config=told,
        zero_stage=config.zero_stage,
        world=world,
        device=device,
    )
    if config.precision == "bf16":
        engine.set_masters(first)  # the bf16 parameters would start them 3 digits short
    return engine


class Engine:
    """A model under training: the weights, their optimizer state, and the step that moves them."""

    def __init__(
        self,
        ds_engine: Any,
        *,
        objective: TrainedObjective,
        optimizer: WholeTensorOptimizer,
        config: EngineConfig,
        zero_stage: int,
        world: World,
        device: torch.device,
    ) -> None:
        """As start_engine makes it.

        ds_engine: DeepSpeed's, around the model
        objective: whose loss is the model's forward
        optimizer: that it steps
        config: as the run file has it, and as it is told elsewhere
        zero_stage: as it is run (as_run)
        world: this rank among the others
        device: of this rank
        """
        self.config, self.world, self.device = config, world, device
        self._stage = zero_stage
        self.module: TrainedModel = ds_engine.module  # the bare model
        self.optimizer = optimizer
        self.objective = objective
        # called after each forward of an evaluation, which may take an hour
        self.on_forward: Callable[[], None] = lambda: None

        # DeepSpeed's engine calls the module's forward, so the loss stands in its place
        forward: Forward = self._terms_of
        if config.graphs == "micro_step":
            forward = GraphedForward(self.module, forward)
        self._forward = forward
        # of this module, not of its class
        self.module.forward = self._in_mode()
        # whole shapes, also where stage 3 has cut the parameters
        self.shapes = {
            name: whole_shape(p) for name, p in self.module.named_parameters() if p.requires_grad
        }
        self._ds = ds_engine
        self._parts = flat_parts(ds_engine)
        self._plain_norm = torch.zeros(())  # stage 0: DeepSpeed measures no norm there

        # what sends the gradients during the backward pass; None where they are sent behind it
        self._overlap: Overlap | None = None
        if sends_during_backward(config, stage=zero_stage, ranks=world.size):
            trained = [p for p in self.module.parameters() if p.requires_grad]
            way = way_of(ds_engine, stage=zero_stage)
            self._overlap = Overlap(way, parameters=trained, world=world)

        # a checkpoint has what each rank owns: without gaps, nothing twice
        check_cover(
            [s for _, s in self._owned()],
            numels={name: math.prod(shape) for name, shape in self.shapes.items()},
            world=world,
            device=device,
        )

        # stage 0 steps whole tensors, and has no ZeRO that averages, clips and checks the gradients
        if zero_stage:
            optimizer.set_slices(self._parts, shapes=self.shapes)
        else:
            optimizer.register_step_pre_hook(self._before_plain_step)
        optimizer.init_state()

    def step(
        self,
        micro_batches: Sequence[TokenBatch],
        *,
        counts: Mapping[str, int],
        lr: float,
        max_lr: float,
        weight_decay: float | None = None,
    ) -> StepResult:
        """One update from this rank's micro-batches.

        A step in which nothing is to be predicted moves nothing, neither weights nor moments nor the optimizer's counter, on all
        ranks alike.

        micro_batches: equally many on every rank
        counts: targets of each loss term in the whole step, over all ranks
        lr: the learning rate
        max_lr: the rate at which a step loses the whole `weight_decay`
        weight_decay: share that the matrices lose; None: the optimizer's
        """
        if not any(counts.values()):
            return StepResult(
                loss=math.nan, grad_norm=0.0, applied=False, means=dict.fromkeys(counts, math.nan)
            )
        assert max_lr > 0.0, "the decay is relative to the peak rate"

        # a phase may change the decay, but not which groups decay
        for group in self.optimizer.param_groups:
            group.update(lr=lr * group["rate"], max_lr=max_lr * group["rate"])
            if weight_decay is not None and group["decays"]:
                group["weight_decay"] = weight_decay
        # of losses and of targets, by term: one all-reduce
        # kept on the device, so that the host need not wait for a micro-batch
        sums = torch.zeros(len(counts), 2, dtype=torch.float64, device=self.device)
        weights: dict[str, float] = {}
        for number, batch in enumerate(on_device(micro_batches, self.device), start=1):
            loss = self._ds(batch)
            assert [*loss] == [*counts], f"the loss has the terms {[*loss]}, the step {[*counts]}"
            with self._sending(last=number == len(micro_batches)):
                # the loss has its denominator already, so DeepSpeed must not divide it again
                self._ds.backward(self._objective_of(loss, counts), scale_wrt_gas=False)
            for row, term in zip(sums, loss.values(), strict=True):
                row[0] += term.sum
                row[1] += term.count
            weights = {name: term.weight for name, term in loss.items()}
        if self._overlap:
            self._overlap.finish()
        self._ds.step()
        if self._stage == 0:
            norm = float(self._plain_norm)
        else:
            norm = float(self._ds.get_global_grad_norm())

        # the comparison is false for nan, too
        if not norm < float("inf"):
            forget_gradients(self._ds)

        # the denominators were fixed before the first forward: the loss must count as many
        means = {}
        for (name, count), (loss_sum, counted) in zip(
            counts.items(), sum_over_ranks(sums).tolist(), strict=True
        ):
            assert counted == count, (
                f"{name}: the batches announced {count} targets, the loss counted {counted:.0f}"
            )
            means[name] = math.nan
            if count:
                means[name] = loss_sum / count

        # the mean of a term without targets is nan and stays out of the loss; a norm of nan is inf
        return StepResult(
            loss=sum(weights[name] * mean for name, mean in means.items() if counts[name]),
            means=means,
            grad_norm=norm if norm == norm else float("inf"),
            applied=norm < float("inf"),
        )

    def _sending(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """What the backward pass of a micro-batch, the last of a step or not, runs in."""
        return self._overlap.backward(last=last) if self._overlap else contextlib.nullcontext()

    def _objective_of(
        self, loss: Mapping[str, LossTerm], counts: Mapping[str, int]
    ) -> torch.Tensor:
        """What a micro-batch adds to the loss of the step, times the ranks, by whose number DeepSpeed divides the gradients' sum.

        A term without targets in the whole step is exactly zero, and stays in the graph: every parameter has a gradient.
        """
        # weight x sum of the losses x ranks / targets; max(1, ...): 0 / 1 rather than 0 / 0
        shares = [
            term.total * (term.weight * self.world.size / max(1, counts[name]))
            for name, term in loss.items()
        ]
        return functools.reduce(torch.add, shares)

    def evaluate(self, batches: Sequence[TokenBatch]) -> dict[str, TermSum]:
        """The loss terms without dropout and without gradients, over all ranks, which may bring different numbers of batches."""
        terms = self.objective.terms

        # by term: losses, targets, targets with the highest logit; fp64 is exact up to 2^53
        sums = torch.zeros(len(terms), 3, dtype=torch.float64, device=self.device)
        # every rank has them, also one without a batch of its own
        scores = {
            name: torch.zeros(2, SCORE_BINS, dtype=torch.int64, device=self.device)
            for name in self.objective.scored_terms
        }
        for loss in self._without_gradients(batches):
            for row, (name, term) in zip(sums, loss.items(), strict=True):
                row[0] += term.sum
                row[1] += term.count
                row[2] += term.correct
                if term.scores is not None:
                    scores[name] += term.scores
        over_ranks = sum_over_ranks(sums).tolist()
        for counted in scores.values():
            sum_over_ranks(counted)
        return {
            name: TermSum(loss_sum, int(count), int(correct), scores.get(name))
            for name, (loss_sum, count, correct) in zip(terms, over_ranks, strict=True)
        }

    def predict(
        self,
        batches: Sequence[TokenBatch],
        answers: Callable[[Any, TokenBatch], torch.Tensor],
    ) -> list[torch.Tensor]:
        """What a model answers to each batch of this rank, without dropout and without gradients, on the CPU.

        Called on every rank; the ranks may bring different numbers of batches.

        batches: of this rank
        answers: (model, batch) -> answers
        """
        trained = self._forward
        self._forward = lambda batch: answers(self.module, batch)
        try:
            # what a forward without a batch of its own answered is left out
            found = [answer.cpu() for answer in self._without_gradients(batches)]
            return found[: len(batches)]
        finally:
            self._forward = trained

    def _without_gradients(self, batches: Sequence[TokenBatch]) -> Iterator[Any]:
        """What the module's forward gives for each batch, in eval mode; at stage 3 all ranks make as many."""
        forwards = [*batches]

        # weights are gathered layer by layer, by all ranks or by none
        if self._stage == 3:
            most = int(max_over_ranks(torch.tensor([len(batches)], device=self.device)))
            forwards += [nothing_to_predict(self.objective.terms)] * (most - len(batches))
        training = self.module.training
        self.module.train(False)
        try:
            with torch.no_grad():
                for batch in on_device(forwards, self.device):
                    yield self.module(batch)
                    self.on_forward()
        finally:
            self.module.train(training)

    def close(self) -> None:
        """Lets go of memory: DeepSpeed's hooks, which no garbage collector sees, and its caches would hold it for good.

        No rank waits for another; safe after any error. Nothing may be asked of it afterwards.
        """
        if self._overlap:
            self._overlap.close()
        # an error before it is what is told
        with contextlib.suppress(Exception):
            self._ds.destroy()
        forget_modules(self.module)
        for parameter in self.module.parameters():
            parameter.grad = None

    def pieces(self) -> list[StateShard]:
        """All the state that lies on this rank, to be written to."""
        found = []
        for part in self._parts:
            found += [self._piece(part, s) for s in part.slices]
        return found

    def owned_pieces(self) -> list[StateShard]:
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
                piece.master.copy_(whole[piece.start : piece.start + piece.master.numel()])
        refresh_parameters(self._ds)

    def whole_masters(self) -> dict[str, torch.Tensor]:
        """The master weights by name, whole, on the CPU of every rank, all of which call this."""
        dtype = torch.float64 if self.config.precision == "fp64" else torch.float32
        owned = {piece.name: piece for piece in self.owned_pieces()}
        found = {}
        for name, shape in self.shapes.items():
            # every element is on one rank, and zero on the others
            flat = torch.zeros(math.prod(shape), dtype=dtype)
            if piece := owned.get(name):
                flat[piece.start : piece.start + piece.master.numel()] = piece.master.cpu()
            found[name] = sum_over_ranks(flat).view(shape)
        return found

    def _owned(self) -> Iterator[tuple[FlatPart, ParamSlice]]:
        for part in self._parts:
            for s in part.slices:
                # stage 0: all lies on every rank, so each answers for a share
                if self._stage == 0:
                    s = share_of(s, self.world)
                if s.length:
                    yield part, s

    def _piece(self, part: FlatPart, s: ParamSlice) -> StateShard:
        kept = {
            kind: s.of(value)
            for kind, value in self.optimizer.state[part.tensor].items()
            if kind != "step"
        }
        return StateShard(
            name=s.name, start=s.start, tensors={"master": s.of(part.tensor.detach()), **kept}
        )

    @contextlib.contextmanager
    def forward_mode(self) -> Iterator[None]:
        """What a forward runs in."""
        with contextlib.ExitStack() as forward:
            # layers that are computed again keep no weight, and theirs must not be replaced while they are in their backward
            if self._stage == 3 and self.config.activation_checkpointing == "off":
                forward.enter_context(weights_may_go())

            # our own: DeepSpeed's reduces the gradients of Linear modules in bf16
            if self.config.precision == "autocast":
                forward.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            yield

    def _terms_of(self, batch: TokenBatch) -> dict[str, LossTerm]:
        return self.objective.loss(self.module, batch)

    def _in_mode(self) -> Forward:
        """Inside DeepSpeed's own forward, which switches an autocast off that it finds around itself. It looks for CUDA's alone:
        a GPU would have trained in fp32, a CPU in bf16."""

        def in_mode(batch: TokenBatch) -> Any:
            with self.forward_mode():
                return self._forward(batch)

        return in_mode

    def _before_plain_step(self, optimizer: WholeTensorOptimizer, _args: Any, _kwargs: Any) -> None:
        """Stage 0, what ZeRO's optimizers do before they step: the mean over ranks, its norm, clipping, and no update from
        a gradient that is not finite."""
        tensors: list[Any] = parameters_of(optimizer.param_groups)

        # one rank on a CPU has nothing to send, and a copy of all would cost as much as an update
        together = self.world.size > 1 or self.device.type != "cpu"
        if together:
            flat = self._summed(tensors).div_(self.world.size)
            self._plain_norm = _norm([flat])
            parts = flat.split([p.numel() for p in tensors])
            grads = [part.view_as(p) for p, part in zip(tensors, parts, strict=True)]
        else:
            grads = [p.grad for p in tensors]
            self._plain_norm = _norm(grads)

        # the formula of ZeRO's unscale_and_clip_grads
        if self.config.gradient_clipping:
            above = (self._plain_norm + 1e-6) / self.config.gradient_clipping
            shrink = above.clamp(min=1.0).to(grads[0].dtype)
            if together:
                flat.div_(shrink)
            # on a CPU a look at the norm waits for nothing, and a division by one would read and write all of it
            elif shrink != 1.0:
                torch._foreach_div_(grads, shrink)

        # a tensor without a gradient is left where it is by the optimizer, and its counter, too
        finite = bool(torch.isfinite(self._plain_norm))
        for p, grad in zip(tensors, grads, strict=True):
            if finite:
                p.grad = grad
            else:
                p.grad = None

    def _summed(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their gradients, one behind the other, summed over the ranks."""
        if self._overlap:
            assert isinstance(self._overlap.way, AllReduced), "stage 0"
            return self._overlap.way.take_sums()
        # every parameter has a gradient (see _objective_of): one all-reduce of all of them
        return sum_over_ranks(torch.cat([p.grad.view(-1) for p in tensors if p.grad is not None]))


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all together, in fp64: of pieces of 4,096 elements in their own precision, together in fp64 (all in fp64: 23 ms
    against 1 for 6 M fp32 elements on one core)."""
    parts = []
    for tensor in tensors:
        flat = tensor.view(-1)
        whole = len(flat) // 4096 * 4096
        parts.append(torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1))
        parts.append(torch.linalg.vector_norm(flat[whole:]).view(1))
    return torch.cat(parts).double().square().sum().sqrt()
