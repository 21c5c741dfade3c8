"""Feeding, measured: how full rows are, how fast windows are planned and rows made, and what a 2T mixture costs to open.

    python launch/bench.py loader [--parts pack,plan,loader,index2t,memory] [--shards FOLDER]

    pack      fill and speed of best fit decreasing on the real lengths, beside the slow twin of the tests, whose rows it must give
    plan      a window from its number to its rows: order, lengths, cut, pack, shuffle; and what the time goes to
    loader    read, pack, mask and collate in one process, and in two side by side, in turn; two must give the rows of one
    index2t   60,000 shards and 2 billion documents that are not there: only their index, card and lengths are (5 GB for a while)
    memory    resident memory over 5 million documents, planned and read

FOLDER holds NAME/train as `data-prep prepare configs/prep/four_domains.yaml` makes them; without it, documents of their lengths and
random ids are written first. Rates of one process are given by its own CPU time as well, which neighbours disturb less.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
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

from benchmarks.options import several_of
from benchmarks.report import Report
from benchmarks.workload import real_lengths
from encoder.base.errors import ConfigError, UserError
from encoder.base.files import write_json
from encoder.base.units import counted
from encoder.base.world import World
from encoder.data.assembly import Dealing
from encoder.data.loader import DataPosition, Loader, WorkerSettings
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
from encoder.data.windows import DataOrder, RowGeometry, WindowPlan, Windows
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import MlmConfig

DOMAINS, WEIGHTS = ("web", "books", "science", "code"), (0.4, 0.2, 0.2, 0.2)
ROOT = Path(__file__).resolve().parents[1]
ROW_TOKENS, WINDOW_DOCUMENTS, MICRO_BATCH_ROWS = 16_384, 8192, 6
LENGTHS_OF_PHASES = (1024, 8192)
SHARDS_2T, DOCUMENTS_2T, TOKENS_2T, SOURCES_2T = 60_000, 2_000_000_000, 2_000_000_000_000, 8


QUICK = dict(parts=["pack", "plan", "loader"], seconds=0.3)


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--parts", type=several_of(*PARTS), default=["pack", "plan", "loader"])
    parser.add_argument(
        "--shards", type=Path, metavar="FOLDER", help="prepared shards of the four domains"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of a count of the loader's")


def ask(args: argparse.Namespace, report: Report) -> None:
    """A table a part."""
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        shards = args.shards
        if shards is None:
            shards = Path(scratch)

            # a quarter of the real lengths for each domain
            for number, name in enumerate(DOMAINS):
                write_documents(
                    shards / name / "train",
                    name,
                    real_lengths(longest=8192)[number :: len(DOMAINS)],
                )
        elif missing := [
            name for name in DOMAINS if not (shards / name / "train" / INDEX).is_file()
        ]:
            raise ConfigError(
                f"--shards {shards} holds no {missing[0]}/train. Make them: "
                "data-prep prepare configs/prep/four_domains.yaml"
            )
        where = "prepared shards" if args.shards else "real lengths, random ids"
        for part in args.parts:
            PARTS[part](shards, report, where=where, args=args)


def pack(shards: Path, report: Report, *, where: str, args: argparse.Namespace) -> None:
    """Share of the rows that is tokens, and how long packing alone takes."""
    from tests.reference.packing import best_fit_decreasing

    sources, found, rows = mixture(shards), {}, []
    for longest in LENGTHS_OF_PHASES:
        # the slow twin looks at every row for every piece, so it gets some of them
        some = pieces_of(windows_of(sources, longest=longest).plan(0), sources)[
            : 2000 if args.quick else 8192
        ]
        # by CPU time, for the same pieces
        began = time.process_time()
        slow = best_fit_decreasing(some.tolist(), ROW_TOKENS)
        slow_seconds, fast = time.process_time() - began, pack_best_fit(some, ROW_TOKENS)
        # rows as lists of pieces, in the same order
        if [
            fast.pieces_P[a:b].tolist() for a, b in zip(fast.row_starts_R1, fast.row_starts_R1[1:])
        ] != slow:
            raise UserError("pack_best_fit gives other rows than its slow twin. Nothing was timed.")
        times = slow_seconds / best_of(3, functools.partial(pack_best_fit, some, ROW_TOKENS))
        for documents in (4096,) if args.quick else (4096, 8192, 16_384):
            plans = [
                windows_of(sources, longest=longest, documents=documents).plan(k)
                for k in range(2 if args.quick else 12)
            ]
            pieces = [pieces_of(plan, sources) for plan in plans]

            # fill = tokens / (rows x row_tokens)
            tokens, opened, count = (
                sum(int(p.sum()) for p in pieces),
                sum(plan.rows for plan in plans),
                sum(map(len, pieces)),
            )
            seconds = best_of(3, functools.partial(pack_all, pieces))
            found[f"{longest}, {documents}"] = {
                "fill": tokens / opened / ROW_TOKENS,
                "mtok_per_cpu_second": tokens / seconds / 1e6,
                "times_the_slow_twin": times,
            }
            rows.append(
                [
                    f"{longest:,}, {documents:,}",
                    f"{count // len(plans):,}",
                    f"{tokens / opened / ROW_TOKENS:.3%}",
                    f"{tokens / seconds / 1e6:,.0f}",
                    f"{count / seconds / 1e6:.2f}",
                    f"{times:,.0f}",
                ]
            )
    report.add(
        f"Packing into rows of {ROW_TOKENS:,}, by CPU time: {where}",
        head=[
            "pieces up to, window",
            "pieces",
            "full",
            "Mtok/s",
            "Mpieces/s",
            "times the slow twin",
        ],
        rows=rows,
        notes=["checked: the rows of the slow twin, which looks at every row for every piece"],
        figures=found,
    )


def plan(shards: Path, report: Report, *, where: str, args: argparse.Namespace) -> None:
    """Whole windows, from number to rows."""
    sources, found, rows, each = mixture(shards), {}, [], 2 if args.quick else 12
    for longest in LENGTHS_OF_PHASES:
        windows = windows_of(sources, longest=longest)
        # what is made once is not timed
        windows.plan(0)

        # five rounds of `each` windows, which are new ones in every round
        rate = []
        for first in range(0, 5 * each, each):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(int(windows.plan(k).tokens_R.sum()) for k in range(first, first + each))
            rate.append(
                (
                    tokens / (time.perf_counter() - wall) / 1e6,
                    tokens / (time.process_time() - cpu) / 1e6,
                )
            )
        wall, cpu = (statistics.median(r) for r in zip(*rate))
        walls = [r[0] for r in rate]
        found[str(longest)] = {
            "mtok_per_second": wall,
            "mtok_per_cpu_second": cpu,
            "profile": profile(functools.partial(plan_all, windows, each), lines=6),
        }
        rows.append(
            [
                f"{longest:,}",
                f"{wall:,.0f}",
                f"{(max(walls) - min(walls)) / wall:.0%}",
                f"{cpu:,.0f}",
            ]
        )
    report.add(
        f"Planning windows of {WINDOW_DOCUMENTS:,} documents: {where}",
        head=["pieces up to", "Mtok/s", "spread", "by CPU time"],
        rows=rows,
        notes=found["1024"]["profile"],
        figures=found,
    )


def loader(shards: Path, report: Report, *, where: str, args: argparse.Namespace) -> None:
    """Processes that make micro-batches of 98,304 tokens as fast as they can."""
    check_two_ranks(mixture(shards))

    # one process and two in turn, each round; `sum` adds what two of them make
    found, table = {}, []
    for longest in LENGTHS_OF_PHASES[:1] if args.quick else LENGTHS_OF_PHASES:
        rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(1 if args.quick else 3):
            for processes in (1, 2):
                made = side_by_side(
                    shards,
                    [
                        f"loader:{longest},{rank},{processes},{args.seconds}"
                        for rank in range(processes)
                    ],
                )
                rounds[processes].append({key: sum(m[key] for m in made) for key in made[0]})
        for n, ran in rounds.items():
            walls, one = [r["wall"] for r in ran], statistics.median(r["wall"] for r in rounds[1])
            wall, cpu = statistics.median(walls), statistics.median(r["cpu"] for r in ran)
            table.append(
                [
                    f"up to {longest:,}, {n} process{'es' * (n > 1)}",
                    f"{wall:.1f}",
                    f"{(max(walls) - min(walls)) / wall:.0%}",
                    f"{cpu:.1f}",
                    f"{wall / one:.2f}",
                ]
            )
        found[str(longest)] = {"rounds": rounds}
    with loader_of(mixture(shards), longest=LENGTHS_OF_PHASES[0]) as one_rank:
        one_rank.next_step()
        profiled = profile(
            lambda: [one_rank.next_step() for _ in range(1 if args.quick else 8)], lines=12
        )
    report.add(
        f"Micro-batches of {MICRO_BATCH_ROWS} rows, read, packed, masked and laid together:"
        f" {where}",
        head=["pieces", "Mtok/s", "spread", "by CPU time", "times one"],
        rows=table,
        notes=["checked: two ranks make the rows of one (hashes)", *profiled],
        figures={**found, "profile": profiled},
    )


def check_two_ranks(sources: list[Source]) -> None:
    """Raises UserError where the rows of two ranks are not those of one."""
    hashes = []
    for world_size in (1, 2):
        total = 0
        for rank in range(world_size):
            with loader_of(
                sources, longest=LENGTHS_OF_PHASES[0], rank=rank, world_size=world_size
            ) as made:
                total += made.next_step().row_hash
        # a sum of hashes, so that the order in which ranks make rows has no say
        hashes.append(total % 2**64)
    if hashes[0] != hashes[1]:
        raise UserError("two ranks make other rows than one. Nothing was timed.")


def loader_child(shards: Path, arguments: str) -> None:
    longest, rank, world_size = map(int, arguments.split(",")[:3])
    counted_seconds = float(arguments.split(",")[3])
    with loader_of(mixture(shards), longest=longest, rank=rank, world_size=world_size) as made:
        made.next_step()
        # all children wait here, so that none is timed while another still starts
        print("ready", flush=True)
        sys.stdin.readline()
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < counted_seconds:
            tokens += sum(m.tokens for m in made.next_step().micro_batches)
        print(
            json.dumps(
                {
                    "wall": tokens / (time.perf_counter() - wall) / 1e6,
                    "cpu": tokens / (time.process_time() - cpu) / 1e6,
                }
            )
        )


def index2t(shards: Path, report: Report, *, where: str, args: argparse.Namespace) -> None:
    """Opens a mixture of 2 billion documents in a new process, and jumps about in it."""
    del shards, where, args
    found, rows = {}, []
    with tempfile.TemporaryDirectory(prefix="index2t-") as folder:
        write_index2t(Path(folder))
        for sources in (1, SOURCES_2T):
            (made,) = side_by_side(Path(folder), [f"index2t:{sources}"])
            found[f"{sources} sources"] = made
            rows.append(
                [
                    counted(sources, "source"),
                    f"{made['open_seconds']:.2f}",
                    f"{made['first_seconds']:.2f}",
                    f"{made['resident_gb']:.2f}",
                    f"{made['private_after_seeks_gb']:.2f}",
                    f"{made['seek_ms']:.0f}",
                    f"{made['seek_cpu_ms']:.0f}",
                    f"{made['slowest_seek_ms']:.0f}",
                ]
            )
    report.add(
        f"{SHARDS_2T:,} shards, {DOCUMENTS_2T:,} documents that are not there",
        head=[
            "",
            "open s",
            "first window s",
            "GB",
            "GB of its own after 60 seeks",
            "seek ms",
            "by CPU time",
            "slowest",
        ],
        rows=rows,
        figures=found,
    )


def index2t_child(folder: Path, arguments: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    imported = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    paths = sorted(folder.glob("all" if arguments == "1" else "source-*"))
    sources = [open_source(path, name=path.name) for path in paths]
    windows = windows_of(sources, longest=1024, weights=[1.0] * len(sources))
    # until here files are opened and checked, no window is planned
    opened = time.perf_counter()
    windows.plan(0)
    first, seeks, resident = time.perf_counter(), [], psutil.Process().memory_info()
    # places all over two epochs, in no order
    for k in (
        np.random.default_rng(0).integers(0, 2 * DOCUMENTS_2T // WINDOW_DOCUMENTS, 60).tolist()
    ):
        at = time.perf_counter(), time.process_time()
        windows.plan(k)
        seeks.append((1000 * (time.perf_counter() - at[0]), 1000 * (time.process_time() - at[1])))
    print(
        json.dumps(
            {
                "documents": sum(s.card.documents for s in sources),
                "shards": sum(len(s.samples_per_shard) for s in sources),
                "open_seconds": opened - begin,
                "first_seconds": first - begin,
                "import_gb": imported / 1e9,
                "resident_gb": resident.rss / 1e9,
                "of_lengths_gb": resident.shared / 1e9,
                "private_after_seeks_gb": private_gb(),
                "seek_ms": statistics.median(wall for wall, _ in seeks),
                "seek_cpu_ms": statistics.median(cpu for _, cpu in seeks),
                "slowest_seek_ms": max(seeks)[0],
            }
        )
    )


def private_gb() -> float:
    """Resident memory without the pages of mapped files, which the kernel takes back when it needs them."""
    now = psutil.Process().memory_info()
    return (now.rss - now.shared) / 1e9


def write_index2t(folder: Path) -> None:
    """Two billion documents as eight sources, which share one lengths.bin of 500 MB, and as one, whose own is 4 GB: a
    million lengths over and over."""
    per_source, shards = DOCUMENTS_2T // SOURCES_2T, SHARDS_2T // SOURCES_2T
    # median e^6.3, about 540 tokens
    some = np.clip(np.random.default_rng(0).lognormal(6.3, 1.1, 1_000_000), 3, 8192).astype("<u2")
    for path in (folder / "lengths.bin", folder / "all-lengths.bin"):
        with open(path, "wb") as f:
            for _ in range(
                per_source // len(some) * (SOURCES_2T if path.name.startswith("all") else 1)
            ):
                f.write(some.tobytes())
    for name, count, documents, lengths in (
        *((f"source-{i}", shards, per_source, "lengths.bin") for i in range(SOURCES_2T)),
        ("all", SHARDS_2T, DOCUMENTS_2T, "all-lengths.bin"),
    ):
        (folder / name).mkdir()
        # source folders share a file of lengths, so the disk holds 5 GB and not 8
        (folder / name / LENGTHS).symlink_to(folder / lengths)
        samples = [len(part) for part in np.array_split(np.empty(documents, dtype=np.bool_), count)]
        write_json(
            folder / name / INDEX,
            {"version": 2, "shards": [shard_entry(i, n) for i, n in enumerate(samples)]},
        )
        tokens = int(some.sum(dtype=np.int64)) * (documents // len(some))
        write_card(
            folder / name,
            card_of(
                name,
                documents=documents,
                tokens=tokens,
                index_sha256=sha256((folder / name / INDEX).read_bytes()).hexdigest(),
            ),
        )


def shard_entry(number: int, samples: int) -> dict[str, Any]:
    """A line of index.json as MDSWriter writes it."""
    name, size = f"shard.{number:05d}.mds", 67_000_000
    return {
        "column_encodings": ["ndarray:uint16"],
        "column_names": [INPUT_IDS],
        "column_sizes": [None],
        "compression": None,
        "format": "mds",
        "hashes": [SHARD_HASH],
        "samples": samples,
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
        "raw_data": {
            "basename": name,
            "bytes": size,
            "hashes": {SHARD_HASH: sha256(name.encode()).hexdigest()},
        },
    }


def card_of(name: str, *, documents: int, tokens: int, index_sha256: str = "") -> Card:
    specials = SpecialIds(
        cls_id=50281,
        sep_id=50282,
        pad_id=50283,
        mask_id=50284,
        unk_id=50280,
        all_special=tuple(range(50280, 50285)),
    )
    return Card(
        source=name,
        split="train",
        tokenizer_sha256="0",
        vocab_size=50368,
        specials=specials,
        dtype="uint16",
        documents=documents,
        tokens=tokens,
        max_tokens_per_document=8192,
        index_sha256=index_sha256,
        lengths_sha256="",
    )


def memory(shards: Path, report: Report, *, where: str, args: argparse.Namespace) -> None:
    """Resident memory of planning and of making rows, each in a new process, every million documents."""
    del shards, where, args
    found = {}
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        write_small_documents(Path(folder) / "small")
        for what in ("plan", "rows"):
            found[what] = side_by_side(Path(folder), [f"memory:{what}"])[0]["resident_mb"]
    report.add(
        "Resident MB after each million documents",
        head=["", *(f"{n} M" for n in range(1, 6))],
        rows=[[what, *(f"{mb:.0f}" for mb in resident)] for what, resident in found.items()],
        figures=found,
    )


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
                # a position is (window, row) of each lane; there is one lane
                documents = made.next_step().end.lanes[0][0] * WINDOW_DOCUMENTS
            if documents >= 1_000_000 * (len(resident) + 1):
                resident.append(psutil.Process().memory_info().rss / 1e6)
    print(json.dumps({"resident_mb": resident}))


def write_small_documents(folder: Path, *, documents: int = 100_000) -> None:
    """Documents of 10 to 30 tokens: five million of them are read in a minute, in 50 epochs."""
    write_documents(folder, "small", np.random.default_rng(0).integers(10, 31, documents))


def write_documents(folder: Path, name: str, lengths: np.ndarray) -> None:
    """A finished shard folder of documents of these lengths and random ids."""
    from streaming import MDSWriter

    draw = np.random.default_rng(0)
    with MDSWriter(
        columns={INPUT_IDS: "ndarray:uint16"},
        out=str(folder),
        hashes=[SHARD_HASH],
        size_limit=1 << 18,
    ) as out:
        for length in lengths.tolist():
            out.write({INPUT_IDS: draw.integers(0, 50000, length).astype(np.uint16)})
    write_lengths(folder, lengths, max_tokens_per_document=8192)
    write_card(folder, with_content(card_of(name, documents=0, tokens=0), folder, lengths))


def mixture(shards: Path) -> list[Source]:
    return [open_source(shards / name / "train", name=name) for name in DOMAINS]


def windows_of(
    sources: list[Source],
    *,
    longest: int,
    documents: int = WINDOW_DOCUMENTS,
    weights: Any = WEIGHTS,
) -> Windows:
    order = DataOrder(weights=weights, seed=1, phase=0, window_documents=documents)
    geometry = RowGeometry(row_tokens=ROW_TOKENS, max_tokens_per_document=longest)
    return Windows(sources, order=order, geometry=geometry)


def loader_of(
    sources: list[Source],
    *,
    longest: int,
    rank: int = 0,
    world_size: int = 1,
    weights: Any = WEIGHTS,
) -> Loader:
    card = sources[0].card
    return Loader(
        sources,
        order=DataOrder(weights=weights, seed=1, phase=0, window_documents=WINDOW_DOCUMENTS),
        geometry=RowGeometry(row_tokens=ROW_TOKENS, max_tokens_per_document=longest),
        masker=build_objective(MlmConfig(), vocab_size=card.vocab_size, specials=card.specials),
        dealing=Dealing(
            world=World(rank=rank, size=world_size),
            micro_batch_rows=MICRO_BATCH_ROWS,
            static_shapes=True,
        ),
        workers=WorkerSettings(),
        rows_at=lambda _: 4 * MICRO_BATCH_ROWS,
        start=DataPosition(),
    )


def pack_all(pieces: list[np.ndarray]) -> None:
    """The rows of some windows."""
    for lengths in pieces:
        pack_best_fit(lengths, ROW_TOKENS)


def plan_all(windows: Windows, count: int) -> None:
    """The first windows."""
    for k in range(count):
        windows.plan(k)


def pieces_of(plan: WindowPlan, sources: list[Source]) -> np.ndarray:
    """Tokens of a plan's pieces, with the [CLS] and [SEP] that are put back."""
    # a piece that begins inside of its document gets a [CLS], one that ends inside a [SEP]
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


def profile(do: Callable[[], Any], *, lines: int) -> list[str]:
    """The functions that hold the time, each without what it calls."""
    taken = cProfile.Profile(time.process_time)
    taken.runcall(do)
    stats = pstats.Stats(taken).stats  # type: ignore[attr-defined]  # typeshed lacks it
    # an entry: primitive calls, calls, own time, time with what it calls, callers
    total = sum(own for _, _, own, _, _ in stats.values())
    return [
        f"    {own / total:6.1%}  {calls:>8,} calls  {Path(path).stem}.{name}"
        for (path, _, name), (_, calls, own, _, _) in sorted(
            stats.items(), key=lambda item: -item[1][2]
        )[:lines]
    ]


def side_by_side(shards: Path, children: list[str]) -> list[dict[str, Any]]:
    """Processes of this module that begin together once all are ready, and what each printed last."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loader", str(shards), child],
            encoding="utf-8",
            errors="replace",
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for child in children
    ]
    # nobody goes before all are ready
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"{children} could not start"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


PARTS = {"pack": pack, "plan": plan, "loader": loader, "index2t": index2t, "memory": memory}
CHILDREN = {"loader": loader_child, "index2t": index2t_child, "memory": memory_child}

if __name__ == "__main__":
    CHILDREN[sys.argv[2].partition(":")[0]](Path(sys.argv[1]), sys.argv[2].partition(":")[2])
