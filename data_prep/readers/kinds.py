"""What a file is, by its first bytes: its name does not count.

1f 8b ...            gzip         opened and read on
28 b5 2f fd ...      zstd         opened and read on
50 41 52 31 ...      Parquet      read by format: parquet, refused by name elsewhere
ff fe 7b 00 ...      UTF-16       refused: save it as UTF-8
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, get_args

HEAD_BYTES = 2**13
Packing = Literal["gzip", "zstd", "bzip2", "xz"]

# a stream under each of these is read on; the rest of the world is refused with what to do
PACKINGS: tuple[tuple[bytes, Packing], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
)
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)", re.DOTALL)

# (first bytes, what it is, what to do)
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "Unpack it (unzip)"),
    (b"PK\x05\x06", "an empty zip archive", "Leave it out"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it (7z x)"),
    (b"Rar!\x1a\x07", "a rar archive", "Unpack it (unrar x)"),
    (b"\x04\x22\x4d\x18", "an lz4 file", "Unpack it (lz4 -d)"),
    (b"\x02\x21\x4c\x18", "an lz4 file", "Unpack it (lz4 -d)"),
    (b"\xff\x06\x00\x00sNaPpY", "a snappy file", "Unpack it (snzip -d)"),
    (b"\x1f\x9d", "a file of compress", "Unpack it (uncompress)"),
    (b"\x89LZO", "an lzop file", "Unpack it (lzop -d)"),
    (b"\x5d\x00\x00", "an lzma file", "Unpack it (xz -d)"),
    (b"SQLite format 3\x00", "an SQLite database", "Write its text out as JSON lines or CSV"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Write its text out as JSON lines or Parquet"),
    (b"\x93NUMPY", "a NumPy array", "Write its text out as JSON lines"),
    (b"Obj\x01", "an Avro file", "Write it out as Parquet"),
    (b"%PDF-", "a PDF document", "Give the text of it"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "Give the text of it"),
    (b"{\\rtf", "an RTF document", "Give the text of it"),
    (b"\x7fELF", "a program", "Leave it out"),
    (b"\x89PNG", "a picture", "Leave it out"),
    (b"\xff\xd8\xff", "a picture", "Leave it out"),
    (b"\xff\xfe\x00\x00", "text in UTF-32", "Save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "text in UTF-32", "Save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS, not the file itself",
        "Fetch the file (git lfs pull)",
    ),
)
# letters alone, which a text may begin with: a NUL must be near
_FOREIGN_LETTERS: tuple[tuple[bytes, str, str], ...] = (
    (b"ORC", "an ORC file", "Write it out as Parquet"),
    (b"PARE", "an encrypted Parquet file", "Decrypt it"),
    (b"FEA1", "a Feather file of the first version", "Write it out as Parquet"),
    (b"LZIP", "an lzip file", "Unpack it (lzip -d)"),
    (b"GIF8", "a picture", "Leave it out"),
)
_UTF16 = ("text in UTF-16", "Save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"
# of text, whatever its encoding, hardly any byte; of compressed bytes 11 %
_MOST_CONTROLS = 0.02
_MANY_BYTES = 64  # from so many on, shares of a head tell something


@dataclass(frozen=True)
class Kind:
    """What the first bytes of a file tell."""

    word: str  # a packing, parquet, arrow, text or another word for people
    what: str = ""  # 'an SQLite database', for messages
    to_do: str = ""  # 'Unpack it (unzip)'

    @property
    def is_unknown(self) -> bool:
        """Whether it is neither text nor anything that has a name here."""
        return self == UNKNOWN

    @property
    def packing(self) -> Packing | None:
        """How it is compressed, if by one of those that are read on."""
        return next((word for word in get_args(Packing) if word == self.word), None)


UNKNOWN = Kind("other", "no text, but bytes of an unknown kind", "Look at it (file, hexdump -C)")


def kind_of(head: bytes) -> Kind:
    """The kind of a file from its first HEAD_BYTES (all of a shorter one)."""
    for mark, packing in PACKINGS:
        if head.startswith(mark):
            return Kind(packing, f"a {packing} file", "Unpack it")
    if _ZSTD_SKIPPABLE.match(head):
        return Kind("zstd", "a zstd file", "Unpack it")
    if _BZIP2.match(head):
        return Kind("bzip2", "a bzip2 file", "Unpack it")
    if head.startswith(b"PAR1"):
        return Kind("parquet", "a Parquet file", "Set format: parquet")
    if head.startswith(b"ARROW1") or _is_arrow_stream(head):
        return Kind("arrow", "an Arrow file", "Set format: arrow")
    if head[257:262] == b"ustar":
        return Kind("other", "a tar archive", "Unpack it (tar xf)")
    for mark, what, to_do in (*_FOREIGN, *(_FOREIGN_LETTERS if b"\0" in head else ())):
        if head.startswith(mark):
            return Kind("other", what, to_do)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Kind("other", *_UTF16)
    return _kind_by_bytes(head)


def _is_arrow_stream(head: bytes) -> bool:
    """A length that is a small multiple of 8, before a FlatBuffers table; since Arrow 0.15 with ffffffff before it."""
    if len(head) < 16:
        return False
    # size of the first message, and where its root table lies: both small, so zeros are near
    at = 4 if head.startswith(b"\xff\xff\xff\xff") else 0
    size, root = (int.from_bytes(head[at + 4 * k : at + 4 * k + 4], "little") for k in range(2))
    return (
        (at > 0 or size % 4 == 0)
        and 0 < size < 2**24
        and 4 <= root < min(size, 2**16)
        and b"\0\0\0" in head[: at + 16]
    )


def _kind_by_bytes(head: bytes) -> Kind:
    """Text, or bytes of an unknown kind: by NULs, control characters, and whether it is UTF-8."""
    if len(head) >= 4 and not head.strip(b"\0"):
        return Kind(
            "other", "nothing but NUL bytes, as after a crash of a machine", "Fetch the file again"
        )
    # UTF-32 of Latin letters: three of each four bytes are 0, in one byte order or the other
    if len(head) >= 16 and (_are_zero(head, (1, 2, 3)) or _are_zero(head, (0, 1, 2))):
        return Kind("other", "text in UTF-32", "Save it as UTF-8 (iconv -f UTF-32 -t UTF-8)")
    nuls, controls = head.count(b"\0"), len(head) - len(head.translate(None, _CONTROLS))
    # UTF-16 of Latin letters: every other byte is 0, and of the rest none
    if (
        nuls * 3 > len(head)
        and len(head) >= 4
        and 0 in (head[::2].count(b"\0"), head[1::2].count(b"\0"))
    ):
        return Kind("other", *_UTF16)
    if len(head) < _MANY_BYTES:
        return Kind("text")
    # many NULs, in the first line already; or many controls in what is no UTF-8
    if (
        nuls * 10 > len(head)
        and b"\0" in head.partition(b"\n")[0]
        or controls > _MOST_CONTROLS * len(head)
        and not _is_utf8(head)
    ):
        return UNKNOWN
    return Kind("text")


def _is_utf8(head: bytes) -> bool:
    """Whether a head, which may end inside a character, is UTF-8."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and error.reason == "unexpected end of data"
    return True


def shape_of(head: bytes) -> Literal["array", "objects", "markup", "pretty object", "other"]:
    """How a text begins: a JSON array, JSON objects one a line, HTML or XML, one JSON object over several lines, or else."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, _, rest = text.partition(b"\n")
    if text.startswith(b"["):
        # a list that ends in its line, and more below: lines of lists, no array
        if not (_is_json(line) and rest.strip()):
            return "array"
        return "other"
    if text.startswith(b"{"):
        if _is_json(line) or b"\n" not in text:
            return "objects"
        if line.strip() == b"{":
            return "pretty object"
        return "other"
    if re.match(rb"<(!doctype|html|\?xml|!--)", text, re.IGNORECASE):
        return "markup"
    return "other"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _are_zero(head: bytes, places: tuple[int, ...]) -> bool:
    """Whether nearly all bytes at these places of each four are 0."""
    return all(head[at::4].count(b"\0") > 0.95 * len(head[at::4]) for at in places)
