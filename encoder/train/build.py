"""Introduces the rooms to each other: the loader gets an objective, the engine a model, the optimizer its stretches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from encoder.base.allocator import freed_memory
from encoder.base.batch import TokenBatch, packed_documents
from encoder.base.dist import World, device_index, max_over_ranks
from encoder.base.errors import ConfigError
from encoder.base.objective import TrainedObjective
from encoder.base.rng import generator
from encoder.base.tokenizer_json import unused_ids
from encoder.data.assembly import Dealing
from encoder.data.loader import (
    DataPosition,
    Loader,
    WorkerSettings,
    evaluation_batches,
    token_counts,
)
from encoder.data.shards import Source, open_source
from encoder.data.windows import DataOrder, RowGeometry, shards_of_lanes
from encoder.engine.precision import computes_bf16, precision_on
from encoder.models.catalog import build_model
from encoder.models.contract import Model
from encoder.nn.attend import AttentionRequest, choose_backend
from encoder.objectives.catalog import build_objective
from encoder.objectives.contract import Objective
from encoder.objectives.words import read_word_edges
from encoder.runs.config import PhaseConfig, RunConfig, SourceConfig
from encoder.runs.facts import DataFacts, source_name
from encoder.runs.objective_models import AskedModel
from encoder.train.course import ModelShape, RunSettings
from encoder.train.evaluate import HeldOut, unigram_entropy

# 320M tokens of 4,096 web documents each: 10 to 30 s of training at 10 to 30 Mtok/s
PREFETCH_WINDOWS = 128
# a CPU's bf16 products (oneDNN) get code of their own for each shape: with few shapes the demo trains 1.1 to 1.4 times as fast
BF16_SHAPE_STEP = 64


def choose_device(run: RunSettings, world: World) -> torch.device:
    """The device of this rank, where the run's attention can run. Raises ConfigError before anything is made.

    On CPU also takes this rank's share of the cores, unless OMP_NUM_THREADS says otherwise, and keeps freed memory.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no CUDA device. Use device: cpu, or install a CUDA"
            " build of torch."
        )
    device = torch.device("cpu")
    if run.device != "cpu" and torch.cuda.is_available():
        # SLURM may show a task some of the node's GPUs alone, numbered from 0
        device = torch.device("cuda", device_index(world, visible=torch.cuda.device_count()))
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # the deepspeed launcher leaves it unset: every rank would take all cores
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))

    if device.type == "cpu":
        freed_memory.keep()
        if run.engine.graphs == "micro_step":
            raise ConfigError(
                "engine.graphs is micro_step and the device a CPU; needed: CUDA, for it is CUDA's"
                " graphs that save launches. Use graphs: off."
            )

    # 8.9 (Ada) is the first compute capability with products of 8-bit floats
    if (
        run.engine.fp8 == "layers"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        raise ConfigError(
            f"engine.fp8 is layers, but {torch.cuda.get_device_name(device)} has no 8-bit products;"
            " needed: compute capability 8.9 (Ada, Hopper or newer). Use fp8: off."
        )

    # what a kernel of attention meets: bf16 also under autocast, whose weights are fp32
    precision = precision_on(run.engine.precision, device)
    computing = {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.bfloat16)
    if head_width := run.model.head_width:
        choose_backend(
            run.attention,
            AttentionRequest(device=device, dtype=computing, head_width=head_width, training=True),
        )
    return device


def check_same_precision(run: RunSettings) -> None:
    """All ranks train in one precision; with ranks joined. Raises ConfigError on all of them where auto meant two."""
    words = ("fp32", "fp64", "autocast", "bf16")
    mine = words.index(run.engine.precision)
    # max(x) and -max(-x) = min(x) in one all-reduce: equal where all ranks have one word
    highest, lowest = max_over_ranks(torch.tensor([mine, -mine])).tolist()
    if highest != -lowest:
        raise ConfigError(
            f"engine.precision auto is {words[-lowest]} on some ranks and {words[highest]} on"
            f" others: their devices differ. Set engine.precision: {words[-lowest]}."
        )


def make_model(run: RunConfig) -> Model:
    """The model with its initial weights, a function of the seed alone; for ZeRO stage 3 without, for the engine draws them."""
    with torch.device("meta" if run.engine.zero_stage == 3 else "cpu"):
        return build_model(run.model, attention=run.attention, seed=run.seed)


def compiles(run: RunSettings, device: torch.device) -> bool:
    """Whether the layers run compiled."""
    # auto leaves ZeRO 3 out: it fetches weights by hooks that compiled code does not call
    return run.compile == "blocks" or (
        run.compile == "auto" and device.type == "cuda" and run.engine.zero_stage < 3
    )


def has_static_shapes(run: RunSettings, device: torch.device) -> bool:
    """Whether micro-batches are padded to one shape: costs the rows' unfilled end, saves compiling and allocating anew."""
    return device.type == "cuda" or compiles(run, device)


def shape_step_of(run: RunSettings, device: torch.device) -> int:
    """Of what a micro-batch's tokens and targets are a multiple, where they have no one shape."""
    halves = precision_on(run.engine.precision, device) in ("autocast", "bf16")
    return BF16_SHAPE_STEP if device.type == "cpu" and halves and computes_bf16(device) else 1


def open_mixture(sources: Sequence[SourceConfig], *, lanes: int = 1) -> list[Source]:
    """Opens the shard folders of a mixture, in the order of the run file. Raises ShardError, ConfigError as shards_of_lanes."""
    opened = [
        open_source(
            s.path,
            name=source_name(s),
            cache=Path(s.cache) if s.cache else None,
            cache_bytes=s.cache_bytes,
        )
        for s in sources
    ]
    # refuses shards that cannot be dealt to the lanes evenly
    for source in opened:
        shards_of_lanes(source.name, source.samples_per_shard, lanes)
    return opened


def make_objective_models(
    run: RunConfig, asked: Mapping[str, AskedModel], device: torch.device
) -> dict[str, Model]:
    """The models that the objective asks, by setting, on the device: they train nothing, and no engine knows them.

    run: its precision decides theirs
    asked: as they were read; their weights are let go
    device: of this rank
    """
    # as the trained model computes: under autocast the weights stay fp32, the products are bf16
    dtypes = {"fp64": torch.float64, "bf16": torch.bfloat16}
    dtype = dtypes.get(run.engine.precision, torch.float32)
    models: dict[str, Model] = {}
    for name, stored in asked.items():
        # no weight is drawn, and assign=True takes the stored ones without a copy
        with torch.device("meta"):
            model = build_model(stored.config, attention=run.attention, seed=0)
        model.load_state_dict(stored.weights, assign=True)
        stored.weights.clear()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.train(False)
        model.to(device=device, dtype=dtype)
        if compiles(run, device):
            model.compile_blocks_()
        models[name] = model
    return models


def make_objective(
    run: RunConfig,
    facts: DataFacts,
    phase: PhaseConfig,
    *,
    models: Mapping[str, Model] | None = None,
) -> Objective:
    """The objective of a phase: how its rows are masked, and the loss.

    run, phase: whose objective
    facts: of the shards
    models: those that the loss asks; rows are masked without them
    """
    words = (
        read_word_edges(facts.tokenizer_json, vocab_size=facts.vocab_size)
        if run.objective.needs_word_edges
        else None
    )
    return build_objective(
        run.objective,
        vocab_size=facts.vocab_size,
        specials=facts.specials,
        share=run.mask_share_of(phase),
        words=words,
        unused=_unused(run, facts),
        models=models,
    )


def _unused(run: RunConfig, facts: DataFacts) -> tuple[int, ...]:
    return (
        unused_ids(facts.tokenizer_json, vocab_size=facts.vocab_size)
        if run.objective.needs_unused_ids
        else ()
    )


def make_loader(
    run: RunConfig,
    facts: DataFacts,
    world: World,
    device: torch.device,
    phase: PhaseConfig,
    position: DataPosition,
    *,
    left_out: Sequence[tuple[int, int]] = (),
) -> Loader:
    """The loader of a phase, standing at a position of it, without some shards: (number of the source, shard)."""
    mixture = run.sources_of(phase)
    prefetch_windows = run.loader.prefetch_windows or PREFETCH_WINDOWS
    return Loader(
        open_mixture(mixture, lanes=run.data.lanes),
        order=DataOrder(
            weights=[s.weight for s in mixture],
            seed=run.seed,
            phase=run.phases.index(phase),
            window_documents=run.data.window_documents,
            lanes=run.data.lanes,
            shuffle_shards=run.data.shuffle_shards,
            piece_order=run.data.piece_order,
            left_out=left_out,
        ),
        geometry=_geometry(run, phase),
        masker=make_objective(run, facts, phase),
        dealing=_dealing(run, world, device),
        workers=WorkerSettings(
            processes=run.loader.workers,
            pin_memory=device.type == "cuda",
            # only a source with a cache has shards to bring ahead
            prefetch_windows=prefetch_windows if any(s.cache for s in mixture) else 0,
        ),
        rows_at=lambda seen: run.rows_at(phase, seen),
        start=position,
    )


def _geometry(run: RunConfig, phase: PhaseConfig) -> RowGeometry:
    return RowGeometry(
        row_tokens=run.data.row_tokens,
        max_tokens_per_document=phase.max_tokens_per_document,
        join=run.data.join,
    )


def _dealing(run: RunConfig, world: World, device: torch.device) -> Dealing:
    return Dealing(
        world=world,
        micro_batch_rows=run.loader.micro_batch_rows,
        static_shapes=has_static_shapes(run, device),
        shape_step=shape_step_of(run, device),
    )


def make_held_out(
    run: RunConfig, facts: DataFacts, world: World, device: torch.device, phase: PhaseConfig
) -> list[HeldOut]:
    """This rank's share of the held-out batches, cut to the phase's document length."""
    if run.evaluation is None:
        return []
    settings = run.objective.held_out(mask_share=run.evaluation.mask_share)
    masker = build_objective(settings, vocab_size=facts.vocab_size, specials=facts.specials)
    return [
        HeldOut(
            name=source.name,
            batches=evaluation_batches(
                source=source,
                rows=run.evaluation.rows,
                seed=run.seed,
                geometry=_geometry(run, phase),
                masker=masker,
                dealing=_dealing(run, world, device),
            ),
        )
        for source in open_mixture(run.evaluation.sources)
    ]


def check_held_out_names(run: RunConfig, facts: DataFacts) -> None:
    """Raises ConfigError for a held-out source named like a loss term: both had held_out_loss_sop."""
    # of a single source the numbers are held_out_loss alone
    if run.evaluation is None or len(run.evaluation.sources) < 2:
        return
    settings = run.objective.held_out(mask_share=run.evaluation.mask_share)
    masker = build_objective(settings, vocab_size=facts.vocab_size, specials=facts.specials)
    for number, source in enumerate(run.evaluation.sources):
        name = source_name(source)
        # the first term's numbers are held_out_loss, too
        if name in masker.terms[1:]:
            raise ConfigError(
                f"evaluation.sources.{number} is named {name}, as a loss term of the objective is:"
                f" held_out_loss_{name} would be of both. Give it another name, such as"
                f" evaluation.sources.{number}.name=text_{name}."
            )


def held_out_entropy(run: RunConfig, facts: DataFacts) -> float | None:
    """Unigram entropy in nats of the held-out text, or None without evaluation."""
    if run.evaluation is None:
        return None
    counts = sum(
        token_counts(s, run.model.vocab_size) for s in open_mixture(run.evaluation.sources)
    )
    return unigram_entropy(np.asarray(counts), facts.specials.all_special)


def fingerprint_batch(
    model: ModelShape,
    *,
    objective: TrainedObjective,
    seed: int,
    address: str,
    documents: int = 1,
) -> TokenBatch:
    """A fixed batch of random tokens, all that can be predicted: its loss tells whether weights came back as they went.

    model: whose vocabulary and length bound it
    objective: whose targets it has
    seed, address: of the tokens
    documents: that the tokens are cut into, all about as long
    """
    length = min(64, model.max_position_embeddings)
    ids_T = torch.from_numpy(generator(seed, address).integers(0, model.vocab_size, length))
    return packed_documents(ids_T.split(length // documents), objective.all_targets(ids_T))
