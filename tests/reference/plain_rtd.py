"""The slow truth of replaced-token detection: whole logits, one token and one word at a time, Python's own integers.

ids drawn        argmax of logits / T + g over a whole row of logits, g from SplitMix64 over (key, word)
loss             mlm weight x mean cross entropy + rtd weight x mean of -log sigmoid(+-logit) over every token
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.plain_encoder import plain_gelu, plain_hidden_states, plain_logits

TABLES = ("tok_embeddings", "position_embeddings", "token_type_embeddings")
MASK64 = 2**64 - 1


@dataclass(frozen=True)
class Plain:
    """What the two networks say of a packed micro-batch."""

    loss: Tensor
    mlm: Tensor  # mean
    rtd: Tensor  # mean
    filled: list[int]  # ids that the discriminator sees
    labels: list[int]


def plain_noise(key: int, word: int, *, use: int) -> float:
    """A Gumbel number of a token's key and a word's id; `use` sets other uses of the key apart."""
    z = ((key ^ use) + (word + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    uniform = (z >> 1) / 2**63
    return -math.log(-math.log1p(-uniform))


def network_weights(weights: dict[str, Tensor], network: str, sharing: str) -> dict[str, Tensor]:
    """A network's own weights, with gradients into those of both."""
    own = {n.partition(".")[2]: w for n, w in weights.items() if n.startswith(f"{network}.")}
    if network == "generator" or sharing == "separate":
        return own
    for name, w in weights.items():
        network_of, _, rest = name.partition(".")
        if network_of != "generator" or not rest.startswith("model.embeddings."):
            continue
        if sharing == "shared":
            own[rest] = w
        elif rest.split(".")[-2] in TABLES:
            own[rest] = w.detach() + own[rest]
    return own


def plain_rtd(weights: dict[str, Tensor], config, batch, lengths: list[int], **how) -> Plain:
    """Everything of a micro-batch without unused targets.

    weights: of both networks, as their state_dict() names them
    config: with `generator`, `discriminator`, `embedding_sharing`
    batch: clean in its targets rtd, masked in its ids
    lengths: of the documents
    how: use, mlm_weight, rtd_weight, temperature, disallow_correct
    """
    generator = network_weights(weights, "generator", config.embedding_sharing)
    masked = batch.targets["mlm"]
    logits_TV = plain_logits(generator, config.generator, batch.ids_T, lengths)
    filled = batch.ids_T.tolist()
    for place, true in zip(masked.index_M.tolist(), masked.value_M.tolist()):
        scores = []
        for word, logit in enumerate(logits_TV[place].tolist()):
            lowered = logit - 1000.0 if how.get("disallow_correct") and word == true else logit
            noise = plain_noise(int(batch.token_key_T[place]) & MASK64, word, use=how["use"])
            scores.append(lowered / how.get("temperature", 1.0) + noise)
        filled[place] = max(range(len(scores)), key=scores.__getitem__)

    clean = batch.targets["rtd"].value_M.tolist()
    labels = [int(seen != own) for seen, own in zip(filled, clean, strict=True)]
    discriminator = network_weights(weights, "discriminator", config.embedding_sharing)
    body = config.discriminator
    x_TC = plain_hidden_states(discriminator, body, torch.tensor(filled), lengths)
    logits_T = _detection(discriminator, body, x_TC)

    mlm = F.cross_entropy(logits_TV[masked.index_M], masked.value_M)
    signs = 2.0 * torch.tensor(labels, dtype=logits_T.dtype) - 1.0
    rtd = F.softplus(-signs * logits_T).mean()
    loss = how["mlm_weight"] * mlm + how["rtd_weight"] * rtd
    return Plain(loss=loss, mlm=mlm, rtd=rtd, filled=filled, labels=labels)


def _detection(w: dict[str, Tensor], config, x_TC: Tensor) -> Tensor:
    h = x_TC @ w["head.dense.weight"].T
    if config.head_bias:
        h = h + w["head.dense.bias"]
    h = plain_gelu(h, "gelu_tanh" if config.mlp == "gelu_tanh" else "gelu")
    if config.head_norm:
        bias = w["head.norm.bias"] if config.norm_bias else None
        h = F.layer_norm(h, h.shape[-1:], w["head.norm.weight"], bias, config.norm_eps)
    return (h @ w["classifier.weight"].T + w["classifier.bias"])[:, 0]
