"""How often each source is gone through: worked out before a run, refused where the run file forbids it, said where it is much."""

from __future__ import annotations

from dataclasses import dataclass

from encoder.base.errors import ConfigError, ShardError
from encoder.data.shard_format import read_card
from encoder.data.shards import read_samples_per_shard
from encoder.data.windows import shards_of_lanes
from encoder.runs.config import RunConfig

# what text teaches that is repeated up to 4 times is hardly less than new text does, and falls off from there
# (Muennighoff et al. 2023, Scaling Data-Constrained Language Models, section 6)
MANY_EPOCHS = 4.0


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """How often one phase goes through one source; with lanes, how often the one of fewest documents goes through its own."""

    phase: str
    source: str
    epochs: float


def count_repeats(run: RunConfig) -> list[Repeats]:
    """Of every phase and source whose card is there. Raises ConfigError for more than a source's max_epochs, and as
    shards_of_lanes does."""
    found, lanes, fewest = [], run.data.lanes, {}
    for phase in run.phases:
        mixture = run.sources_of(phase)
        for source in mixture:
            try:
                card = read_card(source.folder)
            except ShardError:  # not prepared yet: a plan says so, a start refuses it
                continue
            name = source.name or card.source

            # with lanes: documents of the lane that has fewest, which is the one to repeat most
            if lanes > 1 and source.folder not in fewest:
                samples = read_samples_per_shard(source.folder)
                fewest[source.folder] = min(
                    int(samples[own].sum()) for own in shards_of_lanes(name, samples, lanes)
                )
            # mean documents of a lane over those of the smallest: 1.0 to 1.05
            unequal = card.documents / lanes / fewest[source.folder] if lanes > 1 else 1.0
            # the source's share of the phase's tokens over its own tokens
            epochs = (
                phase.tokens
                * source.weight
                / sum(s.weight for s in mixture)
                / max(1, card.tokens)
                * unequal
            )
            if source.max_epochs is not None and epochs > source.max_epochs:
                raise ConfigError(
                    f"phase {phase.name} goes {epochs:.2f} times through source {name}, its"
                    f" max_epochs is {source.max_epochs:g}. Lower its weight or the phase's tokens,"
                    " or add text."
                )
            found.append(Repeats(phase=phase.name, source=name, epochs=epochs))
    return found


def repeats_text(repeats: list[Repeats]) -> str:
    """'stable: web 0.42, code 1.3; decay: web 0.05', for people."""
    of_phases: dict[str, list[str]] = {}
    for r in repeats:
        of_phases.setdefault(r.phase, []).append(f"{r.source} {_times(r.epochs)}")
    return "; ".join(f"{phase}: {', '.join(texts)}" for phase, texts in of_phases.items())


def many_epochs_text(repeats: list[Repeats]) -> str | None:
    """One line on the sources that all phases together go through more than MANY_EPOCHS times, or None."""
    totals: dict[str, float] = {}
    for r in repeats:
        totals[r.source] = totals.get(r.source, 0.0) + r.epochs
    many = [
        f"{name} {_times(epochs)} times" for name, epochs in totals.items() if epochs > MANY_EPOCHS
    ]
    if not many:
        return None
    found = (
        f"the run goes through {', '.join(many)}; above {MANY_EPOCHS:g} repeated text teaches much"
        " less than new text."
    )
    if len(totals) > 1:
        return f"{found} Add text, or lower the weight."
    share = MANY_EPOCHS / max(totals.values())
    return f"{found} Add text, or train on fewer tokens: {_times(100 * share)} % of these."


def _times(epochs: float) -> str:
    if epochs >= 100:
        return f"{epochs:,.0f}"
    return f"{epochs:.3g}"
