"""Small models of two networks, and masked micro-batches for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from encoder.base.batch import Targets, TokenBatch
from encoder.models.electra import ElectraConfig, ModernBertRtdConfig
from tests.helpers.packed import packed

SIZES: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=36,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=64,
)
QUIET = dict(embedding_dropout=0.0, attention_output_dropout=0.0, mlp_output_dropout=0.0)
ELECTRA = ElectraConfig(**SIZES, **QUIET, embedding_size=16)  # a generator of 1 head
MODERNBERT = ModernBertRtdConfig(
    **SIZES, generator_layers=2, window_radius_tokens=4, attention_output_dropout=0.0
)
SETTINGS = {
    "small": ELECTRA,
    "base": replace(ELECTRA, embedding_size=None),
    "of one shape": replace(ELECTRA, embedding_size=None, generator_fraction=1.0),
    "two tables": replace(ELECTRA, embedding_sharing="separate", generator_layers=1),
    "differences": replace(ELECTRA, embedding_sharing="difference", mlp="gelu_tanh"),
    "modernbert": MODERNBERT,
    "modernbert, narrow": replace(
        MODERNBERT, embedding_sharing="shared", generator_fraction=1 / 3, generator_layers=None
    ),
}


def masked_batch(lengths: list[int], *, vocab: int = 60, share: float = 0.3) -> TokenBatch:
    """Documents of these lengths, of which every third token or so is the last word, the mask.

    lengths: of the documents
    vocab: whose last id is the mask and in no text
    share: of the tokens that are masked
    """
    clean = packed(lengths, vocab=vocab - 1, seed=len(lengths))
    tokens = len(clean.ids_T)
    draw = torch.Generator().manual_seed(3)
    index_M = (torch.rand(tokens, generator=draw) < share).nonzero()[:, 0]
    value_M = clean.ids_T[index_M]
    ids_T = clean.ids_T.clone()
    # one in six stays as it is
    ids_T[index_M[torch.arange(len(index_M)) % 6 > 0]] = vocab - 1
    targets = {
        "mlm": Targets(index_M=index_M, value_M=value_M, count=len(index_M)),
        "rtd": Targets(index_M=torch.arange(tokens), value_M=clean.ids_T, count=tokens),
    }
    return replace(clean, ids_T=ids_T, targets=targets)
