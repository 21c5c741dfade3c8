"""How full the rows of a phase will be: some windows of its documents, drawn by their lengths, packed as the loader packs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder.base.errors import ShardError
from encoder.data.packing import pack_best_fit
from encoder.data.sentences import SentenceLists, read_sentences
from encoder.data.shard_format import Card, read_card, read_lengths
from encoder.data.windows import documents_per_window, pieces_of
from encoder.runs.config import PhaseConfig, RunConfig

# of rows of documents that are not there yet (99.7 to 99.9 % in windows of thousands)
FILL = 0.998
FILL_WINDOWS = 8  # packed to know how full rows get
MOST_DOCUMENTS = 65_536  # of a window: larger ones are as full


@dataclass(frozen=True, kw_only=True)
class StoredLengths:
    """How long the documents of a shard folder are, and their sentences: no shard is opened."""

    name: str
    card: Card
    lengths: np.ndarray
    samples_per_shard: np.ndarray  # as if it had one shard
    folder: Path

    def sentences_of(self, documents: np.ndarray) -> SentenceLists:
        """The sentences of some documents. Raises ShardError where they are not known."""
        return read_sentences(self.folder, self.card).of(documents)


def stored_lengths(folder: Path) -> StoredLengths:
    """Raises ShardError where the folder is not there."""
    card = read_card(folder)
    lengths = read_lengths(folder, card)
    return StoredLengths(
        name=card.source,
        card=card,
        lengths=lengths,
        samples_per_shard=np.array([card.documents]),
        folder=folder,
    )


@dataclass(frozen=True, kw_only=True)
class Filling:
    """Rows that were packed. R rows, D documents."""

    tokens_R: np.ndarray  # without padding
    pieces_R: np.ndarray  # documents and parts of them in each
    lengths_D: np.ndarray  # stored, of the documents that were drawn
    row_tokens: int

    @property
    def fill(self) -> float:
        """Share of the rows' capacity that is tokens, 0 to 1."""
        return int(self.tokens_R.sum()) / (len(self.tokens_R) * self.row_tokens)


def fill_rows(
    run: RunConfig,
    phase: PhaseConfig,
    *,
    max_tokens: int | None = None,
    row_tokens: int | None = None,
) -> Filling | None:
    """Windows of a phase, or None where a source's lengths are not there yet.

    max_tokens, row_tokens: instead of the phase's longest document and the run's row.
    """
    sources = run.sources_of(phase)
    try:
        stored = [stored_lengths(s.folder) for s in sources]
    except ShardError:
        return None
    # what is cut at sentences, which the shards do not tell yet
    if run.needs_sentences and not all(s.card.sentences_sha256 for s in stored):
        return None
    longest, capacity = (
        max_tokens or phase.max_tokens_per_document,
        row_tokens or run.data.row_tokens,
    )

    shares = documents_per_window(
        [s.card for s in stored],
        [s.weight for s in sources],
        min(run.data.window_documents, MOST_DOCUMENTS),
    )
    draw = np.random.default_rng(0)
    tokens: list[np.ndarray] = []
    pieces: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    for number in range(FILL_WINDOWS):
        # rounded by chance: the mean over windows is the share
        counts = [int(share + draw.random()) for share in shares]
        # an empty window is left out; were the first 8 all empty, each source gives one document
        if not any(counts) and (tokens or number + 1 < FILL_WINDOWS):
            continue
        if not any(counts):
            counts = [1] * len(counts)
        # a source without a document draws nothing, so that the others draw the same
        drawn = [
            draw.integers(0, len(s.lengths), count) if count else np.zeros(0, np.int64)
            for s, count in zip(stored, counts, strict=True)
        ]

        lengths = pieces_of(
            stored,
            drawn,
            max_tokens=longest,
            pairs=run.objective.pairs,
            join=run.data.join,
            chance=draw,
        ).tokens_D
        packing = pack_best_fit(lengths, capacity)
        # tokens of each row: the lengths of its pieces summed from one row's start to the next
        tokens.append(np.add.reduceat(lengths[packing.pieces_P], packing.row_starts_R1[:-1]))
        pieces.append(np.diff(packing.row_starts_R1))
        documents += [s.lengths[some] for s, some in zip(stored, drawn, strict=True)]
    return Filling(
        tokens_R=np.concatenate(tokens),
        pieces_R=np.concatenate(pieces),
        lengths_D=np.concatenate(documents),
        row_tokens=capacity,
    )


def row_fills(run: RunConfig) -> list[float]:
    """How full the rows of each phase are, FILL where lengths are not there yet."""
    found = [fill_rows(run, phase) for phase in run.phases]
    return [f.fill if f else FILL for f in found]
