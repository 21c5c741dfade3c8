"""The settings of `data-prep prepare` and `plan`: which text, which tokenizer, where to, and what a run takes of it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from data_prep.filters import Filter
from data_prep.other_words import OTHER_WORDS
from data_prep.sentences import ENGLISH, check_language
from encoder.base.errors import ConfigError, nearest
from encoder.base.file_kinds import refuse_other_kinds
from encoder.base.mixtures import Mixture
from encoder.base.schema import (
    LocalText,
    PathText,
    Tokens,
    chosen_by,
    from_mapping,
    put_overrides,
    read_mapping,
    to_plain,
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How much text a source holds, for `data-prep plan`: nothing of the shards depends on it."""

    tokens: Tokens  # of the whole source as it is described here, filters included
    reference: str  # who says so, and what was reckoned from it

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ConfigError(
                "tokens is 0; needed: how many the source holds. Leave the estimate out where"
                " nobody knows."
            )


@dataclass(frozen=True, kw_only=True)
class _Named:
    """What every source has."""

    name: str  # the folder of this source below `out`
    license: str = ""  # goes to the card
    estimate: Estimate | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,149}", self.name):
            raise ConfigError(
                f"name {self.name[:60]!r} cannot name a folder; needed: letters, digits, _ . -, no"
                " dot first, 150 at most."
            )


@dataclass(frozen=True, kw_only=True)
class _Files(_Named):
    """A source of files on this machine."""

    files: tuple[PathText, ...]  # names or globs (** too), relative to `root`
    zstd_window_bytes: int = (
        2**27
    )  # of a .zst file made with zstd --long: up to 2**31, and as much memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ConfigError(
                f"files of {self.name} is an empty list; needed: at least one name or glob."
            )
        if not 2**10 <= self.zstd_window_bytes <= 2**31:
            raise ConfigError(
                f"zstd_window_bytes of {self.name} is {self.zstd_window_bytes:,}; needed: 1,024 to"
                " 2,147,483,648."
            )


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """A source whose documents have columns."""

    text: str = "text"  # the column that holds the text; a.b.c reaches into nested fields
    filters: tuple[Filter, ...] = ()  # only documents that pass all of them

    @property
    def used_columns(self) -> tuple[str, ...]:
        """All columns that are read, each once."""
        return tuple(dict.fromkeys([self.text, *(f.column for f in self.filters)]))


@dataclass(frozen=True, kw_only=True)
class JsonlSource(_Columns, _Files):
    """One JSON object a line. Files of text may be packed by gzip, zstd, bzip2 or xz, whatever their names."""


@dataclass(frozen=True, kw_only=True)
class JsonArraySource(_Columns, _Files):
    """One JSON array of objects a file, read as a stream."""


@dataclass(frozen=True, kw_only=True)
class CsvSource(_Columns, _Files):
    """Comma-separated values by the rules of Python's csv; the first record names the columns."""

    delimiter: str = ","  # between cells
    quotes: bool = True  # a cell in "..." may hold delimiters, line ends and "" for one quote
    columns: tuple[str, ...] = ()  # their names, where the first record is none but a document

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n\0 ' or ord(self.delimiter) > 127:
            raise ConfigError(
                f"delimiter of {self.name} is {self.delimiter!r}; needed: one character, such as"
                " ',' ';' or '\\t'."
            )
        if twice := [name for name in self.columns if self.columns.count(name) > 1]:
            raise ConfigError(f"columns of {self.name} has {twice[0]} twice; needed: each once.")
        if self.columns and (
            absent := [column for column in self.used_columns if column not in self.columns]
        ):
            raise ConfigError(
                f"columns of {self.name} lacks {absent[0]}, which text or a filter names. "
                f"{nearest(absent[0], list(self.columns))}"
            )


@dataclass(frozen=True, kw_only=True)
class TsvSource(CsvSource):
    """Tab-separated values."""

    delimiter: str = "\t"  # between cells


@dataclass(frozen=True, kw_only=True)
class MdsSource(_Columns, _Files):
    """MDS shards of text (columns of str): `files` are folders with an index.json, or these index files."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource(_Columns, _Files):
    """Parquet files, one row a document."""


@dataclass(frozen=True, kw_only=True)
class ArrowSource(_Columns, _Files):
    """Arrow IPC files and streams (what `datasets` saves), one row a document."""


@dataclass(frozen=True, kw_only=True)
class TextSource(_Files):
    """Plain UTF-8 text."""

    # what one document is; paragraphs end at an empty line
    document: Literal["file", "paragraph", "line"] = "file"


@dataclass(frozen=True, kw_only=True)
class HubSource(_Columns, _Named):
    """A dataset of the Hugging Face hub, streamed; code from the hub is never run."""

    dataset: PathText  # organisation/name, or a local folder of the same layout
    config: str | None = None  # the subset
    split: str = "train"  # train, validation, ...
    revision: str = "main"  # branch, tag or commit; the card holds the commit that it meant
    files: tuple[
        PathText, ...
    ] = ()  # globs inside the repository, in place of a config: a part of a large dataset

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config and self.files:
            raise ConfigError(f"source {self.name} has both config and files; needed: one of them.")


FileSource = (
    JsonlSource | JsonArraySource | CsvSource | ParquetSource | ArrowSource | MdsSource | TextSource
)
ColumnSource = (
    JsonlSource | JsonArraySource | CsvSource | ParquetSource | ArrowSource | MdsSource | HubSource
)
Source = FileSource | HubSource
SOURCES: dict[str, type[Source]] = {
    "jsonl": JsonlSource,
    "json_array": JsonArraySource,
    "csv": CsvSource,
    "tsv": TsvSource,
    "parquet": ParquetSource,
    "arrow": ArrowSource,
    "mds": MdsSource,
    "text": TextSource,
    "hub": HubSource,
}


def recipe_of(source: Source) -> dict[str, Any]:
    """The settings of a source that decide its shards, for the card: what `files` match counts, not how it is written."""
    settings = {**to_plain(source), "format": word_of(source)}
    if settings.get("filters") and not isinstance(source, TextSource):
        settings["filters"] = [{"column": f.column, **to_plain(f.rules)} for f in source.filters]
    left = ("files", "estimate", "revision", "zstd_window_bytes")
    return {key: value for key, value in settings.items() if value and key not in left}


def word_of(source: Source) -> str:
    """The `format` of a source."""
    return next(word for word, kind in SOURCES.items() if type(source) is kind)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Text to shards: OUT/<source>/train and OUT/<source>/held_out for every source."""

    other_words: ClassVar[dict[str, str]] = OTHER_WORDS

    tokenizer: PathText  # path of a tokenizer.json (data-prep tokenizer makes one)
    out: LocalText  # folder of the shards: OUT/NAME/train and OUT/NAME/held_out
    sources: tuple[Annotated[Source, chosen_by("format", SOURCES)], ...]
    root: LocalText = "."  # the folder that the sources' files are relative to
    # longer ones are cut into near-equal pieces, nothing is dropped
    max_tokens_per_document: int = 8192
    held_out_share: float = 0.01  # documents kept out of training, chosen by a hash of their text
    on_error: Literal["stop", "skip"] = "stop"  # skip: count what cannot be read and go on
    processes: int = 0  # 0: one per core
    shard_bytes: int = 2**26  # of a shard, at most
    compression: Literal["none", "zstd"] = "none"  # of the shards; training unpacks them once
    # also find where sentences end (sentencex), which objectives of sentence pairs need
    sentences: bool = False
    # of the text, for its abbreviations and marks: am, ar, bg, ..., de, en, ..., uk
    sentence_language: str = ENGLISH
    # of a line, row or file as it is read; larger ones are left out
    max_document_bytes: int = 70_000_000
    mixtures: dict[str, Mixture] = field(
        default_factory=dict
    )  # what phases take; prepare makes every source

    def __post_init__(self) -> None:
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", self.tokenizer)
        if scheme and scheme[1] != "hf":
            raise ConfigError(
                f"tokenizer {self.tokenizer} begins with {scheme[0]}; needed: a tokenizer.json of"
                " this machine, or a name of the hub, such as hf://answerdotai/ModernBERT-base."
            )
        if not self.sources:
            raise ConfigError("sources is an empty list; needed: at least one source.")
        names = [s.name for s in self.sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(
                f"two sources are named {twice[0]}; needed: a name of its own for each."
            )
        for mixture, given in self.mixtures.items():
            unknown = [source for source in given.sources if source not in names]
            if unknown:
                raise ConfigError(
                    f"mixtures.{mixture} names the source {unknown[0]}."
                    f" {nearest(unknown[0], names)}"
                )
        if not 8 <= self.max_tokens_per_document < 2**32:  # lengths.bin holds uint32 at most
            raise ConfigError(
                f"max_tokens_per_document is {self.max_tokens_per_document}; "
                "needed: at least 8 and at most 4294967295."
            )
        check_language(self.sentence_language, where="sentence_language")
        if self.sentence_language != ENGLISH and not self.sentences:
            raise ConfigError(
                f"sentence_language {self.sentence_language} has no effect without sentences: true."
                " Set it, or leave the language out."
            )
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(
                f"held_out_share is {self.held_out_share}; needed: 0 or more and less than 1."
            )
        if self.processes < 0:
            raise ConfigError(
                f"processes is {self.processes}; needed: a number of processes, or 0 for one per"
                " core."
            )
        if not 2**10 <= self.max_document_bytes <= 2**31:
            raise ConfigError(
                f"max_document_bytes is {self.max_document_bytes:,}; needed: 1,024 to"
                " 2,147,483,648."
            )
        if not 2**10 <= self.shard_bytes < 2**32:
            raise ConfigError(
                f"shard_bytes is {self.shard_bytes:,}; needed: 1,024 to "
                "4,294,967,295 (MDS offsets have 32 bits)."
            )

    @property
    def worker_processes(self) -> int:
        """How many processes encode: the setting, or the cores this process may use."""
        if self.processes:
            return self.processes
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


def read_preparation(path: Path | str, overrides: Sequence[str] = ()) -> PrepareConfig:
    """A preparation file with `key=value` overrides. Raises ConfigError, also for a file of another kind."""
    mapping = read_mapping(Path(path))
    refuse_other_kinds(mapping, "preparation", path=path)
    put_overrides(mapping, overrides)
    return from_mapping(PrepareConfig, mapping, where=str(path))
