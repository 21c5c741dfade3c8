"""Documents joined to blocks: worked cases, a slow twin that lays a token at a time, and what a window of them promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoder.base.errors import ShardError
from encoder.data.blocks import blocks_of
from encoder.data.sentences import SentenceLists
from encoder.data.shards import open_source
from encoder.data.windows import GOES_ON
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import MlmConfig
from tests.helpers import memory_source
from tests.helpers.loading import held_out_with, loader_with, windows_with
from tests.helpers.memory_source import SPECIALS
from tests.helpers.shards import random_documents, write_source
from tests.reference.running_text import running_blocks

CLS, SEP = SPECIALS.cls_id, SPECIALS.sep_id
JOINS = ["anywhere", "sentences"]


def laid(pieces_P4, label_P, documents) -> list[list]:
    """The documents that attention sees, as RoBERTa reads them. documents: by (source, document)."""
    found: list[list] = []
    for (source, document, start, end), label in zip(pieces_P4.tolist(), label_P.tolist()):
        ids = documents[source, document]
        if label != GOES_ON:
            found.append([CLS] if start else [])
        found[-1] += ids[start:end] + ([SEP] if end < len(ids) else [])
    return found


def blocks_laid(sentences: list[list[int]], join: str, most: int) -> list[list]:
    """Blocks of documents with sentences of these lengths; a token is its document and place."""
    documents = {
        (0, d): [CLS, *((d, i) for i in range(sum(counts))), SEP]
        for d, counts in enumerate(sentences)
    }
    lists = SentenceLists(
        np.cumsum([0, *map(len, sentences)]), np.array([n for s in sentences for n in s], np.int64)
    )
    made = blocks_of(
        0,
        np.arange(len(sentences)),
        np.array([len(ids) for ids in documents.values()]),
        max_tokens=most,
        sentences=lists if join == "sentences" else None,
    )
    label_P = np.full(len(made.pieces_P4), GOES_ON)
    label_P[made.starts_B1[:-1]] = 0
    found = laid(made.pieces_P4, label_P, documents)
    assert [len(block) for block in found] == made.tokens_B.tolist()
    return found


def test_blocks_of_seven_tokens_are_those_of_the_drawing():
    """C a b c. S     C d e. f g h. S     C i j. S: the text of encoder/data/blocks.py."""
    text = [[3], [2, 3], [2]]
    a, b, c = (0, 0), (0, 1), (0, 2)
    d, e, f, g, h = ((1, i) for i in range(5))
    i, j = (2, 0), (2, 1)
    assert blocks_laid(text, "anywhere", 7) == [
        [CLS, a, b, c, SEP, d, SEP],
        [CLS, e, f, g, h, SEP],
        [CLS, i, j, SEP],
    ]
    assert blocks_laid(text, "sentences", 7) == [
        [CLS, a, b, c, SEP],
        [CLS, d, e, f, g, h, SEP],
        [CLS, i, j, SEP],
    ]
    assert blocks_laid(text, "sentences", 100) == [
        [CLS, a, b, c, SEP, d, e, f, g, h, SEP, i, j, SEP]
    ]


def test_a_sentence_longer_than_a_block_is_cut():
    assert [len(block) for block in blocks_laid([[2, 9, 1]], "sentences", 6)] == [4, 6, 6, 4]


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("most", [3, 4, 7, 20, 60, 1000])
def test_blocks_are_those_of_a_token_at_a_time(join, most):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        text = [rng.integers(1, 13, rng.integers(0, 7)).tolist() for _ in range(30)]
        slow = running_blocks(
            [_tokens(d, counts) for d, counts in enumerate(text)],
            most=most,
            whole_sentences=join == "sentences",
            cls=CLS,
            sep=SEP,
        )
        assert blocks_laid(text, join, most) == slow


def _tokens(document: int, counts: list[int]) -> list[list]:
    places = iter(range(sum(counts)))
    return [[(document, next(places)) for _ in range(count)] for count in counts]


def sources() -> list:
    rng = np.random.default_rng(3)
    texts = [[rng.integers(1, 13, rng.integers(1, 9)).tolist() for _ in range(60)] for _ in "ab"]
    return [memory_source.of_sentences(n, t, shards=5) for n, t in zip("ab", texts, strict=True)]


def windows_of(made, **changes):
    settings = dict(max_tokens_per_document=32, row_tokens=64, window_documents=40)
    return windows_with(made, weights=[2.0, 1.0], **{**settings, **changes})


@pytest.mark.parametrize("join", JOINS)
def test_a_window_has_each_token_of_its_documents_once(join):
    made = sources()
    plan = windows_of(made, join=join).plan(3)
    documents = {
        (s, d): ids.tolist()
        for s, source in enumerate(made)
        for d, ids in enumerate(source.documents)
    }
    apart = windows_of(made).plan(3).pieces_P4
    text = [documents[s, d][a:b] for s, d, a, b in apart.tolist()]
    found = laid(plan.pieces_P4, plan.label_P, documents)
    tokens, others = (
        np.bincount([i for block in some for i in block if i not in (CLS, SEP)])
        for some in (found, text)
    )
    assert np.array_equal(tokens, others)

    # rows are full, and no block is longer than it may be
    assert max(map(len, found)) <= 32 and plan.tokens_R.max() <= 64
    assert sum(map(len, found)) == plan.tokens_R.sum()
    assert all(block[0] == CLS and block[-1] == SEP and block.count(CLS) == 1 for block in found)
    # a source's last block in a window may be short
    least = 31 if join == "anywhere" else 32 - 12
    assert sum(len(block) < least for block in found) <= len(made)


@pytest.mark.parametrize("join", JOINS)
def test_what_is_left_out_moves_no_other_block(join):
    made = sources()
    whole = windows_of(made, join=join).plan(3)
    left = windows_of(made, join=join, left_out=((0, 2),)).plan(3)
    samples = made[0].samples_per_shard
    gone = range(samples[:2].sum(), samples[:3].sum())
    kept, lost = 0, 0
    for row in range(whole.rows):
        blocks = _blocks(whole, row)
        expected = [b for b in blocks if not any(s == 0 and d in gone for s, d, _, _ in b)]
        assert _blocks(left, row) == expected
        kept += len(expected)
        lost += len(blocks) - len(expected)
    assert kept and lost and left.tokens_R.sum() < whole.tokens_R.sum()


def _blocks(plan, row: int) -> list[list]:
    found: list[list] = []
    for piece, label in zip(plan.pieces(row).tolist(), plan.labels(row).tolist(), strict=True):
        if label != GOES_ON:
            found.append([])
        found[-1].append(piece)
    return found


def test_a_batch_has_one_document_for_each_block():
    """Positions and attention run through a block."""
    made = sources()
    ask = build_objective(MlmConfig(), vocab_size=64, specials=SPECIALS)
    settings = dict(masker=ask, max_tokens_per_document=32, row_tokens=64)
    order = dict(weights=[2.0, 1.0], window_documents=40, rows_at=lambda _: 4)
    with loader_with(made, join="anywhere", **order, **settings) as loader:
        batches = loader.next_step().micro_batches
    for batch in batches:
        begins = batch.cu_seqlens_S1[:-1].tolist()
        assert (batch.positions_T == 0).nonzero().flatten().tolist() == begins
        assert len(begins) == 2 and batch.max_seqlen in (31, 32)


def test_held_out_documents_stay_apart(tmp_path):
    source = open_source(write_source(tmp_path / "held", random_documents(30)), name="a")
    ask = build_objective(MlmConfig(), vocab_size=64, specials=source.card.specials)
    settings = dict(masker=ask, max_tokens_per_document=32, row_tokens=64, seed=1, rows=3)
    one, other = (held_out_with(source, join=join, **settings) for join in ("none", "anywhere"))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.ids_T, b.ids_T) and torch.equal(a.cu_seqlens_S1, b.cu_seqlens_S1)


def test_a_frame_that_ends_with_cls_is_not_joined():
    made = sources()
    card = made[0].card
    made[0].card = type(card)(
        **{**vars(card), "specials": type(SPECIALS)(**{**vars(SPECIALS), "frame": "end"})}
    )
    with pytest.raises(ShardError, match="data.join anywhere"):
        windows_of(made, join="anywhere").plan(0)
