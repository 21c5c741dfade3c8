"""The one door for bytes made elsewhere: files are read with bounds, and names out of them stay below their folder.

    content = read_json(folder / "index.json", error=ShardError)
    path = inside(folder, content["shards"][0]["raw_data"]["basename"], where=folder / "index.json", error=ShardError)

Whatever such a file holds, the answer is a value or one error of the caller's class: no other exception, no wait for a
fifo, no memory beyond a small multiple of `most_bytes`, no file outside the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from encoder.base.errors import UserError, why_unreadable

# the largest tokenizer.json in use (vocabulary 262,144) has 34 MB; an index has 0.7 KB a shard
MOST_BYTES = 2**26
INDEX_BYTES = 2**27
MOST_DEPTH = 64  # tokenizer.json: 8, model configs: 6
# lists and mappings take 60 to 240 bytes each, however short their text is
MOST_CONTAINERS = 5_000_000
MOST_DIGITS = 300  # every such integer still fits a float
MOST_NAME_BYTES = 255  # of one file name, on every usual file system
MOST_PATH_BYTES = 4000

# strings are matched first, so that a bracket in one does not count; an open string runs to the end
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class _Refused(ValueError):
    """What a hook of the parser does not take; its text is the end of a sentence."""


def regular_file(path: Path | str) -> IO[bytes]:
    """A regular file, open for reading bytes. Raises OSError, also for a fifo or a device, which it does not wait for."""
    # O_NONBLOCK: opening a fifo would wait for a writer. What it is, is asked of the open file
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = next((word for test, word in _KINDS if test(mode)), "another kind")
            raise OSError(errno.EINVAL, f"it is {kind}; needed: a file", os.fspath(path))
        # a regular file from here on: reads wait as usual
        os.set_blocking(handle, True)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def open_regular(path: Path | str, *, error: type[UserError] = UserError) -> IO[bytes]:
    """As regular_file, but raises `error`, one sentence; whether the file is not there, `missing(caught)` tells."""
    try:
        return regular_file(path)
    except OSError as why:
        reason = why_unreadable(why)
        if why.errno == errno.ENXIO:
            reason = "it is a socket or a device; needed: a file."
        raise error(f"{path} cannot be read: {reason}") from why
    except ValueError as why:  # a NUL, or a character that no name of a file can hold
        raise error(f"{ascii(str(path))} cannot be read: no file has such a name ({why}).") from why


def missing(caught: UserError) -> bool:
    """Whether an error of this module says that the file is not there."""
    return isinstance(caught.__cause__, FileNotFoundError)


def read_bytes(
    path: Path | str, *, error: type[UserError] = UserError, most_bytes: int = MOST_BYTES
) -> bytes:
    """A regular file of at most `most_bytes`. Raises `error`."""
    with open_regular(path, error=error) as file:
        try:
            # one byte more tells a longer file, also one that grows or has no size
            content = file.read(most_bytes + 1)
        except OSError as why:
            raise error(f"{path} cannot be read: {why.strerror or why}.") from why
        if len(content) > most_bytes:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise error(
                f"{path} cannot be read: it has {size:,} bytes, and no such file has more than"
                f" {most_bytes:,}."
            )
    return content


def read_text(
    path: Path | str, *, error: type[UserError] = UserError, most_bytes: int = MOST_BYTES
) -> str:
    """A regular file of UTF-8, with or without a byte order mark. Raises `error`, naming the line that is not UTF-8."""
    content = read_bytes(path, error=error, most_bytes=most_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise error(f"{path} cannot be read: it is UTF-16; needed: UTF-8. Save it so.") from why
        line = content.count(b"\n", 0, why.start) + 1
        raise error(
            f"{path} cannot be read: line {line} is not UTF-8 (byte {why.start:,}). Save it as"
            " UTF-8."
        ) from why


def read_json(
    path: Path | str,
    *,
    error: type[UserError] = UserError,
    most_bytes: int = MOST_BYTES,
    root: type = object,
    non_finite: bool = False,
) -> Any:
    """The value of a JSON file.

    error: class of what is raised, always one sentence with the path.
    most_bytes: larger files are refused unread.
    root: class that the whole value must have, dict or list.
    non_finite: takes NaN and Infinity, which JSON does not know.
    """
    text = read_text(path, error=error, most_bytes=most_bytes)
    return parse_json(text, where=path, error=error, root=root, non_finite=non_finite)


def parse_json(
    text: str,
    *,
    where: Path | str,
    error: type[UserError] = UserError,
    root: type = object,
    non_finite: bool = False,
) -> Any:
    """The value of a JSON text, at most MOST_DEPTH deep, every key once a mapping, every number finite. Raises `error`.

    where: what the text is, for messages: a path, or words.
    error, root, non_finite: as of read_json.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if not (non_finite or math.isfinite(value)):
            raise _Refused(f"holds the number {digits[:40]}, which is too large")
        return value

    def constant(word: str) -> float:
        if not non_finite:
            raise _Refused(f"holds {word}; needed: numbers that JSON knows")
        return float(word)

    # brackets in strings count, too: an upper bound, which costs no parse
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise error(
            f"{where} cannot be read: it holds more than {MOST_CONTAINERS:,} lists and mappings, as"
            " no such file does."
        )

    # hooks refuse what json.loads would take: huge integers, NaN, keys that stand twice
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=number,
            parse_constant=constant,
            object_pairs_hook=_mapping_of,
        )
    except RecursionError:
        _too_deep(text, where, error)
    except json.JSONDecodeError as why:
        what = f"{why.msg} in line {why.lineno}"
        if not text.strip():
            what = "it is empty"
        raise error(f"{where} cannot be read: {what}; needed: JSON.") from why
    except _Refused as why:
        raise error(f"{where} cannot be read: it {why}.") from why

    if not isinstance(value, root):
        found = {dict: "a mapping", list: "a list", str: "text", type(None): "null"}.get(
            type(value), "one number"
        )
        needed = "a mapping" if root is dict else "a list"
        raise error(f"{where} cannot be read: it holds {found}; needed: {needed}.")
    _check(value, text, where, error)
    return value


@contextlib.contextmanager
def native_code(
    what: str,
    *,
    error: type[UserError] = UserError,
    remedy: str = "Make one with data-prep tokenizer.",
) -> Iterator[None]:
    """Whatever a library of native code raises inside, a panic of Rust too, is one `error` that begins with `what`.

    A panic is no Exception to Python, so that nothing else would catch it.
    """
    try:
        yield
    except (UserError, MemoryError, ImportError):
        raise
    except BaseException as why:
        # a Rust panic comes as PanicException; Ctrl-C and exits go on
        if not isinstance(why, Exception) and type(why).__name__ != "PanicException":
            raise
        said = " ".join(str(why).split())[:200].rstrip(".") or type(why).__name__
        raise error(f"{what}: {said}. {remedy}".rstrip()) from why


def plain_name(
    name: Any, *, where: Path | str, error: type[UserError] = UserError, folders: bool = True
) -> str:
    """A name out of a file made elsewhere, checked to be a relative path that stays below its folder; nothing is opened.

    where: the file that holds the name, for messages.
    error: class of what is raised for any other name.
    folders: whether it may hold folders, as in `train/shard.00000.mds`.
    """
    wrong = _wrong_name(name, folders)
    if wrong:
        shown = ascii(name) if isinstance(name, str) else type(name).__name__
        needed = "a path below its folder" if folders else "the name of a file beside it"
        raise error(
            f"{where} names the file {shown[:100]}, which {wrong}; needed: {needed}. Do not use"
            " this folder unless you know who made it."
        )
    return name


def inside(
    folder: Path,
    name: Any,
    *,
    where: Path | str,
    error: type[UserError] = UserError,
    folders: bool = True,
) -> Path:
    """`folder / name` for a name out of a file made elsewhere; it lies below the folder, also behind symbolic links.

    `where`, `error`, `folders` as of plain_name. A folder of Hugging Face's cache links to `blobs` of its own repository.
    """
    path = folder / plain_name(name, where=where, error=error, folders=folders)
    try:
        # with all links resolved: the file must lie below its folder
        there, home = os.path.realpath(path), os.path.realpath(folder)
    except (OSError, ValueError) as why:
        raise error(f"{path} cannot be looked up: {why}.") from why

    homes = [home]
    if Path(home).parent.name == "snapshots":
        homes.append(str(Path(home).parent.parent / "blobs"))
    if not any(there.startswith(h.rstrip("/") + "/") for h in homes):
        raise error(
            f"{path} is a symbolic link that leaves its folder, to {there}. Put the file itself"
            " there."
        )
    return path


def number_in_name(text: str, *, digits: int = 18) -> int | None:
    """The number that a name on disk spells, None where it is no number or one that nobody counted to."""
    if len(text) <= digits and text.isascii() and text.isdigit():
        return int(text)
    return None


def _wrong_name(name: Any, folders: bool) -> str | None:
    """What is wrong with a name, as the end of 'which'; None for a good one."""
    if not isinstance(name, str):
        return "is no text"
    if not name:
        return "is empty"
    if not _is_whole(name) or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "holds a character that no name needs"
    if len(name.encode("utf-8")) > MOST_PATH_BYTES:
        return "is too long"
    if name.startswith("/"):
        return "is absolute"
    if "\\" in name or re.match(r"[A-Za-z]:", name):
        return "is a path of Windows"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "leaves its folder" if ".." in parts else "is no plain path"
    if any(len(part.encode("utf-8")) > MOST_NAME_BYTES for part in parts):
        return "is too long"
    if not folders and len(parts) > 1:
        return "lies in another folder"
    return None


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _Refused(f"holds an integer of {len(digits):,} digits")
    return int(digits)


def _mapping_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"has the key {ascii(key)[:80]} twice in one mapping; keep one of them")
        found[key] = value
    return found


def _check(value: Any, text: str, where: Path | str, error: type[UserError]) -> None:
    """Depth, level by level; and strings, where the text spells parts of characters.

    A value, not a key, may hold what Python makes of the name of a file that is not UTF-8: caf\\udce9.
    """
    surrogates = _SURROGATE.search(text) is not None
    level, depth = [value], 0
    # breadth first: a recursion would fail on the depth that is to be refused
    while level:
        below: list[Any] = []
        for item in level:
            wrong: list[str] = []
            if isinstance(item, dict):
                below += item.values()
                wrong = [key for key in item if surrogates and not _is_whole(key)]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not _is_whole(item, "surrogateescape"):
                wrong = [item]
            if wrong:
                raise error(
                    f"{where} cannot be read: it holds half of a character ({ascii(wrong[0])[:60]});"
                    " needed: Unicode."
                )
        level = [
            item
            for item in below
            if isinstance(item, (dict, list)) or surrogates and isinstance(item, str)
        ]
        depth += 1
        if depth > MOST_DEPTH and level:
            _too_deep(text, where, error)


def _is_whole(text: str, errors: str = "strict") -> bool:
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False
    return True


def _too_deep(text: str, where: Path | str, error: type[UserError]) -> NoReturn:
    depth, line = 0, 1
    # the text is read once more, to name the line where the depth is first exceeded
    for match in _BRACKETS.finditer(text):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            depth -= 1
        if depth > MOST_DEPTH:
            line = text.count("\n", 0, match.start()) + 1
            break
    raise error(
        f"{where} cannot be read: line {line} is nested more than {MOST_DEPTH} levels deep, as no"
        " such file is."
    )
