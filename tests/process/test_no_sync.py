"""A micro-step asks the device nothing: the host never waits between the first kernel of a forward and the last of its backward.

On CPU every operation that would have to wait for a device is counted as it is dispatched; on CUDA torch itself raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from encoder.base.dist import World
from encoder.engine.engine import EngineConfig, start_engine
from encoder.models import encoder as shared
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn.attend import BACKENDS, Choice
from encoder.objectives.mlm import mlm_loss
from encoder.optim.catalog import OPTIMIZERS, build_optimizer
from encoder.optim.stable_adamw import StableAdamWConfig
from tests.helpers.packed import OnDevice, packed
from tests.process.ranks import run_ranks
from tests.process.tiny import mlm_objective

CONFIG = ModernBertConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    window_radius_tokens=6,
    attention_output_dropout=0.1,
)
LENGTHS = [30, 1, 50, 12, 35]
# what gives the host a number, or a tensor whose size only the device knows
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "nonzero_numpy",
    "argwhere",
    "_to_host",
}


class HostReads(TorchDispatchMode):
    """The names of the operations that would wait, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in chosen
        )
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or counted:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads() -> Iterator[list[str]]:
    """Of the block; tolist, numpy and cpu are dispatched nowhere on a CPU, so they are watched by name. So are new_tensor and
    torch.tensor: a number of the host's is copied from memory that is not pinned, for which CUDA waits.
    """
    with HostReads() as reads, contextlib.ExitStack() as patches:
        for home, name in (
            *((torch.Tensor, n) for n in ("tolist", "numpy", "cpu", "new_tensor")),
            (torch, "tensor"),
        ):
            plain = getattr(home, name)

            def watched(*args, _name=name, _plain=plain, **named):
                reads.found.append(_name)
                return _plain(*args, **named)

            patches.enter_context(mock.patch.object(home, name, watched))
        yield reads.found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        shared,
        "choose_backend",
        lambda *_: Choice(backend=OnDevice(), reason="stands for a kernel"),
    )


def batch(seed: int = 0):
    return packed(LENGTHS, vocab=96, seed=seed)


def test_what_waits_is_seen():
    x = torch.arange(4.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: bool(x[0] > 0),
        lambda: x[x > 1],
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: float(x[0]),
        lambda: torch.equal(x, x),
        lambda: x.masked_select(x > 1),
        lambda: x.cpu(),
        lambda: x.repeat_interleave(x.long()),
        lambda: x.new_tensor([1.0]),
        lambda: torch.tensor(1.0),
    ):
        with host_reads() as found:
            wait()
        assert found
    first = torch.arange(2)
    with host_reads() as found:
        x[first] + x.index_select(0, first).where(x[:2] > 0, 0)
    assert not found


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_no_host_read_in_a_forward_and_its_backward(as_on_a_gpu, autocast, recompute):
    model = ModernBertForMaskedLM(CONFIG)
    if recompute:
        model.recompute_blocks_()
    one = batch()
    with host_reads() as found, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mlm_loss(model, one, z_loss_weight=1e-4)
        (loss.total * 0.5).backward()
    assert found == [] and loss.count > 0 and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("tiles", "sdpa")])
def test_plans_of_gpu_backends_read_nothing_back(name):
    ends = batch().cu_seqlens_S1
    with host_reads() as found:
        BACKENDS[name].plan(ends, max_seqlen=50, tokens=128, window_radius_tokens=6)
    assert found == []


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_an_update_of_whole_tensors_asks_nothing_and_brings_no_number_to_the_device(rule):
    """As benchmarks and stage 0 make it: on CUDA a copy a tensor was a wait a tensor, 137 in an update of base."""
    model = ModernBertForMaskedLM(CONFIG)
    optimizer = build_optimizer(model, OPTIMIZERS[rule]())
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with host_reads() as found:
            optimizer.step()
        assert found == []


def reads_of_steps(world: World, *, stage: int) -> list[list[str]]:
    """What steps of 1, 1 and 5 micro-batches read, the update included."""
    with mock.patch.object(
        shared,
        "choose_backend",
        lambda *_: Choice(backend=OnDevice(), reason="stands for a kernel"),
    ):
        engine = start_engine(
            ModernBertForMaskedLM(CONFIG),
            objective=mlm_objective(CONFIG.vocab_size),
            config=EngineConfig(zero_stage=stage, precision="fp32"),
            optimizer=StableAdamWConfig(),
            world=world,
            device=torch.device("cpu"),
        )
        counts = []
        for batches in (1, 1, 5):
            some = [batch(i) for i in range(batches)]
            with host_reads() as found:
                engine.step(
                    some,
                    counts={"mlm": world.size * sum(b.counts["mlm"] for b in some)},
                    lr=1e-3,
                    max_lr=1e-3,
                )
            counts.append(found)
    return counts


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_of_five_micro_batches_reads_as_often_as_a_step_of_one(stage):
    """So no micro-step reads anything, DeepSpeed's part included."""
    for _first, one, five in run_ranks(reads_of_steps, 2, stage=stage):
        assert one and five == one


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled layers"])
def test_no_wait_for_the_device_in_three_micro_steps_on_cuda(compiled):
    """Copies to the device included: their memory is pinned, as the loader's is."""
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=2,
        )
    ).cuda()
    if compiled:
        model.compile_blocks_()
    # as in training: above 3,072 tokens torch's embedding has another backward, above 2,048 positions the loss has pieces
    pinned = [
        _pinned(packed([3000, 1, 1400, 67], vocab=512, seed=i, predict=3000)) for i in range(4)
    ]

    def micro_step(one):
        with torch.autocast("cuda", torch.bfloat16):
            loss = mlm_loss(model, one.to("cuda", non_blocking=True))
        (loss.total * 0.5).backward()
        return loss

    for one in pinned[:1] * 2:
        micro_step(one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in pinned[1:]:
            loss = micro_step(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.total.isfinite()


def _pinned(one):
    return one.with_tensors({name: tensor.pin_memory() for name, tensor in one.tensors().items()})
