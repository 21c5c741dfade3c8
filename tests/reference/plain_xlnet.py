"""XLNet's two streams without blocks and without a shift: document by document, segment by segment, by the folded scores.

With u = W_r^T (q + r_r), cut in its halves of sine and cosine, a score of a distance is a plain product of what belongs to the
query's place and what belongs to the key's:

    u R(i - j) = sum_f (u_s sin(w i) + u_c cos(w i)) cos(w j) + (u_c sin(w i) - u_s cos(w i)) sin(w j)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.models.xlnet import XlnetConfig
from encoder.nn.two_streams import ReadingOrder

Weights = dict[str, Tensor]


def plain_query_logits(
    w: Weights, config: XlnetConfig, ids_T: Tensor, order: ReadingOrder, index_M: Tensor
) -> Tensor:
    """Logits [M, V] of one document's targets, in the dtype of the weights."""
    layers = config.num_hidden_layers
    table = w["model.embeddings.tok_embeddings.weight"]
    memories: list[Tensor | None] = [None] * layers
    places = torch.zeros(0, dtype=torch.int64)
    logits = torch.zeros(len(index_M), len(table), dtype=table.dtype)
    for stretch in range(int(order.stretch_T.max()) + 1):
        own = torch.nonzero(order.stretch_T == stretch)[:, 0]
        own = own[order.stream_T[own].argsort()]
        mine = torch.tensor([m for m, t in enumerate(index_M.tolist()) if t in own], dtype=int)
        h, g = table[ids_T[own]], w["first_query.weight"].expand(len(mine), -1)
        token_g = index_M[mine]
        kept = []
        for layer in range(layers):
            at = {
                n.removeprefix(f"model.layers.{layer}."): v
                for n, v in w.items()
                if n.startswith(f"model.layers.{layer}.")
            }
            past = memories[layer]
            kept.append(h if past is None else torch.cat((past, h)))
            keys = (kept[-1], places, own)
            h, g = (
                _layer(at, config, x, tokens, order, keys, sees_itself=itself)
                for x, tokens, itself in ((h, own, True), (g, token_g, False))
            )
        places = torch.cat((places, order.place_T[own]))[-order.memory_tokens :]
        memories = [k.detach()[-order.memory_tokens :] for k in kept]
        if not order.memory_tokens:
            places, memories = places[:0], [None] * layers
        logits[mine] = g @ table.T + w["decoder.bias"]
    return logits


def _layer(at, config, x_QC, token_Q, order, keys, *, sees_itself) -> Tensor:
    c = config
    heads, d = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    key_KC, past_places, own = keys
    past = len(past_places)
    place_K = torch.cat((past_places, order.place_T[own]))
    rank_K = torch.cat((torch.full((past,), -1), order.key_rank_T[own]))
    segment_K = torch.cat((torch.zeros(past, dtype=int), order.segment_T[own]))
    itself_K = torch.cat((torch.full((past,), -1), own))

    visible = rank_K[None, :] < order.query_rank_T[token_Q][:, None]
    if sees_itself:
        visible |= itself_K[None, :] == token_Q[:, None]
    q = (x_QC @ at["attn.Wq.weight"].T).view(-1, heads, d)
    wk, wv = at["attn.Wkv.weight"].chunk(2)
    k, v = ((key_KC @ m.T).view(-1, heads, d) for m in (wk, wv))
    content = torch.einsum("qhd,khd->hqk", q + at["attn.r_w.weight"], k)

    wr = at["attn.Wr.weight"].view(heads, d, c.hidden_size)
    u = torch.einsum("qhd,hdc->qhc", q + at["attn.r_r.weight"], wr)
    u_s, u_c = u.chunk(2, dim=-1)
    f = torch.arange(0, c.hidden_size, 2, dtype=torch.float32)
    frequency = (1 / torch.pow(10000, f / c.hidden_size)).double()
    sin_q, cos_q = _waves(order.place_T[token_Q], frequency)
    sin_k, cos_k = _waves(place_K, frequency)
    to_cos = u_s * sin_q[:, None] + u_c * cos_q[:, None]
    to_sin = u_c * sin_q[:, None] - u_s * cos_q[:, None]
    distance = torch.einsum("qhf,kf->hqk", to_cos, cos_k)
    distance = distance + torch.einsum("qhf,kf->hqk", to_sin, sin_k)

    s = at["attn.segments.weight"].view(2, heads, d)
    by_kind = torch.einsum("qhd,shd->hqs", q + at["attn.r_s.weight"], s)
    differs = (order.segment_T[token_Q][:, None] != segment_K[None, :]).long()
    segment = by_kind.gather(-1, differs[None].expand(heads, -1, -1))

    scores = (content + distance + segment) / math.sqrt(d)
    shares = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
    out = torch.einsum("hqk,khd->qhd", shares, v).flatten(1) @ at["attn.Wo.weight"].T
    x = _norm(at, "attn_norm", x_QC + out, c)
    inner = x @ at["mlp.Wi.weight"].T + at["mlp.Wi.bias"]
    inner = F.gelu(inner, approximate="tanh" if c.mlp == "gelu_tanh" else "none")
    return _norm(at, "mlp_norm", x + inner @ at["mlp.Wo.weight"].T + at["mlp.Wo.bias"], c)


def _waves(places: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    angle = places.double()[:, None] * frequency
    return angle.sin(), angle.cos()


def _norm(at: Weights, name: str, x: Tensor, config: XlnetConfig) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], at[f"{name}.weight"], at[f"{name}.bias"], config.norm_eps)
