"""Packed shards, unpacked to a size that is known before: a small file that unpacks to a large one costs no memory."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable

# ids of text shrink to a third, padded samples to a thirtieth; 4 GiB of zeros come in 130 KB
LARGE_BYTES, MOST_TIMES = 2**30, 30
_ZSTD_MAGIC = 0xFD2FB528


def unpack(algorithm: str, packed: bytes, *, size: int) -> bytes:
    """The `size` bytes that were packed.

    algorithm: as MDS's index.json names it, with or without a level: zstd, gz, bz2, br, snappy, zstd:7.
    packed: one whole file.
    size: bytes it must unpack to; memory beyond them is 1 MiB.

    Raises ValueError, whose text ends a sentence, for another size, for damage and for an unknown algorithm.
    """
    name = algorithm.partition(":")[0]
    if name not in _ALGORITHMS:
        raise ValueError(f"compression {algorithm!r} is none of {', '.join(_ALGORITHMS)}")

    # refused before a byte is unpacked
    if size > max(LARGE_BYTES, MOST_TIMES * len(packed)):
        raise ValueError(f"{len(packed):,} bytes would grow to {size:,}, as no shard of text does")
    try:
        content = _ALGORITHMS[name](packed, size)
    except ImportError as error:
        raise ValueError(f"compression {name} needs the package {error.name}") from error
    except Exception as error:  # each algorithm raises its own
        raise ValueError(
            " ".join(str(error).split()).rstrip(".") or type(error).__name__
        ) from error

    if len(content) != size:
        found = "more" if len(content) > size else f"{len(content):,}"
        raise ValueError(f"it holds {found} bytes")
    return content


def _zstd(packed: bytes, size: int) -> bytes:
    # zstd.decompress allocates what the header says, so that is held against the size before
    told = _told_by_zstd(packed)
    if told is None:
        return _stream("zstd", packed, size)
    if told != size:
        raise ValueError(f"it says that it holds {told:,} bytes")
    import zstd

    return zstd.decompress(packed)


def _told_by_zstd(packed: bytes) -> int | None:
    """The size in a frame's header (RFC 8878, section 3.1.1.1), None where it does not tell."""
    if int.from_bytes(packed[:4], "little") != _ZSTD_MAGIC or len(packed) < 6:
        raise ValueError("it is no frame of zstd")

    # bits 0 and 1: width of a dictionary's id; bit 5: single segment, without a window byte;
    # bits 6 and 7: width of the size
    descriptor = packed[4]
    single, field = bool(descriptor & 0x20), descriptor >> 6
    width = (1 if single else 0, 2, 4, 8)[field]
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]

    if not width:
        return None
    # sizes in two bytes begin at 256
    return int.from_bytes(packed[at : at + width], "little") + (256 if width == 2 else 0)


def _gzip(packed: bytes, size: int) -> bytes:
    # one byte more than it may have: enough to see that it is too long
    return gzip.GzipFile(fileobj=io.BytesIO(packed)).read(size + 1)


def _bz2(packed: bytes, size: int) -> bytes:
    return bz2.BZ2File(io.BytesIO(packed)).read(size + 1)


def _brotli(packed: bytes, size: int) -> bytes:
    return _stream("brotli", packed, size)


def _snappy(packed: bytes, size: int) -> bytes:
    told = 0
    # a number of 7 bits a byte, the low ones first; the last byte has no high bit
    for place, byte in enumerate(packed[:5]):
        told |= (byte & 127) << 7 * place
        if byte < 128:
            break
    if told != size:
        raise ValueError(f"it says that it holds {told:,} bytes")
    import snappy

    return snappy.decompress(packed)


def _stream(algorithm: str, packed: bytes, size: int) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), algorithm) as stream:
        return stream.read(size + 1)


_ALGORITHMS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": _zstd,
    "gz": _gzip,
    "bz2": _bz2,
    "br": _brotli,
    "snappy": _snappy,
}
