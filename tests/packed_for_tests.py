"""A packed micro-batch of random tokens, for tests of layers and models."""

from __future__ import annotations

import torch

from encoder.base.batch import TokenBatch


def packed(lengths: list[int], *, vocab: int, seed: int = 0, predict: int | None = None, spare_ends: int = 2) -> TokenBatch:
    """Documents of these lengths end to end; a third of the tokens is predicted unless `predict` says how many."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    predict = tokens // 3 if predict is None else predict
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist() + [tokens] * spare_ends
    return TokenBatch(
        ids_T=torch.randint(0, vocab, (tokens,), generator=draw),
        positions_T=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens_S1=torch.tensor(ends, dtype=torch.int32), max_seqlen=max(lengths),
        predict_index_M=torch.randperm(tokens, generator=draw)[:predict].sort().values,
        predict_target_M=torch.randint(0, vocab, (predict,), generator=draw),
        dropout_key_T=torch.randint(-2**63, 2**63 - 1, (tokens,), generator=draw), masked_tokens=predict, tokens=tokens)
