"""First values as Megatron draws them (Shoeybi et al. 2019): normals cut short, narrower where added to the stream."""

from __future__ import annotations

import math

import torch
from torch import nn

from encoder.base.rng import address_seed

INTO_STREAM = ("attn.Wo.weight", "mlp.Wo.weight")
OTHERS = ("tok_embeddings.weight", "attn.Wqkv.weight", "mlp.Wi.weight", "head.dense.weight")


@torch.no_grad()
def init_megatron_(model: nn.Module, *, seed: int, initializer_range: float, cutoff_factor: float, layers: int) -> None:
    """Fill every parameter: matrices ~ normal(0, sigma) cut at +- cutoff_factor * sigma, biases 0, norm weights 1.

    sigma is that of the normal before it is cut; cut at 2 sigma the values' own deviation is 0.8796 sigma.
    Each matrix has its own generator, named by the parameter, so its values depend on the seed and the name only:
    not on the order of construction, the number of ranks, or the parameters beside it. Drawn in fp32, then cast.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim < 2:
            # decoder.bias is zero too. ModernBERT's own code forgot it when the decoder is tied and left nn.Linear's
            # uniform +-1/sqrt(C): noise of about sigma / 0.02 = one embedding deviation on every logit, for no reason.
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        sigma = sigma_of(name, initializer_range=initializer_range, layers=layers)
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        torch.nn.init.trunc_normal_(drawn, std=sigma, a=-cutoff_factor * sigma, b=cutoff_factor * sigma,
                                    generator=torch.Generator().manual_seed(address_seed(seed, "init", name)))
        parameter.copy_(drawn)


def sigma_of(name: str, *, initializer_range: float, layers: int) -> float:
    """sigma of a matrix by its name: initializer_range, over sqrt(2 layers) where its product is added to the stream.

    head.dense has the full initializer_range, as in ModernBERT's training code; transformers' init divides it too.
    """
    if name.endswith(INTO_STREAM):
        return initializer_range / math.sqrt(2 * layers)
    assert name.endswith(OTHERS), f"no rule to draw {name}"
    return initializer_range
