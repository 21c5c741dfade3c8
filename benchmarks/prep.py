"""Text to MDS shards end to end on two cores, ours beside MDSWriter + a Hugging Face tokenizer per document, in one run.

    python launch/bench.py prep [--corpus FOLDER --tokenizer corpus/tokenizer.json] [--megabytes 500] [--against-megabytes 20]
                                [--kind wordpiece]

FOLDER holds *.jsonl with the key text; without it text of this Python environment is collected and a tokenizer of --kind
trained on it.
Ours is the command data-prep prepare with --processes processes (start-up and checks included) on the files one after the
other, gone through as often as --megabytes asks. The other is what people usually write, in one process: json.loads,
tokenizer(text) of transformers, MDSWriter.write; on the first --against-megabytes of every file in equal shares, start-up left
out. Both hash their shards with SHA-256. First both must have made the same ids of the first documents. Rates are by the clock
and by CPU time, which says what cores that nobody else uses would do. At the end one process of ours is taken apart: where the
CPU time of a token goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report
from data_prep import readers, shards, tokenization, worker
from data_prep.config import JsonlSource
from data_prep.environment_corpus import environment_corpus
from data_prep.ledger import open_ledger
from data_prep.segments import Part, segments_of
from data_prep.tokenizer_training import (
    NAMES_OF_KIND,
    TrainingConfig,
    sources_of,
    train_tokenizer,
)
from encoder.base.command import count
from encoder.base.errors import ConfigError, UserError
from encoder.base.tokenizer_json import special_ids_of
from encoder.data.shard_format import read_card
from encoder.data.shards import open_source

# stretch of the work, and the functions that do it; each one's own time, without what it calls of the others
STAGES: dict[str, list[tuple[Any, str]]] = {
    "parse (JSON, checks)": [(worker, "parse")],
    "encode": [(tokenization.TextEncoder, "encode")],
    "held out (hash of the text)": [(tokenization, "is_held_out")],
    "cut and wrap": [(worker, "encode_pieces")],
    "samples": [(shards.ShardWriter, "add")],
    "hash of the shard": [(shards, "_info")],
    "write (fsync)": [(shards.ShardWriter, "_write")],
    "read and the rest": [(worker.SegmentMaker, "__call__")],
}


QUICK = dict(megabytes=1, against_megabytes=0.1, processes=1)
CHECKED_BYTES = 200_000


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--corpus", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; needed with --corpus"
    )
    parser.add_argument(
        "--kind",
        choices=NAMES_OF_KIND,
        default="bpe",
        help="of the tokenizer that is trained; without --tokenizer",
    )
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--against-megabytes", type=float, default=5)
    parser.add_argument("--processes", type=count, default=2)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the shards are written and removed again (the system's for such files)",
    )


def ask(args: argparse.Namespace, report: Report) -> None:
    """Both sides, and where our time goes."""
    if (args.corpus is None) != (args.tokenizer is None):
        raise ConfigError("--corpus and --tokenizer belong together. Give both, or neither.")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        corpus, tokenizer = args.corpus, args.tokenizer
        if corpus is None:
            corpus, tokenizer = folder / "corpus", folder / "tokenizer.json"
            corpus.mkdir()
            environment_corpus(corpus, size_mb=0.5 if args.quick else 8)
            train_tokenizer(
                sources_of(["*.jsonl"]),
                corpus,
                tokenizer,
                TrainingConfig(
                    kind=args.kind, vocab_size=1024 if args.quick else 8192, sample_mb=2
                ),
            )
        files = sorted(corpus.glob("*.jsonl"))
        if not files or not tokenizer.is_file():
            raise ConfigError(
                f"{corpus} holds {len(files)} files *.jsonl, and {tokenizer} is "
                f"{'' if tokenizer.is_file() else 'not '}there; "
                "needed: some, and a tokenizer.json."
            )
        check_same_ids(files, tokenizer, folder)
        our, their = [], []
        # both sides in each round, since the machine's load changes
        for _ in range(1 if args.quick else min(3, args.rounds)):
            our.append(
                ours(files, tokenizer, folder, megabytes=args.megabytes, processes=args.processes)
            )
            their.append(theirs(files, tokenizer, folder, megabytes=args.against_megabytes))
        stages = profile(files, tokenizer, folder)
    sides = {
        f"data-prep prepare, {args.processes} process{'es' * (args.processes > 1)}": our,
        "tokenizer + MDSWriter, 1 process": their,
    }
    rows = [
        [
            name,
            f"{middle(took, 'tokens') / 1e6:.1f}",
            f"{middle(took, 'rate'):.2f}",
            spread(took),
            f"{middle(took, 'cpu_rate'):.2f}",
        ]
        for name, took in sides.items()
    ]
    ratio = statistics.median(a.rate / b.rate for a, b in zip(our, their))
    cpu_ratio = statistics.median(a.cpu_rate / b.cpu_rate for a, b in zip(our, their))
    whole = sum(stages.values())
    report.add(
        "Text to shards" + ("" if args.corpus else ", text of this Python environment"),
        head=["", "Mtok", "Mtok/s", "spread", "Mtok/CPU-s"],
        rows=rows,
        notes=[
            f"ratio {ratio:.1f}; {cpu_ratio:.1f} by CPU time, a core against a core",
            "checked: the same ids of the first documents on both sides",
            f"one process of ours, {1e3 / whole:.1f} Mtok/CPU-s; ns a token:",
            *(
                f"  {name:<28} {spent:6.1f}   {100 * spent / whole:4.1f} %"
                for name, spent in stages.items()
            ),
        ],
        figures={
            "sides": {name: [dataclasses.asdict(t) for t in took] for name, took in sides.items()},
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "nanoseconds_per_token": stages,
        },
    )


def middle(took: list[Took], what: str) -> float:
    """The median."""
    return statistics.median(getattr(t, what) for t in took)


def spread(took: list[Took]) -> str:
    """Of the rate, over the median."""
    rates = [t.rate for t in took]
    return f"{(max(rates) - min(rates)) / statistics.median(rates):.0%}"


def check_same_ids(files: list[Path], tokenizer: Path, folder: Path) -> None:
    """What our command stores of some documents is what transformers' tokenizer makes of them. Raises UserError."""
    from transformers import PreTrainedTokenizerFast

    # short enough to be one piece each
    lines = [line for line in first_lines(files, CHECKED_BYTES // len(files)) if len(line) < 8192]
    (folder / "checked").mkdir()
    (folder / "checked/some.jsonl").write_bytes(b"".join(lines))
    ours(
        [folder / "checked/some.jsonl"],
        tokenizer,
        folder / "checked",
        megabytes=1e-6,
        processes=1,
        keep=True,
    )
    # as bags of documents: held-out ones lie in a split of their own
    found: Counter[bytes] = Counter()
    for split in ("train", "held_out"):
        if (folder / "checked/ours/all" / split).is_dir():
            source = open_source(folder / "checked/ours/all" / split, name=split)
            found.update(source.read(i).tobytes() for i in range(len(source.lengths)))
    encode = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    wanted = Counter(
        np.array(encode(json.loads(line)["text"])["input_ids"], np.uint16).tobytes()
        for line in lines
    )
    if found != wanted:
        raise UserError(
            f"{sum((wanted - found).values())} of {len(lines)} documents have "
            "other ids than transformers' tokenizer gives. Nothing was timed."
        )
    shutil.rmtree(folder / "checked")


@dataclass(frozen=True, kw_only=True)
class Took:
    """Tokens written, and the time that they took."""

    tokens: int
    seconds: float
    cpu_seconds: float  # of all processes

    @property
    def rate(self) -> float:
        """Mtok/s by the clock."""
        return self.tokens / self.seconds / 1e6

    @property
    def cpu_rate(self) -> float:
        """Mtok per CPU-second."""
        return self.tokens / self.cpu_seconds / 1e6


def ours(
    files: list[Path],
    tokenizer: Path,
    folder: Path,
    *,
    megabytes: float,
    processes: int,
    keep: bool = False,
) -> Took:
    """The command."""
    copies, copied = [], 0  # not links: one file under two names is refused
    # the files over and over, until there is enough
    for number, file in enumerate(itertools.cycle(files)):
        if copied >= megabytes * 1e6:
            break
        copies.append(folder / f"{number:04}.jsonl")
        shutil.copyfile(file, copies[-1])
        copied += file.stat().st_size
    config = {
        "tokenizer": str(tokenizer.resolve()),
        "root": str(folder),
        "out": str(folder / "ours"),
        "processes": processes,
        "sources": [{"name": "all", "format": "jsonl", "files": [copy.name for copy in copies]}],
    }
    (folder / "prep.yaml").write_text(json.dumps(config))
    # CPU time of children that have ended: the command and all its processes
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "data_prep", "prepare", str(folder / "prep.yaml")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    tokens = read_card(folder / "ours/all/train").recipe["counts"]["tokens"]
    if not keep:
        shutil.rmtree(folder / "ours")
    return Took(
        tokens=tokens,
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def theirs(files: list[Path], tokenizer_json: Path, folder: Path, *, megabytes: float) -> Took:
    """The usual loop."""
    from streaming import MDSWriter
    from transformers import PreTrainedTokenizerFast

    shutil.rmtree(folder / "theirs", ignore_errors=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json))
    lines, tokens = list(first_lines(files, int(megabytes * 1e6 / len(files)))), 0
    began, cpu_began = time.perf_counter(), time.process_time()
    with MDSWriter(
        columns={"input_ids": "ndarray:uint16"}, out=str(folder / "theirs"), hashes=["sha256"]
    ) as out:
        for line in lines:
            ids = np.array(tokenizer(json.loads(line)["text"])["input_ids"], np.uint16)
            out.write({"input_ids": ids})
            tokens += len(ids)
    return Took(
        tokens=tokens,
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu_began,
    )


def first_lines(files: list[Path], file_bytes: int) -> Iterator[bytes]:
    """Whole lines from the beginning of each file, about `file_bytes` of each."""
    for file in files:
        with open(file, "rb") as f:
            yield from itertools.takewhile(lambda _: f.tell() <= file_bytes, iter(f.readline, b""))


def profile(files: list[Path], tokenizer: Path, folder: Path) -> dict[str, float]:
    """Nanoseconds of CPU time a token by stage, in this process, on every file once."""
    # `stack` has, for each stage that is open, the time of stages inside it
    spent, stack = dict.fromkeys(STAGES, 0.0), []

    def timed(stage: str, real: Callable) -> Callable:
        def call(*words: Any, **more: Any) -> Any:
            began = time.process_time()
            stack.append(0.0)
            try:
                return real(*words, **more)
            finally:
                took = time.process_time() - began
                spent[stage] += took - stack.pop()
                if stack:
                    stack[-1] += took

        return call

    # the functions are replaced in this process for good, so it comes last
    for stage, places in STAGES.items():
        for owner, name in places:
            setattr(owner, name, timed(stage, getattr(owner, name)))
    vocab_size, specials = special_ids_of(tokenizer)
    encoder = tokenization.choose_encoder(tokenizer)
    job = worker.EncodeJob(
        tokenizer_json=str(tokenizer),
        specials=specials,
        dtype="uint16" if vocab_size <= 2**16 else "uint32",
        max_tokens_per_document=8192,
        held_out_share=0.01,
        shard_bytes=2**26,
        compression=None,
        stop_on_error=True,
        max_document_bytes=2**26,
        sentence_language=None,
    )
    tokenization.one_thread_a_process()
    source = JsonlSource(name="all", files=tuple(str(file.resolve()) for file in files))
    tokens = 0

    # only what a block brought counts
    def add(told: worker.At | worker.Done | worker.Sample) -> None:
        nonlocal tokens
        if isinstance(told, worker.Done):
            tokens += told.tokens

    maker = worker.SegmentMaker(job, add)
    with open_ledger(folder / "taken_apart", Part()) as ledger:
        ledger.begin({}, alone=True)
        for segment in segments_of(
            source, readers.find_files(source, Path("/")), shard_bytes=2**26
        ):
            maker(
                worker.SegmentJob(
                    source=source,
                    encoder=encoder,
                    segment=segment,
                    part=Part(),
                    folder=str(ledger.out),
                    made_from_sha256="",
                )
            )
        ledger.discard()
    return {stage: seconds / tokens * 1e9 for stage, seconds in spent.items()}
