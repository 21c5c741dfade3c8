"""Files and folders that are whole or absent: write beside, sync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from encoder.base.errors import UserError, nearest
from encoder.base.untrusted import regular_file

MOST_BESIDE = 1000  # names of a folder that are compared with one that is not there
_HOST = socket.gethostname()  # a pid is one of its host's alone
_LEFTOVER = re.compile(r"\..+\.(part|old)")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is what a killed writer left: .recipe.json.4711.part, .lengths.bin.part."""
    return _LEFTOVER.fullmatch(name) is not None


def is_hidden(path: Path, *, below: Path) -> bool:
    """Whether a file lies in a hidden folder below `below`, where half-made things are, or is hidden itself."""
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def meant_beside(path: Path, *, folders: bool = False, endings: Collection[str] = ()) -> str:
    """' Did you mean runs/own?' for a path that is not there, and is another but for one misspelt name; else "".

    path: that is most likely not there
    folders: whether folders are meant, else files
    endings: of the files that can be meant; none: all
    """
    if path.exists():
        return ""
    # the outermost name that is not there, and what is to follow it
    behind: list[str] = []
    while not path.parent.exists():
        behind.insert(0, path.name)
        path = path.parent
    folders = folders or bool(behind)
    try:
        # the names of a large folder are not all looked at
        beside = [
            place.name
            for place in itertools.islice(path.parent.iterdir(), MOST_BESIDE)
            if place.is_dir() == folders
            and not place.name.startswith(".")
            and (folders or not endings or place.suffix.lower() in endings)
        ]
    except OSError:
        return ""
    hint = nearest(path.name, sorted(beside))
    if not hint.startswith("Did you mean "):
        return ""
    name = hint.removeprefix("Did you mean ").removesuffix("?")
    meant = path.with_name(name).joinpath(*behind)
    return f" Did you mean {meant}?" if meant.exists() else ""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part."""
    if isinstance(content, str):
        # a name of a file that is not UTF-8 is written as JSON and YAML escape it: \udcff
        content = content.encode("utf-8", "backslashreplace")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _named_as_asked(beside, path):
        try:
            with contextlib.suppress(FileNotFoundError):
                # of a killed process of this number, or a link that somebody laid
                beside.unlink()
            with open(beside, "xb") as f:
                # exclusive: never through a link. Durable before it takes the name
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a read-only disk would hide the first error
                beside.unlink()
            raise
    fsync_path(path.parent)


@contextlib.contextmanager
def _named_as_asked(beside: Path, path: Path) -> Iterator[None]:
    """An error about a hidden name names what was asked for.

    beside: the hidden file or folder
    path: the name that it is to take
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == os.fspath(beside):
            error.filename = os.fspath(path)
            error.filename2 = None
        raise


def open_to_append(path: Path) -> IO[str]:
    """A file of text to write on at its end, not through a symbolic link: a folder made elsewhere may hold one. Raises OSError."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    return open(path, "a", encoding="utf-8", opener=opener)


def write_json(path: Path, value: Any) -> None:
    """write_atomic of a value as indented JSON; NaN is refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def refuse_foreign(path: Path, *, ours: Callable[[bytes], bool]) -> None:
    """A file that this command did not write is not written over. Raises UserError.

    ours: whether the first 64 KiB of a file are of this command's making.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        head = file.read(2**16)
    if head and not ours(head):
        raise UserError(
            f"{path} is there, and this command did not write it. Name another file, or remove it."
        )


@contextlib.contextmanager
def native_path(path: Path) -> Iterator[str]:
    """A name of a file or folder for native code, which reads names as UTF-8 and knows no locale; good inside the block.

    /data/web/tokenizer.json -> the same        /data/caf\\xe9/tokenizer.json -> /proc/self/fd/7

    Raises OSError.
    """
    name = os.fspath(path)
    if name.isascii() or not os.path.isdir("/proc/self/fd"):
        yield name
        return

    # a name in ASCII for the open file; O_NONBLOCK, so that a fifo keeps nobody
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def fsync_path(path: Path) -> None:
    """Make durable: a file's content (also one that another library wrote), or a folder's renames and new names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usual_mode(path: Path) -> None:
    """Readable for whom the umask allows: safetensors makes its files 0600, and a group could not read an export."""
    # the umask can only be read by setting it
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


@contextlib.contextmanager
def atomic_folder(out: Path, *, mark: str, ours: Collection[str] | None = None) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    An `out` that exists is replaced only where it is empty, or holds the file `mark`, which the block writes and nobody
    else does, and no file beyond `ours` (names below it; None: any). Raises UserError for any other. What a killed process
    of this host left beside `out` is put right first: an earlier `out` that had been moved aside takes its name again, the
    rest is removed.
    """
    out = Path(os.path.abspath(out))
    _put_right(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; needed: a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file():
        raise UserError(
            f"{out} is not empty and holds no {mark}, so it was not written by this command. "
            "Name another folder, or remove it."
        )

    if ours is not None and out.is_dir():
        foreign = next(
            (name for name in files_below(out) if name != mark and name not in ours), None
        )
        if foreign:
            raise UserError(
                f"{out} holds {foreign}, which this command did not write and would remove. Move it"
                " away, or name another folder."
            )

    # beside `out`, hence on its file system: a rename is then one step
    out.parent.mkdir(parents=True, exist_ok=True)
    part, old = (
        out.with_name(f".{out.name}.{_HOST}.{os.getpid()}.{end}") for end in ("part", "old")
    )

    shutil.rmtree(part, ignore_errors=True)
    with _named_as_asked(part, out):
        part.mkdir()
    try:
        yield part

        # all content is durable before the folder has its name
        for path in part.rglob("*"):
            if path.is_file():
                usual_mode(path)
            fsync_path(path)
        fsync_path(part)

        # no rename replaces a full folder: the old one moves aside, and
        # comes back if the next fails
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
        fsync_path(out.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def files_below(folder: Path) -> list[str]:
    """Names of all files of a folder, sorted, those of inner folders as FOLDER/NAME."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _put_right(out: Path) -> None:
    """Of a process that was killed in atomic_folder: `out` back from .old where it is missing, .part and .old removed."""
    if not out.parent.is_dir():
        return
    left = re.compile(re.escape(f".{out.name}.{_HOST}.") + r"(\d+)\.(part|old)")
    for path in sorted(out.parent.iterdir()):
        match = left.fullmatch(path.name)
        # a live process's folders are its own business
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not out.exists():
            os.rename(path, out)
            fsync_path(out.parent)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        # signal 0 asks only whether the process is there
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:  # a number in a name that no process can have
        return False
    except OSError:  # somebody else's
        return True
    return True


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a regular file, read in pieces of 1 MiB. Raises OSError, also for a fifo, which it does not wait for."""
    digest = hashlib.sha256()
    with regular_file(path) as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
