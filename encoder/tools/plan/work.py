"""Model FLOP of a run's phases, from the lengths of the stored documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from encoder.base.errors import ShardError, first_names
from encoder.data.windows import pieces_of
from encoder.runs.config import PhaseConfig, RunConfig
from encoder.runs.filling import stored_lengths
from encoder.runs.objective_models import shapes_at_hand

# documents of a source whose lengths tell the work: the mean is good to a few in a thousand
LOOKED_AT = 100_000


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """Model FLOP of a phase, forward and backward, and the shard folders whose lengths were not at hand."""

    flops: float
    unknown: tuple[str, ...]


def phase_work(run: RunConfig, phase: PhaseConfig) -> PhaseWork:
    """From the lengths of the stored documents, cut as the phase cuts them; where there are none yet, from documents as
    long as they may be, which is the most it can be."""
    longest = phase.max_tokens_per_document
    share = run.mask_share_of(phase).mean
    asked = shapes_at_hand(run)
    sources = run.sources_of(phase)
    weights = sum(source.weight for source in sources)
    unknown: list[str] = []
    flops = 0.0
    for source in sources:
        try:
            stored = stored_lengths(source.folder)
            # every k-th document of the whole source: its order may not be one of chance
            every = math.ceil(len(stored.lengths) / LOOKED_AT)
            lengths = pieces_of(
                [stored],
                [np.arange(0, len(stored.lengths), every)],
                max_tokens=longest,
                pairs=run.objective.pairs,
                join=run.data.join,
                chance=np.random.default_rng(0),
            ).tokens_D
        except ShardError:
            # the longest that may be: attention makes long documents the most work a token
            lengths = np.array([longest])
            unknown.append(source.path)
        tokens = int(lengths.sum())
        some_flops = run.objective.train_flops(
            run.model,
            asked,
            lengths=lengths,
            targets=run.objective.expected_targets(
                documents=len(lengths), tokens=tokens, mask_share=share
            ),
        )
        # work a token, times the source's share of the phase's tokens
        flops += some_flops / tokens * phase.tokens * source.weight / weights
    return PhaseWork(flops=flops, unknown=tuple(unknown))


def works_text(run: RunConfig, works: Sequence[PhaseWork]) -> str:
    """Where the lengths came from."""
    unknown = sorted(set(chain.from_iterable(work.unknown for work in works)))
    if not unknown:
        return "documents as long as lengths.bin says, cut as the phases cut them"
    text = f"documents of {first_names(unknown, 1)} counted as long as they may be"
    all_sources = chain.from_iterable(map(run.sources_of, run.phases))
    if {source.path for source in all_sources} != set(unknown):
        text += "; the others as long as lengths.bin says"
    return text
