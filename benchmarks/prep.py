"""Text to MDS shards end to end on two cores, ours beside MDSWriter + a Hugging Face tokenizer per document, in one run.

    python benchmarks/prep.py CORPUS_FOLDER --tokenizer corpus/tokenizer.json --megabytes 500 --against-megabytes 20

CORPUS_FOLDER holds *.jsonl with the key text. Ours is the command data-prep prepare with --processes processes (start-up
and checks included) on the files one after the other, gone through as often as --megabytes asks. The other is what
people usually write, in one process: json.loads, tokenizer(text) of transformers, MDSWriter.write; on the first
--against-megabytes of every file in equal shares, start-up left out. Both hash their shards with SHA-256. Rates are by the
clock and by CPU time, which says what cores that nobody else uses would do. At the end one process of ours is taken
apart: where the CPU time of a token goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import readers, shards, tokenization, worker
from data_prep.config import JsonlSource
from data_prep.ledger import open_ledger
from data_prep.segments import Part, segments_of
from encoder.data.shard_format import read_card, special_ids_of

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


def main() -> None:
    """Prints a line a side, the ratio, and the profile."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("corpus", type=Path)
    asked.add_argument("--tokenizer", type=Path, required=True)
    asked.add_argument("--megabytes", type=int, default=500)
    asked.add_argument("--against-megabytes", type=int, default=20)
    asked.add_argument("--processes", type=int, default=2)
    asked.add_argument("--out", type=Path, help="a folder for the shards (the system's for temporary files)")
    asked.add_argument("--json", type=Path, help="also write the numbers here")
    args = asked.parse_args()
    files = sorted(args.corpus.glob("*.jsonl"))
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        folder = Path(scratch)
        our = ours(files, args.tokenizer, folder, megabytes=args.megabytes, processes=args.processes)
        their = theirs(files, args.tokenizer, folder, megabytes=args.against_megabytes)
        stages = profile(files, args.tokenizer, folder)
    for name, took in ((f"data-prep prepare, {args.processes} processes", our), ("tokenizer + MDSWriter, 1 process", their)):
        print(f"{name:<34} {took.tokens / 1e6:7.1f} Mtok in {took.seconds:5.1f} s, {took.cpu_seconds:5.1f} s of CPU: "
              f"{took.rate:6.2f} Mtok/s, {took.cpu_rate:6.2f} Mtok/CPU-s")
    print(f"ratio {our.rate / their.rate:.1f}; by CPU time {args.processes * our.cpu_rate / their.cpu_rate:.1f}")
    whole = sum(stages.values())
    print(f"one process of ours, {1e3 / whole:.1f} Mtok/CPU-s; ns a token:")
    for name, spent in stages.items():
        print(f"  {name:<28} {spent:6.1f}   {100 * spent / whole:4.1f} %")
    if args.json:
        args.json.write_text(json.dumps({"ours": dataclasses.asdict(our), "theirs": dataclasses.asdict(their),
                                         "ratio": our.rate / their.rate, "nanoseconds_per_token": stages}, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Took:
    """Tokens written, and the time that they took."""

    tokens: int
    seconds: float
    cpu_seconds: float                 # of all processes

    @property
    def rate(self) -> float:
        """Mtok/s by the clock."""
        return self.tokens / self.seconds / 1e6

    @property
    def cpu_rate(self) -> float:
        """Mtok per CPU-second."""
        return self.tokens / self.cpu_seconds / 1e6


def ours(files: list[Path], tokenizer: Path, folder: Path, *, megabytes: int, processes: int) -> Took:
    """The command."""
    copies, copied = [], 0         # not links: one file under two names is refused
    for number, file in enumerate(itertools.cycle(files)):
        if copied >= megabytes * 1e6:
            break
        copies.append(folder / f"{number:04}.jsonl")
        shutil.copyfile(file, copies[-1])
        copied += file.stat().st_size
    config = {"tokenizer": str(tokenizer.resolve()), "root": str(folder), "out": str(folder / "ours"), "processes": processes,
              "sources": [{"name": "all", "format": "jsonl", "files": [copy.name for copy in copies]}]}
    (folder / "prep.yaml").write_text(json.dumps(config))
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "data_prep", "prepare", str(folder / "prep.yaml")], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    tokens = read_card(folder / "ours/all/train").recipe["counts"]["tokens"]
    shutil.rmtree(folder / "ours")
    return Took(tokens=tokens, seconds=seconds,
                cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def theirs(files: list[Path], tokenizer_json: Path, folder: Path, *, megabytes: int) -> Took:
    """The usual loop."""
    from streaming import MDSWriter
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json))
    lines, tokens = list(first_lines(files, int(megabytes * 1e6 / len(files)))), 0
    began, cpu_began = time.perf_counter(), time.process_time()
    with MDSWriter(columns={"input_ids": "ndarray:uint16"}, out=str(folder / "theirs"), hashes=["sha256"]) as out:
        for line in lines:
            ids = np.array(tokenizer(json.loads(line)["text"])["input_ids"], np.uint16)
            out.write({"input_ids": ids})
            tokens += len(ids)
    return Took(tokens=tokens, seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu_began)


def first_lines(files: list[Path], file_bytes: int) -> Iterator[bytes]:
    """Whole lines from the beginning of each file, about `file_bytes` of each."""
    for file in files:
        with open(file, "rb") as f:
            yield from itertools.takewhile(lambda _: f.tell() <= file_bytes, iter(f.readline, b""))


def profile(files: list[Path], tokenizer: Path, folder: Path) -> dict[str, float]:
    """Nanoseconds of CPU time a token by stage, in this process, on every file once."""
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

    for stage, places in STAGES.items():
        for owner, name in places:
            setattr(owner, name, timed(stage, getattr(owner, name)))
    vocab_size, specials = special_ids_of(tokenizer)
    job = worker.EncodeJob(tokenizer_json=str(tokenizer), cls_id=specials.cls_id, sep_id=specials.sep_id,
                           dtype="uint16" if vocab_size <= 2**16 else "uint32", max_tokens_per_document=8192,
                           held_out_share=0.01, shard_bytes=2**26, compression=None, stop_on_error=True)
    tokenization.one_thread_a_process()
    source = JsonlSource(name="all", files=tuple(str(file.resolve()) for file in files))
    tokens = 0

    def count(done: worker.Done) -> None:
        nonlocal tokens
        tokens += done.tokens

    maker = worker.SegmentMaker(job, count)
    with open_ledger(folder / "taken_apart", Part()) as ledger:
        ledger.begin({}, alone=True)
        for segment in segments_of(source, readers.find_files(source, Path("/")), shard_bytes=2**26):
            maker(worker.SegmentJob(source=source, encoder="fastokens", segment=segment, part=Part(), folder=str(ledger.out),
                                    made_from_sha256=""))
        ledger.discard()
    return {stage: seconds / tokens * 1e9 for stage, seconds in spent.items()}


if __name__ == "__main__":
    main()
