"""What the cards of a run's sources say: read before anything starts, no shard opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from encoder.base.dist import World
from encoder.base.errors import ConfigError, UserError, as_rank_says
from encoder.base.files import sha256_of
from encoder.data.cache import fetch_side_files
from encoder.data.loader import check_fits
from encoder.data.shard_format import (
    CARD,
    TOKENIZER,
    Card,
    SpecialIds,
    check_same_tokenizer,
    read_card,
)
from encoder.runs.config import RunConfig, SourceConfig, with_settings
from encoder.runs.epochs import count_repeats

HELD_OUT = " (held out)"


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the cards of a run's sources say, after they were checked to fit together and to fit the model."""

    specials: SpecialIds
    vocab_size: int  # the tokenizer's; the model's may be padded above it
    tokenizer_json: Path
    # by source name, held-out ones as NAME (held out); saved in checkpoints
    card_sha256: dict[str, str]


def source_name(config: SourceConfig) -> str:
    """The name of a source in reports and in the data order's address."""
    return config.name or read_card(config.folder).source


def fetch_cards(run: RunConfig, world: World) -> None:
    """Cards, lengths and tokenizers of the sources that have a cache, once for a machine. Raises ShardError or RankError."""
    try:
        for source in run.all_sources():
            if source.cache:
                fetch_side_files(source.path, Path(source.cache))
    except UserError as error:  # other machines may have met nothing: whoever did reports it
        raise as_rank_says(error, rank=world.rank) from error


def check_data(run: RunConfig) -> DataFacts:
    """Reads every card of the run (no shard). Raises ShardError or ConfigError; the same on every rank."""
    cards: dict[str, Card] = {}
    paths: dict[str, Path] = {}
    digests: dict[str, str] = {}
    groups = [(run.data.sources, "")] + [(p.sources, "") for p in run.phases if p.sources]
    if run.evaluation:
        groups.append((run.evaluation.sources, HELD_OUT))

    for sources, mark in groups:
        names = [source_name(s) for s in sources]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise ConfigError(
                f"two sources of one mixture are named {twice}. Give one of them another name:"
                " NAME."
            )
        for name, source in zip(names, sources, strict=True):
            path = source.folder
            cards[name + mark] = read_card(path)
            digest = sha256_of(path / CARD)
            # one name in several mixtures must mean one text
            if digests.setdefault(name + mark, digest) != digest:
                raise ConfigError(
                    f"{paths[name + mark]} and {path} are both named {name}. Give one of them"
                    " another name: NAME."
                )
            paths.setdefault(name + mark, path)
    count_repeats(run)  # refuses more than a source's max_epochs
    first = check_same_tokenizer(cards)
    for name, card in cards.items():
        check_fits(card, vocab_size=run.model.vocab_size, where=str(paths[name]))
    return DataFacts(
        specials=first.specials,
        vocab_size=first.vocab_size,
        tokenizer_json=next(iter(paths.values())) / TOKENIZER,
        card_sha256=digests,
    )


def named_sources(
    run: RunConfig, *, name_of: Callable[[SourceConfig], str | None] = source_name
) -> RunConfig:
    """The run with the name of every source written out, as it is recorded: a source is known by it wherever it lies.

    run: as it was read
    name_of: what a source is named; None leaves it without
    """

    def named(sources: Sequence[SourceConfig]) -> tuple[SourceConfig, ...]:
        return tuple(dataclasses.replace(s, name=name_of(s)) for s in sources)

    return with_settings(
        run,
        data=dataclasses.replace(run.data, sources=named(run.data.sources)),
        phases=tuple(
            dataclasses.replace(p, sources=p.sources and named(p.sources)) for p in run.phases
        ),
        evaluation=run.evaluation
        and dataclasses.replace(run.evaluation, sources=named(run.evaluation.sources)),
    )
