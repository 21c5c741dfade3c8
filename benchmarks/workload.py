"""What is trained in a bench: named shapes, and micro-batches of documents as long as real ones are."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.base.batch import IGNORE, Targets, TokenBatch
from encoder.base.rng import generator
from encoder.data.windows import cut
from encoder.models.catalog import PRESETS
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.objectives.mlm import MLM
from encoder.train.meters import document_lengths

LENGTHS = Path(__file__).with_name("document_lengths.json")
MASK_SHARE = 0.3
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
    ),
    "small": dict(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
    ),
    **{
        name.removeprefix("modernbert_"): {k: v for k, v in shape.items() if k != "system"}
        for name, shape in PRESETS.items()
    },
}


def config_of(shape: str, *, dropout: float) -> ModernBertConfig:
    """The model of a name; thetas are the published ones of the long phases."""
    return ModernBertConfig(
        **SHAPES[shape],
        global_rope_theta=160000.0,
        attention_output_dropout=dropout,
        max_position_embeddings=8192,
    )


def first_model(config: ModernBertConfig, *, attention: str = "auto") -> ModernBertForMaskedLM:
    """A model of its own, on the CPU, from the weights that all sides start with."""
    model = copy.deepcopy(_drawn(config))
    model.attention = attention
    return model


@cache
def _drawn(config: ModernBertConfig) -> ModernBertForMaskedLM:
    # large: 7 s, a copy less than one; a bench has up to six sides
    return ModernBertForMaskedLM(config, seed=1)


def real_lengths(*, longest: int) -> np.ndarray:
    """Lengths of documents of the four domains, int64, cut into pieces as a phase of this length cuts them."""
    documents = np.array(json.loads(LENGTHS.read_text(encoding="utf-8"))["lengths"])
    return cut(0, np.arange(len(documents)), documents, longest).tokens_D


def make_batch(
    *, vocab_size: int, longest: int, row_tokens: int, rows: int, number: int
) -> TokenBatch:
    """Documents of real lengths as they come, end to end, random ids, of static shape; a function of its arguments.

    Drawn at random from the whole corpus until 0.2 % is free: rows that best fit packed hold documents of like lengths, and four
    of them would spare a peer that pads most of its padding.
    """

    # more than fits, since a document that is too long for what is free is passed over
    draw = generator(0, "bench", number)
    capacity = rows * row_tokens
    lengths = draw.permutation(real_lengths(longest=min(longest, row_tokens)))
    while lengths.sum() < 1.1 * capacity:
        lengths = np.concatenate([lengths, draw.permutation(lengths)])
    real, room = [], capacity
    for n in lengths.tolist():
        if n <= room:
            real.append(n)
            room -= n
        if room <= capacity // 500:
            break
    tokens = sum(real)
    # what is free becomes documents of padding
    segments = list(real)
    while room:
        segments.append(min(room, longest))
        room -= segments[-1]
    ends = np.cumsum([0, *segments])
    ids_T = torch.from_numpy(draw.integers(5, vocab_size, capacity))

    # of fixed shape: room for 5 % more predictions than full rows have, the rest ignored
    masked = round(MASK_SHARE * tokens)
    fixed = round(1.05 * MASK_SHARE * capacity)
    index, target = torch.zeros(fixed, dtype=torch.int64), torch.full((fixed,), IGNORE)
    index[:masked] = torch.from_numpy(np.sort(draw.permutation(tokens)[:masked]))
    target[:masked] = torch.from_numpy(draw.integers(5, vocab_size, masked))
    # of fixed shape: the last end repeated is a document without tokens
    seqlens = torch.full((max(len(ends), capacity // 16) + 1,), capacity, dtype=torch.int32)
    seqlens[: len(ends)] = torch.from_numpy(ends)
    return TokenBatch(
        ids_T=ids_T,
        positions_T=torch.from_numpy(np.arange(capacity) - np.repeat(ends[:-1], segments)).int(),
        cu_seqlens_S1=seqlens,
        max_seqlen=longest,
        targets={MLM: Targets(index_M=index, value_M=target, count=masked)},
        token_key_T=torch.from_numpy(draw.integers(-(2**63), 2**63, capacity)),
        tokens=tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a micro-batch, as others take it: ids and labels, [n] each."""

    ids: torch.Tensor
    labels: torch.Tensor


def documents_of(batch: TokenBatch) -> list[Document]:
    """The documents of a packed micro-batch, in a random order."""

    # labels at predicted positions alone
    labels_T = torch.full_like(batch.ids_T, IGNORE)
    masked = batch.targets[MLM]
    labels_T[masked.index_M[: masked.count]] = masked.value_M[: masked.count]
    # a full row repeats its end
    lengths = [n for n in document_lengths(batch).tolist() if n]
    found = [
        Document(ids=ids, labels=labels)
        for ids, labels in zip(
            batch.ids_T[: batch.tokens].split(lengths),
            labels_T[: batch.tokens].split(lengths),
            strict=True,
        )
    ]
    return [found[i] for i in generator(0, "order").permutation(len(found))]
