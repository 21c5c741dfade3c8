"""What must hold whatever the ranks, lanes, workers, micro-batch and position: tried on chosen at random, small examples."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.base.batch import IGNORE
from encoder.base.errors import ConfigError, ShardError
from encoder.base.rng import generator
from encoder.data.assembly import wrap_int64
from encoder.data.loader import DataPosition
from encoder.data.order import deal_shards
from encoder.data.windows import GOES_ON, Join, PieceOrder
from encoder.objectives.catalog import OBJECTIVES, build_objective
from encoder.objectives.contract import MaskShare
from encoder.objectives.mlm import MlmConfig
from encoder.objectives.words import WordEdges
from tests.helpers.loading import loader_with, windows_with
from tests.helpers.memory_source import SPECIALS, MemorySource, in_memory, planned, sentences_of
from tests.helpers.shards import random_documents
from tests.helpers.small_runs import run_with, trained_by

ROW = 64
SOURCES = [
    in_memory("web", random_documents(132, longest=90), shards=12),
    in_memory("code", random_documents(60, longest=200, seed=1), shards=12),
    in_memory("books", random_documents(12, longest=300, seed=2), shards=12),
]
for source in SOURCES:
    source.sentences = sentences_of(source.lengths)
EDGES = WordEdges(np.arange(64) % 3 == 0, np.arange(64) < 59)
START = DataPosition()
several = settings(max_examples=4, deadline=None, derandomize=True, database=None)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What decides the batches."""

    sources: int
    lanes: int
    cap: int
    window_documents: int
    rows_of_lane: int
    whole_words: bool
    seed: int
    objective: str = "mlm"
    join: str = "none"  # of documents, where the objective has no pairs
    piece_order: str = "documents"
    left_out: tuple[tuple[int, int], ...] = ()  # (number of the source, shard)


# of all cases
DRAWN = dict(
    sources=st.integers(1, 3),
    lanes=st.integers(1, 4),
    window_documents=st.integers(1, 50),
    rows_of_lane=st.integers(1, 3),
    whole_words=st.booleans(),
    seed=st.integers(0, 2**40),
    left_out=st.sampled_from([(), ((0, 1),), ((0, 3), (0, 7))]),
)
cases = st.builds(
    Case,
    **DRAWN,
    cap=st.integers(3, ROW),
    objective=st.sampled_from([*OBJECTIVES]),
    join=st.sampled_from(get_args(Join)),
    piece_order=st.sampled_from(get_args(PieceOrder)),
)


def steps_of(
    case: Case, count: int, *, start=START, rank=0, world_size=1, micro_batch_rows=1, workers=0
):
    settings = OBJECTIVES[case.objective]
    # rows are masked without the models that a loss asks
    stored = dict.fromkeys(settings.STORED_MODELS, "not read")
    # where words begin, each objective in its own word
    named = {field.name for field in dataclasses.fields(settings)} & {"whole_words", "word_starts"}
    by_words = dict.fromkeys(named, case.whole_words)
    ask = build_objective(
        settings(**by_words, **stored),
        vocab_size=64,
        specials=dataclasses.replace(SPECIALS, frame=settings.frame or SPECIALS.frame),
        words=EDGES,
        share=MaskShare(start=0.5, end=0.1, over_tokens=2000),
    )
    with loader_with(
        SOURCES[: case.sources],
        weights=[3.0, 2.0, 0.5][: case.sources],
        seed=case.seed,
        phase=1,
        max_tokens_per_document=case.cap if ask.pairs is None else max(case.cap, 5),
        join=case.join if ask.pairs is None else "none",
        piece_order=case.piece_order,
        left_out=case.left_out,
        row_tokens=ROW,
        window_documents=case.window_documents,
        masker=ask,
        rank=rank,
        world_size=world_size,
        micro_batch_rows=micro_batch_rows,
        rows_at=lambda seen: case.lanes * (case.rows_of_lane + seen // 1500),
        start=start,
        static_shapes=rank % 2 == 1,
        workers=workers,
        lanes=case.lanes,
    ) as loader:
        return [loader.next_step() for _ in range(count)]


def content(steps):
    """Of each step over all ranks: every document with its masks and dropout keys, sorted, and what the ledger sees."""
    return [
        (
            sorted(d for s in ranks for m in s.micro_batches for d in documents_in(m)),
            ranks[0].tokens,
            {term: sum(s.counts[term] for s in ranks) for term in ranks[0].counts},
            wrap_int64(sum(s.row_hash for s in ranks)),
            ranks[0].start,
            ranks[0].end,
        )
        for ranks in zip(*steps, strict=True)
    ]


def documents_in(batch):
    ids, keys, ends = batch.ids_T.tolist(), batch.token_key_T.tolist(), batch.cu_seqlens_S1.tolist()
    segments = [0] * len(ids) if batch.segments_T is None else batch.segments_T.tolist()
    asked = [
        (i, t, term)
        for term, targets in batch.targets.items()
        for i, t in zip(targets.index_M.tolist(), targets.value_M.tolist())
        if t != IGNORE
    ]
    return [
        (
            tuple(ids[a:b]),
            tuple(keys[a:b]),
            tuple(segments[a:b]),
            tuple((i - a, t, term) for i, t, term in asked if a <= i < b),
        )
        for a, b in zip(ends, ends[1:])
        if a < b <= batch.tokens
    ]


def lane_of_document(source, lanes):
    lane_of_shard = np.empty(len(source.samples_per_shard), dtype=int)
    for lane, own in enumerate(deal_shards(source.samples_per_shard, lanes)):
        lane_of_shard[own] = lane
    return np.repeat(lane_of_shard, source.samples_per_shard)


@few
@given(
    case=cases,
    world_size=st.integers(1, 8),
    micro_batch_rows=st.integers(1, 4),
    walked=st.integers(0, 5),
)
def test_all_ranks_rows_are_those_of_one_rank_from_any_position(
    case, world_size, micro_batch_rows, walked
):
    whole = steps_of(case, walked + 2)
    ranks = [
        steps_of(
            case,
            2,
            start=whole[walked].start,
            rank=r,
            world_size=world_size,
            micro_batch_rows=micro_batch_rows,
        )
        for r in range(world_size)
    ]
    assert content(ranks) == content([whole])[walked:]


def allowed_and_refused() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(objective, join) that the configuration takes with mixed pieces, and those that it does not."""
    allowed, refused = [], []
    for objective, join in itertools.product(OBJECTIVES, get_args(Join)):
        # such text is refused where it is read, see below
        if join != "none" and OBJECTIVES[objective].frame == "end":
            continue
        data = {"piece_order": "mixed", "join": join, "lanes": 2}
        try:
            run_with(trained_by(objective)[0], objective, data=data)
        except ConfigError as error:
            assert f"data.join {join} and an objective of pairs" in str(error)
            refused.append((objective, join))
        else:
            allowed.append((objective, join))
    return allowed, refused


ALLOWED, REFUSED = allowed_and_refused()
mixed_cases = st.builds(
    Case,
    **DRAWN,
    cap=st.integers(5, ROW),
    piece_order=st.just("mixed"),
)


def test_only_pairs_refuse_to_be_joined_mixed_or_not():
    has_pairs = [word for word in OBJECTIVES if _settings_of(word).pairs]
    assert {*REFUSED} == {*itertools.product(has_pairs, ["anywhere", "sentences"])}
    assert {objective for objective, _ in ALLOWED} == {*OBJECTIVES}


@pytest.mark.parametrize("join", ["anywhere", "sentences"])
@pytest.mark.parametrize("piece_order", get_args(PieceOrder))
def test_text_with_cls_at_its_end_is_not_joined_mixed_or_not(join, piece_order):
    source = planned("xlnet's", [20] * 12, shards=3)
    source.card = dataclasses.replace(
        source.card, specials=dataclasses.replace(SPECIALS, frame="end")
    )
    shapes = dict(max_tokens_per_document=ROW, row_tokens=ROW, window_documents=4)
    windows = windows_with([source], join=join, piece_order=piece_order, **shapes)
    with pytest.raises(ShardError, match=f"data.join {join}"):
        windows.plan(0)


@pytest.mark.parametrize("objective, join", ALLOWED)
@several
@given(
    case=mixed_cases,
    world_size=st.integers(1, 8),
    micro_batch_rows=st.integers(1, 4),
    walked=st.integers(0, 4),
    past_bad=st.booleans(),
)
def test_mixed_pieces_are_the_same_on_any_ranks_after_any_resume(
    objective, join, case, world_size, micro_batch_rows, walked, past_bad
):
    case = dataclasses.replace(case, objective=objective, join=join)
    whole = steps_of(case, walked + 3)
    # where a checkpoint's run goes on
    start = whole[walked - 1].end if walked else START
    if past_bad:
        # behind steps that were left out: each lane at its next window
        lanes = tuple((window + (row > 0), 0) for window, row in start.lanes)
        start = dataclasses.replace(start, lanes=lanes)
        whole = whole[:walked] + steps_of(case, 3, start=start)
        start = whole[walked].end
        walked += 1

    ranks = [
        steps_of(
            case,
            2,
            start=start,
            rank=r,
            world_size=world_size,
            micro_batch_rows=micro_batch_rows,
        )
        for r in range(world_size)
    ]
    assert content(ranks) == content([whole])[walked : walked + 2]


@pytest.mark.parametrize("objective, join", ALLOWED)
@several
@given(case=mixed_cases, window=st.integers(0, 40))
def test_a_mixed_window_has_the_documents_of_one_that_is_not(objective, join, case, window):
    case = dataclasses.replace(case, objective=objective, join=join)
    mixed = units_of(case, window)
    before = units_of(dataclasses.replace(case, piece_order="documents"), window)
    whole = units_of(dataclasses.replace(case, left_out=()), window)

    flat = [[unit for row in rows for unit in row] for rows in (mixed, before)]
    assert sorted(flat[0]) == sorted(flat[1])
    # what is left out goes from its row, and moves nothing else
    lost = lost_documents(case)
    assert mixed == [[unit for unit in row if not lost & documents_of(unit)] for row in whole]


def units_of(case, window):
    """Of each lane's rows the documents: (label, pieces), a piece (source, document, start, end)."""
    rows = []
    for lane in range(case.lanes):
        plan = windows_with(
            SOURCES[: case.sources],
            weights=[3.0, 2.0, 0.5][: case.sources],
            seed=case.seed,
            phase=1,
            max_tokens_per_document=case.cap,
            join=case.join,
            piece_order=case.piece_order,
            left_out=case.left_out,
            row_tokens=ROW,
            window_documents=case.window_documents,
            lanes=case.lanes,
            pairs=_settings_of(case.objective).pairs,
        ).plan(window, lane=lane)
        assert all(tokens <= ROW for tokens in plan.tokens_R)
        for row in range(plan.rows):
            units = []
            labels = plan.labels(row)
            labels = np.zeros(len(plan.pieces(row))) if labels is None else labels
            for piece, label in zip(plan.pieces(row).tolist(), labels.tolist(), strict=True):
                if label != GOES_ON:
                    units.append((label, []))
                units[-1][1].append(tuple(piece))
            rows.append(units)
    return rows


def documents_of(unit):
    return {piece[:2] for piece in unit[1]}


def lost_documents(case):
    found = set()
    for source, shard in case.left_out:
        ends = np.cumsum(SOURCES[source].samples_per_shard)
        found |= {(source, d) for d in range(ends[shard - 1], ends[shard])}
    return found


def _settings_of(objective):
    settings = OBJECTIVES[objective]
    return settings(**dict.fromkeys(settings.STORED_MODELS, "not read"))


@pytest.mark.parametrize(
    "objective, join, piece_order",
    [
        ("mlm", "sentences", "documents"),
        ("mlm_nsp", "none", "documents"),
        ("mlm_sop", "none", "mixed"),
    ],
)
def test_worker_processes_make_the_same_rows(objective, join, piece_order):
    case = Case(
        sources=3,
        lanes=2,
        cap=40,
        window_documents=12,
        rows_of_lane=2,
        whole_words=True,
        seed=7,
        objective=objective,
        join=join,
        piece_order=piece_order,
        left_out=((0, 5),) if piece_order == "mixed" else (),
    )
    whole = steps_of(case, 7)
    ranks = [
        steps_of(case, 4, start=whole[3].start, rank=r, world_size=2, micro_batch_rows=2, workers=1)
        for r in range(2)
    ]
    assert content(ranks) == content([whole])[3:]


@few
@given(lanes=st.integers(1, 4), ranks=st.integers(1, 8), rows=st.integers(1, 5))
def test_a_rank_meets_the_lanes_of_its_group_only(lanes, ranks, rows):
    case = Case(
        sources=1,
        lanes=lanes,
        cap=ROW,
        window_documents=20,
        rows_of_lane=rows,
        whole_words=False,
        seed=1,
    )
    lane_of = lane_of_document(SOURCES[0], lanes)
    groups = np.gcd(lanes, ranks)
    for rank in range(ranks):
        with pytest.MonkeyPatch.context() as patch:
            read = set()
            patch.setattr(
                MemorySource,
                "read",
                lambda source, d, read=read: read.add(d) or source.documents[d],
            )
            steps_of(case, 2, rank=rank, world_size=ranks)
        assert {lane_of[d] * groups // lanes for d in read} <= {rank * groups // ranks}


@pytest.mark.parametrize("piece_order", get_args(PieceOrder))
@pytest.mark.parametrize("join", get_args(Join))
@several
@given(
    lanes=st.integers(1, 4),
    window_documents=st.integers(1, 60),
    cap=st.integers(3, ROW),
    seed=st.integers(0, 99),
)
def test_every_lane_shows_every_token_of_its_shards_once_an_epoch(
    join, piece_order, lanes, window_documents, cap, seed
):
    windows = windows_with(
        SOURCES,
        weights=[3.0, 2.0, 0.5],
        seed=seed,
        phase=0,
        max_tokens_per_document=cap,
        join=join,
        piece_order=piece_order,
        row_tokens=ROW,
        window_documents=window_documents,
        lanes=lanes,
    )
    # of a joined document the frame may be left out
    shown = slice(None) if join == "none" else slice(1, -1)
    for lane in range(lanes):
        own = [np.flatnonzero(lane_of_document(s, lanes) == lane).tolist() for s in SOURCES]
        count = next(
            k
            for k in range(10**6)
            if all(n >= len(o) for n, o in zip(windows.documents_before(k), own))
        )
        # of every token of every document, how often it came
        times = [[np.zeros(n, dtype=int) for n in source.lengths] for source in SOURCES]
        for k in range(count):
            for source, document, start, end in windows.plan(k, lane=lane).pieces_P4.tolist():
                times[source][document][start:end] += 1
        for documents, found, after in zip(
            own, times, windows.documents_before(count), strict=True
        ):
            epochs, rest = divmod(after, len(documents))
            once = {epochs: len(documents) - rest, **({epochs + 1: rest} if rest else {})}
            assert all(len(set(found[d][shown])) == 1 for d in documents)
            assert Counter(int(found[d][1]) for d in documents) == Counter(once)
            assert not any(found[d].any() for d in set(range(len(found))) - {*documents})


@few
@given(
    weights=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4),
    lengths=st.lists(st.integers(3, 30), min_size=4, max_size=4),
    lanes=st.integers(1, 3),
    first=st.integers(0, 10**12),
)
def test_any_hundred_windows_hold_the_mixture_within_half_a_percent(weights, lengths, lanes, first):
    sources = [planned(f"s{i}", [n] * 97, shards=6) for i, n in enumerate(lengths[: len(weights)])]
    windows = windows_with(
        sources,
        weights=weights,
        seed=1,
        phase=0,
        max_tokens_per_document=30,
        row_tokens=ROW,
        window_documents=64,
        lanes=lanes,
    )
    tokens = np.zeros(len(sources))
    for k in range(first, first + 100):
        pieces = windows.plan(k, lane=k % lanes).pieces_P4
        tokens += np.bincount(
            pieces[:, 0], weights=pieces[:, 3] - pieces[:, 2], minlength=len(sources)
        )
    assert np.abs(tokens / tokens.sum() - np.array(weights) / sum(weights)).max() < 0.005


def within_five_sigma(count, total, share):
    return abs(count - total * share) <= 5 * np.sqrt(total * share * (1 - share)) + 1e-9


@few
@given(
    share=st.floats(0.01, 0.9),
    random_share=st.floats(0.0, 0.5),
    keep_share=st.floats(0.0, 0.5),
    seed=st.integers(0, 2**40),
    window=st.integers(0, 10**9),
    whole_words=st.booleans(),
)
def test_masks_have_their_shares_spare_specials_and_are_drawn_for_each_row_alone(
    share, random_share, keep_share, seed, window, whole_words
):
    ask = build_objective(
        MlmConfig(
            mask_share=share,
            random_share=random_share,
            keep_share=keep_share,
            whole_words=whole_words,
        ),
        vocab_size=64,
        specials=SPECIALS,
        words=EDGES,
    )
    ids = np.random.default_rng(seed).integers(0, 64, 8000)
    one, other = (ask.mask(ids, generator(seed, "mlm", 0, window, row)) for row in (5, 6))
    ordinary = ids < 59
    spread = np.bincount(EDGES.words(ids), weights=ordinary) if whole_words else ordinary
    for question in (one, other):
        asked, target = question.targets["mlm"]
        shown = question.ids[asked]
        assert (target == ids[asked]).all() and ordinary[asked].all()
        assert (np.delete(question.ids, asked) == np.delete(ids, asked)).all()
        assert (ordinary | (ids == question.ids)).all() and set(shown[shown != 63]) <= set(
            range(59)
        )
        assert abs(len(asked) - share * ordinary.sum()) <= 5 * np.sqrt(
            (spread**2).sum() * share * (1 - share)
        )
        assert within_five_sigma((shown == 63).sum(), len(asked), 1 - random_share - keep_share)
        assert within_five_sigma(
            (shown == target).sum(), len(asked), keep_share + random_share / 59
        )
    both = len(np.intersect1d(one.targets["mlm"].index, other.targets["mlm"].index))
    assert abs(both - share**2 * ordinary.sum()) <= 5 * np.sqrt(
        (spread**2).sum() * share**2 * (1 - share**2)
    )


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_of_neighbouring_rows_are_uncorrelated(whole_words):
    ask = build_objective(
        MlmConfig(whole_words=whole_words), vocab_size=64, specials=SPECIALS, words=EDGES
    )
    ids = np.full(64, 3)  # each a word of its own
    asked = np.zeros((2000, 64))
    for row in range(2000):
        asked[row, ask.mask(ids, generator(1, "mlm", 0, 0, row)).targets["mlm"].index] = 1
    between = np.corrcoef(asked.T)[np.triu_indices(64, 1)]  # of places, over rows
    neighbours = np.corrcoef(asked[:-1].ravel(), asked[1:].ravel())[0, 1]
    assert np.abs(between).max() < 5 / np.sqrt(2000) and abs(neighbours) < 5 / np.sqrt(asked.size)


def test_phase_lane_window_and_row_each_give_masks_of_their_own():
    source = in_memory(
        "same", [np.array([60, *range(30), 61])] * 64, shards=4
    )  # two documents fill a row
    asked = []
    for phase, lanes in ((0, 1), (0, 2), (1, 1), (1, 2)):
        with loader_with(
            [source],
            phase=phase,
            max_tokens_per_document=32,
            row_tokens=ROW,
            window_documents=8,
            masker=build_objective(MlmConfig(), vocab_size=64, specials=SPECIALS),
            rows_at=lambda _: 12,
            lanes=lanes,
        ) as loader:
            asked += [
                tuple(m.targets["mlm"].index_M.tolist()) for m in loader.next_step().micro_batches
            ]
    assert len(set(asked)) == len(asked) == 48
