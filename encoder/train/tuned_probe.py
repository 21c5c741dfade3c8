"""A short fine-tuning as a probe of a run: a classifier on a copy of its weights learns the training texts.

    engine of the run    masters --copied-->    engine of the probe    body, and a head that is drawn
                         nothing comes back     epochs of steps, then the logits of the test texts

All ranks train it together, at the run's ZeRO stage and precision, and let its engine go. It has no checkpoint: a run that is
killed meanwhile goes on from its own, and asks again; one that is asked to stop leaves it, without a number. Its steps are those
of `tessera finetune`: the same examples in the same order, the same head, rates and engine.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.base.dist import World, max_over_ranks
from encoder.base.log import say
from encoder.base.stopping import StopFlag
from encoder.base.tokenizer_json import SpecialIds
from encoder.data.examples import ExampleDealing, Examples, ExampleSteps, in_order
from encoder.data.loader import DataPosition
from encoder.engine.engine import Engine, EngineConfig, start_engine
from encoder.models.catalog import networks_of
from encoder.models.contract import ModelConfig
from encoder.models.stored import StoredModel, used_network
from encoder.models.with_task import (
    HeadShape,
    build_task_model,
    first_weights,
    head_family,
    layers_of,
)
from encoder.objectives.text_tasks import TERM, Classes
from encoder.optim.adamw import AdamWConfig
from encoder.optim.shares import LinearShares, rate_of_step
from encoder.runs.config import FineTuneProbeConfig, RunConfig
from encoder.train.answers import answered


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is fine-tuned, and how."""

    settings: FineTuneProbeConfig
    head: HeadShape


def tuning_of(
    settings: FineTuneProbeConfig, run: RunConfig, specials: SpecialIds, *, labels: int
) -> Tuning:
    """With the head that transformers has on such a model. Raises ConfigError where it has none.

    settings: of the probe
    run: whose model it is
    specials: of the tokenizer
    labels: how many there are
    """
    family = head_family(body_of(run.model), specials)
    head = HeadShape(
        family=family,
        outputs=labels,
        pooling=settings.pooling,
        dropout=layers_of("text", family).dropout,
    )
    return Tuning(settings=settings, head=head)


def tuned_probes(run: RunConfig) -> list[FineTuneProbeConfig]:
    """The probes of the run that are such a fine-tuning."""
    probes = run.evaluation.probes if run.evaluation else ()
    return [probe for probe in probes if isinstance(probe, FineTuneProbeConfig)]


def body_of(model: ModelConfig) -> ModelConfig:
    """The shape of the network that is used after training."""
    return next(iter(networks_of(model).values()), model)


def engine_of(run: EngineConfig) -> EngineConfig:
    """How the copy is held: as the run's weights are, but for graphs and 8 bits, which need fixed shapes or long runs."""
    return EngineConfig(
        zero_stage=run.zero_stage,
        precision=run.precision,
        activation_checkpointing=run.activation_checkpointing,
        offload_optimizer=run.offload_optimizer,
        overlap=run.overlap,
    )


def tuned_logits(
    tuning: Tuning,
    train: Examples,
    test: Examples,
    *,
    engine: Engine,
    run: RunConfig,
    world: World,
    stop: StopFlag | None = None,
) -> Tensor:
    """Logits [N, K] in fp64 of the test texts after the fine-tuning; the same on every rank, all of which call this.

    All nan where a rank is asked to stop meanwhile: the run's step is done, and waits to be saved.

    tuning: head and settings
    train, test: the texts with the numbers of their classes
    engine: of the run; its weights are read, and stay
    run: whose model, attention and micro-batches are used
    world: of this rank
    stop: asked between two steps
    """
    dealing = ExampleDealing(
        world=world, micro_batch_tokens=run.loader.micro_batch_rows * run.data.row_tokens
    )
    with _random_state_kept(engine.device):
        copy = _start(tuning, engine, run, world)
        try:
            if not _train(copy, tuning.settings, train, dealing, stop):
                shape = (len(test), tuning.head.outputs)
                return torch.full(shape, torch.nan, dtype=torch.float64)
            return answered(
                copy,
                in_order(test, term=TERM, dealing=dealing),
                copy.objective.answers,  # type: ignore[attr-defined]
                examples=test,
                width=tuning.head.outputs,
                dtype=torch.float64,
            )
        finally:
            copy.close()
            # an engine holds itself in circles
            del copy
            gc.collect()


def _start(tuning: Tuning, engine: Engine, run: RunConfig, world: World) -> Engine:
    """The engine of the probe, with the run's weights and a drawn head."""
    config, seed = engine_of(engine.config), tuning.settings.seed
    body = body_of(run.model)
    # of a model of several networks the one that is used; nothing but its weights is asked
    weights = used_network(
        StoredModel(
            config=run.model, weights=engine.whole_masters(), tokenizer_json=None, origin=""
        )
    ).weights
    with torch.device("meta"):
        shape = build_task_model(body, tuning.head, seed=seed)
    values, _ = first_weights(weights, shape)
    with torch.device("meta" if config.zero_stage == 3 else "cpu"):
        model = build_task_model(body, tuning.head, attention=run.attention, seed=seed)
    copy = start_engine(
        model,
        objective=Classes(),
        config=config,
        optimizer=AdamWConfig(),
        world=world,
        device=engine.device,
    )
    copy.on_forward = engine.on_forward
    copy.set_masters(lambda name, _shape: values[name])
    # the angles of the phase that the run is in
    copy.module.set_phase_(engine.module.phase_settings)
    return copy


def _train(
    copy: Engine,
    settings: FineTuneProbeConfig,
    train: Examples,
    dealing: ExampleDealing,
    stop: StopFlag | None,
) -> bool:
    """Whether it came to its end; it leaves where a rank is asked to stop.

    copy: what is trained
    settings: of the probe
    train, dealing: the examples, and who computes what
    stop: of this rank
    """
    total = settings.epochs * len(train)
    schedule = LinearShares(peak=settings.lr).over(total)
    steps = ExampleSteps(
        train,
        term=TERM,
        seed=settings.seed,
        epochs=settings.epochs,
        batch_examples=settings.batch_examples,
        dealing=dealing,
        start=DataPosition(lanes=(), phase_tokens=0),
    )
    seen = 0
    while seen < total:
        if _any_rank_stops(stop):
            say(
                f"probe {settings.name}: left after {seen:,} of {total:,} texts, for the run is asked"
                " to stop; no number here"
            )
            return False
        data = steps.next_step()
        copy.step(
            data.micro_batches,
            counts={TERM: data.rows},
            lr=rate_of_step(schedule, seen=seen, rows=data.rows, examples=total),
            max_lr=settings.lr,
        )
        # a long probe is no hang
        copy.on_forward()
        seen += data.rows
    return True


def _any_rank_stops(stop: StopFlag | None) -> bool:
    """Agreed by one all-reduce: a signal reaches ranks at different steps."""
    is_asked = stop is not None and stop.asked
    return bool(max_over_ranks(torch.tensor([int(is_asked)]))[0])


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """torch's generators are afterwards as they were: modules draw weights when they are made."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
