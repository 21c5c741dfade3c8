"""A small XLNet, its objective and a micro-batch of drawn documents, for tests of what they do together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from encoder.base.batch import IGNORE, Targets, TokenBatch
from encoder.base.tokenizer_json import SpecialIds
from encoder.models.xlnet import DROPOUTS, XlnetConfig
from encoder.objectives.catalog import build_objective
from encoder.objectives.plm import PermutationLanguageModel, PlmConfig
from tests.helpers.packed import packed

VOCAB = 60
# <unk> <cls> <sep> <pad> <mask>
SPECIALS = SpecialIds(
    unk_id=0, cls_id=1, sep_id=2, pad_id=3, mask_id=4, all_special=(0, 1, 2, 3, 4), frame="end"
)
QUIET = dict.fromkeys(DROPOUTS, 0.0)
TINY = XlnetConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    query_stream=True,
    **QUIET,
)


def objective_of(**settings) -> PermutationLanguageModel:
    """Of small blocks, its spans beginning anywhere."""
    config = PlmConfig(**{"word_starts": False, "block_tokens": 8, **settings})
    return build_objective(config, vocab_size=VOCAB, specials=SPECIALS)


def row_of(lengths: Sequence[int], seed: int = 0) -> np.ndarray:
    """Clean ids: documents of these lengths, each with <sep> <cls> at its end."""
    draw = np.random.default_rng(seed)
    documents = [np.append(draw.integers(5, VOCAB, n - 2), [2, 1]) for n in lengths]
    return np.concatenate(documents)


def batch_of(
    objective: PermutationLanguageModel, lengths: Sequence[int], *, seed: int = 0
) -> TokenBatch:
    """A micro-batch of one row, its token keys drawn."""
    ids = row_of(lengths, seed)
    row = objective.mask(ids, np.random.default_rng(seed), lengths=lengths)
    found = row.targets["plm"]
    targets = Targets(
        index_M=torch.from_numpy(found.index),
        value_M=torch.from_numpy(found.value),
        count=len(found.index),
    )
    plain = packed([*lengths], vocab=VOCAB, seed=seed)
    return replace(plain, ids_T=torch.from_numpy(row.ids), targets={"plm": targets})


def only(batch: TokenBatch, start: int, end: int) -> TokenBatch:
    """One document of a micro-batch, alone."""
    targets = batch.targets["plm"]
    mine = (targets.index_M >= start) & (targets.index_M < end)
    return replace(
        batch,
        ids_T=batch.ids_T[start:end],
        positions_T=batch.positions_T[start:end],
        cu_seqlens_S1=torch.tensor([0, end - start], dtype=torch.int32),
        max_seqlen=end - start,
        token_key_T=batch.token_key_T[start:end],
        tokens=end - start,
        targets={
            "plm": Targets(
                index_M=targets.index_M[mine] - start,
                value_M=targets.value_M[mine],
                count=int(mine.sum()),
            )
        },
    )


def with_room(batch: TokenBatch, *, tokens: int, targets: int, pad_id: int = 3) -> TokenBatch:
    """The micro-batch with so many tokens of padding, a document, and so many unused targets."""
    given = batch.targets["plm"]
    total = batch.tokens + tokens
    return replace(
        batch,
        ids_T=torch.cat((batch.ids_T, torch.full((tokens,), pad_id))),
        positions_T=torch.cat((batch.positions_T, torch.arange(tokens, dtype=torch.int32))),
        cu_seqlens_S1=torch.cat(
            (batch.cu_seqlens_S1[:-2], torch.full((3,), total, dtype=torch.int32))
        ),
        token_key_T=torch.cat((batch.token_key_T, torch.zeros(tokens, dtype=torch.int64))),
        targets={
            "plm": replace(
                given,
                index_M=torch.cat((given.index_M, torch.zeros(targets, dtype=torch.int64))),
                value_M=torch.cat((given.value_M, torch.full((targets,), IGNORE))),
            )
        },
    )
