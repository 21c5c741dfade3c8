"""The settings of `data-prep prepare`: which text, which tokenizer, where to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from encoder.base.errors import ConfigError
from encoder.base.schema import chosen_by


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What every format needs."""

    name: str                        # the folder of this source below `out`
    files: tuple[str, ...]           # names or globs (** too), relative to `root`

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ConfigError(f"name {self.name!r} cannot name a folder; needed: letters, digits, _ . -, no dot first.")
        if not self.files:
            raise ConfigError(f"files of {self.name} is an empty list; needed: at least one name or glob.")


@dataclass(frozen=True, kw_only=True)
class JsonlSource(_Source):
    """One JSON object a line; .gz and .zst are opened as they are."""

    text: str = "text"               # the key that holds the text


@dataclass(frozen=True, kw_only=True)
class ParquetSource(_Source):
    """Parquet files, one row a document."""

    text: str = "text"               # the column that holds the text


@dataclass(frozen=True, kw_only=True)
class TextSource(_Source):
    """Plain UTF-8 text."""

    document: Literal["file", "paragraph", "line"] = "file"   # what one document is; paragraphs end at an empty line


SOURCES = {"jsonl": JsonlSource, "parquet": ParquetSource, "text": TextSource}
Source = JsonlSource | ParquetSource | TextSource


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Text to shards: OUT/<source>/train and OUT/<source>/held_out for every source."""

    tokenizer: str                                    # path of a tokenizer.json (data-prep tokenizer makes one)
    out: str
    sources: tuple[chosen_by("format", SOURCES), ...]
    root: str = "."                                   # the folder that the sources' files are relative to
    max_tokens_per_document: int = 8192               # longer ones are cut into near-equal pieces, nothing is dropped
    held_out_share: float = 0.01                      # documents kept out of training, chosen by a hash of their text
    on_error: Literal["stop", "skip"] = "stop"        # skip: count what cannot be read and go on
    processes: int = 0                                # 0: one per core
    shard_bytes: int = 2**26
    compression: Literal["none", "zstd"] = "none"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is an empty list; needed: at least one source.")
        names = [s.name for s in self.sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"two sources are named {twice[0]}; needed: a name of its own for each.")
        if self.max_tokens_per_document < 8:
            raise ConfigError(f"max_tokens_per_document is {self.max_tokens_per_document}; needed: at least 8.")
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(f"held_out_share is {self.held_out_share}; needed: 0 or more and less than 1.")
        if self.processes < 0:
            raise ConfigError(f"processes is {self.processes}; needed: a number of processes, or 0 for one per core.")
        if not 2**10 <= self.shard_bytes < 2**32:
            raise ConfigError(f"shard_bytes is {self.shard_bytes:,}; needed: 1,024 to "
                              "4,294,967,295 (MDS offsets have 32 bits).")

    @property
    def worker_processes(self) -> int:
        """How many processes encode: the setting, or the cores this process may use."""
        if self.processes:
            return self.processes
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
