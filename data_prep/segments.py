"""A source cut into segments: the unit that one process makes, that a kill costs, and that parts of a job array share.

The files of a source lie end to end, and every `segment_bytes` of them begin a segment. What is read as a whole - a
line, a paragraph, a row group of Parquet, or a file that cannot be entered in its middle - belongs to the segment in
which it begins:

    files      |a.jsonl          |b.jsonl   |c.jsonl.gz        |d.jsonl |
    segments   |0      |1      |2      |3      |4      |5      |6      |
    c.jsonl.gz                               3 3 3 3 3 3 3 3 3           so 4 has nothing and is left out

Cuts are made by sizes alone, and no file is opened for them. So a segment may be empty: here 1, of three row groups.

    e.parquet  |first            |second    |third|
    segments   |0      |1      |2      |3      |
                0 0 0 0 0 0 0 0 0 2 2 2 2 2 3 3 3

Segments are a function of the input and of shard_bytes alone. Every one makes shards of its own, so the shards are the
same whoever made them, in however many parts, and however often that was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.config import Source
from data_prep.readers import InputFile, can_be_cut

# shard_bytes of text in a segment: of English prose 1.8 shards of uint16, of code 2.4
SEGMENT_SHARDS = 4
# a source has at least so many, for as many cores to share, as long as they have
SEGMENTS = 64
LEAST_BYTES = 2**23  # this much text: 0.1 s of work, against 10 ms of fsync


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The documents of one file that begin in [begin, end); the whole file where end is None."""

    file: InputFile
    begin: int = 0
    end: int | None = None

    def described(self) -> list:
        """For segment.json."""
        return [self.file.name, self.begin, self.end]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Some neighbouring stretches of a source."""

    number: int
    begin: int  # where its first byte lies in the source, all files end to end
    bytes: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `index` (from 1) of `count`: the segments that begin in this share of the source's bytes."""

    index: int = 1
    count: int = 1

    @property
    def label(self) -> str:
        """'3-of-16', for names of files."""
        return f"{self.index}-of-{self.count}"

    def of(self, segments: Sequence[Segment]) -> list[Segment]:
        """Its segments."""
        # a segment is of the part in whose share it begins: floor(begin * count / total) + 1
        total = max(1, sum(s.bytes for s in segments))
        # an empty last file may begin at `total`, which is of the last part
        return [
            s for s in segments if min(s.begin, total - 1) * self.count // total == self.index - 1
        ]


def numbers_text(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> '1-3,7', as sbatch --array takes it."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][1] + 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in stretches)


def segment_bytes(source_bytes: int, shard_bytes: int) -> int:
    """The bytes of a source that begin a segment: shards are full from 16 GB of text on, of the usual 64 MiB."""
    # -(-a // b) rounds up: smaller segments where there would else be fewer than SEGMENTS
    return min(SEGMENT_SHARDS * shard_bytes, max(LEAST_BYTES, -(-source_bytes // SEGMENTS)))


def segments_of(source: Source, files: Sequence[InputFile], *, shard_bytes: int) -> list[Segment]:
    """The segments of a source's files, in order."""
    size, at = segment_bytes(sum(file.bytes for file in files), shard_bytes), 0
    # (begin in the source, bytes, stretch)
    found: dict[int, list[tuple[int, int, Stretch]]] = {}
    for file in files:
        # the segments in which the file begins and ends
        first, last = at // size, (at + file.bytes - 1) // size
        if can_be_cut(source, file) and first < last:
            # a stretch for each of them, in bytes of the file
            for k in range(first, last + 1):
                begin, end = max(0, k * size - at), min(file.bytes, (k + 1) * size - at)
                found.setdefault(k, []).append(
                    (at + begin, end - begin, Stretch(file=file, begin=begin, end=end))
                )
        else:
            # read as a whole, by the segment in which it begins
            found.setdefault(first, []).append((at, file.bytes, Stretch(file=file)))
        at += file.bytes

    # numbered anew: those in which nothing begins are left out
    segments = []
    for number, (_, of_k) in enumerate(sorted(found.items())):
        begins, sizes, stretches = zip(*of_k, strict=True)
        segments.append(
            Segment(number=number, begin=begins[0], bytes=sum(sizes), stretches=stretches)
        )
    return segments
