"""The slow truth for whole models: every setting written out once, with dense masks, from a state dict.

Only the table of rotary angles is the model's own (fp32 by promise; judged by itself in test_nn_layers.py), so that in
fp64 nothing but the last digits may differ.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.models.albert import AlbertConfig
from encoder.models.bert import BertConfig
from encoder.models.modernbert import ModernBertConfig
from encoder.nn.rope import rope_table
from tests.reference.dense import dense_attention


def plain_hidden_states(
    weights: dict[str, Tensor],
    config: ModernBertConfig | BertConfig,
    ids_T: Tensor,
    lengths: list[int],
    segments_T: Tensor | None = None,
) -> Tensor:
    """x_TC after the last norm, without dropout, in the weights' precision (fp64 to be a judge)."""
    w = weights
    places_T = torch.cat([torch.arange(n) for n in lengths])
    pre = config.norm_place == "pre"

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "rmsnorm":
            return (
                x
                / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
                * w[f"{name}.weight"]
            )
        centred = x - x.mean(-1, keepdim=True)
        scaled = (
            centred
            / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            * w[f"{name}.weight"]
        )
        return scaled + w[f"{name}.bias"] if config.norm_bias else scaled

    def linear(x: Tensor, name: str, bias: bool) -> Tensor:
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0.0)

    x = w["model.embeddings.tok_embeddings.weight"][ids_T]
    if config.positions == "learned":
        rows_T = places_T + config.position_offset
        x = x + w["model.embeddings.position_embeddings.weight"][rows_T]
    if config.positions == "sinusoidal":
        waves = [_waves(int(place), config.embedding_width) for place in places_T]
        x = x + w["model.embeddings.sinusoids.scale"] * torch.tensor(waves, dtype=x.dtype)
    if config.type_vocab_size:
        segments = torch.zeros_like(ids_T) if segments_T is None else segments_T
        x = x + w["model.embeddings.token_type_embeddings.weight"][segments]
    if config.embedding_norm:
        x = norm(x, "model.embeddings.norm")
    if config.embedding_projection:
        x = linear(x, "model.embedding_projection", True)
    for i in _blocks_run(config):
        layer, local = f"model.layers.{i}", i % config.global_attn_every_n_layers != 0
        u = x
        if pre and (i > 0 or not config.embedding_norm or config.embedding_projection):
            u = norm(x, f"{layer}.attn_norm")
        qkv = linear(u, f"{layer}.attn.Wqkv", config.attention_bias)
        q, k, v = qkv.view(len(x), 3, config.num_attention_heads, config.head_width).unbind(1)
        if config.positions == "rope":
            theta = config.local_rope_theta if local else config.global_rope_theta
            q, k = (
                _turned(x, rope_table(places_T, theta=theta, head_width=config.head_width))
                for x in (q, k)
            )
        mixed = dense_attention(
            q, k, v, lengths=lengths, radius=config.window_radius_tokens if local else None
        )
        x = x + linear(mixed.reshape(len(x), -1), f"{layer}.attn.Wo", config.attention_bias)
        if not pre:
            x = norm(x, f"{layer}.attn_norm")
        u = norm(x, f"{layer}.mlp_norm") if pre else x
        inner = linear(u, f"{layer}.mlp.Wi", config.mlp_bias)
        if config.mlp in ("gelu", "gelu_tanh"):
            inner = plain_gelu(inner, config.mlp)
        else:
            a, gate = inner[:, : config.intermediate_size], inner[:, config.intermediate_size :]
            inner = (F.gelu(a) if config.mlp == "geglu" else a * torch.sigmoid(a)) * gate
        x = x + linear(inner, f"{layer}.mlp.Wo", config.mlp_bias)
        if not pre:
            x = norm(x, f"{layer}.mlp_norm")
    return norm(x, "model.final_norm") if pre and config.final_norm else x


def _blocks_run(config: ModernBertConfig | BertConfig) -> list[int]:
    """The number of each block that runs; of an ALBERT as its code says it, group by group."""
    if not isinstance(config, AlbertConfig):
        return [*range(config.num_hidden_layers)]
    found = []
    for layer in range(config.num_hidden_layers):
        group = int(layer / config.num_hidden_layers * config.num_hidden_groups)
        for block in range(config.inner_group_num):
            found.append(group * config.inner_group_num + block)
    return found


def plain_gelu(x: Tensor, kind: str) -> Tensor:
    """By erf, or by tanh as BERT's own code writes it."""
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _waves(place: int, width: int) -> list[float]:
    """Sine and cosine of one position, by turns; the angles in fp32, as the model promises them."""
    found = []
    for channel in range(width):
        even = torch.tensor(channel // 2 * 2, dtype=torch.float32)
        angle = torch.tensor(place, dtype=torch.float32) * (1.0 / 10000.0 ** (even / width))
        found.append(float(angle.cos() if channel % 2 else angle.sin()))
    return found


def _turned(x_THD: Tensor, table: Tensor) -> Tensor:
    turn = torch.complex(*table.to(x_THD.dtype))
    turned = torch.complex(*x_THD.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def plain_logits(
    weights: dict[str, Tensor], config: ModernBertConfig, ids_T: Tensor, lengths: list[int]
) -> Tensor:
    """[T, V]."""
    w, x = weights, plain_hidden_states(weights, config, ids_T, lengths)
    h = x if config.head == "none" else _plain_head(w, config, x)
    decoder = w[
        "model.embeddings.tok_embeddings.weight" if config.tie_word_embeddings else "decoder.weight"
    ]
    return h @ decoder.T + (w["decoder.bias"] if config.decoder_bias else 0.0)


def _plain_head(w: dict[str, Tensor], config: ModernBertConfig | BertConfig, x: Tensor) -> Tensor:
    h = x @ w["head.dense.weight"].T + (w["head.dense.bias"] if config.head_bias else 0.0)
    h = plain_gelu(h, "gelu_tanh" if config.mlp == "gelu_tanh" else "gelu")
    if config.norm == "rmsnorm":
        h = h / (h.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w["head.norm.weight"]
    else:
        h = F.layer_norm(
            h,
            h.shape[-1:],
            w["head.norm.weight"],
            w["head.norm.bias"] if config.norm_bias else None,
            config.norm_eps,
        )
    return h
