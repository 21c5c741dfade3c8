"""A packed micro-batch of random tokens, and a kernel for packed documents that a CPU has, for tests of layers and models."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from encoder.base.batch import Targets, TokenBatch
from encoder.nn.attend.packed import PackedPlan


def packed(
    lengths: list[int],
    *,
    vocab: int,
    seed: int = 0,
    predict: int | None = None,
    spare_ends: int = 2,
) -> TokenBatch:
    """Documents of these lengths end to end; a third of the tokens is predicted unless `predict` says how many."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    predict = tokens // 3 if predict is None else predict
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist() + [tokens] * spare_ends
    return TokenBatch(
        ids_T=torch.randint(0, vocab, (tokens,), generator=draw),
        positions_T=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens_S1=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(lengths),
        targets={
            "mlm": Targets(
                index_M=torch.randperm(tokens, generator=draw)[:predict].sort().values,
                value_M=torch.randint(0, vocab, (predict,), generator=draw),
                count=predict,
            )
        },
        token_key_T=torch.randint(-(2**63), 2**63 - 1, (tokens,), generator=draw),
        tokens=tokens,
    )


class OnDevice:
    """Stands for the kernels of a GPU: documents are found without looking at them; a dense mask."""

    name = "on device"

    def why_not(self, situation):
        return None

    def plan(self, cu_seqlens_S1, *, max_seqlen, tokens, window_radius_tokens):
        return PackedPlan(
            _dense, cu_seqlens_S1=cu_seqlens_S1, max_seqlen=max_seqlen, radius=window_radius_tokens
        )


def _dense(q_THD, k_THD, v_THD, cu_seqlens_S1, longest, radius):
    place_T = torch.arange(len(q_THD), dtype=cu_seqlens_S1.dtype)
    document_T = torch.searchsorted(cu_seqlens_S1[1:].contiguous(), place_T, right=True)
    sees_TT = document_T[:, None] == document_T
    if radius is not None:
        sees_TT = sees_TT & ((place_T[:, None] - place_T).abs() <= radius)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees_TT)[0].transpose(0, 1)
