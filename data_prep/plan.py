"""`data-prep plan`: what a settings file will cost and what a run takes of it, before anything is read.

Tokens of a source come from the card of its finished shards, else from its `estimate`, else from the sizes of its files.
Nothing is asked of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import HubSource, ParquetSource, PrepareConfig, Source
from data_prep.readers import ReadError, find_files
from encoder.base.errors import ConfigError, ShardError, nearest
from encoder.base.log import say, warn_once
from encoder.base.mixtures import Mixture, sources_of
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.units import short_count
from encoder.data.shard_format import ids_dtype, read_card

# Measured on JSON lines of books and code with ModernBERT's vocabulary, one process on a machine that had other work:
# 6.5 to 10.7 Mtok/s. The bytes a token are of four domains (29 Mtok). --speed says what your cores do.
TOKENS_PER_CORE_SECOND = 10_000_000
BYTES_PER_TOKEN = 4.0  # of JSON lines
PACKED = 3.0  # gzip of the same; zstd and Parquet are near it
SAMPLE_BYTES = 13  # offset, head and shape in the shard, length beside it
TOKENS_PER_SAMPLE = 700  # mean of the four domains; for sources without a card
ZSTD = 0.5  # of uint16 ids, books and code
# up to here repeated text is worth nearly as much as new (arXiv 2305.16264)
MANY_EPOCHS = 4


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What one source holds, and how that is known."""

    tokens: int
    samples: int
    known_from: str  # card, estimate or files


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """One source with its costs; `amount` is None where nothing tells how much it holds."""

    name: str
    license: str
    amount: Amount | None
    text_bytes: float = 0.0
    disk_bytes: float = 0.0
    core_hours: float = 0.0


def plan(
    config: PrepareConfig, *, mixture: str | None = None, speed_mtok: float | None = None
) -> None:
    """Print sources with their costs, and epochs for the mixture named, or for all. Raises ConfigError."""
    chosen = config.mixtures
    if mixture:
        chosen = {mixture: _mixture(config, mixture)}
    speed: float = TOKENS_PER_CORE_SECOND
    if speed_mtok is not None:
        speed = speed_mtok * 1e6
    if not speed > 0:
        raise ConfigError(
            f"--speed is {speed_mtok:g}; needed: millions of tokens a core encodes in a second,"
            " above 0."
        )
    plans = [source_plan(config, source, speed) for source in config.sources]
    # sources of unknown size are left out of the total
    known = [p for p in plans if p.amount]
    tokens = sum(p.amount.tokens for p in plans if p.amount)
    total = SourcePlan(
        name="all",
        license="",
        amount=Amount(tokens=tokens, samples=0, known_from=""),
        text_bytes=sum(p.text_bytes for p in known),
        disk_bytes=sum(p.disk_bytes for p in known),
        core_hours=sum(p.core_hours for p in known),
    )
    _table(
        [
            ("source", "tokens", "known from", "text", "shards", "core-hours", "license"),
            *map(_cells, [*plans, total]),
        ]
    )
    packed = ", zstd" if config.compression == "zstd" else ""
    say(
        f"\nat {speed / 1e6:g} Mtok a core and second; text as JSON lines at {BYTES_PER_TOKEN:g}"
        f" bytes a token; shards of {_id_bytes(config)} bytes a token{packed}"
    )
    for name, given in chosen.items():
        say(f"\n{name}: {short_count(given.tokens)} tokens")
        _table(
            [
                ("source", "tokens", "share", "epochs"),
                *_mixture_cells(given, {p.name: p for p in plans}),
            ]
        )
    _remarks(plans, chosen)


def mixture_yaml(config: PrepareConfig, name: str) -> str:
    """The `sources:` block of a run file for one mixture."""
    given = _mixture(config, name)
    lines = [f"# mixture {name}: {short_count(given.tokens)} tokens", "sources:"]
    lines += [
        f"  - {{name: {source['name']}, path: {source['path']}, weight: {source['weight']:.12g}}}"
        for source in sources_of(given, out=config.out)
    ]
    return "\n".join(lines)


def source_plan(config: PrepareConfig, source: Source, tokens_per_core_second: float) -> SourcePlan:
    """The costs of one source."""
    amount = _amount(config, source)
    if amount is None:
        return SourcePlan(name=source.name, license=source.license, amount=None)
    # ids, packed or not, and what each sample takes beside its ids
    disk = (
        amount.tokens * _id_bytes(config) * (ZSTD if config.compression == "zstd" else 1)
        + amount.samples * SAMPLE_BYTES
    )
    return SourcePlan(
        name=source.name,
        license=source.license,
        amount=amount,
        text_bytes=amount.tokens * BYTES_PER_TOKEN,
        disk_bytes=disk,
        core_hours=amount.tokens / tokens_per_core_second / 3600,
    )


def _amount(config: PrepareConfig, source: Source) -> Amount | None:
    try:
        card = read_card(Path(config.out) / source.name / "train")
        return Amount(tokens=card.tokens, samples=card.documents, known_from="card")
    except ShardError:
        pass  # not made yet
    if source.estimate:
        tokens, known_from = source.estimate.tokens, "estimate"
    elif isinstance(source, HubSource):
        return None
    else:
        # files are taken for JSON lines of BYTES_PER_TOKEN, packed ones unpacked by PACKED
        try:
            sizes = [
                file.bytes * (PACKED if file.packing or isinstance(source, ParquetSource) else 1)
                for file in find_files(source, Path(config.root))
            ]
        except (ConfigError, ReadError):
            return None  # the files are not on this machine
        tokens, known_from = int(sum(sizes) / BYTES_PER_TOKEN), "files"
    return Amount(tokens=tokens, samples=tokens // TOKENS_PER_SAMPLE, known_from=known_from)


def _id_bytes(config: PrepareConfig) -> int:
    """Bytes of an id; ModernBERT's where the tokenizer is not there yet."""
    path = Path(config.tokenizer)
    return ids_dtype(special_ids_of(path)[0]).itemsize if path.is_file() else 2


def _mixture(config: PrepareConfig, name: str) -> Mixture:
    if name not in config.mixtures:
        hint = (
            nearest(name, list(config.mixtures)) if config.mixtures else "The settings have none."
        )
        raise ConfigError(f"--mixture {name} is not in the settings. {hint}")
    return config.mixtures[name]


def _cells(p: SourcePlan) -> tuple[str, ...]:
    if p.amount is None:
        return (p.name, "?", "", "?", "?", "?", p.license)
    return (
        p.name,
        short_count(p.amount.tokens),
        p.amount.known_from,
        f"{p.text_bytes / 1e9:,.1f} GB",
        f"{p.disk_bytes / 1e9:,.1f} GB",
        f"{p.core_hours:,.1f}",
        p.license,
    )


def _epochs_cell(tokens: int, amount: Amount | None) -> str:
    return f"{tokens / amount.tokens:.2f}" if amount and amount.tokens else "?"


def _mixture_cells(given: Mixture, plans: dict[str, SourcePlan]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            short_count(tokens),
            f"{100 * tokens / given.tokens:.2f} %",
            _epochs_cell(tokens, plans[name].amount),
        )
        for name, tokens in given.sources.items()
    ]


def _remarks(plans: Sequence[SourcePlan], mixtures: dict[str, Mixture]) -> None:
    for p in plans:
        # over all mixtures shown, since a run goes through them one after the other
        taken = sum(m.sources.get(p.name, 0) for m in mixtures.values())
        if p.amount is None:
            warn_once(f"nothing tells how much {p.name} holds: give it an estimate, or prepare it.")
        elif p.amount.tokens and taken > MANY_EPOCHS * p.amount.tokens:
            warn_once(
                f"{p.name} is gone through {taken / p.amount.tokens:.1f} times in all; beyond"
                f" {MANY_EPOCHS} epochs repeated text teaches less and less. Lower its budget."
            )
        elif mixtures and not taken:
            say(f"{p.name} is in no mixture shown here.")


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Columns that begin with letters to the left, numbers to the right."""
    # a column is of numbers where its first cell below the head begins with a digit
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [cell[:1].isdigit() for cell in rows[1]]
    for row in rows:
        cells = []
        for cell, width, to_the_right in zip(row, widths, is_number, strict=True):
            if to_the_right:
                cells.append(cell.rjust(width))
            else:
                cells.append(cell.ljust(width))
        say("  ".join(cells).rstrip())
