"""What a plan says of a run's data: sources and their weights, the order of documents, epochs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from encoder.base.errors import ShardError
from encoder.base.units import short_count
from encoder.data.loader import check_fits
from encoder.data.shard_format import INDEX, Card, read_card, shards_meant
from encoder.data.shards import read_samples_per_shard
from encoder.runs.config import RunConfig, SourceConfig
from encoder.runs.epochs import count_repeats, many_epochs_text, repeats_text

QUICKLY_READ_BYTES = 2**22  # of an index
INDEX_BYTES_A_SHARD = 700


def data_lines(run: RunConfig) -> list[str]:
    """The mixtures of the phases, the order of documents, and what is not there yet.

    Raises ShardError for shards of a larger vocabulary than the model's.
    """
    mixtures: dict[tuple[SourceConfig, ...], list[str]] = {}
    for phase in run.phases:
        mixtures.setdefault(run.sources_of(phase), []).append(phase.name)
    joined = {
        "none": "",
        "anywhere": ", of blocks of running text",
        "sentences": ", of blocks of whole sentences of running text",
    }
    lines = [f"rows of {run.data.row_tokens:,} tokens{joined[run.data.join]}"]
    missing: dict[str, tuple[str, str]] = {}
    for sources, phases in mixtures.items():
        total = sum(source.weight for source in sources)
        parts = []
        for source in sources:
            share = f"{source.weight / total:.1%}"
            try:
                card = read_card(source.folder)
            except ShardError:
                parts.append(f"{source.name or source.path} {share}")
                missing[source.path] = ("fetched", "")
                if not source.cache:
                    missing[source.path] = ("prepared", shards_meant(source.folder))
                continue
            check_fits(card, vocab_size=run.model.vocab_size, where=source.path)
            tokens = short_count(card.tokens)
            parts.append(f"{source.name or card.source} {share} of {tokens} tokens")
        lines.append(f"{', '.join(phases)}: {', '.join(parts)}")
    lines += _order_lines(run)
    if missing:
        # one with a suggestion first
        path = next((path for path, said in missing.items() if said[1]), next(iter(missing)))
        word, meant = missing[path]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        lines.append(f"{path}{more} not {word} yet{'.' if meant else ''}{meant}")
    return lines


def epochs_lines(run: RunConfig) -> list[str]:
    """How often each source is gone through, and a warning where that is often."""
    repeats = count_repeats(run)
    if not repeats:
        return []
    lines = [f"epochs      {repeats_text(repeats)}"]
    if many := many_epochs_text(repeats):
        lines.append(f"            warning: {many}")
    return lines


def _order_lines(run: RunConfig) -> list[str]:
    """How local the order of documents is, of the sources that are not shuffled whole."""
    group = run.data.shuffle_shards
    local: dict[str, tuple[int, int]] = {}
    for source, card in _cards(run):
        with contextlib.suppress(ShardError, OSError):
            # a lane has its own share of the shards
            shards = _shards_of(source) // run.data.lanes
            if shards > group:
                local[source.name or card.source] = (shards, card.documents)
    if not local:
        return []
    name, (shards, documents) = max(local.items(), key=lambda item: item[1][0])
    more = f" (and of {len(local) - 1} more)" if len(local) > 1 else ""
    # documents of a group, as many a shard as the mean
    together = short_count(documents * group / shards)
    return [
        f"order: {group} of {shards:,} shards of {name}{more} are read at a time, {together} of its"
        f" {short_count(documents)} documents shuffled together; data.shuffle_shards sets how many"
    ]


def _cards(run: RunConfig) -> Iterator[tuple[SourceConfig, Card]]:
    for phase in run.phases:
        for source in run.sources_of(phase):
            with contextlib.suppress(ShardError, OSError):
                yield source, read_card(source.folder)


def _shards_of(source: SourceConfig) -> int:
    """By the index, by its size where it is long. Raises ShardError and OSError."""
    size = (source.folder / INDEX).stat().st_size
    # a long index is not parsed for its number of shards: an entry takes about 700 bytes
    if size > QUICKLY_READ_BYTES:
        return size // INDEX_BYTES_A_SHARD
    return len(read_samples_per_shard(source.folder))
