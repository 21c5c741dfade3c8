"""Mixtures of a preparation file: the tokens that a phase takes of each source, and the shards that it finds them in.

out: shards/mine
mixtures:
  first: {tokens: 10B, sources: {web: 8B, books: 2B}}

sources_of(first, out="shards/mine")
-> [{name: web, path: shards/mine/web/train, weight: 8.0}, {name: books, path: shards/mine/books/train, weight: 2.0}]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.errors import ConfigError
from encoder.base.schema import Tokens


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The tokens that one phase of a run takes from each source."""

    tokens: Tokens  # of the phase; the sources' must add up to it
    sources: dict[str, Tokens]  # tokens by source

    def __post_init__(self) -> None:
        total = sum(self.sources.values())
        if total != self.tokens:
            word = "more" if total < self.tokens else "fewer"
            raise ConfigError(
                f"its sources add up to {total:,} tokens; needed: {self.tokens:,},"
                f" {abs(self.tokens - total):,} {word}."
            )
        if empty := [name for name, tokens in self.sources.items() if not tokens]:
            raise ConfigError(f"{empty[0]} has 0 tokens. Leave it out instead.")


def sources_of(mixture: Mixture, *, out: str) -> list[dict[str, Any]]:
    """The `sources` of a run file; weights are budgets in billions of tokens.

    mixture: one of the preparation file.
    out: the folder that the preparation file puts shards in.
    """
    sources = []
    for name, tokens in mixture.sources.items():
        # 12 digits, which is what is printed of it
        weight = float(f"{tokens / 1e9:.12g}")
        sources.append({"name": name, "path": str(Path(out) / name / "train"), "weight": weight})
    return sources


def held_out_of(mixture: Mixture, *, out: str) -> list[dict[str, Any]]:
    """The `evaluation.sources` of a run file: the held-out documents of each source; arguments as of sources_of."""
    return [{"name": name, "path": str(Path(out) / name / "held_out")} for name in mixture.sources]
