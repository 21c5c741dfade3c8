"""Initial weights, by one of four rules.

    megatron   truncated normals, narrower where added to the stream (Shoeybi et al. 2019)
    bert       truncated normals, all with sigma initializer_range (Devlin et al. 2018: cut at 2 sigma)
    electra    the same, but for two matrices whose code names no rule: uniform to sqrt(6 / (in + out)), TensorFlow's default
    normal     as bert, not cut (Liu et al. 2019: RoBERTa)

Megatron's:

    matrix                                                               sigma                                  base
    tok_embeddings, position_embeddings, token_type_embeddings           initializer_range                      0.02
    attn.Wqkv, mlp.Wi, head.dense, pooler.dense, nsp                     initializer_range                      0.02
    attn.Wo, mlp.Wo                                                      initializer_range / sqrt(2 layers)     0.0030151
    decoder.weight, where it is not the embedding; classifier.weight     hidden_size ** -0.5                    0.036084
    biases 0, norm weights 1

These are the values ModernBERT-base was trained from. transformers' own init differs: it divides head.dense by
sqrt(2 layers), too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from encoder.base.model import DrawnModel
from encoder.base.rng import address_seed

Initialization = Literal["megatron", "bert", "electra", "normal"]
PLAIN = (
    "tok_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "embedding_projection.weight",
    "attn.Wqkv.weight",
    "mlp.Wi.weight",
    "head.dense.weight",
    "pooler.dense.weight",
    "nsp.weight",
)
INTO_STREAM = ("attn.Wo.weight", "mlp.Wo.weight")
ATTENTION = "attn."
INTO_HEAD = "head.dense.weight"
INTO_LOGITS = ("decoder.weight", "classifier.weight")
# with electra (google-research/electra, model/modeling.py and run_pretraining.py)
BY_DEFAULT = ("embedding_projection.weight", "classifier.weight")
# what nn.Linear and nn.Embedding fill their new parameters by
TORCHS_OWN = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class drawn_later(TorchFunctionMode):
    """While it lasts, torch's layers are made without random weights of torch's own: `draw_` fills all of them afterwards.

    No weight is drawn twice then. On the meta device nn.Embedding's normal_ would also import torch's compiler, whose
    1,000 modules are 2 s of CPU.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in TORCHS_OWN and given["generator"] is None:
            return given["tensor"]
        return func(*args, **given)


@torch.no_grad()
def draw_(model: DrawnModel) -> None:
    """Fills every parameter of a model with its `initial_values`, but those without data: on the meta device, or fake tensors."""
    for name, parameter in model.named_parameters():
        if not (parameter.is_meta or isinstance(parameter, FakeTensor)):
            parameter.copy_(model.initial_values(name, parameter.shape))


def initial_values(
    name: str,
    shape: Sequence[int],
    *,
    seed: int,
    initializer_range: float,
    cutoff_factor: float,
    layers: int,
    rule: Initialization = "megatron",
) -> Tensor:
    """The initial weights of a whole parameter, fp32 on the CPU: a function of the seed, the name and the shape alone.

    Matrices ~ normal(0, sigma) cut at +- cutoff_factor * sigma, biases 0, norm weights 1. Each matrix has its own
    generator, named by the parameter, so neither the order of construction, the number of ranks, the ZeRO stage nor the
    parameters beside it have a say. sigma is that of the normal before it is cut; cut at 2 sigma the values' own
    deviation is 0.8796 sigma.

    name, shape: of the parameter.
    seed: of the run.
    initializer_range: sigma of most matrices.
    cutoff_factor: sigmas at which a normal is cut; not with rule normal.
    layers: of the model, by which Megatron narrows what is added to the stream.
    rule: of the four above.
    """
    if len(shape) < 2:
        # decoder.bias is zero too. ModernBERT's own code forgot it when the decoder is tied and left nn.Linear's
        # uniform +-1/sqrt(C): noise of about sigma / 0.02 = one embedding deviation on every logit, for no reason.
        assert name.endswith(("bias", "norm.weight")), f"no rule to draw {name}"
        if name.endswith("bias"):
            return torch.zeros(tuple(shape), device="cpu")
        return torch.ones(tuple(shape), device="cpu")
    sigma = initializer_range
    if rule == "megatron":
        sigma = sigma_of(name, shape, initializer_range=initializer_range, layers=layers)

    # on the CPU, wherever the model is: all devices start with the same values
    drawn = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    draw = torch.Generator().manual_seed(address_seed(seed, "init", name))
    if rule == "normal":
        return nn.init.normal_(drawn, std=sigma, generator=draw)
    if rule == "electra" and name.endswith(BY_DEFAULT):
        return nn.init.xavier_uniform_(drawn, generator=draw)
    return truncated_normal_(drawn, sigma=sigma, cutoff_factor=cutoff_factor, draw=draw)


def truncated_normal_(
    drawn: Tensor, *, sigma: float, cutoff_factor: float, draw: torch.Generator
) -> Tensor:
    """Fills a tensor from a normal that is cut, by the inverse of its distribution function.

    x = sigma sqrt(2) erfinv(u),  u ~ U(-p, p),  p = erf(cutoff_factor / sqrt(2))

    A seed gives the same values under every version of torch: these are those of nn.init.trunc_normal_ in torch 2.11,
    which draws in another way since.

    drawn: what is filled
    sigma: of the normal before it is cut
    cutoff_factor: sigmas at which it is cut
    draw: the generator
    """
    cut = cutoff_factor * sigma
    # the shares below the two cuts, rounded as torch 2.11 does
    below = (1.0 + math.erf(-cut / sigma / math.sqrt(2.0))) / 2.0
    above = (1.0 + math.erf(cut / sigma / math.sqrt(2.0))) / 2.0
    drawn.uniform_(2.0 * below - 1.0, 2.0 * above - 1.0, generator=draw)
    drawn.erfinv_().mul_(sigma * math.sqrt(2.0))
    # rounding may pass the cut
    return drawn.clamp_(min=-cut, max=cut)


def sigma_of(name: str, shape: Sequence[int], *, initializer_range: float, layers: int) -> float:
    """sigma of a matrix [out, in] by its name: the table above."""
    if name.endswith(PLAIN):
        return initializer_range
    if name.endswith(INTO_STREAM):
        return initializer_range / math.sqrt(2 * layers)
    assert name.endswith(INTO_LOGITS), f"no rule to draw {name}"
    return shape[1] ** -0.5


def why_not_mimetic(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why a model with parameters of these shapes cannot have mimetic_values; None: it can."""
    layers = [name.removesuffix("Wo.weight") for name in shapes if name.endswith("attn.Wo.weight")]
    if not all(f"{layer}Wqkv.weight" in shapes for layer in layers):
        return "its query, key and value are not one matrix"
    heads = [shape for name, shape in shapes.items() if name.endswith(INTO_HEAD)]
    if not all(rows == columns for rows, columns in heads):
        return "its embeddings are not as wide as its layers"
    return None


def mimetic_values(
    name: str, drawn: Tensor, *, seed: int, strength: float, turns: Mapping[int, Tensor]
) -> Tensor:
    """A drawn parameter of a model whose attention begins by passing on what it sees, and whose head by scoring its neighbours.

        Wo Wv = strength x identity        Wv [A, C] orthogonal, drawn from the seed; Wo [C, A] its transpose times strength
        head.dense = S                     of the vectors of tokens (encoder.nn.token_vectors)

    Where heads together are narrower than the stream (A < C), Wo Wv projects on A directions. All else stays as it is. Weights of
    attention that look like those of a trained model: Trockman and Kolter 2023, Mimetic Initialization of Self-Attention Layers.
    The head's is ours: drawn, it hides from the logits what was passed on; the identity takes like tokens for neighbours.

    name, drawn: of the whole parameter of a model for which why_not_mimetic has no reason
    seed: of the run
    strength: of the identity
    turns: S [C, C] by its width; without one the head lets through
    """
    if name.endswith(INTO_HEAD):
        return turns[len(drawn)] if len(drawn) in turns else torch.eye(len(drawn))
    stem, found, matrix = name.rpartition(ATTENTION)
    if not found or matrix not in ("Wqkv.weight", "Wo.weight"):
        return drawn
    is_output = matrix == "Wo.weight"
    rows, columns = drawn.shape
    inner, width = (columns, rows) if is_output else (rows // 3, columns)

    # both matrices of a layer are made of one draw. QR leaves signs to the library: the diagonal of R takes them away
    draw = torch.Generator().manual_seed(address_seed(seed, "mimetic", stem))
    more, fewer = max(inner, width), min(inner, width)
    tall, upper = torch.linalg.qr(torch.randn(more, fewer, generator=draw, dtype=torch.float64))
    value_AC = (tall * upper.diagonal().sign()).float()
    if inner < width:
        value_AC = value_AC.T
    if is_output:
        return (strength * value_AC.T).contiguous()
    values = drawn.clone()
    values[2 * inner :] = value_AC
    return values
