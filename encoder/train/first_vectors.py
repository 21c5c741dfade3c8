"""What a new model begins with that knows its text: rows of tokens from counts of their neighbours in the run's own shards, and
attention that passes them on (`init_embeddings`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.base.agreement import all_ranks_agree
from encoder.base.dist import World, sum_over_ranks
from encoder.base.log import say
from encoder.base.units import short_count
from encoder.data.neighbours import Neighbours, count_neighbours, first_documents
from encoder.engine.engine import Engine
from encoder.nn.embedding import TOKEN_TABLE
from encoder.nn.init import INTO_HEAD, mimetic_values, why_not_mimetic
from encoder.nn.token_vectors import TokenVectors, token_vectors
from encoder.runs.config import InitEmbeddingsConfig, RunConfig
from encoder.runs.facts import DataFacts
from encoder.train.build import open_mixture

# deviations of an element that all rows have in common: without biases it is what layers begin to attend by
COMMON = 0.5


@dataclass(frozen=True, kw_only=True)
class FirstVectors:
    """What was done, for the run's header, its events and its report."""

    tokens: int  # of text that were counted
    rows: int  # of tokens that got a vector, in a table
    attention: str  # what was done to it
    seconds: float

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"rows of {self.rows:,} tokens from their neighbours in {short_count(self.tokens)} tokens,"
            f" {self.attention}; found in {self.seconds:.1f}s"
        )


def set_first_vectors(
    run: RunConfig, facts: DataFacts, engine: Engine, world: World
) -> FirstVectors:
    """Writes vectors of neighbours into every table of tokens, and into attention and head what passes them on.

    All else is drawn from the seed. So are the rows of tokens that have no vector, such as [MASK], with the spread of the rest.
    Rank zero counts and computes, the others get its rows. A table that begins at zero, such as a difference to another, stays.
    Raises ShardError.
    """
    began = time.perf_counter()
    asked = run.init_embeddings
    assert asked, "asked for in the run file"
    model = engine.module
    tables: dict[str, Tensor] = {}
    for name, shape in engine.shapes.items():
        if name.endswith(TOKEN_TABLE):
            drawn = model.initial_values(name, shape)
            if drawn.any():
                tables[name] = drawn

    turns = {table.shape[1]: torch.eye(table.shape[1]) for table in tables.values()}

    told = torch.zeros(2, dtype=torch.int64)
    with all_ranks_agree(world):
        if world.first:
            say(f"counting neighbours in up to {short_count(asked.tokens)} tokens")
            found = _counted(run, facts, asked)
            rows = fill_tables_(
                [*tables.values()], turns, found, seed=run.seed, times_drawn=asked.times_drawn
            )
            told = torch.tensor([found.tokens, rows])
    # exact: the others add zeros
    for shared in (*tables.values(), *turns.values()):
        if not world.first:
            shared.zero_()
        sum_over_ranks(shared)
    sum_over_ranks(told)

    why_not = why_not_mimetic(engine.shapes)
    passes_on = asked.mimetic > 0 and why_not is None

    def first_values(name: str, shape: Sequence[int]) -> Tensor:
        if name in tables:
            return tables[name]
        drawn = model.initial_values(name, shape)
        if passes_on:
            # a head before a classifier of its own scores no tokens
            stem = name.removesuffix(INTO_HEAD)
            turning = {} if f"{stem}classifier.weight" in engine.shapes else turns
            return mimetic_values(name, drawn, seed=run.seed, strength=asked.mimetic, turns=turning)
        return drawn

    engine.set_masters(first_values)
    attention = "which attention passes on"
    if not passes_on:
        attention = "attention drawn" + (f", for {why_not}" if why_not else "")
    tokens, rows = told.tolist()
    return FirstVectors(
        tokens=tokens, rows=rows, attention=attention, seconds=time.perf_counter() - began
    )


def fill_tables_(
    tables: Sequence[Tensor],
    turns: Mapping[int, Tensor],
    found: Neighbours,
    *,
    seed: int,
    times_drawn: float,
) -> int:
    """Rows of the tokens that have a vector, in place of drawn ones, and what all rows have in common; how many in a table.

    tables: [rows, C], drawn; rows beyond the vocabulary have no vector
    turns: [C, C] by its width, which becomes what turns a vector towards its neighbours'
    found: of the shards' tokens
    seed: of the run
    times_drawn: deviation of an element over that of the table as it is drawn, also for rows that stay; without the common part
    """
    of_width: dict[int, TokenVectors] = {}
    rows = torch.empty(0)
    for table in tables:
        width = table.shape[1]
        if width not in of_width:
            of_width[width] = token_vectors(found, width=width, seed=seed)
            turns[width].copy_(of_width[width].turn_CC)
        known = of_width[width]
        table *= times_drawn
        rows = known.there_V.nonzero()[:, 0]
        # all of one length: that of a vector says how much is known of its token. Of 50,368 entries the frequent
        # ones had 16 times that of rare ones, and the first logits were a hundred times too large
        vectors_RC = known.vectors_VC[rows]
        sizes_R1 = vectors_RC.square().mean(dim=1, keepdim=True).sqrt()
        table[rows] = vectors_RC / sizes_R1 * table.std()

        # of alternating sign: a norm that takes the mean away leaves it
        table += COMMON * table.std() * (1.0 - 2.0 * (torch.arange(width) % 2))
    return len(rows)


def _counted(run: RunConfig, facts: DataFacts, asked: InitEmbeddingsConfig) -> Neighbours:
    mixture = run.sources_of(run.phases[0])
    documents = first_documents(
        open_mixture(mixture),
        [source.weight for source in mixture],
        seed=run.seed,
        tokens=asked.tokens,
        lanes=run.data.lanes,
        shuffle_shards=run.data.shuffle_shards,
        skip_damaged=run.loader.on_bad_shard == "quarantine",
    )
    return count_neighbours(
        documents,
        window=asked.window,
        vocab_size=facts.vocab_size,
        left_out=facts.specials.all_special,
    )
