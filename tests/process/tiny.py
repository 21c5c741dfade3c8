"""A tiny ModernBERT and its rows, so that every process test trains the same thing; the rows are a function of the step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.base.batch import IGNORE, Targets, TokenBatch
from encoder.base.rng import address_seed, generator
from encoder.base.units import Progress
from encoder.engine.checkpoint.save import Saver
from encoder.engine.engine import Engine
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.objectives.mlm import MaskedLanguageModel, MlmConfig

ROWS, ROW_TOKENS, VOCAB = 8, 24, 61  # 61: the decoder's bias has an odd number of elements
SIZE = ModernBertConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    global_attn_every_n_layers=2,
    window_radius_tokens=3,
    max_position_embeddings=64,
)


# a parameter of every kind there is: untied, biases, learned positions, segments
ALL_KINDS = dataclasses.replace(
    SIZE,
    tie_word_embeddings=False,
    positions="learned",
    type_vocab_size=2,
    attention_bias=True,
    mlp_bias=True,
    head_bias=True,
    norm_bias=True,
)


def tiny_model(*, size: ModernBertConfig = SIZE, seed: int = 5) -> ModernBertForMaskedLM:
    """Two layers, tied decoder, dropout on."""
    return ModernBertForMaskedLM(size, attention="sdpa", seed=seed)


NOTHING_ASKED = {
    2: 2,
    4: 3,
}  # in these steps every second, every third row: a rank of two, of three, predicts nothing


def masked_in(step: int, row: int) -> int:
    """Predicted positions of a row: another number in each, none in row 0 and in the rows that only fill a rank up."""
    return 0 if row >= ROWS or row % NOTHING_ASKED.get(step, ROWS) == 0 else row


def masked_tokens_of(step: int) -> int:
    """Predicted positions of a step, over all ranks."""
    return sum(masked_in(step, row) for row in range(ROWS))


def counts_of(step: int) -> dict[str, int]:
    """As masked_tokens_of, by loss term."""
    return {"mlm": masked_tokens_of(step)}


def mlm_objective(vocab_size: int = VOCAB) -> MaskedLanguageModel:
    """Plain masked language modelling; special ids are the last four."""
    last = range(vocab_size - 4, vocab_size)
    return MaskedLanguageModel(
        MlmConfig(), vocab_size=vocab_size, mask_id=last[3], pad_id=last[2], special_ids=tuple(last)
    )


def micro_batch(step: int, rows: list[int]) -> TokenBatch:
    """Some rows of a step end to end, two documents a row."""
    ids, targets, index, keys, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        random = generator(1, "row", step, row)
        ids.append(random.integers(0, VOCAB, ROW_TOKENS))
        masked = np.sort(random.choice(ROW_TOKENS, size=masked_in(step, row), replace=False))
        index += [int(m) + i * ROW_TOKENS for m in masked] + [0] * (ROWS - len(masked))
        targets += random.integers(0, VOCAB, len(masked)).tolist() + [IGNORE] * (ROWS - len(masked))
        keys.append(np.arange(ROW_TOKENS) + (address_seed(1, step, row) >> 8))
        ends += [ends[-1] + 10, ends[-1] + ROW_TOKENS]
    lengths = np.diff(ends)
    return TokenBatch(
        ids_T=torch.from_numpy(np.concatenate(ids)),
        cu_seqlens_S1=torch.tensor(ends, dtype=torch.int32),
        positions_T=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).int(),
        max_seqlen=int(lengths.max()),
        targets={
            "mlm": Targets(
                index_M=torch.tensor(index),
                value_M=torch.tensor(targets),
                count=sum(masked_in(step, row) for row in rows),
            )
        },
        token_key_T=torch.from_numpy(np.concatenate(keys)),
        tokens=len(rows) * ROW_TOKENS,
    )


def share_of_step(
    step: int, *, rank: int, world_size: int, micro_batch_rows: int
) -> list[TokenBatch]:
    """Row r goes to rank r mod world, rows that ask nothing to those left short, then micro-batches of some rows."""
    mine = [rank + world_size * i for i in range(-(-ROWS // world_size))]
    return [
        micro_batch(step, mine[i : i + micro_batch_rows])
        for i in range(0, len(mine), micro_batch_rows)
    ]


def save_checkpoint(
    root: Path,
    *,
    engine: Engine,
    progress: Progress,
    incarnation: int,
    keep_last: int,
    run_yaml: str = "",
    extra: dict[str, Any] | None = None,
    milestone: str | None = None,
) -> Path:
    """One save, waited for."""
    saver = Saver(root, engine=engine, incarnation=incarnation, keep_last=keep_last)
    saved = (
        saver.start(progress, run_yaml=run_yaml, extra=extra or {}, milestone=milestone)
        or saver.wait()
    )
    return saved.path
