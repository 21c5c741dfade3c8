"""What autograd keeps of a forward, counted on tensors without data: no weight is made, no kernel runs.

    fp32, one plain layer of width C, MLP width F      [T, C]: stream, norm, q, k, v, attention, dropout, stream, norm = 9
                                                       [T, F]: both halves of Wi, their GELU, its product with the gate = 4

A model of one layer and one of four meet two batches each; the differences are bytes per token and layer. A model whose shapes
depend on values, such as the number of distinct ids, cannot run without data: its settings say activation_width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from encoder.base.batch import TokenBatch
from encoder.models.catalog import build_model
from encoder.models.contract import Model, ModelConfig
from encoder.nn.attend import AttentionRequest, attend_by

# a layer beyond the first four repeats them: of ModernBERT's, one in three is global
LAYERS = (1, 4)
TOKENS = (128, 256)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes from the forward to the backward pass."""

    layer_per_token: float
    layer_fixed: float  # whatever the tokens: the weights in bf16 under autocast
    outside_per_token: float  # embedding and final norm
    outside_fixed: float  # whatever the tokens: shared layers' weights in bf16 under autocast


@lru_cache(maxsize=32)
def count_kept(
    config: ModelConfig, *, precision: str, device: str, fp8: bool = False, zero_3: bool = False
) -> Kept:
    """Each storage once, without the parameters. Raises ConfigError as fp8_blocks_.

    precision: fp32, fp64, autocast or bf16
    device: cpu or cuda, which need not be there
    fp8: the layers' matmuls run in FP8
    zero_3: DeepSpeed's linear layers of ZeRO stage 3, which keep their input as it comes: under autocast in fp32
    """
    from torch._subclasses import fake_tensor

    needs_data = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    )
    try:
        return _count(config, precision=precision, device=device, fp8=fp8, zero_3=zero_3)
    except needs_data:
        # bytes of a number; what lies outside of the layers is left out
        width = {"autocast": 2, "bf16": 2, "fp64": 8}.get(precision, 4)
        return Kept(
            layer_per_token=width * config.activation_width,
            layer_fixed=0.0,
            outside_per_token=0.0,
            outside_fixed=0.0,
        )


def _count(config: ModelConfig, *, precision: str, device: str, fp8: bool, zero_3: bool) -> Kept:
    # a model whose layers share blocks has as many layers as sets of them, or more
    rules = config.growth()
    few, many = (rules.fewest_layers * layers for layers in LAYERS)
    if rules.most_layers is not None:
        many = min(many, rules.most_layers)
    short, long = TOKENS

    def count(layers: int) -> list[int]:
        shape = replace(config, num_hidden_layers=layers)
        return _bytes_kept(shape, precision=precision, device=device, fp8=fp8, zero_3=zero_3)

    # two lengths give bytes per token, two depths bytes per layer
    few_short, few_long = count(few)
    few_per_token = (few_long - few_short) / (long - short)
    # no other depth can be: all of it is that of its layers
    if many == few:
        return Kept(
            layer_per_token=few_per_token / few,
            layer_fixed=(few_short - short * few_per_token) / few,
            outside_per_token=0.0,
            outside_fixed=0.0,
        )
    many_short, many_long = count(many)
    many_per_token = (many_long - many_short) / (long - short)
    layer_per_token = (many_per_token - few_per_token) / (many - few)
    layer = (many_short - few_short) / (many - few)
    layer_fixed = layer - short * layer_per_token
    return Kept(
        layer_per_token=layer_per_token,
        layer_fixed=layer_fixed,
        outside_per_token=few_per_token - few * layer_per_token,
        outside_fixed=few_short - short * few_per_token - few * layer_fixed,
    )


def _bytes_kept(
    config: ModelConfig, *, precision: str, device: str, fp8: bool, zero_3: bool
) -> list[int]:
    """For one document of each of TOKENS, through the same model."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        with _default_dtype(precision), torch.device(device):
            model = build_model(config, seed=0)
            batches = [_one_document(tokens) for tokens in TOKENS]
        # made by numpy, so not where torch.device says
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)
        if fp8:
            model.fp8_blocks_()
        if zero_3:
            stack.enter_context(_linear_keeps_its_input())
        stack.enter_context(attend_by(_Counted()))
        stack.enter_context(_autocast(device, enabled=precision == "autocast"))
        return [_kept_by(model, batch) for batch in batches]


def _one_document(tokens: int) -> TokenBatch:
    """One without data: under fake tensors no kernel reads its ids."""
    ids_T = torch.zeros(tokens, dtype=torch.int64)
    return TokenBatch(
        ids_T=ids_T,
        positions_T=ids_T.to(torch.int32),
        cu_seqlens_S1=torch.zeros(2, dtype=torch.int32),
        max_seqlen=tokens,
        targets={},
        token_key_T=ids_T,
        tokens=tokens,
    )


def _kept_by(model: Model, batch: TokenBatch) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        # held, so that no other storage takes its place
        storage = x.untyped_storage()
        storages[storage._cdata] = storage
        return x

    with autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # held, as the loss holds it: what its last step keeps is counted
        hidden = model.hidden_states(batch)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    # what autograd keeps of the weights themselves is counted as weights elsewhere
    found = sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)
    del hidden
    return found


class _Counted:
    """Attention by contract: what the kernels for packed documents keep, of which none can be asked without its device.

    q, k, v, output and logsumexp. On a CPU, local layers in half precision keep windows of three blocks instead
    (encoder.nn.attend.tiles): keys and values three times and the probabilities.
    """

    name = "counted"
    traceable = True

    def why_not(self, situation: AttentionRequest) -> str | None:
        """It runs everywhere and computes nothing."""
        return None

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> _Counted:
        """Itself."""
        # three blocks of keys around a block of queries (tiles)
        self.window = 3 * max(window_radius_tokens, 32)
        return self

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """[T, H, D] -> [T, H, D], without values."""
        in_windows = local and q_THD.device.type == "cpu" and q_THD.element_size() == 2
        return _Keeps.apply(q_THD, k_THD, v_THD, self.window if in_windows else 0)


class _Keeps(autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, window: int) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        tokens, heads, width = q_THD.shape
        if window:
            k_THD, v_THD = (x.new_empty(3 * tokens, heads, width) for x in (k_THD, v_THD))
            # keys and values of each block's window, and its probabilities
            ctx.save_for_backward(q_THD, k_THD, v_THD, q_THD.new_empty(tokens, heads, window))
        else:
            ctx.save_for_backward(
                q_THD, k_THD, v_THD, out_THD, q_THD.new_empty(heads, tokens, dtype=torch.float32)
            )
        return out_THD


class _KeepsItsInput(autograd.Function):
    """torch.nn.functional.linear as DeepSpeed 0.19.8 has it at ZeRO stage 3 (runtime/zero/linear.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _LINEAR(x, weight, bias)


_LINEAR = F.linear


@contextlib.contextmanager
def _linear_keeps_its_input() -> Iterator[None]:
    before = F.linear
    F.linear = _KeepsItsInput.apply
    try:
        yield
    finally:
        F.linear = before


@contextlib.contextmanager
def _default_dtype(precision: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(
        {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    )
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _autocast(device: str, *, enabled: bool) -> Iterator[None]:
    """torch.autocast to bf16, which would be off for a device that is not there."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
