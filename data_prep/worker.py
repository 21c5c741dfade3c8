"""Segments to shards on every core: a process reads, parses, encodes and writes a whole segment, and reports it in a line.

Nothing but a few numbers passes between processes, so the cores do not wait for one another.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from data_prep.config import Source
from data_prep.ledger import (
    COUNT_DTYPE,
    SIDE_FILES,
    SPLITS,
    Counts,
    Ledger,
    Record,
    side_file,
    write_record,
)
from data_prep.long_texts import MOST_UNCUT_CHARS
from data_prep.readers import Block, InputFile, Parsed, ReadError, numbered, parse, read_blocks
from data_prep.readers.blocks import SKIP, without_skip
from data_prep.segments import Part, Segment, Stretch
from data_prep.sentences import FoundSentences, SentenceSplitter
from data_prep.shards import ShardWriter, text_stretches
from data_prep.tokenization import (
    EncoderName,
    Pieces,
    TextEncoder,
    encode_pieces,
    one_thread_a_process,
)
from encoder.base.errors import ConfigError, ShardError, UserError
from encoder.base.files import write_atomic
from encoder.base.log import warn_once
from encoder.base.main_script import without_main_script
from encoder.base.stopping import STOP_SIGNALS
from encoder.base.tokenizer_json import SpecialIds
from encoder.data.shard_format import lengths_dtype

# also where one process is asked for; a test that looks into its work has it in its own
IN_CHILDREN = True
# real text for the check of the encoder, per source
CHECK_DOCUMENTS = 200
CHECK_CHARS = 500_000
MOST_CHECK_CHARS = 20_000  # of one document
# documents of a part of a file, of which none is good: the file is of another kind
MANY = 100
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What a process must know to encode: the same for all sources."""

    tokenizer_json: str
    specials: SpecialIds
    dtype: str
    max_tokens_per_document: int
    held_out_share: float
    shard_bytes: int
    compression: str | None
    stop_on_error: bool
    max_document_bytes: int
    sentence_language: str | None  # None: sentences are not asked for


@dataclass(frozen=True, kw_only=True)
class SegmentJob:
    """One segment to be made."""

    source: Source
    encoder: EncoderName
    segment: Segment
    part: Part
    folder: str  # OUT/NAME
    made_from_sha256: str
    read_ahead: bool = False  # a core has nothing to do: a thread parses the next block


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """Some short documents from the beginning of a file, for the check of the encoder."""

    source: Source
    file: InputFile


@dataclass(frozen=True, kw_only=True)
class At:
    """Where a process is, said before it encodes a block: should it die there, the sentence names the place."""

    place: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """What one block brought, for the progress bar."""

    file_bytes: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The answer to a SampleJob."""

    texts: list[str]


class SegmentMaker:
    """Makes segments in this process."""

    def __init__(self, job: EncodeJob, tell: Callable[[Done | At | Sample], None]) -> None:
        self._job, self._tell = job, tell
        self.place = ""  # where it is, for messages
        self._encoders: dict[EncoderName, TextEncoder] = {}
        self._splitter: SentenceSplitter | None = None

    def encoder(self, name: EncoderName) -> TextEncoder:
        """Loaded once (0.3 s). Raises ShardError."""
        if name not in self._encoders:
            self._encoders[name] = TextEncoder(Path(self._job.tokenizer_json), name)
        return self._encoders[name]

    def _sentences(self, pieces: Pieces) -> FoundSentences | None:
        """Where the sentences of the pieces end, where that is asked for."""
        language = self._job.sentence_language
        if language is None:
            return None
        self._splitter = self._splitter or SentenceSplitter(
            Path(self._job.tokenizer_json), language=language
        )
        begins_P, ends_P = text_stretches(pieces.lengths_P, self._job.specials)
        return self._splitter(pieces.ids_T, begins_P, ends_P)

    def __call__(self, asked: SegmentJob | SampleJob) -> None:
        """From files to a finished segment in the ledger, or to a Sample. Raises UserError, OSError for the disk."""
        if isinstance(asked, SampleJob):
            self._tell(self._sample(asked))
        else:
            self._make(asked)

    def _sample(self, asked: SampleJob) -> Sample:
        """The first block of a file. Raises UserError where all of it lacks the column; bad lines are told later, in place."""
        texts: list[str] = []
        try:
            with _memory_told(self):
                self._say_place(asked.file, None)
                blocks = self._blocks(asked.source, Stretch(file=asked.file))
                for block in itertools.islice(blocks, 1):
                    parsed = parse(block)
                    self._check_column(parsed)
                    short = [text for text in parsed.texts if len(text) < MOST_CHECK_CHARS]
                    texts = short[:CHECK_DOCUMENTS]
        except ReadError as error:
            # what has a cause may be read at the next try; without one the file itself is wrong
            if self._job.stop_on_error and error.__cause__ is None:
                raise

        # as many texts as together stay within CHECK_CHARS
        ends = list(itertools.accumulate(map(len, texts)))
        return Sample(texts=texts[: sum(end <= CHECK_CHARS for end in ends)])

    def _check_column(self, parsed: Parsed) -> None:
        """A column that no document has is told before hours of other sources. Raises ConfigError."""
        if self._job.stop_on_error and not parsed.texts and parsed.left_out["no text"]:
            raise ConfigError(parsed.problem)

    def _make(self, asked: SegmentJob) -> None:
        with Ledger(Path(asked.folder)).making(asked.segment, asked.part) as folder:
            counts = Counts()
            out = _Splits(folder, self._job)
            with _unchanged(asked.segment), _memory_told(self):
                self._read(asked, out, counts)
            shards = out.finish()
            counts.tokens = sum(out.tokens.values())

            # a segment that lost a document or a token never becomes a finished one
            counts.check()
            stretches = [s.described() for s in asked.segment.stretches]
            write_record(
                folder,
                Record(
                    made_from_sha256=asked.made_from_sha256,
                    stretches=stretches,
                    counts=counts,
                    tokens=out.tokens,
                    shards=shards,
                ),
            )

    def _read(self, asked: SegmentJob, out: _Splits, counts: Counts) -> None:
        """The stretches of a segment, each to its end or to where it breaks."""
        encoder = self.encoder(asked.encoder)
        for stretch in asked.segment.stretches:
            # of this stretch: documents taken, those that should not be there, the first of these
            good, problems, first_problem, broken = 0, 0, "", ""
            try:
                for block, parsed in self._parsed(asked, stretch):
                    self._encode(encoder, stretch.file, block, parsed, out, counts)
                    good += len(parsed.texts)
                    problems += parsed.problems
                    first_problem = first_problem or parsed.problem or ""
            # what came before the break is kept
            except ReadError as error:
                if self._job.stop_on_error:
                    raise
                broken = without_skip(str(error))
                # a file of which nothing can be read is said and counted once, by its beginning
                if not (error.whole_file and stretch.begin):
                    warn_once(f"left out, with an unknown number of documents: {broken}")
                    counts.leave_out({"rest of a broken file": 1})

            # no good document at all: the file is of another kind. In a part of a file, which has
            # an end, a few bad lines prove nothing, so it takes MANY
            if not broken and not good and problems >= (1 if stretch.end is None else MANY):
                broken = f"none of {problems:,} documents could be read: {first_problem}"
                warn_once(f"{stretch.file.place}: {broken}")
            if broken:
                counts.add_bad_file(stretch.file.name, broken)

    def _parsed(self, asked: SegmentJob, stretch: Stretch) -> Iterator[tuple[Block, Parsed]]:
        """The blocks of a stretch and what is in them.

        The place of each is told before it is worked on; read ahead, before it is encoded.
        """
        self._say_place(stretch.file, None)
        blocks = self._blocks(asked.source, stretch)
        if not asked.read_ahead:
            for block in blocks:
                self._say_place(stretch.file, block)
                yield block, parse(block)
            return
        with made_ahead((block, parse(block)) for block in blocks) as pairs:
            for block, parsed in pairs:
                self._say_place(stretch.file, block)
                yield block, parsed

    def _blocks(self, source: Source, stretch: Stretch) -> Iterator[Block]:
        return read_blocks(
            source,
            stretch.file,
            stretch.begin,
            stretch.end,
            most_bytes=self._job.max_document_bytes,
        )

    def _say_place(self, file: InputFile, block: Block | None) -> None:
        self.place = file.place
        if block:
            behind = f" behind byte {block.counted_from:,}" if block.counted_from else ""
            self.place += f"{behind}, {block.kind_of_row} {block.first:,} and on"
        self._tell(At(place=self.place))

    def _encode(
        self,
        encoder: TextEncoder,
        file: InputFile,
        block: Block,
        parsed: Parsed,
        out: _Splits,
        counts: Counts,
    ) -> None:
        """The texts of a block into the shards.

        encoder: gives their ids
        file: in which the block lies
        block: that was parsed
        parsed: what is in it; a text that no encoder takes is taken out
        out: takes the pieces
        counts: take the documents
        """
        job, tokens = self._job, 0
        # from the last to the first: taking a text out moves those behind it
        for number in [
            number
            for number in sorted(parsed.long, reverse=True)
            if not encoder.fits(parsed.texts[number])
        ]:
            text = parsed.texts.pop(number)
            parsed.leave_out(
                "no end of a word",
                f"{parsed.long[number]}: {len(text):,} characters, of which {MOST_UNCUT_CHARS:,} "
                "follow one another without a place to cut between words; needed: prose or code "
                f"with spaces. Leave it out, or {SKIP}.",
            )

        # the message needs the number of the line in its file, which costs reading what lies before
        if parsed.problem and job.stop_on_error:
            raise ConfigError(parse(numbered(block, file)).problem or parsed.problem)
        counts.leave_out(parsed.left_out)
        if parsed.texts:
            pieces = encode_pieces(
                encoder,
                parsed.texts,
                specials=job.specials,
                dtype=np.dtype(job.dtype),
                held_out_share=job.held_out_share,
                max_tokens_per_document=job.max_tokens_per_document,
            )
            out.add(pieces, self._sentences(pieces))
            tokens = len(pieces.ids_T)
            counts.add(
                Counts(
                    documents_read=len(parsed.texts),
                    documents_held_out=pieces.held_out_documents,
                    documents_train=len(parsed.texts) - pieces.held_out_documents,
                    content_tokens=pieces.content_tokens,
                    pieces=len(pieces.lengths_P),
                )
            )
        self._tell(Done(file_bytes=block.file_bytes, documents=len(parsed.texts), tokens=tokens))


@contextlib.contextmanager
def made_ahead(items: Iterator[_Item]) -> Iterator[Iterator[_Item]]:
    """Gives the same items, in their order and with their error; a thread makes each while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:

        def each() -> Iterator[_Item]:
            making = thread.submit(next, items, end)
            while (item := making.result()) is not end:
                making = thread.submit(next, items, end)
                yield cast(_Item, item)

        yield each()


@contextlib.contextmanager
def _memory_told(maker: SegmentMaker) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise UserError(no_memory(maker.place)) from error


def no_memory(place: str) -> str:
    """The sentence about a process that ran out of memory."""
    return (
        f"memory ran out at {place}. Run it again with fewer processes (processes: N), a smaller"
        " max_document_bytes, or more memory; what is finished is kept."
    )


@contextlib.contextmanager
def _unchanged(segment: Segment) -> Iterator[None]:
    """The files are, after what is done inside, what they were when it was planned. Raises ConfigError, also in place of an
    error inside, which a change explains."""
    try:
        yield
    except UserError:
        for stretch in segment.stretches:
            stretch.file.check_unchanged()
        raise
    for stretch in segment.stretches:
        stretch.file.check_unchanged()


class _Splits:
    """The shards and lengths of a segment, train and held out."""

    def __init__(self, folder: Path, job: EncodeJob) -> None:
        self._folder, self._lengths_dtype = folder, lengths_dtype(job.max_tokens_per_document)
        self._writers = {
            split: ShardWriter(
                folder,
                split,
                dtype=np.dtype(job.dtype),
                shard_bytes=job.shard_bytes,
                compression=job.compression,
            )
            for split in SPLITS
        }
        # the contents of side files, by name
        self._side: dict[str, list[np.ndarray]] = {
            side_file(split, kind): []
            for split in SPLITS
            for kind in (SIDE_FILES if job.sentence_language else SIDE_FILES[:1])
        }

    def add(self, pieces: Pieces, sentences: FoundSentences | None) -> None:
        for split, chosen_P in zip(SPLITS, (~pieces.held_out_P, pieces.held_out_P), strict=True):
            # `train` gets the pieces that are not held out
            self._writers[split].add(pieces.ids_T, pieces.lengths_P, chosen_P)
            self._keep(split, "lengths", pieces.lengths_P[chosen_P], self._lengths_dtype)
            if sentences is not None:
                # N sentences: each goes where its piece goes
                chosen_N = np.repeat(chosen_P, sentences.counts_P)
                self._keep(split, "sentence_counts", sentences.counts_P[chosen_P], COUNT_DTYPE)
                self._keep(split, "sentences", sentences.tokens_N[chosen_N], self._lengths_dtype)

    def _keep(self, split: str, kind: str, values: np.ndarray, dtype: np.dtype) -> None:
        self._side[side_file(split, kind)].append(values.astype(dtype))

    def finish(self) -> dict[str, list[dict[str, Any]]]:
        """Everything on the disk, durable; the entries of the shards by split."""
        shards = {split: writer.finish() for split, writer in self._writers.items()}
        for name, parts in self._side.items():
            write_atomic(self._folder / name, b"".join(part.tobytes() for part in parts))
        return shards

    @property
    def tokens(self) -> dict[str, int]:
        return {split: writer.tokens for split, writer in self._writers.items()}


class SegmentPool:
    """Processes that make segments, given out in order: one at least, whose death by native code is a sentence of this one.

    Each hangs on a pipe of its own: the queues of a ProcessPoolExecutor leave semaphores in /dev/shm after a SIGKILL.
    """

    def __init__(self, job: EncodeJob, processes: int) -> None:
        self._job = job
        one_thread_a_process()
        self._processes: dict[connection.Connection, BaseProcess] = {}
        if processes > 1 or IN_CHILDREN:
            # spawn: a forked copy of a process with threads (arrow) can hang
            context = get_context("spawn")
            # they start and load while this process checks the encoder
            for _ in range(processes):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(job, there), daemon=True)
                # a new process must not run the script that started this one
                with without_main_script():
                    process.start()
                there.close()  # so that the end of the process ends the pipe
                self._processes[here] = process

    def sample(self, source: Source, file: InputFile) -> list[str]:
        """Some short documents from the beginning of a file; no process but those of the pool reads what others made."""
        texts: list[str] = []
        self.make([SampleJob(source=source, file=file)], lambda news: texts.extend(news.texts))
        return texts

    def make(self, jobs: Iterable[SegmentJob | SampleJob], tell: Callable[[Any], None]) -> None:
        """All of them; `tell` is called with what is Done, and each Sample. Raises the error of the first that has one."""
        if not self._processes:
            # in this process, without children; where it is now interests nobody
            maker = SegmentMaker(
                self._job, lambda news: None if isinstance(news, At) else tell(news)
            )
            for job in jobs:
                maker(job)
            return
        self._make(enumerate(jobs), tell)

    def _make(
        self, jobs: Iterator[tuple[int, SegmentJob | SampleJob]], tell: Callable[[Any], None]
    ) -> None:
        # every process has one job at most; `places` is for the sentence about one that dies
        idle = list(self._processes)
        busy: dict[connection.Connection, int] = {}
        failed: dict[int, tuple[Exception, str]] = {}
        places = {pipe: "its start" for pipe in idle}
        while True:
            # after a failure nothing new is begun
            while idle and not failed and (job := next(jobs, None)):
                pipe = idle.pop()
                busy[pipe] = job[0]
                places[pipe] = _file_of(job[1]).place
                # dead: reported where its messages are read
                with contextlib.suppress(OSError):
                    pipe.send(job[1])

            # the error to raise is that of the earliest job, whoever failed first.
            # So wait until no earlier job is under way: the same input gives the same message
            if failed and min(failed) < min(busy.values(), default=min(failed) + 1):
                error, trace = failed[min(failed)]
                raise error from None if isinstance(error, UserError) else RuntimeError(trace)
            if not busy:
                return

            # news: where it is (At), what was done (Done, Sample); at a job's end None or an error
            for ready in connection.wait(busy):
                assert isinstance(ready, connection.Connection)
                pipe = ready
                try:
                    news = pipe.recv()
                except (EOFError, OSError) as error:
                    raise UserError(self._how_it_died(pipe, places[pipe])) from error
                if isinstance(news, At):
                    places[pipe] = news.place
                    continue
                if isinstance(news, Done | Sample):
                    tell(news)
                    continue
                number = busy.pop(pipe)
                idle.append(pipe)
                if news:
                    failed[number] = news

    def _how_it_died(self, pipe: connection.Connection, place: str) -> str:
        """A process that ended by itself: by which signal, and where."""
        process = self._processes[pipe]
        process.join(DEATH_SECONDS)
        code, count = process.exitcode, len(self._processes)
        how = f"with code {code}"
        if code and -code in set(signal.Signals):
            how = f"by signal {-code} ({signal.Signals(-code).name})"
        # SIGKILL comes from the kernel when memory is out, and native code aborts (SIGABRT)
        memory = code in (-signal.SIGKILL, -signal.SIGABRT, 1, None)
        why = ""
        if memory:
            why = ", most likely for want of memory"
        fewer = f"fewer processes than {count} (processes: N), " if count > 1 else ""
        return (
            f"a process that encodes text died {how} at {place}{why}. Run it again with {fewer}a"
            " smaller max_document_bytes, more memory, or without this file; what is finished is"
            " kept."
        )

    def close(self) -> None:
        """End the processes; segments that are not finished are given up."""
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()
        self._processes = {}


def _file_of(job: SegmentJob | SampleJob) -> InputFile:
    if isinstance(job, SampleJob):
        return job.file
    return job.segment.stretches[0].file


DEATH_SECONDS = 10.0  # until the exit code of a process that closed its pipe is known


def _work(job: EncodeJob, pipe: connection.Connection) -> None:
    """In a new process: leave Ctrl-C to the parent, and end when the parent is killed. Sends what is Done; after each
    segment None, or an error and its trace."""
    for number in STOP_SIGNALS:  # they reach whole process groups: the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_thread_a_process()
    maker = SegmentMaker(job, pipe.send)
    # loaded while the parent checks the encoder; without it the job says which one to use
    with contextlib.suppress(ImportError, ShardError):
        maker.encoder("fastokens")
    # a pipe that breaks has no parent at its other end, who would hear of it
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked = pipe.recv()
            answer: tuple[Exception, str] | None = None
            try:
                maker(asked)
            except Exception as error:
                answer = error, traceback.format_exc()
            pipe.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    # ready when the parent is gone, after SIGKILL too. sys.exit would end this thread alone
    connection.wait([parent.sentinel])
    os._exit(1)
