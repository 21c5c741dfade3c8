"""Files that are whole or absent: write beside, sync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):      # a read-only disk would hide the first error
            beside.unlink()
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """write_atomic of a value as indented JSON; NaN is refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def fsync_path(path: Path) -> None:
    """Make durable: a file's content (also one that another library wrote), or a folder's renames and new names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usual_mode(path: Path) -> None:
    """Readable for whom the umask allows: safetensors makes its files 0600, and a group could not read an export."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
