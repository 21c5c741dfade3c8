"""Blocks to pieces on every core: results come back in the order of the blocks, however many processes work."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

from data_prep.readers import Block, parse
from data_prep.tokenization import EncoderName, Pieces, TextEncoder, encode_pieces, one_thread_a_process
from encoder.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What a process must know to turn blocks into pieces."""

    tokenizer_json: str
    encoder: EncoderName
    cls_id: int
    sep_id: int
    dtype: str
    max_tokens_per_document: int
    held_out_share: float
    stop_on_error: bool


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One block done."""

    pieces: Pieces | None         # None: no document was good
    documents: int                # good ones
    left_out: Counter[str]
    problem: str | None           # the first bad line, as a sentence
    file_bytes: int


class BlockEncoder:
    """Parses and encodes blocks in this process."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self._encoder = TextEncoder(Path(job.tokenizer_json), job.encoder)

    def __call__(self, block: Block) -> Encoded:
        job, parsed = self._job, parse(block)
        pieces = None
        if parsed.texts and not (parsed.problem and job.stop_on_error):
            pieces = encode_pieces(self._encoder, parsed.texts, cls_id=job.cls_id, sep_id=job.sep_id,
                                   dtype=np.dtype(job.dtype), held_out_share=job.held_out_share,
                                   max_tokens_per_document=job.max_tokens_per_document)
        return Encoded(pieces=pieces, documents=len(parsed.texts), left_out=parsed.left_out, problem=parsed.problem,
                       file_bytes=block.file_bytes)


class EncoderPool:
    """Several processes (or none besides this one) that encode blocks; at most two blocks wait for each."""

    def __init__(self, job: EncodeJob, processes: int) -> None:
        self._processes = processes
        one_thread_a_process()
        if processes == 1:
            self._here, self._pool = BlockEncoder(job), None
        else:
            # spawn: a forked copy of a process with threads (streaming, arrow) can hang
            self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start,
                                             initargs=(job,))

    def encoded(self, blocks: Iterable[Block]) -> Iterator[Encoded]:
        """The blocks' results in order. Raises UserError when a process dies."""
        if self._pool is None:
            yield from map(self._here, blocks)
            return
        waiting: deque[Future[Encoded]] = deque()
        try:
            for block in blocks:
                waiting.append(self._pool.submit(_encode, block))
                if len(waiting) > 2 * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a process that encodes text died, most likely for want of memory. "
                            f"Run it again with fewer processes than {self._processes}: processes=N.") from error

    def close(self) -> None:
        """End the processes; blocks not yet begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_this_process: dict[str, BlockEncoder] = {}


def _start(job: EncodeJob) -> None:
    """In a new process: leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_thread_a_process()
    _this_process["encoder"] = BlockEncoder(job)


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode(block: Block) -> Encoded:
    return _this_process["encoder"](block)
