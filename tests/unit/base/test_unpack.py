"""What unpacks to another size than was said is refused, and costs no memory."""

from __future__ import annotations

import bz2
import gzip
import subprocess
import sys

import pytest

from encoder.base import unpack as unpack_module
from encoder.base.unpack import unpack

TEXT = bytes(range(256)) * 700


@pytest.mark.parametrize("algorithm", ["zstd", "zstd:7", "gz:1", "bz2", "br", "snappy"])
def test_what_streaming_packs_is_unpacked(algorithm):
    from streaming.base.compression import compress

    packed = compress(algorithm, TEXT)
    assert unpack(algorithm, packed, size=len(TEXT)) == TEXT
    for size in (len(TEXT) - 1, len(TEXT) + 1, 0):
        with pytest.raises(ValueError, match="bytes"):
            unpack(algorithm, packed, size=size)
    for broken in (packed[: len(packed) // 2], b"", b"\0" * 100):
        with pytest.raises(ValueError):
            unpack(algorithm, broken, size=len(TEXT))


def test_frames_of_zstd_that_do_not_tell_their_size_are_read():
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(TEXT)
    assert unpack("zstd", sink.getvalue().to_pybytes(), size=len(TEXT)) == TEXT


def test_an_unknown_algorithm_is_named():
    with pytest.raises(ValueError, match="compression 'lzma' is none of zstd, gz"):
        unpack("lzma", b"", size=0)


@pytest.mark.parametrize("algorithm", ["zstd", "gz", "bz2", "br", "snappy"])
def test_a_file_that_unpacks_to_gigabytes_costs_no_memory(algorithm, tmp_path):
    """1 GiB of zeros, said to be 1,000 bytes, under a limit of 500 MB more than the start takes."""
    from streaming.base.compression import compress

    big = bytes(2**20)
    packed = {"gz": lambda: gzip.compress(big) * 1024, "bz2": lambda: bz2.compress(big) * 1024}.get(
        algorithm, lambda: compress("br:1" if algorithm == "br" else algorithm, bytes(2**30))
    )()
    (tmp_path / "packed").write_bytes(packed)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "import pyarrow, zstd, snappy; from encoder.base.unpack import unpack\n"
        "packed = Path(sys.argv[2]).read_bytes()\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20,) * 2)\n"
        "try: unpack(sys.argv[1], packed, size=1000)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, algorithm, str(tmp_path / "packed")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "bytes" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("algorithm", ["zstd", "gz", "bz2", "br", "snappy"])
def test_a_small_file_that_would_take_gigabytes_is_refused_unread(algorithm, monkeypatch):
    """Also where its index and its own header agree on the size."""
    monkeypatch.setattr(
        unpack_module, "_ALGORITHMS", {algorithm: lambda *_: pytest.fail("it was unpacked")}
    )
    with pytest.raises(ValueError, match="as no shard of text does"):
        unpack(algorithm, bytes(400_000), size=2**32 - 1)
