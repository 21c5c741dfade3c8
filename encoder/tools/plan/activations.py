"""What autograd keeps of a forward, counted on a few tokens: weights without values, and products that are not computed.

    fp32, one plain layer of width C, MLP width F      [T, C]: stream, norm, q, k, v, attention, dropout, stream, norm = 9
                                                       [T, F]: both halves of Wi, their GELU, its product with the gate = 4

A model of one layer and one of four meet two batches each; the differences are bytes per token and layer. A model whose shapes
depend on values, such as the number of distinct ids, cannot be counted so: its settings say activation_width.

All runs on the CPU, whatever device is meant: tensors say that they are there, and what autocast and kernels do otherwise there is
done here (_Device). torch's FakeTensorMode knows it all, by its compiler: 870 modules, about 1 s of CPU, a third of a plan. It is
the judge in tests/reference/fake_activations.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn
from torch.overrides import TorchFunctionMode

from encoder.base.batch import TokenBatch
from encoder.models.catalog import build_model
from encoder.models.contract import Model, ModelConfig
from encoder.nn.attend import AttentionRequest, attend_by
from encoder.nn.attend.tiles import most_product_keys

# a layer beyond the first four repeats them: of ModernBERT's, one in three is global
LAYERS = (1, 4)
# what is kept grows with them exactly
TOKENS = (4, 8)
# a document longer than any
LONG = 2**31
# what gives values to Python, or has a shape that depends on them
VALUES = (
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.nonzero,
    torch.bincount,
    torch.nonzero,
    torch.unique,
)
# other functions that CUDA's autocast gives bf16 or fp32 (docs of torch.amp); on a CPU autocast itself does it
IN_HALF = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.einsum,
    F.conv1d,
    F.scaled_dot_product_attention,
)
IN_FP32 = (torch.softmax, Tensor.softmax, F.softmax, F.log_softmax, Tensor.log_softmax)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes from the forward to the backward pass."""

    layer_per_token: float
    layer_fixed: float  # whatever the tokens: the weights in bf16 under autocast
    outside_per_token: float  # embedding and final norm
    outside_fixed: float  # whatever the tokens: shared layers' weights in bf16 under autocast


@lru_cache(maxsize=32)
def count_kept(
    config: ModelConfig,
    *,
    precision: str,
    device: str,
    longest_tokens: int = LONG,
    fp8: bool = False,
    zero_3: bool = False,
) -> Kept:
    """Each storage once, without the parameters. Raises ConfigError as fp8_blocks_.

    precision: fp32, fp64, autocast or bf16
    device: cpu or cuda, which need not be there
    longest_tokens: of a document
    fp8: the layers' matmuls run in FP8
    zero_3: DeepSpeed's linear layers of ZeRO stage 3, which keep their input as it comes: under autocast in fp32
    """
    try:
        return _count(
            config,
            counted=_Counted(longest_tokens),
            precision=precision,
            device=device,
            fp8=fp8,
            zero_3=zero_3,
        )
    except _NeedsValues:
        # bytes of a number; what lies outside of the layers is left out
        width = {"autocast": 2, "bf16": 2, "fp64": 8}.get(precision, 4)
        return Kept(
            layer_per_token=width * config.activation_width,
            layer_fixed=0.0,
            outside_per_token=0.0,
            outside_fixed=0.0,
        )


def _count(config: ModelConfig, **way: Any) -> Kept:
    # a model whose layers share blocks has as many layers as sets of them, or more
    rules = config.growth()
    few, many = (rules.fewest_layers * layers for layers in LAYERS)
    if rules.most_layers is not None:
        many = min(many, rules.most_layers)
    short, long = TOKENS

    def count(layers: int) -> list[int]:
        shape = replace(config, num_hidden_layers=layers)
        return _bytes_kept(shape, **way)

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
    config: ModelConfig,
    *,
    precision: str,
    device: str,
    fp8: bool,
    zero_3: bool,
    counted: _Counted | None = None,
) -> list[int]:
    """For one document of each of TOKENS, through the same model.

    config: its settings
    precision, device, fp8, zero_3: as of count_kept
    counted: attention, by default that of long documents
    """
    with contextlib.ExitStack() as stack:
        with _default_dtype(precision):
            model = _without_values(config)
        if fp8:
            model.fp8_blocks_()
        if zero_3:
            stack.enter_context(_linear_keeps_its_input())
        stack.enter_context(attend_by(counted or _Counted()))
        stack.enter_context(_autocast(device, enabled=precision == "autocast"))
        stack.enter_context(_Device(torch.device(device)))
        return [_kept_by(model, _one_document(tokens)) for tokens in TOKENS]


def _without_values(config: ModelConfig) -> Model:
    """A model on the CPU whose weights are not drawn: memory that nothing is written to is not mapped."""
    with torch.device("meta"):
        model = build_model(config, seed=0)
    for parameter in model.parameters():
        # not empty_like, which asks torch's compiler about a tensor of the meta device
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        torch.utils.swap_tensors(parameter, nn.Parameter(values))
    return model


def _one_document(tokens: int) -> TokenBatch:
    """Of one token, again and again."""
    ids_T = torch.zeros(tokens, dtype=torch.int64)
    return TokenBatch(
        ids_T=ids_T,
        positions_T=torch.arange(tokens, dtype=torch.int32),
        # a model may look up its documents by them
        cu_seqlens_S1=torch.tensor([0, tokens], dtype=torch.int32),
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

    q, k, v, output and logsumexp. On a CPU in half precision products keep the probabilities instead of the last two
    (encoder.nn.attend.tiles), counted as if all documents were as long as that goes. Of windows keys and values are kept thrice.

    longest_tokens: of a document
    """

    name = "counted"
    traceable = True

    def __init__(self, longest_tokens: int = LONG) -> None:
        self.longest_tokens = longest_tokens

    def why_not(self, situation: AttentionRequest) -> str | None:
        """It runs everywhere and computes nothing."""
        return None

    def plan(
        self, cu_seqlens_S1: Tensor, *, max_seqlen: int, tokens: int, window_radius_tokens: int
    ) -> _Counted:
        """Itself."""
        self.radius = window_radius_tokens
        return self

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, local: bool) -> Tensor:
        """[T, H, D] -> [T, H, D], without values."""
        keys, copies = 0, 1
        if q_THD.device.type == "cpu" and q_THD.element_size() == 2:
            most = most_product_keys("cpu")
            keys = min(self.longest_tokens, most)
            # three blocks of keys around a block of queries
            if local and self.longest_tokens > 2 * self.radius:
                window, copies = 3 * max(self.radius, 32), 3
                keys = window if window <= most else 0
        return _Keeps.apply(q_THD, k_THD, v_THD, keys, copies)


class _Keeps(autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, keys: int, copies: int
    ) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        tokens, heads, width = q_THD.shape
        if copies > 1:
            k_THD, v_THD = (x.new_empty(copies * tokens, heads, width) for x in (k_THD, v_THD))
        if keys:
            # and the probabilities
            ctx.save_for_backward(q_THD, k_THD, v_THD, q_THD.new_empty(tokens, heads, keys))
        else:
            ctx.save_for_backward(
                q_THD, k_THD, v_THD, out_THD, q_THD.new_empty(heads, tokens, dtype=torch.float32)
            )
        return out_THD


class _NeedsValues(Exception):
    """A value was asked, which a weight that is not drawn does not give."""


class _Device(TorchFunctionMode):
    """While it lasts, tensors of the CPU say that they are on a device, and keep for the backward what they would keep there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        # each weight as autocast gives it to products, made once; beside the weight, whose id stays its own
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {name: _on_cpu(x) for name, x in (kwargs or {}).items()}
        found = [_on_cpu(x) for x in args]
        if func == _DEVICE_OF:
            return self.device
        if func in VALUES:
            raise _NeedsValues(str(func))
        if func is _LINEAR:
            return self._linear(*found, **given)
        if func in (F.layer_norm, F.rms_norm) and self.device.type == "cuda":
            return self._norm(*found, **given, statistics=2 if func is F.layer_norm else 1)
        if self.device.type == "cuda" and self._autocasts:
            if func in IN_HALF:
                found = [_as(x, torch.get_autocast_dtype("cuda")) for x in found]
            if func in IN_FP32:
                found = [_as(x, torch.float32) for x in found]
        if func is torch._scaled_mm:
            return found[0].new_empty(len(found[0]), found[1].shape[1], dtype=given["out_dtype"])
        return func(*found, **given)

    @property
    def _autocasts(self) -> bool:
        return torch.is_autocast_enabled(self.device.type)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._autocasts or input.dtype == torch.float64:
            return _KeepsFactors.apply(input, weight)
        dtype = torch.get_autocast_dtype(self.device.type)
        if id(weight) not in self._cast:
            self._cast[id(weight)] = (weight, weight.to(dtype))
        return _KeepsFactors.apply(input.to(dtype), self._cast[id(weight)][1])

    def _norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        *settings: Any,
        statistics: int,
        **more: Any,
    ) -> Tensor:
        """CUDA's LayerNorm, under autocast in fp32; or its RMSNorm, which has no mean.

        input, normalized_shape, weight: as of torch's function
        statistics: numbers of a token that are kept
        settings, more: a bias, and epsilon
        """
        if statistics == 2 and self._autocasts and input.dtype != torch.float64:
            input = input.float()
        return _KeepsStatistics.apply(input, weight, statistics)


# a new object each time that it is asked
_DEVICE_OF = Tensor.device.__get__


def _as(x: Any, dtype: torch.dtype) -> Any:
    """A tensor as autocast gives it to a function: floats but fp64."""
    casts = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if casts else x


def _on_cpu(x: Any) -> Any:
    """The CPU instead of a device."""
    return torch.device("cpu") if isinstance(x, torch.device) else x


class _KeepsFactors(autograd.Function):
    """A linear layer that is not computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], len(weight))


class _KeepsStatistics(autograd.Function):
    """A norm that is not computed; its statistics are fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, statistics: int) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        found = x.new_empty(statistics, *x.shape[:-1], dtype=dtype)
        ctx.save_for_backward(x, weight, found)
        return torch.empty_like(x)


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
