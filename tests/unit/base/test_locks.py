"""Disks that refuse a lock: every reason has its answer, in preparing and in caches of shards."""

from __future__ import annotations

import errno
import fcntl
import os
import re

import pytest

from encoder.base.errors import ShardError
from encoder.base.locks import Busy, NoLocks, take_lock
from encoder.data import remote
from encoder.data.shards import open_source
from tests.helpers.prep import run, settings, texts, write_jsonl
from tests.helpers.shards import random_documents, write_source

WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524)


def refuse_flock(monkeypatch, code: int) -> None:
    def flock(_file, _how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def packed_folder(folder):
    return write_source(
        folder, random_documents(50, longest=20), shard_bytes=1 << 11, compression="zstd"
    )


def test_who_holds_a_lock_is_told_from_a_disk_that_knows_none(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with open(path, "w") as held, open(path, "w") as other:
        take_lock(held, path)
        with pytest.raises(Busy):
            take_lock(other, path)
        take_lock(held, path, "shared")
        take_lock(other, path, "shared")
        for code in WITHOUT:
            refuse_flock(monkeypatch, code)
            with pytest.raises(
                NoLocks, match="no lock can be had in this folder: its (file system|lock service)"
            ):
                take_lock(held, path)
        refuse_flock(monkeypatch, errno.EIO)
        with pytest.raises(OSError) as found:
            take_lock(held, path)
        assert not isinstance(found.value, NoLocks)


@pytest.mark.parametrize("code", WITHOUT)
def test_prepare_works_and_warns_on_a_disk_without_locks(tmp_path, monkeypatch, capsys, code):
    write_jsonl(tmp_path / "a.jsonl", texts(30))
    refuse_flock(monkeypatch, code)
    assert run("prepare", settings(tmp_path)) == 0
    err = capsys.readouterr().err
    assert (
        re.search(
            r"warning: .*shards: no lock can be had in this folder: its .*another disk\.", err
        )
        and "524" not in err
    )
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["a"]


@pytest.mark.parametrize("code", [*WITHOUT, errno.EROFS])
def test_packed_shards_on_such_a_disk_name_the_cache_setting(tmp_path, monkeypatch, code):
    source = open_source(packed_folder(tmp_path / "train"), name="web")
    if code == errno.EROFS:

        def read_only(path, mode="r", *words, **more):
            if "a" in mode or "w" in mode or "+" in mode:
                raise OSError(code, os.strerror(code), str(path))
            return real(path, mode, *words, **more)

        def read_only_handle(path, flags, *words, **more):
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(code, os.strerror(code), str(path))
            return real_handle(path, flags, *words, **more)

        real, real_handle = open, os.open
        monkeypatch.setattr("builtins.open", read_only)
        monkeypatch.setattr("os.open", read_only_handle)
    else:
        refuse_flock(monkeypatch, code)
    with pytest.raises(
        ShardError,
        match=r"shard\.00000\.mds\.zstd cannot be unpacked where it lies: .*\. Give the source a "
        r"cache: FOLDER, on a disk of this machine",
    ):
        source.read(0)


@pytest.mark.parametrize("code", WITHOUT)
def test_shards_unpacked_before_are_read_without_locks(tmp_path, monkeypatch, code):
    folder = packed_folder(tmp_path / "train")
    before = open_source(folder, name="web")
    documents = [before.read(n).tolist() for n in range(before.documents)]
    refuse_flock(monkeypatch, code)
    source = open_source(folder, name="web")
    assert [source.read(n).tolist() for n in range(source.documents)] == documents


@pytest.mark.parametrize("code", WITHOUT)
def test_a_cache_on_a_disk_without_locks_is_refused_with_the_reason(tmp_path, monkeypatch, code):
    folder = packed_folder(tmp_path / "train")
    monkeypatch.setattr(
        remote, "download", lambda url, path: path.write_bytes(open(url, "rb").read())
    )
    refuse_flock(monkeypatch, code)
    with pytest.raises(
        ShardError,
        match=(
            r"cannot be the cache of .*: no lock can be had in this folder: its .*\. Mend that, or "
            "set cache to a folder on a disk of this machine"
        ),
    ):
        open_source(str(folder), name="web", cache=tmp_path / "cache")
