"""Documents joined to blocks of running text, as RoBERTa's FULL-SENTENCES (Liu et al. 2019, section 4.2).

    stored      C a b c. S     C d e. f g h. S     C i j. S       blocks of at most 7 tokens
    anywhere    C a b c. S d S'     C' e. f g h. S     C i j. S
    sentences   C a b c. S     C d e. f g h. S     C i j. S       cut behind the last sentence that fits

A block begins with [CLS] and ends with [SEP]. Between two documents stands the [SEP] of the first, the [CLS] of the second is
left out. Attention and positions go over the whole block. A sentence longer than a block is cut.

The documents of a window are one text, source by source. So a block depends on nothing but its window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.data.sentences import SentenceLists

FRAME_TOKENS = 2  # [CLS] and [SEP] of a block, and of a stored document


@dataclass(frozen=True)
class Blocks:
    """The blocks of some documents. B blocks, P pieces, in the order of the text."""

    pieces_P4: np.ndarray  # int64, as WindowPlan has them
    starts_B1: np.ndarray  # int64 into the pieces
    tokens_B: np.ndarray  # int64, with what is put back


def blocks_of(
    source: int,
    documents: np.ndarray,
    lengths: np.ndarray,
    *,
    max_tokens: int,
    sentences: SentenceLists | None = None,
) -> Blocks:
    """The blocks of a source's documents. One without text adds nothing.

    source: its number
    documents: their numbers, int64 [D]
    lengths: their stored tokens [D], [CLS] and [SEP] counted
    max_tokens: of a block
    sentences: of the documents, behind which blocks end; None: they end anywhere
    """
    kept_D = lengths > FRAME_TOKENS
    ends_N = None if sentences is None else _sentence_ends(sentences)
    documents = documents[kept_D]

    # the text: every document without its [CLS]. Document d is begins[d] to begins[d + 1] of it,
    # its last token a [SEP]
    begins_D1 = np.concatenate([[0], np.cumsum(lengths[kept_D].astype(np.int64) - 1)])
    text_ends = begins_D1[1:] - 1
    cuts = _cuts(
        text_ends.tolist(),
        None if ends_N is None else ends_N.tolist(),
        room=max_tokens - FRAME_TOKENS,
    )

    # pieces end where a block or a document does
    cuts_B1 = np.array(cuts, dtype=np.int64)
    edges = np.union1d(cuts_B1, begins_D1)
    start_P, end_P = edges[:-1], edges[1:]
    whose_P = np.searchsorted(begins_D1, start_P, side="right") - 1
    begins_block_P = np.isin(start_P, cuts_B1)

    # places in the stored document; a block that begins with a document keeps its [CLS]
    offset_P = 1 - begins_D1[whose_P]
    keeps_cls_P = begins_block_P & (start_P == begins_D1[whose_P])
    pieces_P4 = np.stack(
        [
            np.full(len(start_P), source),
            documents[whose_P],
            start_P + offset_P - keeps_cls_P,
            end_P + offset_P,
        ],
        axis=1,
    )

    # [CLS] before a block, and [SEP] behind one that ends inside a document
    inside_B = ~np.isin(cuts_B1[1:], begins_D1)
    tokens_B = np.diff(cuts_B1) + 1 + inside_B
    starts_B1 = np.concatenate([np.flatnonzero(begins_block_P), [len(start_P)]])
    return Blocks(pieces_P4.astype(np.int64), starts_B1, tokens_B)


def _sentence_ends(sentences: SentenceLists) -> np.ndarray:
    """Where sentences end in the text, ascending: those before a [SEP] end where it stands."""
    # each document with a sentence adds its [SEP] to the text behind its sentences
    has_text_D = np.diff(sentences.starts_D1) > 0
    counts_D = np.diff(sentences.starts_D1)[has_text_D]
    before_N = np.repeat(np.arange(len(counts_D)), counts_D)
    return np.cumsum(sentences.tokens_N) + before_N


def _cuts(text_ends: Sequence[int], sentence_ends: Sequence[int] | None, *, room: int) -> list[int]:
    """Where blocks begin and end in the text, ascending, first 0.

    text_ends: places of the documents' [SEP]
    sentence_ends: behind which a block may end; None: anywhere
    room: tokens of a block without its frame
    """
    total = text_ends[-1] + 1 if text_ends else 0
    separators = frozenset(text_ends)
    cuts = [0]
    while cuts[-1] < total:
        end = min(cuts[-1] + room, total - 1)
        if sentence_ends is not None:
            fitting = bisect_right(sentence_ends, end)
            # none fits: the sentence is longer than a block, and is cut
            if fitting and sentence_ends[fitting - 1] > cuts[-1]:
                end = sentence_ends[fitting - 1]
        # the [SEP] behind a document's last token is the block's own
        cuts.append(end + (end in separators))
    return cuts
