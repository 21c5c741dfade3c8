"""What runs on the ranks: each optimizer under each ZeRO stage, fed gradients that are the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from encoder.base.dist import World, sum_over_ranks
from encoder.base.rng import address_seed
from encoder.base.units import Progress
from encoder.engine.checkpoint.read import claim_incarnation, load_checkpoint, newest_checkpoint
from encoder.engine.engine import Engine, EngineConfig, start_engine
from encoder.engine.zero import config as zero_config
from encoder.optim.adamw import AdamWConfig
from encoder.optim.lamb import LambConfig
from encoder.optim.muon import MuonConfig
from encoder.optim.stable_adamw import StableAdamWConfig
from tests.process.engine_cases import keep_weights
from tests.process.tiny import counts_of, mlm_objective, save_checkpoint, share_of_step, tiny_model

CPU = torch.device("cpu")
CONFIGS = {
    "stable_adamw": StableAdamWConfig(weight_decay=0.01),
    "adamw": AdamWConfig(weight_decay=0.3),
    "lamb": LambConfig(),
    "muon": MuonConfig(weight_decay=0.01),
    "adamw_bare": AdamWConfig(weight_decay=0.3, bias_correction=False),
    "lamb_bare": LambConfig(bias_correction=False),
}
LRS, MAX_LR, MOVED_AT = [1e-2, 2e-2, 5e-3], 2e-2, 2
SPIKED, SPIKE_STEP = "model.layers.1.mlp.Wi.weight", 1


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """A fixed fp32 gradient of a parameter; in one step that of one parameter is 1,000 times as large."""
    drawn = torch.randn(
        shape, generator=torch.Generator().manual_seed(address_seed(7, name, step) >> 1)
    )
    return drawn * (1000.0 if (name, step) == (SPIKED, SPIKE_STEP) else 1.0)


def begin(world: World, *, optimizer: str, zero_stage: int) -> tuple[Engine, dict]:
    """An engine whose parameters get the fixed gradients of the step that the box holds, whatever the loss says."""
    zero_config.STAGE_3.update(stage3_param_persistence_threshold=0, sub_group_size=600)
    with torch.device("meta" if zero_stage == 3 else "cpu"):
        model = tiny_model()
    engine = start_engine(
        model,
        objective=mlm_objective(),
        config=EngineConfig(zero_stage=zero_stage, precision="fp32"),
        optimizer=CONFIGS[optimizer],
        world=world,
        device=CPU,
    )
    at = {"step": 0}
    for name, p in engine.module.named_parameters():
        p.register_hook(lambda g, name=name: gradient(name, g.shape, at["step"]))
    return engine, at


def muons_settings(world: World) -> list[list[str]]:
    """Of a precision of the engine and a word: what the optimizer is told of Newton-Schulz."""
    found = []
    for precision, word in (("fp32", "model"), ("autocast", "model"), ("autocast", "auto")):
        engine = start_engine(
            tiny_model(),
            objective=mlm_objective(),
            config=EngineConfig(zero_stage=0, precision=precision),
            optimizer=MuonConfig(matrix_precision=word),
            world=world,
            device=CPU,
        )
        found.append([precision, word, engine.optimizer.config.matrix_precision])
    return found


def train(engine: Engine, at: dict, steps: range) -> None:
    """One micro-batch on each rank; its loss has no say."""
    for at["step"] in steps:
        batches = share_of_step(
            at["step"], rank=engine.world.rank, world_size=engine.world.size, micro_batch_rows=8
        )
        assert engine.step(
            batches, counts=counts_of(at["step"]), lr=LRS[at["step"]], max_lr=MAX_LR
        ).applied


def updates(world: World, *, out: str, settings: list[dict]) -> dict[str, Any]:
    """The weights after some steps in OUT/label.safetensors; `then`: saved on the way, and another stage goes on."""
    seen = {}
    for s in settings:
        engine, at = begin(world, optimizer=s["optimizer"], zero_stage=s["zero_stage"])
        if "then" in s:
            folder = Path(out) / s["label"]
            train(engine, at, range(MOVED_AT))
            save_checkpoint(
                folder / "checkpoints",
                engine=engine,
                progress=Progress(step=MOVED_AT, tokens=1),
                run_yaml="",
                incarnation=claim_incarnation(folder, world),
                extra={},
                keep_last=1,
            )
            engine, at = begin(world, optimizer=s["optimizer"], zero_stage=s["then"])
            load_checkpoint(newest_checkpoint(folder / "checkpoints"), engine)
        train(engine, at, range(MOVED_AT if "then" in s else 0, len(LRS)))
        keep_weights(engine, Path(out) / f"{s['label']}.safetensors")
        count = torch.tensor([getattr(engine.optimizer, "orthogonalized", 0)])
        seen[s["label"]] = {
            "own": int(count),
            "all": int(sum_over_ranks(count)),
            "kinds": sorted({kind for piece in engine.pieces() for kind in piece.tensors}),
        }
    return seen
