"""Datasets of the Hugging Face hub, and local folders of their layout: the only importer of `datasets`.

Which files belong to a subset and a split is the library's to say. Parquet and JSON, as most are, are then read here; others
by the builders of `datasets`, streamed. Code from the hub is never run.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import HubSource, JsonArraySource, JsonlSource
from data_prep.readers.arrays import array_blocks
from data_prep.readers.blocks import SKIP, Block, Limits, ReadError
from data_prep.readers.files import InputFile, name_below
from data_prep.readers.kinds import HEAD_BYTES, kind_of, shape_of
from data_prep.readers.lines import line_blocks
from data_prep.readers.packed import open_at, unpacking
from data_prep.readers.tables import parquet_blocks, table_blocks
from encoder.base.errors import ConfigError, UserError
from encoder.base.hub import reason_in_short

# builders of datasets whose files are read by our readers
READ_HERE = ("parquet", "json")
# a hub file whose size is not known: for the bar and the processes alone
HUB_FILE_BYTES = 2**28
_TYPED_NAME = re.compile(
    r"(?:^|[\s{'])([A-Za-z_][\w.]*)'?: (?:Value|List|string|int|double|float|bool|list|struct|null)"
)
BATCH_ROWS = 16  # that `datasets` puts together; a row may be large


def hub_files(source: HubSource) -> list[InputFile]:
    """The files of a dataset's split, the commit in their names. Raises ConfigError."""
    builder = _hub_builder(source)
    urls = [
        str(url)
        for url in (getattr(builder.config, "data_files", None) or {}).get(source.split) or []
    ]
    ours = bool(urls) and getattr(builder, "name", "") in READ_HERE
    names = [url.removeprefix("hf://datasets/") for url in urls]
    # the builder of datasets (and torch, with it) is asked only where it is needed
    if not ours:
        count = _hub_rows(source).num_shards
        if len(names) != count:
            names = [f"{source.dataset} {source.split} {i + 1} of {count}" for i in range(count)]
    splits = builder.info.splits or {}
    known = None
    if source.split in splits:
        known = splits[source.split].num_bytes
    # only the split's size is known; its files share it evenly
    size = HUB_FILE_BYTES
    if known:
        size = known // len(names)
    local = Path(source.dataset)
    return [
        InputFile(
            name=name_below(local, Path(name)) if local.is_dir() else name,
            place=name,
            bytes=size,
            number=i,
            url=urls[i] if ours else "",
        )
        for i, name in enumerate(names)
    ]


def hub_blocks(source: HubSource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """The rows of one file of a dataset. Raises ReadError."""
    try:
        if file.url:
            yield from _blocks_here(source, file, limits)
        else:
            rows = _hub_rows(source)
            rows = (
                rows.shard(num_shards=rows.num_shards, index=file.number)
                if rows.num_shards > 1
                else rows
            )
            yield from table_blocks(source, file, _tables(rows), limits, errors=())
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        # a remote file fails in as many ways as there are libraries below fsspec
        raise ReadError(_why(file, error)) from error


def _blocks_here(source: HubSource, file: InputFile, limits: Limits) -> Iterator[Block]:
    """Parquet and JSON files by the readers of local files; which columns other files have does not matter to them."""
    # opened for its first bytes alone; the reader opens it again
    with open_at(file.url) as stream:
        head = stream.read(HEAD_BYTES)
        kind = kind_of(head)
        if kind.packing:
            stream.seek(0)
            head = unpacking(stream, kind.packing, place=file.place).read(HEAD_BYTES)
        elif kind.word == "parquet":
            yield from parquet_blocks(source, file, limits, stream)
            return
    common: dict[str, Any] = {
        "name": source.name,
        "text": source.text,
        "filters": source.filters,
        "files": (file.place,),
    }
    # the readers of local files take it from here
    known = dataclasses.replace(file, packing=kind.packing)
    if shape_of(head) == "array":
        yield from array_blocks(JsonArraySource(**common), known, limits)
    else:
        yield from line_blocks(JsonlSource(**common), known, 0, None, limits)


def _tables(rows: Any) -> Iterator[Any]:
    import datasets

    datasets.disable_progress_bars()
    # it prints errors that are raised, too
    datasets.logging.set_verbosity(logging.CRITICAL)
    yield from rows.with_format("arrow").iter(batch_size=BATCH_ROWS)


def _why(file: InputFile, error: Exception) -> str:
    """A failure of `datasets` as a sentence: files of other columns are not broken files."""
    said = " ".join(" ".join(str(e) for e in (error, error.__cause__) if e).split())
    if (
        "column names don't match" in said
        or "CastError" in type(error).__name__
        or "couldn't cast" in said.lower()
    ):
        return (
            f"{file.place} has other columns than the first file of the dataset{_names_in(said)};"
            " needed: files of the same columns in a source. Set files: [GLOB] or config to choose"
            f" some, as sources of their own, or {SKIP}."
        )
    return (
        f"{file.place} cannot be read: {said[:200].rstrip('.')}. Fetch the file again, or {SKIP}."
    )


def _names_in(said: str) -> str:
    """The columns in a CastError: 'text: string a: int64 to {...}' names both sides."""
    found = list(dict.fromkeys(_TYPED_NAME.findall(said)))
    if found:
        return f" (in all: {', '.join(found[:12])})"
    return ""


@functools.lru_cache(maxsize=8)
def _hub_builder(source: HubSource) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    # five tries in 23 s, each reported in 500 characters
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    local = os.path.isdir(source.dataset)
    try:
        return datasets.load_dataset_builder(
            source.dataset,
            source.config,
            data_files=list(source.files) or None,
            revision=None if local else source.revision,
        )
    except Exception as error:
        # as many kinds as there are libraries between here and the hub
        raise ConfigError(
            f"source {source.name}: dataset {source.dataset} cannot be opened:"
            f" {reason_in_short(error).rstrip('.')}. On a machine without a way to the"
            f" hub, fetch it elsewhere (hf download {source.dataset} --repo-type dataset"
            " --local-dir FOLDER) and set dataset: FOLDER."
        ) from error


@functools.lru_cache(maxsize=8)
def _hub_rows(source: HubSource) -> Any:
    try:
        return _hub_builder(source).as_streaming_dataset(source.split)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"source {source.name}: split {source.split} of dataset {source.dataset} cannot be"
            f" opened: {reason_in_short(error).rstrip('.')}."
        ) from error
