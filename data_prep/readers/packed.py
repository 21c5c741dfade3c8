"""Compressed files as streams: gzip, bzip2 and xz by the standard library, zstd by Arrow or, for long windows, by libzstd.

A stream has read(n) and read1(n), gives what was unpacked before a break first, and holds a window and a step in memory:
128 MiB at most for zstd, unless the settings allow more; 1 GiB for xz.
"""

from __future__ import annotations

import bz2
import contextlib
import ctypes
import ctypes.util
import gzip
import importlib.util
import lzma
import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

from data_prep.readers.blocks import SKIP, ReadError
from data_prep.readers.kinds import HEAD_BYTES, Packing, kind_of

STEP_BYTES = 2**16  # of decompressed text in one step: no more is lost before a break
USUAL_ZSTD_WINDOW = 2**27  # what zstd itself reads without --long=N or --memory
MOST_ZSTD_WINDOW = 2**31  # of libzstd
XZ_MEMORY = 2**30  # the dictionary of xz -9 has 64 MiB
PACKED_ENDINGS = (".gz", ".zst", ".gzip", ".zstd", ".bz2", ".xz")


class ByteStream(Protocol):
    """What is read from beginning to end."""

    def read(self, size: int = -1, /) -> bytes:
        """`size` bytes, or all."""

    def read1(self, size: int, /) -> bytes:
        """Up to `size` bytes, b'' at the end."""


@contextlib.contextmanager
def opened(
    place: Path | str, packing: Packing | None, *, zstd_window_bytes: int = USUAL_ZSTD_WINDOW
) -> Iterator[tuple[ByteStream, BufferedReader]]:
    """(the decompressed stream, the file below it), by a path or a URL. Raises ReadError for a zstd window above the one
    allowed."""
    with open_at(place) as raw:
        # an empty file is no stream of any of these formats
        if (
            isinstance(place, Path)
            and place.suffix in PACKED_ENDINGS
            and not os.fstat(raw.fileno()).st_size
        ):
            raise EOFError("it is cut short to 0 bytes, and compressed nothing has some")
        yield unpacking(raw, packing, place=str(place), zstd_window_bytes=zstd_window_bytes), raw


def open_at(place: Path | str) -> BufferedReader:
    """A file for reading from anywhere in it, by its path or URL. Raises whatever the libraries below fsspec raise."""
    if isinstance(place, str) and "://" in place:
        import fsspec

        return fsspec.open(place, "rb").open()
    return open(place, "rb")


def unpacking(
    raw: BufferedReader,
    packing: Packing | None,
    *,
    place: str,
    zstd_window_bytes: int = USUAL_ZSTD_WINDOW,
) -> ByteStream:
    """The stream over an open file at its beginning; the file itself where it is not compressed."""
    if packing is None:
        return raw
    if packing == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if packing == "zstd":
        return _zstd_stream(raw, place, zstd_window_bytes)
    if packing == "bzip2":
        return _Unpacked(raw, bz2.BZ2Decompressor, place=place)
    return _Unpacked(
        raw, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY), place=place, padding=True
    )


def inner_head(
    path: Path, packing: Packing, *, zstd_window_bytes: int = USUAL_ZSTD_WINDOW
) -> bytes:
    """The first bytes of what is in a compressed file. Raises READ_ERRORS, ReadError."""
    with opened(path, packing, zstd_window_bytes=zstd_window_bytes) as (stream, _):
        head = b""
        # a break is reported where the file is read
        with contextlib.suppress(OSError, EOFError, ValueError):
            while len(head) < HEAD_BYTES and (piece := stream.read1(HEAD_BYTES - len(head))):
                head += piece
        return head


class _Unpacked:
    """A stream of one compressed stream after the other, by decompressors as bz2 and lzma have them."""

    def __init__(
        self, raw: BufferedReader, new: Callable[[], Any], *, place: str, padding: bool = False
    ) -> None:
        self._raw, self._new, self._place, self._padding = raw, new, place, padding
        self._decompressor, self._rest, self._begun = new(), b"", False

    def read1(self, size: int) -> bytes:
        """Up to `size` unpacked bytes, b'' at the end. Raises OSError, EOFError."""
        while True:
            # streams may follow one another (cat a.xz b.xz); between those of xz zeros may lie
            if self._decompressor.eof:
                self._rest = self._decompressor.unused_data.lstrip(b"\0" if self._padding else b"")
                self._decompressor, self._begun = self._new(), False
            # more is read only when the decompressor has nothing left to work on
            if not self._rest and (self._begun is False or self._decompressor.needs_input):
                self._rest = self._raw.read(STEP_BYTES)
                if self._padding and not self._begun:
                    self._rest = self._rest.lstrip(b"\0")
                if not self._rest:
                    if self._begun:
                        raise EOFError("it is cut short inside a compressed stream")
                    return b""
            given, self._rest, self._begun = self._rest, b"", True
            try:
                piece = self._decompressor.decompress(given, size)
            except (lzma.LZMAError, ValueError) as error:
                if "memory" in str(error).lower():
                    raise ReadError(
                        f"{self._place} needs more than {XZ_MEMORY:,} bytes of memory to be"
                        f" unpacked, as no preset of xz does. Unpack it (xz -d), or {SKIP}."
                    ) from error
                raise OSError(str(error)) from error
            if piece:
                return piece

    def read(self, size: int = -1) -> bytes:
        """`size` unpacked bytes, or all."""
        pieces, missing = [], size
        while missing and (
            piece := self.read1(STEP_BYTES if size < 0 else min(missing, STEP_BYTES))
        ):
            pieces.append(piece)
            missing -= len(piece) if size > 0 else 0
        return b"".join(pieces)


def _zstd_stream(raw: BufferedReader, place: str, window_bytes: int) -> ByteStream:
    # the window is in the head, so it is refused before memory is taken for it
    if (needed := zstd_window(raw.read(32))) > window_bytes:
        raise ReadError(too_wide(place, needed, window_bytes))
    raw.seek(0)
    # Arrow reads the usual windows alone
    if window_bytes > USUAL_ZSTD_WINDOW and (library := _libzstd()):
        return _Unpacked(raw, lambda: _LongZstd(library, place, window_bytes), place=place)
    if needed > USUAL_ZSTD_WINDOW:
        raise ReadError(
            f"{place} has a zstd window of {needed:,} bytes, and no libzstd is here to read it. "
            f"Unpack the file (zstd -d --long=31), or {SKIP}."
        )
    import pyarrow

    return _Arrow(
        pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"),
        place,
        window_bytes,
    )


def zstd_window(head: bytes) -> int:
    """The window of the first frame in bytes, 0 where the head does not tell (RFC 8878, 3.1.1.1)."""
    if len(head) < 6 or not head.startswith(b"\x28\xb5\x2f\xfd"):
        return 0
    descriptor = head[4]
    # no single segment: the window is (1 + mantissa / 8) 2^(10 + exponent)
    if not descriptor & 0x20:
        exponent, mantissa = head[5] >> 3, head[5] & 7
        base = 1 << (10 + exponent)
        return base + base // 8 * mantissa
    # a single segment: the window is the content's size. It follows the id of a dictionary
    # (0, 1, 2 or 4 bytes), and has 1, 2, 4 or 8 bytes; two of them count from 256
    at, width = 5 + (0, 1, 2, 4)[descriptor & 3], (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)


def too_wide(place: str, needed: int, allowed: int) -> str:
    """The sentence about a zstd frame whose window is beyond the settings."""
    size = "wider than the settings allow (as zstd --long writes)"
    if needed:
        size = f"of {needed:,} bytes (as zstd --long writes)"
    if needed > MOST_ZSTD_WINDOW:
        return (
            f"{place} needs a zstd window {size}; at most {MOST_ZSTD_WINDOW:,} can be read. Pack it"
            f" anew, or {SKIP}."
        )
    enough = MOST_ZSTD_WINDOW
    if needed:
        enough = 1 << (needed - 1).bit_length()
    return (
        f"{place} needs a zstd window {size}; zstd_window_bytes is {allowed:,}. Set the source's"
        f" zstd_window_bytes: {enough} (a process may take as much more memory), or {SKIP}."
    )


class _Arrow:
    """Arrow's stream, in which a frame with a window above the usual one is told from a broken file."""

    def __init__(self, stream: Any, place: str, window_bytes: int) -> None:
        self._stream, self._place, self._window = stream, place, window_bytes

    def read1(self, size: int) -> bytes:
        try:
            return self._stream.read1(size)
        except OSError as error:
            if "too much memory" in str(error):
                raise ReadError(too_wide(self._place, 0, self._window)) from error
            raise

    def read(self, size: int = -1) -> bytes:
        pieces, missing = [], size
        while missing and (
            piece := self.read1(STEP_BYTES if size < 0 else min(missing, STEP_BYTES))
        ):
            pieces.append(piece)
            missing -= len(piece) if size > 0 else 0
        return b"".join(pieces)


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (("start", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t))


class _LongZstd:
    """One zstd frame after the other by libzstd, with windows of up to `window_bytes`; as a decompressor of bz2."""

    def __init__(self, library: ctypes.CDLL, place: str, window_bytes: int) -> None:
        self._library, self._place, self._window = library, place, window_bytes
        self._context = library.ZSTD_createDCtx()
        # 100 is ZSTD_d_windowLogMax
        library.ZSTD_DCtx_setParameter(
            self._context, 100, min(31, max(10, (window_bytes - 1).bit_length()))
        )
        self._given, self.eof, self.unused_data, self.needs_input = b"", False, b"", True

    def __del__(self) -> None:
        self._library.ZSTD_freeDCtx(self._context)

    def decompress(self, data: bytes, size: int) -> bytes:
        """Up to `size` bytes. Raises OSError, ReadError for a window beyond the settings."""
        self._given += data
        source = ctypes.create_string_buffer(self._given, len(self._given))
        target = ctypes.create_string_buffer(size)
        # both count in `at` what was taken and what was made
        given = _Buffer(ctypes.cast(source, ctypes.c_void_p), len(self._given), 0)
        made = _Buffer(ctypes.cast(target, ctypes.c_void_p), size, 0)
        left = self._library.ZSTD_decompressStream(
            self._context, ctypes.byref(made), ctypes.byref(given)
        )
        if self._library.ZSTD_isError(left):
            why = self._library.ZSTD_getErrorName(left).decode("ascii", "replace")
            if "too much memory" in why:
                raise ReadError(too_wide(self._place, 0, self._window))
            raise OSError(why)
        self._given = self._given[given.at :]
        # 0: the frame is whole
        if left == 0:
            self.eof, self.unused_data, self._given = True, self._given, b""
        # an output that is full may have more behind it
        self.needs_input = not self._given and made.at < size
        return target.raw[: made.at]


def _libzstd() -> ctypes.CDLL | None:
    """libzstd: the one inside the package zstd, which MDS shards are packed with, or the system's."""
    module = importlib.util.find_spec("zstd")
    for name in (module.origin if module else None, ctypes.util.find_library("zstd")):
        with contextlib.suppress(OSError, AttributeError, TypeError):
            library = ctypes.CDLL(name)
            library.ZSTD_createDCtx.restype = ctypes.c_void_p
            library.ZSTD_freeDCtx.argtypes = (ctypes.c_void_p,)
            library.ZSTD_DCtx_setParameter.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
            library.ZSTD_DCtx_setParameter.restype = ctypes.c_size_t
            library.ZSTD_decompressStream.argtypes = (
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_void_p,
            )
            library.ZSTD_decompressStream.restype = ctypes.c_size_t
            library.ZSTD_isError.argtypes = library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
            library.ZSTD_getErrorName.restype = ctypes.c_char_p
            return library
    return None


def head_of(path: Path) -> bytes:
    """The first bytes of a file, before any unpacking. Raises OSError."""
    with open(path, "rb") as f:
        return f.read(HEAD_BYTES)


def packing_of(path: Path) -> Packing | None:
    """How a file is compressed, None where it is not or cannot be read."""
    try:
        return kind_of(head_of(path)).packing
    except OSError:
        return None
