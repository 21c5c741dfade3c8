"""The cache of a remote shard folder on this machine: fetched once, verified, evicted only when nobody uses it.

    CACHE/origin.txt                                      where all of it comes from
    CACHE/card.json index.json lengths.bin ...            the side files, card.json last
    CACHE/shards/shard.00007.mds                          a whole, verified shard
    CACHE/shards/.shard.00007.mds.lock, .part/            a shard on its way: how many bytes it will take, and its bytes

Any number of processes, also of several jobs, share a cache. They agree by flock alone, which the kernel frees when a
process is killed: a shared lock on a shard says that somebody reads it or will soon (a memory map keeps the lock of the
file it was made from), and who evicts takes the exclusive one. No daemon, no shared memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from encoder.base.errors import DamagedShard, ShardError
from encoder.base.files import fsync_path, is_leftover, sha256_of, write_atomic
from encoder.base.locks import Busy, NoLocks, open_lock, take_lock
from encoder.base.log import warn_once
from encoder.base.unpack import unpack
from encoder.base.untrusted import inside, read_text, regular_file
from encoder.data import remote
from encoder.data.shard_format import (
    CARD,
    HASHES,
    INDEX,
    LENGTHS,
    SENTENCES,
    TOKENIZER,
    read_card,
)

TRIES = 5
# before the second try, doubled before each one after it: 15 s in all
BACKOFF_SECONDS = 1.0
ORIGIN, SHARDS, ROOM = "origin.txt", "shards", ".room.lock"


@dataclass(frozen=True)
class StoredShard:
    """A shard file as index.json lists it."""

    name: str
    size_bytes: int
    compression: str | None
    stored: str  # name of the file as it lies in the folder, compressed or not
    stored_bytes: int
    sha256: str  # hex, of that file
    raw_sha256: str  # hex, of the unpacked shard; empty where index.json does not tell


class ShardCache:
    """Shards fetched from `origin` to `folder`; holds nothing open, so it is picklable.

    Where the two are one, compressed shards are unpacked beside themselves, and nothing is ever evicted. What was unpacked
    there, maybe by others and long ago, is held against index.json when this object first opens it.
    """

    def __init__(self, *, origin: str, folder: Path, limit_bytes: int | None = None) -> None:
        self.origin, self.limit_bytes = origin, limit_bytes
        self.in_place = Path(origin) == folder
        self.folder = folder if self.in_place else folder / SHARDS
        self._seen_right: set[str] = set()  # names of what was unpacked in place

    def place(self, shard: StoredShard) -> Path:
        """Where the shard lies once it is here."""
        if self.in_place:
            return self.folder / shard.name
        return self.folder / shard.name.replace("/", "--")

    def open(
        self, shard: StoredShard, *, may_exceed: bool = True, wait: bool = True
    ) -> IO[bytes] | None:
        """The shard's file, fetched if it is not here; not evicted while it, or a map of it, is open.

        None, only if `may_exceed` is false and nothing can be evicted to make room, or `wait` is false and another
        process is fetching it. Raises ShardError, DamagedShard for a shard whose bytes are not those of index.json.
        """
        if self.in_place:
            # the names come from an index made elsewhere, and links may leave the folder
            for name in {shard.name, shard.stored}:
                inside(self.folder, name, where=self.folder / INDEX, error=ShardError)
        try:
            return self._open(shard, may_exceed=may_exceed, wait=wait)
        except OSError as error:
            raise ShardError(self._why_not(shard, error)) from error

    def _why_not(self, shard: StoredShard, error: OSError) -> str:
        """A fault of the disk as found, needed, what to do."""
        why = error.strerror or f"{error}"
        if self.in_place:
            needed = "unpacked" if shard.compression else "read"
            return (
                f"{self.folder / shard.stored} cannot be {needed} where it lies: {why}. "
                "Give the source a cache: FOLDER, on a disk of this machine that can be written to."
            )
        return (
            f"{remote.url_of(self.origin, shard.stored)} cannot be brought to {self.place(shard)}:"
            f" {why}. Mend that, or set the source's cache to a folder on a disk of this machine"
            " with room."
        )

    def _open(self, shard: StoredShard, *, may_exceed: bool, wait: bool) -> IO[bytes] | None:
        while True:
            if (file := self._present(shard)) is not None:
                return file
            self.folder.mkdir(parents=True, exist_ok=True)

            # one process fetches a shard; the others wait here, and then find it
            with _exclusive(self._lock_of(shard), wait=wait) as lock:
                if lock is None:
                    return None
                if self.place(shard).exists():
                    continue

                # what the fetch needs at its peak: the unpacked shard, and the packed one beside
                # it. Others read this number in the lock file, and leave room for it
                peak_bytes = shard.size_bytes
                if shard.compression:
                    peak_bytes += shard.stored_bytes
                lock.write(str(peak_bytes))
                lock.flush()

                if (above := self._bytes_above_limit()) > 0:
                    if not may_exceed:
                        return None
                    warn_once(
                        f"{self.folder}: the shards in use take {above:,} bytes more than"
                        f" cache_bytes {self.limit_bytes:,}. Raise it, or lower"
                        " loader.prefetch_windows."
                    )
                return self._fetch(shard, lock)

    def _present(self, shard: StoredShard) -> IO[bytes] | None:
        path = self.place(shard)
        try:
            file = regular_file(path)
        except FileNotFoundError:
            return None
        try:
            take_lock(file, path, "shared", wait=True)
        except NoLocks:
            # in place nothing is evicted, so no reader needs a lock
            if not self.in_place:
                raise

        # while this waited for the lock, the file may have been evicted: no link is left to it
        found = os.fstat(file.fileno())
        if found.st_nlink and found.st_size == shard.size_bytes and self._is_right(file, shard):
            with contextlib.suppress(OSError):  # another user's
                os.utime(path)  # needed now: what was needed longest ago is evicted first
            return file
        file.close()
        if found.st_nlink:  # damaged since it was fetched: a power cut, a full disk
            with _exclusive(self.folder / ROOM), contextlib.suppress(FileNotFoundError):
                # also where others have it open: they keep what they have
                if path.stat().st_ino == found.st_ino:
                    path.unlink()
        return None

    def _is_right(self, file: IO[bytes], shard: StoredShard) -> bool:
        """Whether an unpacked copy in place has its bytes: read once, about 0.1 s for 64 MiB."""
        if not self.in_place or not shard.raw_sha256 or shard.name in self._seen_right:
            return True
        # this open file, whatever has its name by now
        right = hashlib.sha256(file.read()).hexdigest() == shard.raw_sha256
        if right:
            self._seen_right.add(shard.name)
        return right

    def _bytes_above_limit(self) -> int:
        """Evicts what nobody holds until all that is here or on its way fits the limit; how much it still is above."""
        if self.limit_bytes is None:
            return 0
        # one process at a time counts and evicts, so that two do not give away the same room
        with _exclusive(self.folder / ROOM):
            shards, coming = [], 0
            for entry in os.scandir(self.folder):
                # this process's own fetch is found like the others: flock
                # refuses a second handle, too
                if entry.name.endswith(".lock") and entry.name != ROOM:
                    coming += self._coming(Path(entry.path))
                elif not entry.name.startswith("."):
                    found = entry.stat()
                    shards.append((found.st_mtime_ns, found.st_size, Path(entry.path)))
            above = sum(size for _, size, _ in shards) + coming - self.limit_bytes
            # the modification time is that of the last use: least recently used first
            for _, size, path in sorted(shards):
                if above > 0 and _evict(path):
                    above -= size
        return above

    def _coming(self, lock: Path) -> int:
        """Bytes that a fetch under way will take; what a killed one left is removed."""
        # not ours: opening it would lead to another file
        if lock.is_symlink():
            return 0
        with (
            contextlib.suppress(FileNotFoundError, PermissionError),
            open(lock, "r+", encoding="ascii", errors="replace") as file,
        ):
            try:
                take_lock(file, lock)
            except Busy:
                return _whole_number(file.read())
            # the name was removed meanwhile: another fetch may have the next file of this name
            if not os.fstat(file.fileno()).st_nlink:
                return self._coming(lock)

            # the lock was free: its fetch was killed
            shutil.rmtree(lock.with_suffix(".part"), ignore_errors=True)
            lock.unlink(missing_ok=True)
        return 0

    def _fetch(self, shard: StoredShard, lock: IO[str]) -> IO[bytes]:
        part = self._lock_of(shard).with_suffix(".part")
        url = remote.url_of(self.origin, shard.stored)
        try:
            # in place the packed file stays where it is, and is checked as a fetched one is
            if self.in_place:
                stored = self.folder / shard.stored
                if wrong := _difference(stored, shard):
                    raise DamagedShard(f"{url} {wrong}. Copy or prepare the shard again.")
                _new_folder(part)
            else:
                stored = _fetched(url, part, check=lambda path: _difference(path, shard))

            ready = part / "ready"
            if shard.compression:
                ready.write_bytes(_unpacked(stored, shard, url=url))
            else:
                stored.rename(ready)
            fsync_path(ready)

            # locked before it has its name, so that nobody evicts it first
            file = open(ready, "rb")
            take_lock(file, ready, "shared", wait=True)

            # under the room's lock, so that its bytes count once: on their way, then as a file
            with _exclusive(self.folder / ROOM):
                ready.rename(self.place(shard))
                lock.truncate(0)  # here, and no more on its way
            return file
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _lock_of(self, shard: StoredShard) -> Path:
        place = self.place(shard)
        return place.with_name(f".{place.name}.lock")


def fetch_side_files(origin: str, folder: Path) -> None:
    """Card, index, lengths and tokenizer of a remote shard folder, verified, once for all processes of this machine.

    Raises ShardError, also for a cache of another origin and for a folder that is no cache.
    """
    origin = origin.rstrip("/")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / ".side.lock"):
            mark = folder / ORIGIN
            # a folder with other files is never taken for a cache: side
            # files would replace what is there
            if not mark.exists() and any(
                p.name != ".side.lock" and not is_leftover(p.name) for p in folder.iterdir()
            ):
                raise ShardError(
                    f"{folder} is not empty and no cache of shards. Name an empty folder as cache."
                )

            # a cache of another origin holds other shards under the same names
            if (
                mark.exists()
                and (found := read_text(mark, error=ShardError, most_bytes=2**16).strip()) != origin
            ):
                if not _has_card_of(folder, origin):
                    raise ShardError(
                        f"{folder} is the cache of {found}, not of {origin}. Give each source a"
                        " cache of its own."
                    )
                # moved, or named by another path: the same card, the same bytes
                write_atomic(mark, origin + "\n")

            # the card is written last: where it is, all side files are there and right
            if not (folder / CARD).exists():
                write_atomic(mark, origin + "\n")
                _fetch_side_files(origin, folder)
    except OSError as error:
        raise ShardError(
            f"{folder} cannot be the cache of {origin}: {error.strerror or error}. "
            "Mend that, or set cache to a folder on a disk of this machine with room."
        ) from error


def _has_card_of(folder: Path, origin: str) -> bool:
    """Whether a finished cache holds what lies at `origin`, by its card there; not where that cannot be had."""
    part = folder / ".side.part"
    try:
        _new_folder(part)
        remote.download(remote.url_of(origin, CARD), part / CARD)
        return (part / CARD).read_bytes() == (folder / CARD).read_bytes()
    except Exception:  # streaming raises what its many back ends raise
        return False
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch_side_files(origin: str, folder: Path) -> None:
    part = folder / ".side.part"
    try:
        card_file = _fetched(remote.url_of(origin, CARD), part / "card", check=lambda path: None)
        # the card names the hashes that all other side files must have
        try:
            card = read_card(card_file.parent)
        except ShardError as error:
            raise ShardError(
                f"{remote.url_of(origin, CARD)}, as it was fetched: {error}"
            ) from error
        needed = {
            INDEX: card.index_sha256,
            LENGTHS: card.lengths_sha256,
            TOKENIZER: card.tokenizer_sha256,
        }
        if card.hashes_sha256:
            needed[HASHES] = card.hashes_sha256
        if card.sentences_sha256:
            needed[SENTENCES] = card.sentences_sha256

        for name, sha256 in needed.items():

            def check(path: Path, sha256: str = sha256) -> str | None:
                found = sha256_of(path)
                if found == sha256:
                    return None
                return f"has SHA-256 {found[:12]}, {CARD} beside it says {sha256[:12]}"

            file = _fetched(remote.url_of(origin, name), part / "file", check=check)
            fsync_path(file)
            file.rename(folder / name)
        fsync_path(card_file)
        card_file.rename(folder / CARD)  # last: a cache without it is not finished
        fsync_path(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetched(url: str, part: Path, *, check: Callable[[Path], str | None]) -> Path:
    """The file of a URL in the folder `part`, checked to be right by `check`, which tells what is wrong, or None.

    Raises DamagedShard for a file that was never right, ShardError for one that could not be had, after TRIES tries.
    """
    path = part / url.rsplit("/", 1)[-1]
    for number in range(TRIES):
        if number:
            time.sleep(BACKOFF_SECONDS * 2 ** (number - 1))
        _new_folder(part)
        try:
            remote.download(url, path)
            # damaged: it came whole and is wrong. A fault on the way is no damage, and may pass
            wrong, damaged = check(path), True
        except ShardError:  # what it needs is not installed
            raise
        except Exception as error:  # streaming raises what its many back ends raise
            # a full or read-only disk of this machine: another try does not help
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EROFS,
            ):
                raise
            wrong, damaged = " ".join(f"{error}".split()) or type(error).__name__, False
        if not wrong:
            return path
    if damaged:
        raise DamagedShard(
            f"{url} {wrong}; so it was {TRIES} times. Copy or prepare it again; if the folder was"
            " made anew, remove its cache."
        )
    assert wrong, "each try ended in return or in a reason"
    raise ShardError(
        f"{url} could not be fetched in {TRIES} tries: {wrong.rstrip('.')}. Look at the path, the"
        " network and the credentials."
    )


def _difference(path: Path, shard: StoredShard) -> str | None:
    size = path.stat().st_size
    if size != shard.stored_bytes:
        return f"has {size:,} bytes, {INDEX} says {shard.stored_bytes:,}"
    found = sha256_of(path)
    if found != shard.sha256:
        return f"has SHA-256 {found[:12]}, {INDEX} says {shard.sha256[:12]}"
    return None


def _unpacked(stored: Path, shard: StoredShard, *, url: str) -> bytes:
    """The bytes of a shard, checked to be those of index.json before they get its name. Raises DamagedShard."""
    try:
        assert shard.compression, "only what was compressed is unpacked"
        content = unpack(shard.compression, stored.read_bytes(), size=shard.size_bytes)
    except ValueError as error:
        raise DamagedShard(
            f"{url} cannot be unpacked to the {shard.size_bytes:,} bytes that {INDEX} lists"
            f" ({error}). Prepare the shard again."
        ) from error
    if shard.raw_sha256 and (found := hashlib.sha256(content).hexdigest()) != shard.raw_sha256:
        raise DamagedShard(
            f"{url} unpacks to bytes of SHA-256 {found[:12]}, {INDEX} says"
            f" {shard.raw_sha256[:12]}. Prepare the shard again."
        )
    return content


def _evict(path: Path) -> bool:
    """Remove a shard that nobody holds; called under the room's lock, so that a name means one file meanwhile."""
    try:
        # opened for writing, since NFS gives the exclusive lock to no other
        with open(path, "r+b") as file:
            take_lock(file, path)
            path.unlink()
    except (Busy, PermissionError):  # in use, or another user's
        return False
    except FileNotFoundError:
        pass
    return True


@contextlib.contextmanager
def _exclusive(path: Path, *, wait: bool = True) -> Iterator[IO[str] | None]:
    """This process alone, by a lock file that is there only meanwhile; None if another has it and `wait` is false."""
    while True:
        with open_lock(path) as file:
            try:
                take_lock(file, path, wait=wait)
            except Busy:
                yield None
                return
            # removed by the one before: others lock the next file of this name
            if not os.fstat(file.fileno()).st_nlink:
                continue
            file.truncate(0)
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


def _whole_number(text: str) -> int:
    """The number a lock file holds; 0 for an empty one, and for what no fetch of ours wrote."""
    if text.isascii() and text.isdecimal() and len(text) < 20:
        return int(text)
    return 0


def _new_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
