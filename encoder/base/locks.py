"""Locks between processes by flock, which the kernel frees when a process dies, SIGKILL included.

A disk may refuse for several reasons, and each has its answer: held by another process (Busy), a file system that knows
no locks (NoLocks, with the reason in words), anything else (OSError: a read-only disk, missing rights).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO, Literal

Kind = Literal["alone", "shared"]

# of the kernel's own errors, which no C library has a word for: NFS and
# overlay file systems let it through
ENOTSUPP = 524

NO_LOCKS = {
    errno.ENOSYS: "its file system has no flock (Lustre: mount it with -o flock)",
    errno.ENOLCK: "its lock service has no lock to give (NFS: is lockd running?)",
    errno.EOPNOTSUPP: "its file system does not support locks",
    errno.ENOTSUP: "its file system does not support locks",
    ENOTSUPP: "its file system does not support locks",
    errno.EINVAL: "its file system does not understand locks",
    errno.EBADF: "its file system locks only what may be written to",
    errno.EPERM: "its file system does not permit locks",
    errno.EACCES: "its file system does not permit locks",
}


class Busy(Exception):
    """Another process holds the lock."""


class NoLocks(OSError):
    """No lock can be had on this disk; the text says which folder and why."""


def open_lock(path: Path) -> IO[str]:
    """A lock file, made where it is missing, open for reading and writing text at its end; never through a symbolic link.

    A folder made elsewhere could hold a link in its place, and what a lock says would replace what the link points to.
    """
    # no symbolic link is followed, no fifo waited for, and nothing is
    # cut off before the lock is held
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(
                errno.ELOOP, "it is a symbolic link in place of a lock; remove it", os.fspath(path)
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no file, in place of a lock; remove it", os.fspath(path))
    return os.fdopen(handle, "a+", encoding="utf-8", errors="replace")


def take_lock(file: IO | int, path: Path, kind: Kind = "alone", *, wait: bool = False) -> None:
    """Lock an open file until it is closed or unlocked; an earlier lock of the same file is changed to this kind.

    file: the open file or its handle; on NFS one that may be written to for "alone", read for "shared".
    path: its name, for messages.
    kind: "alone" against everybody, "shared" against who wants it alone.
    wait: until it is free, else raises Busy at once.

    Raises NoLocks where the file system knows none, OSError for other faults of the disk.
    """
    how = {"alone": fcntl.LOCK_EX, "shared": fcntl.LOCK_SH}[kind]
    if not wait:
        how |= fcntl.LOCK_NB
    try:
        fcntl.flock(file, how)
    except BlockingIOError as error:
        raise Busy(f"another process holds {path}") from error
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise NoLocks(
                error.errno,
                f"no lock can be had in this folder: {NO_LOCKS[error.errno]}",
                os.fspath(path.parent),
            ) from error
        raise
