"""Shards to steps: deals the planned rows to ranks, has them assembled ahead of time, and says where the run stands.

Everything that leaves this file is a function of (sources, settings, seed, position). The number of ranks, the
micro-batch and the workers decide only who makes a row and when.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from encoder.base.batch import TokenBatch, counts_of
from encoder.base.errors import PassingError, ShardError, UserError
from encoder.base.main_script import without_main_script
from encoder.base.objective import Masker
from encoder.base.rng import generator
from encoder.base.stopping import STOP_SIGNALS
from encoder.data.assembly import (
    Assembled,
    Assembler,
    Dealing,
    RowSpec,
    deal,
    lanes_of,
    wrap_int64,
)
from encoder.data.packing import pack_best_fit
from encoder.data.prefetch import Prefetch
from encoder.data.shard_format import Card
from encoder.data.shards import Source
from encoder.data.windows import (
    DataOrder,
    RowGeometry,
    WindowPlan,
    Windows,
    check_lengths,
    lay_rows,
    pieces_of,
)

MICRO_BATCHES_AHEAD = 4  # per worker; a micro-batch of 98,304 tokens holds 3 MB


@dataclass(frozen=True, kw_only=True)
class DataPosition:
    """Where a phase stands: the next row of each lane, as (window, row); none at the beginning."""

    lanes: tuple[tuple[int, int], ...] = ()
    phase_tokens: int = 0  # tokens without padding of all rows before


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One step: this rank's micro-batches, and what every rank knows of the whole step without asking."""

    micro_batches: list[TokenBatch]  # this rank's; the same number on every rank
    rows: int  # all ranks
    tokens: int  # all ranks, without padding
    counts: dict[str, int]  # targets of each loss term, this rank
    row_hash: int  # this rank; int64, summed over ranks it does not depend on the dealing
    start: DataPosition
    end: DataPosition
    fill: float  # share of the rows' capacity that is tokens


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Who makes the micro-batches ahead of time: nothing here changes them."""

    processes: int = 0  # 0: made in this process when they are asked for
    pin_memory: bool = False  # in page-locked memory, from which a GPU copies
    # windows ahead, whose shards are brought to the caches of their sources; 0: none
    prefetch_windows: int = 0


class Loader:
    """The steps of one phase from a position on, without end. Owns worker processes: use it in `with`, or close it.

    An exception in a worker is raised by next_step(), a UserError as it is, others with the worker's traceback; so is
    the death of a worker.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        order: DataOrder,
        geometry: RowGeometry,
        masker: Masker,
        dealing: Dealing,
        workers: WorkerSettings,
        rows_at: Callable[[int], int],
        start: DataPosition,
    ) -> None:
        """Starts the workers.

        sources: of one tokenizer; order.weights has one of each
        order: which document comes when
        geometry: how long rows and pieces are
        masker: how a row is masked
        dealing: which rank this is, and how its rows are laid out
        workers: who makes the micro-batches
        rows_at: rows of the next step, from the phase's tokens so far, as many of each lane; only the main process calls
            it, and ahead of time
        start: where the phase stands
        """
        check_lengths(geometry, pairs=masker.pairs)
        # a window may touch the last group of one epoch and the first of the next
        for source in sources:
            source.open_shards = max(source.open_shards, 2 * (order.shuffle_shards or 0))
        assembler = Assembler(
            sources=sources,
            masker=masker,
            seed=order.seed,
            geometry=geometry,
            micro_batch_rows=dealing.micro_batch_rows,
            static_shapes=dealing.static_shapes,
            shape_step=dealing.shape_step,
        )

        self.sources = sources
        self._row_tokens = geometry.row_tokens
        self._windows = Windows(sources, order=order, geometry=geometry, pairs=masker.pairs)

        # a fresh phase begins at row 0 of window 0 in every lane
        places = start.lanes or ((0, 0),) * order.lanes
        assert len(places) == order.lanes, (
            f"a position of {len(places)} lanes in a run of {order.lanes}"
        )
        self._planner = _Planner(
            self._windows,
            start=DataPosition(lanes=places, phase_tokens=start.phase_tokens),
            rows_at=rows_at,
            dealing=dealing,
        )
        self._prefetch: Prefetch | None = None
        if workers.prefetch_windows:
            world = dealing.world
            self._prefetch = Prefetch(
                sources=sources,
                windows=self._windows,
                windows_ahead=workers.prefetch_windows,
                lanes=lanes_of(world.rank, world_size=world.size, lanes=order.lanes),
            )
            self._prefetch.start(places)
        self._iterator = _start(_MicroBatches(assembler), self._planner, workers)
        # also at interpreter exit, before multiprocessing waits for its children:
        # workers do not listen to SIGTERM
        self._finish = weakref.finalize(
            self, getattr(self._iterator, "_shutdown_workers", _nothing)
        )

    def next_step(self) -> StepData:
        """The next step. Waits for the workers where they are behind."""
        # the first micro-batch is asked for before: asking makes the planner plan its step
        first = self._take()
        step = self._planner.steps.popleft()
        made = [first, *(self._take() for _ in range(step.micro_batches - 1))]

        # from the step that was taken, not from the plans ahead of it: those are still to be read
        if self._prefetch:
            self._prefetch.at(step.end.lanes)

        return StepData(
            micro_batches=[m.batch for m in made],
            rows=step.rows,
            tokens=step.tokens,
            counts=counts_of([m.batch for m in made]),
            row_hash=wrap_int64(sum(m.row_hash for m in made)),
            start=step.start,
            end=step.end,
            fill=step.tokens / (step.rows * self._row_tokens),
        )

    def epochs_at(self, position: DataPosition) -> dict[str, float]:
        """How often each source was gone through at a position, by name, counted in whole windows."""
        return self._windows.epochs_before([window for window, _ in position.lanes] or [0])

    def close(self) -> None:
        """End the worker processes; the loader gives no more steps."""
        self._finish()
        if self._prefetch:
            self._prefetch.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> Assembled:
        try:
            made = next(self._iterator)
        except RuntimeError as error:
            if not ("DataLoader worker" in str(error) and "exited unexpectedly" in str(error)):
                raise
            # torch's own words, without a type of their own
            raise PassingError(
                "a loader worker was killed from outside, as a machine short of memory does. Start"
                " again: the run goes on; with fewer loader.workers if it comes back."
            ) from error
        if isinstance(made, UserError):
            raise made
        return made


@dataclass(frozen=True, kw_only=True)
class _PlannedStep:
    rows: int
    tokens: int
    micro_batches: int
    start: DataPosition
    end: DataPosition


class _Planner:
    """Walks over the windows: yields this rank's micro-batches to be made, and keeps the steps they belong to.

    The main process iterates it a few micro-batches ahead. Every rank plans every row, so that all ranks know a step's
    tokens without a word.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        start: DataPosition,
        rows_at: Callable[[int], int],
        dealing: Dealing,
    ) -> None:
        """
        windows: of the phase
        start: where it stands, with a place for each lane
        rows_at: rows of the next step, from the phase's tokens so far
        dealing: which rank this is, and its rows in a micro-batch
        """
        self._lanes = [
            _Lane(windows, lane, window, row) for lane, (window, row) in enumerate(start.lanes)
        ]
        self._position = start
        self._rows_at = rows_at
        self._dealing = dealing
        self.steps: deque[_PlannedStep] = deque()

    def __iter__(self) -> Iterator[list[RowSpec]]:
        while True:
            start, rows = self._position, self._rows_at(self._position.phase_tokens)
            assert rows >= 1 and rows % len(self._lanes) == 0, (
                "a step has as many rows of every lane, at least one"
            )

            # row r of the step comes from lane r mod L; a schedule of masks
            # sees the tokens before each row
            specs, tokens = [], start.phase_tokens
            for number in range(rows):
                spec, row_tokens = self._lanes[number % len(self._lanes)].next_row(number, tokens)
                specs.append(spec)
                tokens += row_tokens

            self._position = DataPosition(
                lanes=tuple(lane.place for lane in self._lanes), phase_tokens=tokens
            )
            if tokens == start.phase_tokens:  # all of it left out
                continue

            mine = deal(
                specs,
                rank=self._dealing.world.rank,
                world_size=self._dealing.world.size,
                micro_batch_rows=self._dealing.micro_batch_rows,
                lanes=len(self._lanes),
            )
            self.steps.append(
                _PlannedStep(
                    rows=rows,
                    tokens=tokens - start.phase_tokens,
                    micro_batches=len(mine),
                    start=start,
                    end=self._position,
                )
            )
            yield from mine


class _Lane:
    """Where one lane stands, and the window it stands in once that was asked for."""

    def __init__(self, windows: Windows, lane: int, window: int, row: int) -> None:
        self._windows, self._lane = windows, lane
        self.place = (window, row)
        self._plan: WindowPlan | None = None

    def next_row(self, number: int, phase_tokens: int) -> tuple[RowSpec, int]:
        """The next row, as row `number` of its step, with its tokens."""
        window, row = self.place
        plan = self._plan or self._windows.plan(window, lane=self._lane)

        # only a stored position can be wrong: row 0 of an empty window is skipped below
        if row > 0 and row >= plan.rows:
            raise ShardError(
                f"row {row} of window {window} does not exist: the window has {plan.rows} rows. "
                "The shards or the data settings are not those of this run."
            )

        while plan.rows == 0:  # a window of fewer than one document
            window += 1
            plan = self._windows.plan(window, lane=self._lane)

        # behind the last row the next window is planned when it is asked for, not before
        if row + 1 == plan.rows:
            self.place, self._plan = (window + 1, 0), None
        else:
            self.place, self._plan = (window, row + 1), plan

        spec = RowSpec(
            address=(*self._windows.address(window, lane=self._lane), row),
            number=number,
            pieces_P4=plan.pieces(row),
            label_P=plan.labels(row),
            phase_tokens=phase_tokens,
        )
        return spec, int(plan.tokens_R[row])


class _MicroBatches(Dataset):
    """What torch's DataLoader asks for a micro-batch, in this process or in a worker."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def __getitem__(self, specs: list[RowSpec]) -> Assembled | UserError:
        try:
            return self._assembler.assemble(specs)
        except UserError as error:
            # returned instead of raised: torch would bury its one line in a traceback
            return error


def _start(
    data: _MicroBatches, planner: _Planner, workers: WorkerSettings
) -> Iterator[Assembled | UserError]:
    """Start processes that make micro-batches in order; 0: they are made when asked for.

    The processes come from a fork server: it was started clean, so they inherit no lock that a thread of torch, gloo or
    NCCL held at that moment, and no registered memory; and it has torch imported already, which a spawned process would
    spend 2 to 4 s on. They do not hear the signals that ask a process to end, which reach whole process groups: the main process
    still has to finish its step. They end when it does.
    """
    context: Any = None
    ahead = None
    if workers.processes:
        ahead = MICRO_BATCHES_AHEAD
        context = multiprocessing.get_context("forkserver")
        # the server imports this module once, torch with it, and forks every worker from that
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        data,
        sampler=planner,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers.processes,
        pin_memory=workers.pin_memory,
        multiprocessing_context=context,
        prefetch_factor=ahead,
        worker_init_fn=_end_with_main_process,
        # its own: the default would draw from the model's
        generator=torch.Generator(),
    )

    # workers inherit which signals are blocked. The tracker starts before, since it unblocks
    # some when it starts (Python 3.10 to 3.12)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with without_main_script():
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_main_process(_worker: int) -> None:
    """Runs in a worker: end it when the main process is killed.

    torch's own watch asks for the parent, which is the fork server, and that one stays while it has workers.
    """

    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        parent.join()
        # at once: an orderly exit would wait for somebody to read the micro-batches in the pipe
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def evaluation_batches(
    *,
    source: Source,
    rows: int,
    seed: int,
    geometry: RowGeometry,
    masker: Masker,
    dealing: Dealing,
) -> list[TokenBatch]:
    """This rank's share of the first documents of a held-out source, as many as fill `rows` rows (or all there are).

    Always the same rows and the same masks for the same geometry and seed, on any number of ranks.

    source: the held-out documents
    rows: over all ranks
    seed: of the run
    geometry: how long rows and pieces are
    masker: how a row is masked
    dealing: which rank this is, and how its rows are laid out
    """
    check_lengths(geometry, pairs=masker.pairs)
    assembler = Assembler(
        sources=[source],
        masker=masker,
        seed=seed,
        geometry=geometry,
        micro_batch_rows=dealing.micro_batch_rows,
        static_shapes=dealing.static_shapes,
        shape_step=dealing.shape_step,
    )

    row_tokens = geometry.row_tokens
    max_tokens = geometry.max_tokens_per_document

    # enough documents to fill the rows, by their cumulative lengths; each has at least one token
    documents = np.arange(min(source.documents, rows * row_tokens))
    lengths = np.minimum(source.lengths[: len(documents)], max_tokens)
    needed = 1 + int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), rows * row_tokens))

    pieces = pieces_of(
        [source],
        [documents[:needed]],
        max_tokens=max_tokens,
        pairs=masker.pairs,
        chance=generator(seed, "pairs", "held_out", source.name),
    )

    # as many first pieces as sum to the rows' capacity. Best fit may spread these over more rows
    # than asked for; the last ones are left out
    fitting = int(np.searchsorted(np.cumsum(pieces.tokens_D), rows * row_tokens, side="right"))
    packing = pack_best_fit(pieces.tokens_D[:fitting], row_tokens)
    plan = lay_rows(pieces, packing, np.arange(min(rows, packing.rows)))

    specs = [
        RowSpec(
            address=("held_out", source.name, row),
            number=row,
            pieces_P4=plan.pieces(row),
            label_P=plan.labels(row),
        )
        for row in range(plan.rows)
    ]
    return [
        assembler.assemble(mine).batch
        for mine in deal(
            specs,
            rank=dealing.world.rank,
            world_size=dealing.world.size,
            micro_batch_rows=dealing.micro_batch_rows,
        )
    ]


def token_counts(source: Source, vocab_size: int, documents: int | None = None) -> np.ndarray:
    """How often each id occurs in the first `documents` documents (default: all), int64 [vocab_size].

    Raises ShardError for an id beyond the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = source.documents
    if documents is not None:
        total = min(documents, total)

    # in stretches of documents: each bincount makes a table of the whole vocabulary
    for first in range(0, total, 1024):
        read = [source.read(d) for d in range(first, min(first + 1024, total))]
        found = np.bincount(np.concatenate(read), minlength=vocab_size)
        if len(found) > vocab_size:
            # bincount grew beyond minlength: some id is too large,
            # and its document is to be named
            document = first + next(
                i for i, ids in enumerate(read) if ids.max(initial=0) >= vocab_size
            )
            raise ShardError(
                f"source {source.name}: document {document:,}, in {source.file_of(document)}, has"
                f" the id {read[document - first].max():,}, beyond the vocabulary of"
                f" {vocab_size:,}. Check with data-prep verify {source.path}, and copy or prepare"
                " the shards again."
            )
        counts += found
    return counts


def check_fits(card: Card, *, vocab_size: int, where: str) -> None:
    """The model has an embedding for every id of the shards. Raises ShardError."""
    if card.vocab_size > vocab_size:
        raise ShardError(
            f"{where} was made with a vocabulary of {card.vocab_size:,}, the model has"
            f" {vocab_size:,}. Set model.vocab_size to at least {card.vocab_size:,}; or, for a"
            " model that is there already, prepare the text with its own tokenizer: data-prep"
            " tokenizer from-hf"
        )


def _as_it_is(made: Any) -> Any:
    return made


def _nothing() -> None:
    pass
