"""Feeding, measured: how full rows are, how fast windows are planned and rows made, and what a 2T mixture costs to open.

    python benchmarks/data.py [pack|plan|loader|index2t|memory ...] [--shards FOLDER] [--json FILE]

    pack      fill and speed of best fit decreasing on the real lengths, beside the slow twin of the tests
    plan      a window from its number to its rows: order, lengths, cut, pack, shuffle; and what the time goes to
    loader    read, pack, mask and collate in one process, and in two side by side, in turn
    index2t   60,000 shards and 2 billion documents that are not there: only their index, card and lengths are
    memory    resident memory over 5 million documents, planned and read

FOLDER holds NAME/train as `data-prep prepare configs/prep/four_domains.yaml` makes them. Without a word: all of them.
Rates of one process are given by its own CPU time as well, which neighbours on the machine disturb less.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoder.base.files import write_json
from encoder.data.loader import DataPosition, Loader
from encoder.data.packing import pack_best_fit
from encoder.data.shard_format import (
    INDEX,
    INPUT_IDS,
    LENGTHS,
    SHARD_HASH,
    Card,
    SpecialIds,
    with_content,
    write_card,
    write_lengths,
)
from encoder.data.shards import Source, open_source
from encoder.data.windows import WindowPlan, Windows
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import MlmConfig

DOMAINS, WEIGHTS = ("web", "books", "science", "code"), (0.4, 0.2, 0.2, 0.2)
ROW_TOKENS, WINDOW_DOCUMENTS, MICRO_BATCH_ROWS = 16_384, 8192, 6
LENGTHS_OF_PHASES = (1024, 8192)
SHARDS_2T, DOCUMENTS_2T, TOKENS_2T, SOURCES_2T = 60_000, 2_000_000_000, 2_000_000_000_000, 8


def main() -> None:
    """Runs the asked parts one after the other and prints their figures."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("parts", nargs="*", choices=[*PARTS, []])
    asked.add_argument("--shards", type=Path, default=Path("shards/four_domains"))
    asked.add_argument("--json", type=Path)
    asked.add_argument("--child", help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.child:
        CHILDREN[args.child.partition(":")[0]](args.shards, args.child.partition(":")[2])
        return
    found = {part: PARTS[part](args.shards) for part in args.parts or PARTS}
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], **found}, indent=1) + "\n")


def pack(shards: Path) -> dict[str, Any]:
    """Share of the rows that is tokens, and how long packing alone takes."""
    from tests.reference.packing import best_fit_decreasing

    sources, found = mixture(shards), {}
    print(f"{'longest':>8}{'window':>8}{'pieces':>8}{'fill':>9}{'Mtok/s':>9}{'Mpieces/s':>11}")
    for longest in LENGTHS_OF_PHASES:
        for documents in (4096, 8192, 16_384):
            plans = [windows_of(sources, longest=longest, documents=documents).plan(k) for k in range(12)]
            pieces = [pieces_of(plan, sources) for plan in plans]
            tokens, rows = sum(int(p.sum()) for p in pieces), sum(plan.rows for plan in plans)
            seconds = best_of(3, lambda pieces=pieces: [pack_best_fit(p, ROW_TOKENS) for p in pieces])
            count = sum(map(len, pieces))
            fill, mtok, mpieces = tokens / rows / ROW_TOKENS, tokens / seconds / 1e6, count / seconds / 1e6
            found[f"{longest}, {documents}"] = {"fill": fill, "mtok_per_cpu_second": mtok}
            print(f"{longest:>8,}{documents:>8,}{count // len(plans):>8,}{fill:>9.3%}{mtok:>9,.0f}{mpieces:>11.2f}")
        slow = best_of(1, lambda p=pieces[0]: best_fit_decreasing(p[:8192].tolist(), ROW_TOKENS))
        fast = best_of(3, lambda p=pieces[0]: pack_best_fit(p[:8192], ROW_TOKENS))
        print(f"{longest:>8,}  8,192 pieces: {slow / fast:,.0f} times as fast as looking at every row for every piece")
        found[f"{longest}, times as fast as the slow twin"] = slow / fast
    return found


def plan(shards: Path) -> dict[str, Any]:
    """Whole windows, from number to rows."""
    sources, found = mixture(shards), {}
    for longest in LENGTHS_OF_PHASES:
        windows = windows_of(sources, longest=longest)
        windows.plan(0)
        rate = []
        for first in range(0, 60, 12):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(int(windows.plan(k).tokens_R.sum()) for k in range(first, first + 12))
            rate.append((tokens / (time.perf_counter() - wall) / 1e6, tokens / (time.process_time() - cpu) / 1e6))
        wall, cpu = (statistics.median(r) for r in zip(*rate))
        print(f"pieces up to {longest:>5,}: planning {wall:,.0f} Mtok/s, {cpu:,.0f} by CPU time")
        found[str(longest)] = {"mtok_per_second": wall, "mtok_per_cpu_second": cpu}
        print_profile(lambda windows=windows: [windows.plan(k) for k in range(12)], lines=6)
    return found


def loader(shards: Path) -> dict[str, Any]:
    """Processes that make micro-batches of 98,304 tokens as fast as they can."""
    found: dict[str, Any] = {}
    for longest in LENGTHS_OF_PHASES:
        rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(3):
            for processes in (1, 2):
                made = side_by_side(shards, [f"loader:{longest},{rank},{processes}" for rank in range(processes)])
                rounds[processes].append({key: sum(m[key] for m in made) for key in made[0]})
        one, two = (statistics.median(r["wall"] for r in rounds[n]) for n in (1, 2))
        cpu_one, cpu_two = (statistics.median(r["cpu"] for r in rounds[n]) for n in (1, 2))
        print(f"pieces up to {longest:>5,}: one process {one:.1f} Mtok/s, two {two:.1f}, {two / one:.2f} times; by CPU time "
              f"{cpu_one:.1f} and {cpu_two:.1f}, {cpu_two / cpu_one:.2f} times")
        found[str(longest)] = {"one": one, "two": two, "ratio": two / one, "cpu_ratio": cpu_two / cpu_one, "rounds": rounds}
    with loader_of(mixture(shards), longest=LENGTHS_OF_PHASES[0]) as made:
        made.next_step()
        print_profile(lambda: [made.next_step() for _ in range(8)], lines=12)
    return found


def loader_child(shards: Path, arguments: str) -> None:
    longest, rank, world_size = map(int, arguments.split(","))
    with loader_of(mixture(shards), longest=longest, rank=rank, world_size=world_size) as made:
        made.next_step()
        print("ready", flush=True)
        sys.stdin.readline()
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < 4.0:
            tokens += sum(m.tokens for m in made.next_step().micro_batches)
        print(json.dumps({"wall": tokens / (time.perf_counter() - wall) / 1e6, "cpu": tokens / (time.process_time() - cpu) / 1e6}))


def index2t(shards: Path) -> dict[str, Any]:
    """Opens a mixture of 2 billion documents in a new process, and jumps about in it."""
    del shards
    with tempfile.TemporaryDirectory(prefix="index2t-") as folder:
        write_index2t(Path(folder))
        found = {}
        for sources in (1, SOURCES_2T):
            (made,) = side_by_side(Path(folder), [f"index2t:{sources}"])
            print(f"{made['shards']:,} shards, {made['documents']:,} documents in {sources} sources: opened in "
                  f"{made['open_seconds']:.2f} s, first window after {made['first_seconds']:.2f} s, {made['resident_gb']:.2f} GB "
                  f"resident ({made['import_gb']:.2f} of it imports), {made['private_after_seeks_gb']:.2f} GB of its own after 60 "
                  f"seeks; a seek takes {made['seek_ms']:.0f} ms in the median ({made['seek_cpu_ms']:.0f} by CPU time), "
                  f"{made['slowest_seek_ms']:.0f} at most")
            found[f"{sources} sources"] = made
    return found


def index2t_child(folder: Path, arguments: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    imported = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    paths = sorted(folder.glob("all" if arguments == "1" else "source-*"))
    sources = [open_source(path, name=path.name) for path in paths]
    windows = windows_of(sources, longest=1024, weights=[1.0] * len(sources))
    opened = time.perf_counter()
    windows.plan(0)
    first, seeks, resident = time.perf_counter(), [], psutil.Process().memory_info()
    for k in np.random.default_rng(0).integers(0, 2 * DOCUMENTS_2T // WINDOW_DOCUMENTS, 60).tolist():
        at = time.perf_counter(), time.process_time()
        windows.plan(k)
        seeks.append((1000 * (time.perf_counter() - at[0]), 1000 * (time.process_time() - at[1])))
    print(json.dumps({
        "documents": sum(s.card.documents for s in sources), "shards": sum(len(s.samples_per_shard) for s in sources),
        "open_seconds": opened - begin, "first_seconds": first - begin, "import_gb": imported / 1e9,
        "resident_gb": resident.rss / 1e9, "of_lengths_gb": resident.shared / 1e9, "private_after_seeks_gb": private_gb(),
        "seek_ms": statistics.median(wall for wall, _ in seeks), "seek_cpu_ms": statistics.median(cpu for _, cpu in seeks),
        "slowest_seek_ms": max(seeks)[0]}))


def private_gb() -> float:
    """Resident memory without the pages of mapped files, which the kernel takes back when it needs them."""
    now = psutil.Process().memory_info()
    return (now.rss - now.shared) / 1e9


def write_index2t(folder: Path) -> None:
    """Two billion documents as eight sources, which share one lengths.bin of 500 MB, and as one, whose own is 4 GB: a
    million lengths over and over."""
    per_source, shards = DOCUMENTS_2T // SOURCES_2T, SHARDS_2T // SOURCES_2T
    some = np.clip(np.random.default_rng(0).lognormal(6.3, 1.1, 1_000_000), 3, 8192).astype("<u2")
    for path in (folder / "lengths.bin", folder / "all-lengths.bin"):
        with open(path, "wb") as f:
            for _ in range(per_source // len(some) * (SOURCES_2T if path.name.startswith("all") else 1)):
                f.write(some.tobytes())
    for name, count, documents, lengths in (*((f"source-{i}", shards, per_source, "lengths.bin") for i in range(SOURCES_2T)),
                                            ("all", SHARDS_2T, DOCUMENTS_2T, "all-lengths.bin")):
        (folder / name).mkdir()
        (folder / name / LENGTHS).symlink_to(folder / lengths)
        samples = [len(part) for part in np.array_split(np.empty(documents, dtype=np.bool_), count)]
        write_json(folder / name / INDEX, {"version": 2, "shards": [shard_entry(i, n) for i, n in enumerate(samples)]})
        tokens = int(some.sum(dtype=np.int64)) * (documents // len(some))
        write_card(folder / name, card_of(name, documents=documents, tokens=tokens,
                                          index_sha256=sha256((folder / name / INDEX).read_bytes()).hexdigest()))


def shard_entry(number: int, samples: int) -> dict[str, Any]:
    """A line of index.json as MDSWriter writes it."""
    name, size = f"shard.{number:05d}.mds", 67_000_000
    return {"column_encodings": ["ndarray:uint16"], "column_names": [INPUT_IDS], "column_sizes": [None], "compression": None,
            "format": "mds", "hashes": [SHARD_HASH], "samples": samples, "size_limit": 1 << 26, "version": 2, "zip_data": None,
            "raw_data": {"basename": name, "bytes": size, "hashes": {SHARD_HASH: sha256(name.encode()).hexdigest()}}}


def card_of(name: str, *, documents: int, tokens: int, index_sha256: str = "") -> Card:
    specials = SpecialIds(cls_id=50281, sep_id=50282, pad_id=50283, mask_id=50284, unk_id=50280,
                          all_special=tuple(range(50280, 50285)))
    return Card(source=name, split="train", tokenizer_sha256="0", vocab_size=50368, specials=specials, dtype="uint16",
                documents=documents, tokens=tokens, max_tokens_per_document=8192, index_sha256=index_sha256, lengths_sha256="")


def memory(shards: Path) -> dict[str, Any]:
    """Resident memory of planning and of making rows, each in a new process, every million documents."""
    del shards
    found = {}
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        write_small_documents(Path(folder) / "small")
        for what in ("plan", "rows"):
            (made,) = side_by_side(Path(folder), [f"memory:{what}"])
            found[what] = made["resident_mb"]
            print(f"{what:>5}: resident MB after each of {len(made['resident_mb'])} million documents: "
                  + " ".join(f"{mb:.0f}" for mb in made["resident_mb"]))
    return found


def memory_child(folder: Path, what: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    sources = [open_source(folder / "small", name="small")]
    resident: list[float] = []
    documents = 0
    with loader_of(sources, longest=1024, weights=[1.0]) as made:
        windows = windows_of(sources, longest=1024, weights=[1.0])
        while len(resident) < 5:
            if what == "plan":
                windows.plan(documents // WINDOW_DOCUMENTS)
                documents += WINDOW_DOCUMENTS
            else:
                documents = made.next_step().end.lanes[0][0] * WINDOW_DOCUMENTS
            if documents >= 1_000_000 * (len(resident) + 1):
                resident.append(psutil.Process().memory_info().rss / 1e6)
    print(json.dumps({"resident_mb": resident}))


def write_small_documents(folder: Path, *, documents: int = 100_000) -> None:
    """Documents of 10 to 30 tokens: five million of them are read in a minute, in 50 epochs."""
    from streaming import MDSWriter

    draw = np.random.default_rng(0)
    lengths = draw.integers(10, 31, documents)
    with MDSWriter(columns={INPUT_IDS: "ndarray:uint16"}, out=str(folder), hashes=[SHARD_HASH], size_limit=1 << 18) as out:
        for length in lengths.tolist():
            out.write({INPUT_IDS: draw.integers(0, 50000, length).astype(np.uint16)})
    write_lengths(folder, lengths, max_tokens_per_document=8192)
    write_card(folder, with_content(card_of("small", documents=0, tokens=0), folder, lengths))


def mixture(shards: Path) -> list[Source]:
    return [open_source(shards / name / "train", name=name) for name in DOMAINS]


def windows_of(sources: list[Source], *, longest: int, documents: int = WINDOW_DOCUMENTS, weights: Any = WEIGHTS) -> Windows:
    return Windows(sources=sources, weights=weights, seed=1, phase=0, max_tokens_per_document=longest, row_tokens=ROW_TOKENS,
                   window_documents=documents)


def loader_of(sources: list[Source], *, longest: int, rank: int = 0, world_size: int = 1, weights: Any = WEIGHTS) -> Loader:
    card = sources[0].card
    ids = card.specials
    return Loader(sources=sources, weights=weights, seed=1, phase=0, max_tokens_per_document=longest, row_tokens=ROW_TOKENS,
                  window_documents=WINDOW_DOCUMENTS, corrupt=build_objective(MlmConfig(), vocab_size=card.vocab_size, specials=ids),
                  pad_id=ids.pad_id, cls_id=ids.cls_id, sep_id=ids.sep_id, rank=rank, world_size=world_size,
                  micro_batch_rows=MICRO_BATCH_ROWS, rows_at=lambda _: 4 * MICRO_BATCH_ROWS, start=DataPosition(),
                  static_shapes=True, workers=0)


def pieces_of(plan: WindowPlan, sources: list[Source]) -> np.ndarray:
    """Tokens of a plan's pieces, with the [CLS] and [SEP] that are put back."""
    source, document, start, end = plan.pieces_P4.T
    stored = np.array([sources[s].lengths[d] for s, d in zip(source, document)], dtype=np.int64)
    return end - start + (start > 0) + (end < stored)


def best_of(rounds: int, do: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of some rounds."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        do()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def print_profile(do: Callable[[], Any], *, lines: int) -> None:
    """The functions that hold the time, each without what it calls."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(do)
    stats = pstats.Stats(profile).stats
    total = sum(own for _, _, own, _, _ in stats.values())
    for (path, _, name), (_, calls, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:lines]:
        print(f"    {own / total:6.1%}  {calls:>8,} calls  {Path(path).stem}.{name}")


def side_by_side(shards: Path, children: list[str]) -> list[dict[str, float]]:
    """Processes of this script that begin together once all are ready, and what each printed last."""
    started = [subprocess.Popen([sys.executable, __file__, "--shards", str(shards), "--child", child], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
               for child in children]
    for process in started:
        assert process.stdout.readline() == "ready\n", f"{children} could not start"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


PARTS = {"pack": pack, "plan": plan, "loader": loader, "index2t": index2t, "memory": memory}
CHILDREN = {"loader": loader_child, "index2t": index2t_child, "memory": memory_child}

if __name__ == "__main__":
    main()
