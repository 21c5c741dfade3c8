"""What runs on the ranks: curves of the tiny model, saves and resumes. Returns plain values; weights go to files."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from encoder.base.batch import LossTerm
from encoder.base.dist import World, join, leave
from encoder.base.errors import UserError
from encoder.base.units import Progress
from encoder.engine import engine as engine_module
from encoder.engine.checkpoint import save as checkpoint_save
from encoder.engine.checkpoint.read import (
    claim_incarnation,
    load_checkpoint,
    newest_checkpoint,
    read_weights,
)
from encoder.engine.engine import Engine, EngineConfig, start_engine
from encoder.engine.zero import config as zero_config
from encoder.objectives.mlm import mlm_loss
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from encoder.optim.whole_tensors import WholeTensorOptimizer
from tests.process.tiny import (
    ALL_KINDS,
    ROWS,
    SIZE,
    counts_of,
    masked_tokens_of,
    mlm_objective,
    save_checkpoint,
    share_of_step,
    tiny_model,
)

CPU = torch.device("cpu")
_TORCHS_LINEAR = torch.nn.functional.linear
CONFIG = StableAdamWConfig(weight_decay=0.01)
STEPS = 6
SAVED_AT = 3
# its gradient is 1,000 times as large in one step
SPIKED = "model.layers.1.mlp.Wi.weight"
SPIKE_STEP = 1


def lr_of(step: int) -> float:
    return 4e-3 * (1.0 + 0.5 * (step % 3))


def begin(
    world: World,
    *,
    zero_stage: int,
    precision: str = "fp32",
    clipping: float = 0.0,
    all_kinds: bool = False,
    memory: Mapping[str, str] = MappingProxyType({}),
    device: torch.device = CPU,
    as_told: bool = False,
) -> tuple[Engine, dict]:
    """An engine around the tiny model, and the switch of the spike.

    as_told: its stage is run also where one CPU rank has nothing to cut, as on a GPU alone
    """
    # as cut up as a large model: DeepSpeed leaves parameters below 100,000 elements whole, and steps them all in one
    zero_config.STAGE_3.update(stage3_param_persistence_threshold=0, sub_group_size=600)
    with torch.device("meta" if zero_stage == 3 else "cpu"):
        model = tiny_model(size=ALL_KINDS if all_kinds else SIZE)
    config = EngineConfig(
        zero_stage=zero_stage, precision=precision, gradient_clipping=clipping, **memory
    )
    with contextlib.ExitStack() as patched:
        if as_told:
            keep = lambda config, **_: config  # noqa: E731
            patched.enter_context(mock.patch.object(engine_module, "as_run", keep))
        engine = start_engine(
            model,
            objective=mlm_objective(),
            config=config,
            optimizer=CONFIG,
            world=world,
            device=device,
        )
    spike = {"on": False}
    engine.module.get_parameter(SPIKED).register_hook(
        lambda g: g * (1000.0 if spike["on"] else 1.0)
    )
    return engine, spike


def train(
    engine: Engine, spike: dict, *, rows: int, steps: range, lr_scale: float = 1.0
) -> list[float]:
    """Losses of some steps, micro-batches of `rows` rows."""
    losses = []
    for step in steps:
        spike["on"] = step == SPIKE_STEP
        batches = share_of_step(
            step, rank=engine.world.rank, world_size=engine.world.size, micro_batch_rows=rows
        )
        result = engine.step(
            batches, counts=counts_of(step), lr=lr_scale * lr_of(step), max_lr=1e-2
        )
        assert result.applied and result.loss == result.means["mlm"]
        losses.append(result.loss)
    return losses


def curve(
    world: World,
    out: Path,
    *,
    label: str,
    zero_stage: int,
    precision: str,
    rows: int,
    clipping: float = 0.0,
    whole_tensors: bool = True,
    mean_of_means: bool = False,
    all_kinds: bool = False,
    memory: Mapping[str, str] = MappingProxyType({}),
    as_told: bool = False,
) -> dict[str, Any]:
    """Six steps, a checkpoint after the third; the final weights in OUT/label.safetensors."""
    engine, spike = begin(
        world,
        zero_stage=zero_stage,
        precision=precision,
        clipping=clipping,
        all_kinds=all_kinds,
        memory=memory,
        as_told=as_told,
    )
    if mean_of_means:
        take_means_of_means(engine, rows=rows)
    built = held_at_start(engine) if zero_stage == 3 else {}
    if not whole_tensors:
        take_flats_for_tensors(engine.optimizer)
    incarnation = claim_incarnation(out / label, world)
    losses = train(engine, spike, rows=rows, steps=range(SAVED_AT))
    saved = save_checkpoint(
        out / label / "checkpoints",
        engine=engine,
        progress=Progress(step=SAVED_AT, tokens=1000),
        run_yaml="a: 1\n",
        incarnation=incarnation,
        extra={"note": [1, 2.5]},
        keep_last=2,
    )
    losses += train(engine, spike, rows=rows, steps=range(SAVED_AT, STEPS))
    keep_weights(engine, out / f"{label}.safetensors")
    return {"losses": losses, "saved": str(saved), "evaluated": held_out(engine, world), **built}


def take_flats_for_tensors(optimizer: WholeTensorOptimizer) -> None:
    """Each flat partition is one whole parameter, as an optimizer has it that knows no better."""
    flats = [*optimizer._parts]
    optimizer._parts, optimizer._row = {}, {flat: i for i, flat in enumerate(flats)}
    optimizer._set_sizes(torch.tensor([flat.numel() for flat in flats], dtype=torch.float64))


def take_means_of_means(engine: Engine, *, rows: int) -> None:
    """The usual mistake: each micro-batch's loss is its own mean, and a step's the mean of those."""
    plain, per_rank = engine.step, -(-ROWS // engine.world.size) // rows
    asked: dict[str, int] = {}

    def step(*values: Any, counts: dict[str, int], **named: Any) -> Any:
        asked.update(counts)
        return plain(*values, counts=counts, **named)

    def mean(_module: Any, _inputs: Any, loss: dict[str, LossTerm]) -> dict[str, LossTerm]:
        return {
            name: term._replace(
                total=term.total
                * (asked[name] / (max(int(term.count), 1) * per_rank * engine.world.size))
            )
            for name, term in loss.items()
        }

    engine.step = step
    engine.module.register_forward_hook(mean)


def held_at_start(engine: Engine) -> dict[str, Any]:
    """What a rank holds of a model that stage 3 has built, and whether all of it together is the plain build."""
    parameters = dict(engine.module.named_parameters())
    plain = dict(tiny_model(size=engine.module.config).named_parameters())
    holds = {
        "gathered": sum(p.numel() for p in parameters.values()),
        "too_large": [
            n
            for n, p in parameters.items()
            if p.ds_tensor.numel() != -(-p.ds_numel // engine.world.size)
        ],
    }
    whole = whole_weights(engine)
    return {
        **holds,
        "other": [n for n in plain if not torch.equal(whole[n], plain[n].to(whole[n].dtype))],
    }


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The model's weights, gathered where they are cut; called on every rank."""
    named = dict(engine.module.named_parameters())
    gathered = contextlib.nullcontext()
    if engine.config.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(named.values()))
    with gathered:
        return {n: p.detach().clone() for n, p in named.items()}


def held_out(engine: Engine, world: World) -> list[float]:
    """Rank zero of several brings three micro-batches, the last one the other, one between them none; the same rows in sum."""
    rows = (
        {0: [1, 1, 2], world.size - 1: [4]}.get(world.rank, []) if world.size > 1 else [1, 1, 2, 4]
    )
    batches = share_of_step(99, rank=0, world_size=1, micro_batch_rows=1)
    engine.module.train()
    sums = engine.evaluate([batches[r] for r in rows])["mlm"]
    assert engine.module.training
    return [sums.sum, sums.count, sums.correct]


def keep_weights(engine: Engine, path: Path) -> None:
    weights = whole_weights(engine)
    if engine.world.first:
        save_file(weights, path)


def weights_given_back(world: World, memory: Mapping[str, str]) -> dict[str, Any]:
    """At stage 3, in a forward after the first ones: elements gathered when the head is done, and whether the memory of a
    layer's weight is free before the backward."""
    engine, spike = begin(world, zero_stage=3, memory=memory)
    train(engine, spike, rows=2, steps=range(2))
    seen: dict[str, Any] = {}
    wqkv = engine.module.model.layers[0].attn.Wqkv
    hooks = [
        wqkv.register_forward_hook(
            lambda m, *_: seen.update(memory=StorageWeakRef(m.weight.untyped_storage())),
            prepend=True,
        ),  # before DeepSpeed's, which takes the weight away
        engine.module.head.register_forward_hook(
            lambda *_: seen.update(
                gathered=sum(p.numel() for p in engine.module.parameters()),
                free=seen.pop("memory").expired(),
            )
        ),
    ]
    train(engine, spike, rows=8, steps=range(1))
    for hook in hooks:
        hook.remove()
    seen.pop("memory", None)  # of the layer computed again, in the backward
    return {**seen, "linear_is_torchs": torch.nn.functional.linear is _TORCHS_LINEAR}


def curves(world: World, *, out: str, settings: list[dict]) -> dict[str, Any]:
    """One launch, many curves."""
    return {s["label"]: curve(world, Path(out), **s) for s in settings}


def plain_loop(world: World, *, out: str, all_kinds: bool = False) -> None:
    """The truth without an engine: all rows in one forward, autograd, whole tensors, fp64."""
    model = tiny_model(size=ALL_KINDS if all_kinds else SIZE).double()
    named = dict(model.named_parameters())
    decay = [p for p in named.values() if p.ndim > 1]
    rest = [p for p in named.values() if p.ndim <= 1]
    optimizer = StableAdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], CONFIG)
    for step in range(STEPS):
        (batch,) = share_of_step(step, rank=0, world_size=1, micro_batch_rows=8)
        (mlm_loss(model, batch).total / masked_tokens_of(step)).backward()
        if step == SPIKE_STEP:
            named[SPIKED].grad.mul_(1000.0)
        for group in optimizer.param_groups:
            group.update(lr=lr_of(step), max_lr=1e-2)
        optimizer.step()
        model.zero_grad()
    save_file(
        {n: p.detach() for n, p in named.items()},
        Path(out) / f"plain{'_all_kinds' * all_kinds}.safetensors",
    )


def first_launch(world: World, *, out: str, settings: list[dict]) -> dict[str, Any]:
    """One rank: the plain loop, then the curves."""
    plain_loop(world, out=out)
    plain_loop(world, out=out, all_kinds=True)
    return curves(world, out=out, settings=settings)


def resumes(world: World, *, out: str, settings: list[dict]) -> dict[str, list[float]]:
    """Loads checkpoints of the curves in this fresh process and trains on to the last step."""
    losses = {}
    for s in settings:
        engine, spike = begin(
            world, zero_stage=s["zero_stage"], precision=s.get("precision", "fp32")
        )
        progress, extra = load_checkpoint(
            newest_checkpoint(Path(out) / s["source"] / "checkpoints"), engine
        )
        assert (progress, extra) == (Progress(step=SAVED_AT, tokens=1000), {"note": [1, 2.5]})
        losses[s["label"]] = train(engine, spike, rows=s["rows"], steps=range(progress.step, STEPS))
        keep_weights(engine, Path(out) / f"{s['label']}.safetensors")
    return losses


def pairings(world: World, *, out: str, pairs: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Checkpoints (by label) loaded at a stage, one after the other into the same engine, and trained on to the last step: what
    is not what was saved, the losses, and how far from the source's own end the weights are.
    """
    seen = {}
    for stage in range(4):
        engine, spike = begin(world, zero_stage=stage)
        for source in [label for label, at in pairs if at == stage]:
            folder = newest_checkpoint(Path(out) / source / "checkpoints")
            load_checkpoint(folder, engine)
            saved = stored_state(folder)
            other = [
                f"{p.name}/{kind}"
                for p in engine.pieces()
                for kind, tensor in p.tensors.items()
                if not torch.equal(tensor, saved[p.name, kind][p.start : p.start + tensor.numel()])
            ]
            other += [
                n
                for n, w in whole_weights(engine).items()
                if not torch.equal(w.flatten(), saved[n, "master"])
            ]
            losses = train(engine, spike, rows=8, steps=range(SAVED_AT, STEPS))
            end = load_file(Path(out) / f"{source}.safetensors")
            off, length = (
                sum(
                    float((w - z * end[n]).double().square().sum())
                    for n, w in whole_weights(engine).items()
                )
                ** 0.5
                for z in (1, 0)
            )
            seen[f"{source}->s{stage}x{world.size}"] = {
                "other": other,
                "losses": losses,
                "off": off / length,
            }
    return seen


def stored_state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """What the files of a checkpoint say of each parameter, by (name, kind), put together without our reader."""
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            place, kind = key.rsplit("/", 1)
            name, start = place.rsplit("@", 1)
            parts.setdefault((name, kind), {})[int(start)] = tensor
    return {
        key: torch.cat([tensor for _, tensor in sorted(found.items())])
        for key, found in parts.items()
    }


def products_where_autocast_is_seen(world: World) -> dict[str, list[str]]:
    """The dtype of every linear map's output in a step and an evaluation under autocast, where DeepSpeed sees that it is on.
    It asks without a device, which means CUDA: here the CPU answers."""
    plain, seen = torch.is_autocast_enabled, {}
    with mock.patch.object(torch, "is_autocast_enabled", lambda kind="cpu": plain(kind)):
        for graphs in ("off", "micro_step"):
            engine, _ = begin(world, zero_stage=1, precision="autocast", memory={"graphs": graphs})
            found = []
            for module in engine.module.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(
                        lambda _module, _inputs, out, found=found: found.append(str(out.dtype))
                    )
            batches = share_of_step(0, rank=0, world_size=1, micro_batch_rows=ROWS)
            engine.step(batches, counts=counts_of(0), lr=1e-3, max_lr=1e-3)
            engine.evaluate(batches)
            seen[graphs] = found
    return seen


def one_rank_mishaps(world: World, *, out: str) -> dict[str, Any]:
    """Everything that can happen to checkpoints and steps on one rank; each entry is asserted by a test."""
    folder = Path(out) / "mishaps"
    seen: dict[str, Any] = {}
    engine, spike = begin(world, zero_stage=1)

    def save(
        tokens: int, incarnation: int, *, keep_last: int = 2, milestone: str | None = None
    ) -> Path:
        return save_checkpoint(
            folder / "checkpoints",
            engine=engine,
            progress=Progress(step=1, tokens=tokens),
            run_yaml="",
            incarnation=incarnation,
            extra={},
            keep_last=keep_last,
            milestone=milestone,
        )

    def names() -> list[str]:
        return sorted(p.name for p in (folder / "checkpoints").iterdir())

    def error_of(act: Any) -> str:
        try:
            act()
        except UserError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    seen["none_yet"] = newest_checkpoint(folder / "checkpoints")
    first = claim_incarnation(folder, world)
    save(1, first, milestone="warm-up")
    for tokens in (2, 3, 4):
        save(tokens, first)
    seen["kept"] = names()
    save(4, first, milestone="stable")
    save(5, first)
    save(6, first)
    save(7, first)
    seen["kept_with_milestones"] = names()

    # as a kill would leave it: at each of the file operations of a save in turn, nothing after it happens
    second = claim_incarnation(folder, world)
    seen["kills"] = []
    for at in range(1, 50):
        if not killed_at(at, lambda: save(8, second)):
            break
        seen["kills"].append(newest_checkpoint(folder / "checkpoints").name)
    seen["after_kills"] = newest_checkpoint(folder / "checkpoints").name
    third = claim_incarnation(folder, world)
    (folder / "checkpoints" / ".tokens0000000000009-i0002.part").mkdir()
    seen["stale"] = error_of(lambda: save(9, second))
    save(10, third)
    seen["after_third_start"] = names()

    with too_small_files():
        seen["full"] = error_of(lambda: save(11, third))
    seen["after_full"] = [names(), newest_checkpoint(folder / "checkpoints").name]

    good = folder / "checkpoints" / "tokens0000000000010-i0003"
    content = (good / "rank00000.safetensors").read_bytes()
    (good / "rank00000.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    seen["damaged"] = newest_checkpoint(folder / "checkpoints").name
    (good / "rank00000.safetensors").write_bytes(content[:100])
    seen["cut"] = newest_checkpoint(folder / "checkpoints").name
    for path in (folder / "checkpoints").iterdir():
        (path / "progress.json").unlink()
    seen["none_whole"] = error_of(lambda: newest_checkpoint(folder / "checkpoints"))

    save(12, third)
    whole = newest_checkpoint(folder / "checkpoints")
    seen["weights"] = {n: list(w.shape) for n, w in read_weights(whole).items()}
    seen["weights_equal"] = all(
        torch.equal(w, dict(engine.module.named_parameters())[n])
        for n, w in read_weights(whole).items()
    )
    seen["environment"] = (whole / "environment.json").read_text()
    seen["shapes"] = {n: list(p.shape) for n, p in engine.module.named_parameters()}
    other = start_engine(
        type(engine.module)(dataclasses.replace(SIZE, intermediate_size=20), attention="sdpa"),
        objective=mlm_objective(),
        config=EngineConfig(precision="fp32"),
        optimizer=CONFIG,
        world=world,
        device=CPU,
    )
    before = {n: p.detach().clone() for n, p in other.module.named_parameters()}
    seen["another_model"] = error_of(lambda: load_checkpoint(whole, other))
    seen["another_model_untouched"] = all(
        torch.equal(p, before[n]) for n, p in other.module.named_parameters()
    )

    nothing = engine.step([], counts={"mlm": 0}, lr=1e-3, max_lr=1e-3)
    seen["nothing_masked"] = [nothing.applied, str(nothing.loss), nothing.grad_norm]
    for stage, offload in [
        *((stage, "none") for stage in (0, 1, 2, 3)),
        *((stage, "cpu") for stage in (1, 2, 3)),
    ]:
        engine, spike = begin(world, zero_stage=stage, memory={"offload_optimizer": offload})
        train(engine, spike, rows=2, steps=range(1))
        steps, weights = engine.optimizer_steps, whole_weights(engine)
        for piece in engine.pieces():
            if piece.name == "decoder.bias":
                piece.master.data[0] = float("nan")
        engine.state_was_loaded(optimizer_steps=steps)
        broken = engine.step(
            share_of_step(1, rank=0, world_size=1, micro_batch_rows=2),
            counts=counts_of(1),
            lr=1e-3,
            max_lr=1e-3,
        )
        moved = [
            n
            for n, w in whole_weights(engine).items()
            if n != "decoder.bias" and not torch.equal(w, weights[n])
        ]
        seen[f"not_finite_{stage}_{offload}"] = [
            broken.applied,
            str(broken.grad_norm),
            moved,
            engine.optimizer_steps == steps,
        ]
        for piece in engine.pieces():
            if piece.name == "decoder.bias":
                piece.master.data.copy_(
                    weights[piece.name].flatten()[piece.start : piece.start + piece.master.numel()]
                )
        engine.state_was_loaded(optimizer_steps=steps)
        train(engine, spike, rows=2, steps=range(2, 3))
        after = whole_weights(engine)
        engine, spike = begin(world, zero_stage=stage)
        train(engine, spike, rows=2, steps=range(1))
        train(engine, spike, rows=2, steps=range(2, 3))
        seen[f"as_if_never_{stage}"] = all(
            torch.equal(w, after[n]) for n, w in whole_weights(engine).items()
        )
    return seen


class _Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it, and nothing is cleaned up after it."""


def killed_at(operation: int, act: Any) -> bool:
    """Runs an act that ends at its n-th file operation as if killed; False if it had fewer and went through."""
    count = 0
    names = ["write_tensors", "write_json", "write_atomic", "fsync_path"]
    real = {name: getattr(checkpoint_save, name) for name in names}
    rename, clean_up = checkpoint_save.os.rename, checkpoint_save._Save.clean_up

    def counted(do: Any) -> Any:
        def one(*values: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                checkpoint_save._Save.clean_up = lambda self: None
                raise _Killed
            return do(*values, **named)

        return one

    try:
        for name in names:
            setattr(checkpoint_save, name, counted(real[name]))
        checkpoint_save.os.rename = counted(rename)
        act()
    except _Killed:
        return True
    finally:
        for name in names:
            setattr(checkpoint_save, name, real[name])
        checkpoint_save.os.rename, checkpoint_save._Save.clean_up = rename, clean_up
    return False


@contextlib.contextmanager
def too_small_files() -> Any:
    """No file may grow over 4 KB: what a full disk does to a write, on this process alone."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def two_rank_mishaps(world: World, *, out: str) -> dict[str, Any]:
    """Rank one alone cannot write, then cannot read: both ranks must say so, and go on."""
    folder = Path(out) / "two_rank_mishaps"
    engine, _ = begin(world, zero_stage=2)
    incarnation = claim_incarnation(folder, world)

    def save(tokens: int) -> str:
        try:
            return save_checkpoint(
                folder / "checkpoints",
                engine=engine,
                progress=Progress(tokens=tokens),
                run_yaml="",
                incarnation=incarnation,
                extra={},
                keep_last=3,
            ).name
        except UserError as error:
            return f"{type(error).__name__}: {error}"

    seen: dict[str, Any] = {"incarnation": incarnation, "good": save(1)}
    with too_small_files() if world.rank == 1 else contextlib.nullcontext():
        seen["full"] = save(2)
    dist.barrier()  # rank zero removes what was half-written before it raises
    seen["left"] = sorted(p.name for p in (folder / "checkpoints").iterdir())
    seen["newest"] = newest_checkpoint(folder / "checkpoints").name
    try:
        load_checkpoint(
            folder / ("checkpoints/" + seen["good"] if world.rank == 0 else "nowhere"), engine
        )
        seen["unreadable"] = "no error"
    except UserError as error:
        seen["unreadable"] = str(error)
    return seen


def goes_on_after_nan(world: World) -> dict[str, list[bool]]:
    """Which steps were applied when the second one's gradient is not finite on the last rank, with an offloaded optimizer."""
    applied = {}
    for stage, precision in [(1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]:
        engine, _ = begin(
            world, zero_stage=stage, precision=precision, memory={"offload_optimizer": "cpu"}
        )
        factor = {"of": 1.0}
        engine.module.get_parameter(SPIKED).register_hook(lambda g, factor=factor: g * factor["of"])
        results = []
        for step in range(3):
            factor["of"] = float("nan") if step == 1 and world.rank == world.size - 1 else 1.0
            batches = share_of_step(
                step, rank=world.rank, world_size=world.size, micro_batch_rows=2
            )
            results.append(
                engine.step(batches, counts=counts_of(step), lr=lr_of(step), max_lr=1e-2).applied
            )
        applied[f"{precision}-s{stage}"] = results
    return applied


def curves_on_gpu(world: World, *, settings: list[dict]) -> list[dict[str, Any]]:
    """Losses, where the masters lie, and the final weights' lengths, of one rank on its GPU."""
    leave()
    join(world, device=torch.device("cuda", 0))
    seen = []
    for s in settings:
        engine, spike = begin(world, **s, device=torch.device("cuda", 0))
        losses = train(engine, spike, rows=2, steps=range(STEPS))
        seen.append(
            {
                "losses": losses,
                "masters": sorted({piece.master.device.type for piece in engine.pieces()}),
                "lengths": [float(piece.master.norm()) for piece in engine.pieces()],
            }
        )
    return seen


def second_launch(world: World, *, out: str, settings: list[dict]) -> dict[str, Any]:
    """Resumes in a fresh process, then what only shows on two ranks."""
    return {
        "resumed": resumes(world, out=out, settings=settings),
        "mishaps": two_rank_mishaps(world, out=out),
        "after_nan": goes_on_after_nan(world),
        "given_back": [
            weights_given_back(world, {"activation_checkpointing": word})
            for word in ("off", "blocks")
        ],
    }
