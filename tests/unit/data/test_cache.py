"""Remote shards: fetched once, verified, tried again, evicted only when nobody uses them; with faults put into the door."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import http.server
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from encoder.base.errors import ConfigError, DamagedShard, ShardError
from encoder.data import remote
from encoder.data.cache import TRIES, ShardCache, _exclusive
from encoder.data.order import DocumentOrder, deal_shards
from encoder.data.shard_format import CARD, INDEX, LENGTHS, TOKENIZER
from encoder.data.shards import open_source
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import MlmConfig
from encoder.runs.config import LoaderConfig, SourceConfig
from tests.helpers.loading import loader_with
from tests.helpers.shards import random_documents, write_source

ROOT = Path(__file__).parents[3]
DOCUMENTS = random_documents(400, longest=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_source(tmp_path_factory.mktemp("web") / "train", DOCUMENTS, shard_bytes=1 << 11)
    assert len(list(folder.glob("*.mds"))) > 8
    return folder


class Faults:
    """In the place of the door: copies, but for what `wrong(name, number of the try)` does to the file it is given."""

    def __init__(self, wrong=lambda name, number, path: None):
        self.wrong, self.tries = wrong, {}

    def __call__(self, url: str, path: Path) -> None:
        name = url.rsplit("/", 1)[-1]
        self.tries[name] = self.tries.get(name, 0) + 1
        shutil.copyfile(url.removeprefix("s3://bucket"), path)
        self.wrong(name, self.tries[name], path)


@pytest.fixture()
def faults(monkeypatch):
    faults = Faults()
    monkeypatch.setattr(remote, "download", faults)
    return faults


def shard_files(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*.mds"))


def hidden(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob(".*")]


def reads_all(source) -> bool:
    return all((source.read(n) == DOCUMENTS[n]).all() for n in range(source.documents))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_folder_read_through_a_cache_gives_its_documents(folder, tmp_path, prefix, monkeypatch):
    monkeypatch.delattr(
        "multiprocessing.shared_memory.SharedMemory.__init__"
    )  # nobody may make any
    source = open_source(f"{prefix}{folder}/", name="web", cache=tmp_path / "cache")
    assert reads_all(source) and len(shard_files(tmp_path / "cache")) == len(
        source.samples_per_shard
    )
    assert not hidden(tmp_path / "cache")
    for name in (CARD, INDEX, LENGTHS, TOKENIZER):
        assert (tmp_path / "cache" / name).read_bytes() == (folder / name).read_bytes()


def test_local_shards_are_read_without_the_clients_of_object_storage(folder, tmp_path, monkeypatch):
    """An install without the extra: compressed and cached shards of this machine are read, s3:// names what it needs."""
    packed = write_source(tmp_path / "packed", DOCUMENTS, compression="zstd")
    for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "streaming", None)
    assert reads_all(open_source(f"file://{folder}", name="web", cache=tmp_path / "cache"))
    assert (open_source(str(packed), name="packed").read(3) == DOCUMENTS[3]).all()
    began = time.monotonic()
    with pytest.raises(
        ShardError,
        match=r"s3://b/x/card.json is read by mosaicml-streaming.*tessera-encoders\[remote\]",
    ):
        open_source("s3://b/x", name="web", cache=tmp_path / "other")
    assert time.monotonic() - began < 1, "nothing that a second try would mend"


def test_a_folder_behind_a_web_server_is_read(folder, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert (
            open_source(url, name="web", cache=tmp_path / "cache").read(399) == DOCUMENTS[399]
        ).all()
        with pytest.raises(
            ShardError,
            match=rf"{url}/nothing/card\.json could not be fetched in 5 tries: HTTP Error 404",
        ):
            open_source(f"{url}/nothing", name="web", cache=tmp_path / "other")
        server.shutdown()


def test_side_files_and_shards_are_fetched_once(folder, tmp_path, faults):
    for _ in range(2):
        assert reads_all(open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache"))
    assert set(faults.tries.values()) == {1} and len(faults.tries) == 4 + len(
        list(folder.glob("*.mds"))
    )


def test_what_fails_or_comes_damaged_is_tried_again(folder, tmp_path, faults):
    def wrong(name, number, path):
        if number < TRIES - 1:
            path.write_bytes(path.read_bytes()[:-1])
        elif number < TRIES:
            raise ConnectionResetError("reset by peer")

    faults.wrong = wrong
    source = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    assert (source.read(0) == DOCUMENTS[0]).all() and not hidden(tmp_path / "cache")
    assert faults.tries["shard.00000.mds"] == faults.tries[LENGTHS] == TRIES


def flip(name, _number, path):
    if name.startswith("shard.00001"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)


def refuse(name, _number, _path):
    if name.startswith("shard.00001"):
        raise PermissionError("403 Forbidden")


@pytest.mark.parametrize(
    "wrong, kind, words",
    [
        (
            flip,
            DamagedShard,
            (
                r"/shard\.00001\.mds has SHA-256 \w{12}, index\.json says \w{12}; so it was 5"
                r" times\. "
            ),
        ),
        (
            refuse,
            ShardError,
            r"/shard\.00001\.mds could not be fetched in 5 tries: 403 Forbidden\. Look at",
        ),
    ],
)
def test_a_shard_that_is_never_right_is_named_with_its_url(
    folder, tmp_path, faults, wrong, kind, words
):
    faults.wrong = wrong
    source = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    second = int(source.samples_per_shard[0])
    with pytest.raises(ShardError, match=f"^s3://bucket{folder}{words}[^\n]*$") as raised:
        source.read(second)
    assert type(raised.value) is kind and not hidden(tmp_path / "cache")
    assert (source.read(second - 1) == DOCUMENTS[second - 1]).all()
    if kind is DamagedShard:
        again = pickle.loads(pickle.dumps(raised.value))  # noqa: S301
        assert (str(again), again.source, again.shard) == (str(raised.value), "web", 1)


def test_a_damaged_side_file_is_named_with_its_url(folder, tmp_path, faults):
    faults.wrong = lambda name, _number, path: name == INDEX and path.write_bytes(b"{}")
    with pytest.raises(
        ShardError,
        match=rf"^s3://bucket{folder}/index\.json has SHA-256 \w+, card\.json beside it says",
    ):
        open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    faults.wrong = lambda *_: None
    assert reads_all(open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache"))


def test_a_cache_belongs_to_one_source_and_is_no_folder_of_other_files(folder, tmp_path, faults):
    open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    with pytest.raises(
        ShardError,
        match=rf"cache is the cache of s3://bucket{folder}, not of s3://bucket/other\. Give",
    ):
        open_source("s3://bucket/other", name="web", cache=tmp_path / "cache")
    with pytest.raises(ShardError, match="is not empty and no cache of shards"):
        open_source(f"s3://bucket{folder}", name="web", cache=folder)


def test_a_cache_stays_that_of_a_source_that_was_moved(folder, tmp_path, faults):
    open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache").read(0)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    source = open_source(f"s3://bucket{moved}", name="web", cache=tmp_path / "cache")
    assert (
        reads_all(source)
        and (tmp_path / "cache" / "origin.txt").read_text() == f"s3://bucket{moved}\n"
    )


def test_a_full_disk_is_said_at_once(folder, tmp_path, faults):
    def full(name, _number, _path):
        if name.startswith("shard"):
            raise OSError(28, "No space left on device")

    faults.wrong = full
    source = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    with pytest.raises(
        ShardError,
        match=r"shard\.00000\.mds cannot be brought to .*cache/shards/.*No space left on device",
    ):
        source.read(0)
    assert faults.tries["shard.00000.mds"] == 1


def test_what_was_needed_longest_ago_is_evicted_and_never_what_is_in_use(folder, tmp_path, faults):
    source = open_source(
        f"s3://bucket{folder}", name="web", cache=tmp_path / "cache", cache_bytes=3 * 2100
    )
    first = [0, *np.cumsum(source.samples_per_shard).tolist()]
    source.read(first[0])
    kept = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache").read(
        first[0]
    )  # a view keeps its shard
    for number in (1, 2):
        source.read(first[number])
    os.utime(source.file_of(first[1]), (9e9, 9e9))  # as if it had been needed last
    source._open.clear()
    gc.collect()
    source.read(first[3])
    assert [p.name for p in shard_files(tmp_path / "cache")] == [
        f"shard.0000{n}.mds" for n in (0, 1, 3)
    ]
    del kept
    source._open.clear()
    gc.collect()
    source.read(first[4])
    assert [p.name for p in shard_files(tmp_path / "cache")] == [
        f"shard.0000{n}.mds" for n in (1, 3, 4)
    ]


def test_readers_may_exceed_the_limit_and_prefetch_may_not(folder, tmp_path, faults, capsys):
    source = open_source(
        f"s3://bucket{folder}", name="web", cache=tmp_path / "cache", cache_bytes=2 * 2100
    )
    held = [source.hold(n, wait=True) for n in range(3)]
    assert [f is not None for f in held] == [True, True, False] and len(
        shard_files(tmp_path / "cache")
    ) == 2
    assert reads_all(source) and "bytes more than cache_bytes 4,200" in capsys.readouterr().err
    for file in held[:2]:
        assert not file.closed and os.fstat(file.fileno()).st_nlink == 1
        file.close()


def test_a_shard_cut_short_in_the_cache_is_fetched_again(folder, tmp_path, faults):
    source = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    source.read(0)
    source._open.clear()
    gc.collect()
    source.file_of(0).write_bytes(b"")
    assert (source.read(0) == DOCUMENTS[0]).all() and faults.tries["shard.00000.mds"] == 2


# a reader among others: shards 0, 1, 2, ... in an order of its own, slowly fetched, at most two maps open
READER = """
import shutil, sys, time
from pathlib import Path
import numpy as np
from encoder.data import remote, shards
from tests.helpers.shards import random_documents

folder, cache, seed, limit, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
shards.OPEN_SHARDS = 2

def slow(url, path):
    content = Path(url).read_bytes()
    path.write_bytes(content[:100])
    time.sleep(seconds if path.suffix == ".mds" else 0)
    path.write_bytes(content)

remote.download = slow
documents = random_documents(400, longest=40)
source = shards.open_source(folder, name="web", cache=cache, cache_bytes=limit)
random = np.random.default_rng(seed)
first = [0, *np.cumsum(source.samples_per_shard).tolist()]
for _ in range(3):
    for shard in random.permutation(len(first) - 1):
        print(shard, flush=True)
        for n in range(first[shard], first[shard + 1]):
            assert (source.read(n) == documents[n]).all(), n
assert "/dev/shm" not in Path("/proc/self/maps").read_text() and "multiprocessing.shared_memory" not in sys.modules
"""


def start_reader(folder, cache, *, seed, limit, seconds):
    command = [
        sys.executable,
        "-c",
        READER,
        str(folder),
        str(cache),
        str(seed),
        str(limit),
        str(seconds),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_small_cache_and_a_killed_one_disturbs_nobody(folder, tmp_path):
    limit = 6 * 2100  # two open maps each of three readers
    victim, *others = [
        start_reader(folder, tmp_path / "cache", seed=s, limit=limit, seconds=0.02)
        for s in range(3)
    ]
    for _ in range(12):
        victim.stdout.readline()
    while not list((tmp_path / "cache/shards").glob(".*.part")):
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    most = 0
    while any(p.poll() is None for p in others):
        sizes = []
        for path in shard_files(tmp_path / "cache"):
            with contextlib.suppress(FileNotFoundError):  # evicted since it was listed
                sizes.append(path.stat().st_size)
        most = max(most, sum(sizes))
        time.sleep(0.005)
    assert [p.wait() for p in others] == [0, 0] and victim.wait() == -signal.SIGKILL
    assert most <= limit + 2 * 2100  # files come and go between two looks
    source = open_source(folder, name="web", cache=tmp_path / "cache", cache_bytes=limit)
    assert reads_all(source) and not hidden(tmp_path / "cache"), (
        "what the killed one left is removed"
    )


def test_a_fetch_that_was_killed_is_begun_again(folder, tmp_path):
    reader = start_reader(folder, tmp_path / "cache", seed=0, limit=10**6, seconds=60)
    while not list((tmp_path / "cache").glob("shards/.*.part/*.mds")):
        time.sleep(0.01)
    reader.kill()
    reader.wait()
    source = open_source(folder, name="web", cache=tmp_path / "cache", cache_bytes=10**6)
    assert reads_all(source) and not hidden(tmp_path / "cache")


def test_a_fetch_begun_while_an_ended_ones_lock_is_looked_at_is_left_alone(tmp_path, monkeypatch):
    cache = ShardCache(origin="/elsewhere", folder=tmp_path, limit_bytes=10)
    cache.folder.mkdir()
    lock, real = cache.folder / ".a.mds.lock", fcntl.flock
    ended, begun = _exclusive(lock), _exclusive(lock)
    ended.__enter__()

    def flock(file, how):  # between the look's open and its lock, one fetch ends and another begins
        monkeypatch.setattr(fcntl, "flock", real)
        ended.__exit__(None, None, None)
        written = begun.__enter__()
        written.write("1000")
        written.flush()
        lock.with_suffix(".part").mkdir()
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cache._coming(lock) == 1000
    assert lock.exists() and lock.with_suffix(".part").exists()
    begun.__exit__(None, None, None)


def loader_of(source, **settings):
    return loader_with(
        [source],
        max_tokens_per_document=32,
        row_tokens=64,
        window_documents=16,
        micro_batch_rows=2,
        masker=build_objective(MlmConfig(), vocab_size=64, specials=source.card.specials),
        rows_at=lambda tokens: 4,
        **settings,
    )


def test_prefetch_brings_the_coming_windows_shards_and_changes_no_step(
    tmp_path, faults, monkeypatch
):
    folder = write_source(
        tmp_path / "web" / "train", DOCUMENTS, shard_bytes=1500
    )  # lanes of 199 and 201 documents
    monkeypatch.setattr("encoder.data.order.SHARDS_PER_GROUP", 2)
    with loader_of(open_source(folder, name="web"), lanes=2) as loader:
        expected = [loader.next_step().row_hash for _ in range(30)]
    source = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    fetched_by = {}
    faults.wrong = lambda name, *_: fetched_by.setdefault(name, threading.current_thread().name)
    with loader_of(source, lanes=2, prefetch_windows=6) as loader:
        needed = {
            s for lane in (0, 1) for s in loader._windows.shards(0, 7, lane=lane, at_most=99)[0]
        }
        end = time.monotonic() + 20
        while len(shard_files(tmp_path / "cache")) < len(needed) and time.monotonic() < end:
            time.sleep(0.01)
        assert {p.name for p in shard_files(tmp_path / "cache")} == {
            f"shard.{n:05d}.mds" for n in needed
        }
        assert sorted(set(fetched_by.values())) == [
            "MainThread",
            "prefetch of shards",
        ], "the first window's before it begins"
        assert 4 < len(needed) < len(source.samples_per_shard)
        assert [loader.next_step().row_hash for _ in range(30)] == expected
    assert not loader._prefetch._thread.is_alive() and not loader._prefetch._held


def test_what_prefetch_cannot_fetch_is_the_readers_to_report(folder, tmp_path, faults):
    faults.wrong = flip
    source = open_source(f"s3://bucket{folder}", name="web", cache=tmp_path / "cache")
    with loader_of(source, prefetch_windows=4) as loader:
        with pytest.raises(DamagedShard, match=r"shard\.00001\.mds has SHA-256"):
            for _ in range(100):
                loader.next_step()


def test_steps_that_lost_all_their_documents_are_passed_over(folder):
    source = open_source(folder, name="web")
    lost = tuple((0, n) for n in range(1, len(source.samples_per_shard)))
    first, end = source.documents_of(0)
    with loader_of(source, left_out=lost) as loader:
        steps = [loader.next_step() for _ in range(60)]
    assert all(step.tokens == sum(b.tokens for b in step.micro_batches) > 0 for step in steps)
    assert any(before.end != after.start for before, after in zip(steps, steps[1:]))
    an_epoch = [
        s.tokens for s in steps if s.end.lanes[0][0] <= 25
    ]  # 25 windows of 16 of 400 documents
    assert sum(an_epoch) >= int(source.lengths[first:end].sum())


def test_the_order_names_every_shard_that_its_documents_lie_in():
    samples = np.random.default_rng(0).integers(1, 5, 70)
    ends = np.cumsum(samples)
    for lane in (None, (1, deal_shards(samples, 3)[1])):
        order = DocumentOrder(samples, seed=1, phase=0, source="web", lane=lane)
        for start in range(0, 3 * order.documents_per_epoch, 37):
            lie_in = set(np.searchsorted(ends, order.documents(start, 20), side="right").tolist())
            named = order.shards(start, 20, at_most=70)
            assert lie_in <= set(named) and len(named) <= 32 and len(set(named)) == len(named)
        assert len(order.shards(0, 10**12, at_most=20)) <= 32


@pytest.mark.parametrize(
    "values, words",
    [
        ({"path": "s3://b/x"}, r"path s3://b/x lies elsewhere\. Add cache: FOLDER"),
        ({"path": "s4://b/x", "cache": "c"}, r"begins with s4://\. Known: s3, gs, hf, https"),
        ({"path": "x", "cache_bytes": 5}, "cache_bytes has no effect without cache"),
        ({"path": "x", "cache": "c", "cache_bytes": 0}, "must be at least 1"),
        ({"path": "x", "cache": "x"}, "is the source itself"),
    ],
)
def test_cache_settings_that_cannot_be_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        SourceConfig(**values)
    with pytest.raises(ConfigError, match="prefetch_windows 0 must be"):
        LoaderConfig(prefetch_windows=0)
