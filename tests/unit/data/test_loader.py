"""The loader: one sequence of rows, whoever makes them, from wherever it starts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from encoder.base.batch import IGNORE
from encoder.base.errors import ConfigError, ShardError
from encoder.base.objective import MaskedRow, RowTargets
from encoder.data.assembly import Assembled, wrap_int64
from encoder.data.loader import DataPosition, Loader
from encoder.data.shards import open_source
from encoder.objectives.catalog import OBJECTIVES, build_objective
from encoder.objectives.mlm import MlmConfig
from tests.helpers.loading import held_out_with, loader_with
from tests.helpers.memory_source import in_memory
from tests.helpers.shards import random_documents, write_source

V, CLS, SEP, PAD, MASK = 64, 60, 61, 62, 63
ROW, CAP = 64, 32
WEB, CODE = random_documents(150, longest=90), random_documents(40, longest=200, seed=1)


def growing(phase_tokens: int) -> int:
    """A batch warm-up in miniature: 5 rows, then one more each 600 tokens."""
    return 5 + phase_tokens // 600


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder / "web" / "train", WEB, shard_bytes=1 << 11)
    write_source(folder / "code" / "train", CODE, shard_bytes=1 << 11)
    return [open_source(folder / name / "train", name=name) for name in ("web", "code")]


def objective(sources, **settings):
    return build_objective(MlmConfig(**settings), vocab_size=V, specials=sources[0].card.specials)


def loader_of(sources, **changes) -> Loader:
    settings = dict(
        weights=[2.0, 1.0],
        seed=3,
        phase=0,
        max_tokens_per_document=CAP,
        row_tokens=ROW,
        window_documents=16,
        masker=objective(sources),
        micro_batch_rows=2,
        rows_at=growing,
    )
    return loader_with(sources, **{**settings, **changes})


def steps_of(sources, count, **changes):
    with loader_of(sources, **changes) as loader:
        return [loader.next_step() for _ in range(count)]


def whole_step_hashes(sources, count, *, world_size, **changes):
    """What the ledger sees of each step: the sum over ranks, as an all-reduce of int64 gives it."""
    ranks = [
        steps_of(sources, count, rank=r, world_size=world_size, **changes)
        for r in range(world_size)
    ]
    return [
        (
            wrap_int64(sum(s.row_hash for s in step)),
            sum(s.counts["mlm"] for s in step),
            step[0].tokens,
            step[0].rows,
        )
        for step in zip(*ranks, strict=True)
    ]


def documents_in(batch):
    """Every document of a micro-batch: (shown ids, {position: target}), padding and empty ones left out."""
    targets = dict(
        zip(
            batch.targets["mlm"].index_M.tolist(),
            batch.targets["mlm"].value_M.tolist(),
            strict=True,
        )
    )
    found = []
    bounds = batch.cu_seqlens_S1.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        ids = batch.ids_T[start:end].tolist()
        if ids and set(ids) != {PAD}:
            found.append(
                (
                    ids,
                    {i - start: t for i, t in targets.items() if start <= i < end and t != IGNORE},
                    batch.token_key_T[start:end].tolist(),
                )
            )
    return found


def test_the_sum_over_ranks_does_not_depend_on_ranks_or_micro_batches(sources):
    expected = whole_step_hashes(sources, 8, world_size=1)
    assert len({h for h, *_ in expected}) == 8 and [rows for *_, rows in expected][:2] == [5, 5]
    for world_size in (2, 3, 4, 7):
        for micro_batch_rows in (1, 2, 3):
            assert (
                whole_step_hashes(
                    sources, 8, world_size=world_size, micro_batch_rows=micro_batch_rows
                )
                == expected
            )
    assert whole_step_hashes(sources, 8, world_size=2, static_shapes=True) == expected


def with_cls_behind():
    """A source whose documents are text, [SEP], [CLS]."""
    documents = [np.concatenate([d[1:], d[:1]]) for d in CODE]
    source = in_memory("xlnet", documents, shards=2)
    specials = dataclasses.replace(source.card.specials, frame="end")
    source.card = dataclasses.replace(source.card, specials=specials)
    return source, documents


def test_every_piece_of_a_document_with_cls_behind_it_has_its_frame():
    source, stored = with_cls_behind()
    steps = steps_of([source], 24, weights=[1.0], workers=0)
    found = [d for step in steps for batch in step.micro_batches for d in documents_in(batch)]
    bodies = set()
    for ids, targets, _ in found:
        clean = [targets.get(place, shown) for place, shown in enumerate(ids)]
        assert clean[-2:] == [SEP, CLS] and CLS not in clean[:-1] and SEP not in clean[:-2]
        assert len(ids) <= CAP
        bodies.add(tuple(clean[:-2]))
    texts = [tuple(d[:-2].tolist()) for d in stored]
    for text in texts:
        count = -(-len(text) // (CAP - 2))
        ends = [len(text) * part // count for part in range(count + 1)]
        assert all(text[a:b] in bodies for a, b in zip(ends, ends[1:]))


def test_pairs_of_sentences_with_cls_behind_them_are_refused():
    source, _ = with_cls_behind()
    specials = source.card.specials
    ask = build_objective(OBJECTIVES["mlm_nsp"](), vocab_size=V, specials=specials)
    with pytest.raises(ShardError, match="xlnet has .CLS. behind each text; needed for pairs"):
        steps_of([source], 1, weights=[1.0], masker=ask)


def test_the_rows_of_all_ranks_together_are_the_rows_of_one(sources):
    alone = [d for m in steps_of(sources, 1)[0].micro_batches for d in documents_in(m)]
    dealt = [
        [
            documents_in(m)
            for m in steps_of(sources, 1, rank=r, world_size=3, micro_batch_rows=1)[0].micro_batches
        ]
        for r in range(3)
    ]
    # row r of the step is micro-batch r // 3 of rank r mod 3
    assert [d for r in range(6) for d in dealt[r % 3][r // 3]] == alone


def test_masks_and_dropout_keys_do_not_depend_on_padding_or_micro_batch(sources):
    def everything(**changes):
        return [
            d
            for s in steps_of(sources, 6, **changes)
            for m in s.micro_batches
            for d in documents_in(m)
        ]

    expected = everything()
    for static_shapes in (False, True):
        for micro_batch_rows in (1, 3, 8):
            assert (
                everything(static_shapes=static_shapes, micro_batch_rows=micro_batch_rows)
                == expected
            )


def test_a_row_is_the_same_whatever_its_place_in_a_step(sources):
    alone, together = (
        [
            d
            for s in steps_of(sources, count, rows_at=lambda _, rows=rows: rows)
            for m in s.micro_batches
            for d in documents_in(m)
        ]
        for rows, count in ((1, 21), (7, 3))
    )
    assert alone == together


def test_resuming_after_any_step_gives_what_would_have_followed_on_any_number_of_ranks(sources):
    whole = steps_of(sources, 12)
    hashes = whole_step_hashes(sources, 12, world_size=1)
    for done in range(1, 11):
        assert whole[done].start == whole[done - 1].end
        for world_size in (1, 2, 3):
            again = whole_step_hashes(sources, 2, world_size=world_size, start=whole[done].start)
            assert again == hashes[done : done + 2], (done, world_size)


def test_every_documents_tokens_are_shown_exactly_once_an_epoch(sources):
    # one source, 10 windows of 15 documents: an epoch of web
    class Ask:
        terms, has_segments, pairs = ("mlm",), False, None

        def mask(self, ids, generator, *, lengths, phase_tokens):
            return MaskedRow(ids=ids, targets={"mlm": RowTargets(np.arange(0), np.arange(0))})

        def capacity(self, term, tokens):
            return 1

    bodies = []
    with loader_of(
        sources[:1], weights=[1.0], window_documents=15, masker=Ask(), rows_at=lambda _: 1
    ) as loader:
        while (step := loader.next_step()).start.lanes[0][0] < 10:
            for ids, _, _ in documents_in(step.micro_batches[0]):
                assert ids[0] == CLS and ids[-1] == SEP and len(ids) <= CAP
                bodies += ids[1:-1]
    assert sorted(bodies) == sorted(np.concatenate([d[1:-1] for d in WEB]).tolist())


def test_counts_of_a_step_are_those_of_its_batches(sources):
    for step in steps_of(sources, 10):
        assert (
            step.tokens
            == sum(m.tokens for m in step.micro_batches)
            == step.end.phase_tokens - step.start.phase_tokens
        )
        assert step.counts["mlm"] == sum(
            int((m.targets["mlm"].value_M != IGNORE).sum()) for m in step.micro_batches
        )
        assert step.rows == growing(step.start.phase_tokens)
        assert step.fill == step.tokens / (step.rows * ROW)
        assert len(step.micro_batches) == -(-step.rows // 2)


@pytest.mark.parametrize("static_shapes", [False, True])
def test_a_batch_fits_together(sources, static_shapes):
    room = 3 * objective(sources).capacity("mlm", ROW)
    for step in steps_of(sources, 6, static_shapes=static_shapes, world_size=2, micro_batch_rows=3):
        for m in step.micro_batches:
            bounds = m.cu_seqlens_S1.tolist()
            assert bounds[0] == 0 and bounds[-1] == len(m.ids_T) == len(m.positions_T) == len(
                m.token_key_T
            )
            assert bounds == sorted(bounds)
            spans = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
            assert m.positions_T.tolist() == [i for a, b in spans for i in range(b - a)]
            assert max(b - a for a, b in spans) <= m.max_seqlen <= CAP
            counted = m.targets["mlm"].value_M != IGNORE
            assert (
                int(counted.sum()) == m.counts["mlm"]
                and (m.targets["mlm"].index_M[counted] < m.tokens).all()
            )
            assert (m.ids_T[: m.tokens] != PAD).all() and (m.ids_T[m.tokens :] == PAD).all()
            assert (m.ids_T.dtype, m.positions_T.dtype, m.cu_seqlens_S1.dtype) == (
                torch.int64,
                torch.int32,
                torch.int32,
            )
            assert {
                t.dtype for t in (m.targets["mlm"].index_M, m.targets["mlm"].value_M, m.token_key_T)
            } == {torch.int64}
            if static_shapes:
                assert (
                    len(m.ids_T) == 3 * ROW
                    and m.max_seqlen == CAP
                    and len(m.targets["mlm"].index_M) == room
                )
            else:
                assert len(m.ids_T) == m.tokens and len(m.targets["mlm"].index_M) == m.counts["mlm"]
                assert m.max_seqlen == max(b - a for a, b in spans)


def test_static_shapes_are_the_same_in_every_micro_batch(sources):
    shapes = {
        tuple(
            len(t)
            for t in (m.ids_T, m.cu_seqlens_S1, m.targets["mlm"].index_M, m.targets["mlm"].value_M)
        )
        for s in steps_of(sources, 20, static_shapes=True, micro_batch_rows=4)
        for m in s.micro_batches
    }
    # 4 rows of 64 tokens hold up to 32 documents at most now and then: cu_seqlens doubles, the rest never moves
    assert len({(t, i, p) for t, _, i, p in shapes}) == 1
    assert all(s & (s - 1) == 0 for _, s, _, _ in shapes)


def test_held_out_rows_are_rounded_as_the_loaders_are(sources):
    own, rounded = (held_out(sources, shape_step=step) for step in (1, 16))
    for a, b in zip(own, rounded, strict=True):
        assert len(b.ids_T) % 16 == 0 and torch.equal(b.ids_T[: a.tokens], a.ids_T)


def test_a_shape_step_rounds_tokens_and_targets_up_and_adds_nothing_that_counts(sources):
    own, rounded = (
        [
            m
            for s in steps_of(sources, 6, shape_step=step, micro_batch_rows=3)
            for m in s.micro_batches
        ]
        for step in (1, 16)
    )
    assert len({len(m.ids_T) for m in rounded}) < len({len(m.ids_T) for m in own})
    for a, b in zip(own, rounded, strict=True):
        assert len(b.ids_T) % 16 == len(b.targets["mlm"].index_M) % 16 == 0
        assert len(b.ids_T) - len(a.ids_T) < 16
        assert (b.tokens, b.counts) == (a.tokens, a.counts)
        assert torch.equal(b.ids_T[: a.tokens], a.ids_T) and (b.ids_T[a.tokens :] == PAD).all()
        values = b.targets["mlm"].value_M
        assert torch.equal(values[: a.counts["mlm"]], a.targets["mlm"].value_M)
        assert (values[a.counts["mlm"] :] == IGNORE).all()
        assert b.cu_seqlens_S1[-1] == len(b.ids_T) and b.max_seqlen <= CAP


@pytest.mark.parametrize("static_shapes", [False, True])
def test_ranks_left_short_get_as_many_micro_batches_of_nothing(sources, static_shapes):
    ranks = [
        steps_of(sources, 1, rank=r, world_size=8, static_shapes=static_shapes)[0] for r in range(8)
    ]
    assert {len(s.micro_batches) for s in ranks} == {1}
    for short in ranks[5:]:  # five rows, eight ranks
        (nothing,) = short.micro_batches
        assert (short.counts["mlm"], nothing.tokens, short.row_hash) == (
            0,
            0,
            0,
        ) and short.tokens == ranks[0].tokens
        assert (nothing.ids_T == PAD).all() and len(nothing.ids_T) == (
            2 * ROW if static_shapes else 1
        )
        assert nothing.cu_seqlens_S1[-1] == len(nothing.ids_T)


def test_phases_and_seeds_draw_their_own(sources):
    drawn = {
        steps_of(sources, 1, **c)[0].row_hash
        for c in ({}, {"phase": 1}, {"seed": 4}, {"max_tokens_per_document": 16})
    }
    assert len(drawn) == 4


def test_the_hash_sees_masks_as_well_as_ids(sources):
    def hashes(**mlm):
        return [s.row_hash for s in steps_of(sources, 2, masker=objective(sources, **mlm))]

    assert hashes() != hashes(mask_share=0.2) and hashes() != hashes(random_share=0.2)


def test_position_one_billion_is_reached_at_once(sources):
    far = DataPosition(lanes=((10**9, 1),), phase_tokens=10**15)
    (step,) = steps_of(sources, 1, start=far, rows_at=lambda tokens: 4 if tokens >= 10**15 else 1)
    assert step.start == far and step.rows == 4 and step.end.phase_tokens == 10**15 + step.tokens


def test_surplus_questions_are_dropped_alike_in_every_layout(sources):
    class Greedy:
        terms, has_segments, pairs = ("mlm",), False, None

        def mask(self, ids, generator, *, lengths, phase_tokens):
            return MaskedRow(ids=ids, targets={"mlm": RowTargets(np.arange(len(ids)), ids)})

        def capacity(self, term, tokens):
            return 7

    one, other = (
        steps_of(sources, 2, masker=Greedy(), **c)
        for c in ({}, {"static_shapes": True, "micro_batch_rows": 5})
    )
    assert [s.row_hash for s in one] == [s.row_hash for s in other]
    assert one[0].counts["mlm"] == other[0].counts["mlm"] == 7 * 5


def test_the_models_generator_is_left_alone(sources):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps_of(sources, 2)
    assert (torch.get_rng_state() == before).all()


def test_pinning_pins_every_tensor_of_a_micro_batch(sources, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch, *_ = steps_of(sources, 1)[0].micro_batches
    again = Assembled(batch=batch, row_hash=5).pin_memory()
    assert len(pinned) == 6 and again.row_hash == 5 and again.batch.ids_T is batch.ids_T


def test_a_row_that_does_not_exist_is_refused(sources):
    with pytest.raises(ShardError, match="row 999 of window 2 does not exist"):
        steps_of(sources, 1, start=DataPosition(lanes=((2, 999),)))


@pytest.mark.parametrize("cap", [2, 65])
def test_documents_longer_than_rows_are_refused(sources, cap):
    with pytest.raises(
        ConfigError, match=f"max_tokens_per_document {cap} must lie between 3 and row_tokens 64"
    ):
        loader_of(sources, max_tokens_per_document=cap)


def test_an_id_outside_the_vocabulary_names_its_shard(tmp_path):
    documents = random_documents(30, longest=20)
    documents[11][1] = 64
    source = open_source(write_source(tmp_path / "train", documents), name="web")
    with pytest.raises(ShardError, match=r"shard\.00000\.mds holds id 64, its vocabulary has 64"):
        steps_of([source], 5, weights=[1.0])


def held_out(sources, *, rows=6, **changes):
    settings = dict(
        rows=rows,
        seed=3,
        max_tokens_per_document=CAP,
        row_tokens=ROW,
        masker=objective(sources),
        micro_batch_rows=2,
        static_shapes=False,
    )
    return held_out_with(sources[0], **{**settings, **changes})


def test_held_out_batches_are_the_first_documents_whatever_the_ranks(sources):
    alone = held_out(sources)
    assert 5 <= sum(m.tokens for m in alone) / ROW <= 6 and len(alone) == 3
    documents = sorted(str(d) for m in alone for d in documents_in(m))
    for world_size in (2, 3, 8):
        dealt = [
            held_out(sources, rank=r, world_size=world_size, static_shapes=r % 2 == 0)
            for r in range(world_size)
        ]
        assert len({len(batches) for batches in dealt}) == 1
        assert (
            sorted(str(d) for batches in dealt for m in batches for d in documents_in(m))
            == documents
        )
    assert [m.ids_T.tolist() for m in held_out(sources)] == [m.ids_T.tolist() for m in alone]


def test_a_small_held_out_source_gives_all_it_has(sources):
    batches = held_out(sources, rows=10_000)
    pieces = sum(len(documents_in(m)) for m in batches)
    cut = sum(-(-(len(d) - 2) // (CAP - 2)) if len(d) > CAP else 1 for d in WEB)
    assert pieces == cut
