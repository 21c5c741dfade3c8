"""What DeepSpeed is told, and how it is kept quiet and from compiling anything."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist

from encoder.base.errors import ConfigError
from encoder.base.model import TrainedModel
from encoder.engine.precision import Precision

OverlapWord = Literal["auto", "reduction", "weights", "off"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How parameters are held; apart from rounding, none but gradient_clipping changes the curve."""

    # 0: all on every rank; 1: optimizer state cut over ranks; 2: gradients, too; 3: weights, too, gathered when used;
    # one CPU rank has nothing to cut: 1 and 2 step as 0 there
    zero_stage: Literal[0, 1, 2, 3] = 1
    # auto: autocast where the device has units for bf16, else fp32; autocast: fp32 parameters, matmuls in bf16 (as ModernBERT);
    # bf16: bf16 parameters, fp32 masters; fp64: for tests
    precision: Precision = "auto"
    # layers: the layers' matmuls in FP8, weights and optimizer as precision says; experimental: never run on a GPU
    fp8: Literal["off", "layers"] = "off"
    # blocks: of a layer its input alone is kept for the backward, which computes the rest again: exact, a third more work
    activation_checkpointing: Literal["off", "blocks"] = "off"
    # cpu: masters and optimizer state lie in host memory, and the update is computed there; experimental with CUDA
    offload_optimizer: Literal["none", "cpu"] = "none"
    # micro_step: forward and backward of a micro-batch as one CUDA graph, for small models that wait for launches;
    # experimental: never run on a GPU
    graphs: Literal["off", "micro_step"] = "off"
    # reduction: gradients are summed over the ranks while the backward pass still computes others; off: after it;
    # weights: stage 3 also gathers the next layers' weights while one computes, and keeps them until their backward;
    # auto: reduction on a CPU, off on CUDA, where the other words are experimental: never run on a GPU
    overlap: OverlapWord = "auto"
    # largest global gradient norm; 0: none (StableAdamW clips its own updates)
    gradient_clipping: float = 0.0

    def __post_init__(self) -> None:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError(
                "precision bf16 with zero_stage 0: without ZeRO there are no fp32 master weights to"
                " collect small updates. Use zero_stage 1, 2 or 3, or precision autocast."
            )
        if self.precision == "fp64" and self.zero_stage != 0:
            raise ConfigError(
                f"precision fp64 with zero_stage {self.zero_stage}: DeepSpeed keeps ZeRO's flat"
                " weights in fp32. Use zero_stage 0."
            )
        if self.offload_optimizer == "cpu" and self.zero_stage == 0:
            raise ConfigError(
                "offload_optimizer cpu with zero_stage 0: there the optimizer steps the model's own"
                " weights. Use zero_stage 1, 2 or 3, also on one rank."
            )
        if self.fp8 == "layers" and (self.precision in ("fp32", "fp64") or self.zero_stage == 3):
            raise ConfigError(
                f"fp8 layers with precision {self.precision} and zero_stage {self.zero_stage};"
                " needed: precision autocast or bf16, and a stage below 3, which would keep all"
                " weights in 8 bits for the backward."
            )
        if self.graphs == "micro_step" and (
            self.zero_stage == 3 or self.activation_checkpointing != "off"
        ):
            raise ConfigError(
                "graphs micro_step with zero_stage 3 or activation_checkpointing: both take weights"
                " or layers apart in the middle of a micro-step, and are for models too large to"
                " wait for launches. Use graphs: off."
            )
        if self.overlap == "weights" and self.zero_stage != 3:
            raise ConfigError(
                f"overlap weights with zero_stage {self.zero_stage}: only stage 3 gathers weights"
                " during a pass. Use overlap reduction, or zero_stage 3."
            )
        if self.gradient_clipping < 0.0:
            raise ConfigError(
                f"gradient_clipping {self.gradient_clipping} is below 0. Use 0 for no clipping."
            )


def as_run(config: EngineConfig, *, ranks: int, device: torch.device) -> EngineConfig:
    """The configuration as it is run: stages 1 and 2 of one CPU rank are stage 0, for there is nothing to cut.

    DeepSpeed would copy every gradient and weight into flat tensors and back at each step. bf16 weights keep their stage,
    whose masters they need, and so does an offloaded optimizer.

    config: as the run file has it
    ranks: of the run
    device: of a rank
    """
    cuts = ranks > 1 or config.zero_stage == 3
    needs_masters = config.precision == "bf16" or config.offload_optimizer == "cpu"
    if device.type != "cpu" or cuts or needs_masters:
        return config
    return replace(config, zero_stage=0)


def overlap_on(word: OverlapWord, *, cuda: bool) -> OverlapWord:
    """What `overlap: auto` means on a device; other words as they are."""
    if word != "auto":
        return word
    return "off" if cuda else "reduction"


def sends_during_backward(config: EngineConfig, *, stage: int, ranks: int) -> bool:
    """Whether gradients are summed over the ranks during the backward pass, and not by DeepSpeed.

    It stays DeepSpeed's on one rank, which sends nothing; with graphs, which give all gradients at once; with an offloaded
    optimizer, whose copies are its own; and with bf16 weights at stage 1, whose gradients it adds up elsewhere.

    config: of the run, its `overlap` the device's
    stage: as it is run
    ranks: of the run
    """
    return (
        ranks > 1
        and config.overlap in ("reduction", "weights")
        and config.graphs == "off"
        and config.offload_optimizer == "none"
        and not (config.precision == "bf16" and stage == 1)
    )


# gradients that are reduced at a time, in fp32 268 MB; DeepSpeed's 5e8 would be a buffer of 2 GB
BUCKET_ELEMENTS = 2**26

# Stages 1 and 2 reduce each slice of a bucket to its owner; by default DeepSpeed all-reduces whole buckets: twice the bytes
TO_THE_OWNER = {"use_multi_rank_bucket_allreduce": False}
STAGE_3 = {
    # A weight goes after each use. By default DeepSpeed keeps what is used again within 1e9 elements, and any look ahead
    # keeps it, too. 150 M parameters on 2 ranks at the end of a forward: 2,505 MiB, with a look ahead 3,079
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
# weights that are on their way while others compute, in fp32 67 MB: two layers of large
LOOK_AHEAD = {"stage3_prefetch_bucket_size": 2**24}


def zero_config(config: EngineConfig, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for an engine whose caller scales the loss and says when a step is full."""
    plain = {
        # every engine.step() ends an accumulation: any number of micro-batches, another one at each step
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,  # only counted, never used: rows are ours
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        # DeepSpeed's default is 1.0; at stage 0 our own hook clips
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        # else bf16 parameters reduce their gradients in bf16
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            **TO_THE_OWNER,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            **(STAGE_3 if config.zero_stage == 3 else {}),
            **(LOOK_AHEAD if config.overlap == "weights" else {}),
            **(
                {"offload_optimizer": {"device": "cpu"}}
                if config.offload_optimizer == "cpu"
                else {}
            ),
        },
        "zero_allow_untested_optimizer": True,
        # our optimizer also where it is offloaded, not DeepSpeed's compiled CPU Adam
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }

    # gradients of several micro-batches are added up in fp32
    if config.precision == "bf16":
        plain |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return plain


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for this device, with its just-in-time compilation off.

    Its TorchBackend compiles a shared-memory all-reduce on CPU (50-75 s, needs a compiler, leaves a lock behind when
    killed) that training never calls. It would also ask the compiler which of its kernels could be built here: 0.3 s.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    # exists before its import, which then only adds a handler
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with quiet():
        import deepspeed
        import deepspeed.ops
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # every engine asks whether its optimizer is DeepSpeed's Muon, whose import compiles it: 1,000 modules, 2 s of CPU
    with quiet(), nothing_compiled():
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    return deepspeed


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """What DeepSpeed decorates for torch.compile meanwhile stays as it is."""
    from deepspeed.runtime import compiler

    plain = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        yield
    finally:
        compiler.compile = plain


def forget_former_groups() -> None:
    """Takes from DeepSpeed the process groups of a run that this process has left: it would ask them, not the new ones."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    if comm.cdb is None or groups._WORLD_GROUP is None:
        return

    # a group that torch.distributed no longer knows belonged to a run that is over
    try:
        dist.get_process_group_ranks(groups._WORLD_GROUP)
    except (KeyError, ValueError):
        comm.cdb = None
        groups._release_process_group_references()


def forget_modules(module: TrainedModel) -> None:
    """Takes from DeepSpeed what would hold an engine that is closed: stage 3 has a list of modules and a cache in a class.

    module: of the engine; another engine of this process keeps its own
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    own = {id(part) for part in module.modules()}
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [part for part in stack if id(part) not in own]
    # which parameters a module lets go, keyed by the coordinator, which knows the whole engine:
    # an engine that is still there works its own out again
    for cache in _caches_in(PartitionedParameterCoordinator):
        cache.cache_clear()


def _caches_in(cls: type) -> Iterator[Any]:
    """The functools.lru_cache of each method, also below its decorators."""
    waiting = [*vars(cls).values()]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if hasattr(function, "cache_clear"):
            yield function
        cells = getattr(function, "__closure__", None) or ()
        waiting += [cell.cell_contents for cell in cells if callable(cell.cell_contents)]


def initialize(
    deepspeed: ModuleType,
    *,
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
) -> Any:
    """DeepSpeed's engine around a model and our optimizer, without its lines on the console."""
    with quiet():
        return deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed's remarks on what we do on purpose (an untested optimizer) and its memory tables are not passed on."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
