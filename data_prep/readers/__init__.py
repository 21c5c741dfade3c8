"""Sources to blocks of documents, and blocks to texts: the door to the readers of all formats.

A block is a few MiB of one file. Every reader holds a block or the longest document in memory, and passes over documents
beyond `max_document_bytes`, whatever the format:

    files.py, kinds.py, packed.py     which files there are, what their first bytes say, how they are unpacked
    lines.py                          JSON lines, plain text
    arrays.py, delimited.py           one JSON array; CSV and TSV
    tables.py, hub.py, mds.py         Parquet and Arrow; datasets of the hub; MDS shards of text
    parsing.py                        a block to texts, filtered and counted
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.config import (
    ArrowSource,
    CsvSource,
    HubSource,
    JsonArraySource,
    JsonlSource,
    MdsSource,
    ParquetSource,
    Source,
    TextSource,
)
from data_prep.readers.blocks import (
    MOST_DOCUMENT_BYTES,
    Block,
    Limits,
    Parsed,
    ReadError,
    opening,
)
from data_prep.readers.files import InputFile, check_kind, fingerprint, local_files
from data_prep.readers.kinds import HEAD_BYTES, kind_of
from data_prep.readers.packed import open_at
from data_prep.readers.parsing import parse

__all__ = [
    "Block",
    "InputFile",
    "Parsed",
    "ReadError",
    "can_be_cut",
    "check_kind",
    "find_files",
    "fingerprint",
    "numbered",
    "parse",
    "pinned",
    "read_blocks",
]

BLOCK_BYTES = 2**22


def find_files(source: Source, root: Path) -> list[InputFile]:
    """The files of a source: its patterns in order, each pattern's matches sorted. Raises ConfigError for no match."""
    if isinstance(source, HubSource):
        from data_prep.readers.hub import hub_files

        return hub_files(source)
    if isinstance(source, MdsSource):
        from data_prep.readers.mds import mds_files

        return mds_files(source, root)
    return local_files(source, root)


def pinned(source: Source, files: list[InputFile]) -> Source:
    """A source of the hub at the commit that its files were found at, so that every process reads the same."""
    if isinstance(source, HubSource) and (found := re.search(r"@([0-9a-f]{40})/", files[0].name)):
        return dataclasses.replace(source, revision=found[1])
    return source


def can_be_cut(source: Source, file: InputFile) -> bool:
    """Whether the documents that begin in a range of the file's bytes can be read without those before."""
    if file.path is None or file.packing is not None:
        return False
    # by its row groups
    if isinstance(source, ParquetSource):
        return True
    by_lines = (
        isinstance(source, JsonlSource)
        or isinstance(source, TextSource)
        and source.document != "file"
    )
    # a plain file with such a name was never cut: its segments stay what they were
    return by_lines and file.path.suffix not in (".gz", ".zst")


def read_blocks(
    source: Source,
    file: InputFile,
    begin: int = 0,
    end: int | None = None,
    *,
    most_bytes: int = MOST_DOCUMENT_BYTES,
) -> Iterator[Block]:
    """The blocks of one file in order; memory is bounded by some blocks and the longest document. Raises ReadError.

    begin, end: of a file that can be cut, the documents that begin in these bytes are read; of Parquet the row groups.
    most_bytes: that a document may have as it is read; a longer one becomes a block that says so.
    """
    limits = Limits(block_bytes=BLOCK_BYTES, document_bytes=most_bytes)
    with opening():
        check_kind(source, file)
    if isinstance(source, TextSource) and source.document == "file":
        from data_prep.readers.lines import text_blocks

        return text_blocks(source, file, limits)
    if isinstance(source, JsonlSource | TextSource):
        from data_prep.readers.lines import line_blocks

        return line_blocks(source, file, begin, end, limits)
    if isinstance(source, JsonArraySource):
        from data_prep.readers.arrays import array_blocks

        return array_blocks(source, file, limits)
    if isinstance(source, CsvSource):
        from data_prep.readers.delimited import delimited_blocks

        return delimited_blocks(source, file, limits)
    if isinstance(source, MdsSource):
        from data_prep.readers.mds import mds_blocks

        return mds_blocks(source, file, limits)
    if isinstance(source, ParquetSource):
        from data_prep.readers.tables import parquet_blocks

        return parquet_blocks(source, file, limits, begin=begin, end=end)
    if isinstance(source, ArrowSource):
        from data_prep.readers.tables import arrow_blocks

        return arrow_blocks(source, file, limits)
    from data_prep.readers.hub import hub_blocks

    return hub_blocks(source, file, limits)


def numbered(block: Block, file: InputFile) -> Block:
    """The block with `first` counted from the beginning of its file: reads what lies before, for messages alone, where
    counting all along would take 5 % of the time of preparing."""
    if not block.counted_from:
        return block
    from data_prep.readers.lines import line_ends

    # how a file of the hub is packed is not known before it is opened
    if file.url:
        with open_at(file.url) as stream:
            file = dataclasses.replace(file, packing=kind_of(stream.read(HEAD_BYTES)).packing)
    limits = Limits(block_bytes=BLOCK_BYTES, document_bytes=block.most_bytes)
    return dataclasses.replace(
        block,
        first=block.first + line_ends(file, block.source, block.counted_from, limits),
        counted_from=0,
    )
