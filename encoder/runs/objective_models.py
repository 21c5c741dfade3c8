"""The stored models that an objective asks beside the trained one, such as a teacher: read, checked to fit, known by their hash.

They are named in `objective:` of a run file as init_from is, and are needed at every start: a resume asks them, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from encoder.base.errors import CheckpointError, ConfigError, UserError
from encoder.base.hub import parse_hub_name
from encoder.base.units import short_count
from encoder.models.catalog import predicts_tokens
from encoder.models.contract import ModelConfig
from encoder.runs.config import RunConfig
from encoder.runs.facts import DataFacts
from encoder.runs.initial import weights_sha256
from encoder.runs.vocabulary import edits_of
from encoder.runs.weights import model_facts, read_model


@dataclass(frozen=True, kw_only=True)
class AskedModel:
    """One of them, at rest."""

    config: ModelConfig
    weights: dict[str, Tensor]  # fp32 on the CPU
    sha256: str | None  # of names, shapes and values; None where it was not asked for
    lines: tuple[str, ...]  # for the run's header


def places_of(run: RunConfig) -> dict[str, str]:
    """Setting of the objective -> the stored model that it names."""
    return {name: getattr(run.objective, name) for name in run.objective.STORED_MODELS}


def read_objective_models(
    run: RunConfig, facts: DataFacts, *, hashed: bool
) -> dict[str, AskedModel]:
    """The models that the objective asks, by setting. Raises ConfigError, ModelError, CheckpointError for one that does not fit.

    hashed: whether their SHA-256 is needed
    """
    return {
        name: _read(run, facts, name=name, place=place, hashed=hashed)
        for name, place in places_of(run).items()
    }


def _read(run: RunConfig, facts: DataFacts, *, name: str, place: str, hashed: bool) -> AskedModel:
    stored = read_model(Path(place))
    check_fits_run(run, {name: stored.config}, text_vocabulary=facts.vocab_size)
    sha256 = weights_sha256(stored.weights) if hashed else None
    known = f", SHA-256 {sha256[:16]}" if sha256 else ""
    lines = [f"{name} {place}: {stored.origin}, {shape_text(stored.config)}{known}"]
    if stored.tokenizer_json is None:
        lines.append(
            f"    {place} has no tokenizer.json: that its ids mean the shards' tokens was not seen"
        )
    else:
        # raises where an id is another token: nothing may differ here
        edits_of(stored.tokenizer_json, facts.tokenizer_json, None)
    return AskedModel(
        config=stored.config, weights=stored.weights, sha256=sha256, lines=tuple(lines)
    )


def check_fits_run(
    run: RunConfig, configs: Mapping[str, ModelConfig], *, text_vocabulary: int = 0
) -> None:
    """Each model can read the run's documents, and fits the trained one. Raises ConfigError.

    run: whose objective asks
    configs: of the models, by setting
    text_vocabulary: ids of the shards, where it is known
    """
    longest = max(phase.max_tokens_per_document for phase in run.phases)
    places = places_of(run)
    for name, config in configs.items():
        where = f"objective.{name} {places[name]}"
        if not predicts_tokens(config):
            raise ConfigError(
                f"{where} predicts no tokens; needed: a model of masked tokens. Of two networks the"
                " generator is one: export it with --network generator, and name that folder."
            )
        if config.vocab_size < text_vocabulary:
            raise ConfigError(
                f"{where} has a vocabulary of {config.vocab_size:,}, the shards one of"
                f" {text_vocabulary:,}; needed: a model of the shards' tokenizer. Name another, or"
                " prepare shards with its tokenizer."
            )
        if config.max_position_embeddings < longest:
            raise ConfigError(
                f"{where} reads documents of at most {config.max_position_embeddings:,} tokens, a"
                f" phase has {longest:,}. Lower max_tokens_per_document, or name another."
            )
    run.objective.check_models(run.model, configs)


def shapes_at_hand(run: RunConfig) -> dict[str, ModelConfig]:
    """The shapes of those models that can be read here and now, by setting; for a plan."""
    found = {}
    for name, place in places_of(run).items():
        try:
            found[name] = model_facts(Path(place))
        except (UserError, OSError, ValueError):
            continue
    return found


def plan_texts(run: RunConfig) -> dict[str, str]:
    """Setting -> a line about its model, for a plan. Raises UserError for one that is here and does not fit."""
    texts = {}
    for name, place in places_of(run).items():
        if parse_hub_name(Path(place)) is None and not Path(place).exists():
            texts[name] = f"{place}, which is not there yet: its memory and work are not counted"
            continue
        try:
            config = model_facts(Path(place))
        except UserError as error:
            if parse_hub_name(Path(place)) is None:
                raise
            # a plan needs no network; the run says so when it starts
            texts[name] = f"{place} on the Hugging Face hub, not counted: {error}"
            continue
        check_fits_run(run, {name: config})
        texts[name] = f"{place}: {shape_text(config)}"
    return texts


def shape_text(config: ModelConfig) -> str:
    """One line: its parameters and layers."""
    return f"{short_count(config.parameter_counts().total)} parameters, {config.shape_text}"


def check_same_models(
    found: Mapping[str, AskedModel], saved_sha256: Mapping[str, str], *, run: RunConfig
) -> None:
    """The models are those that a checkpoint was trained with. Raises CheckpointError.

    found: as read now
    saved_sha256: of the checkpoint, by setting
    run: for the paths
    """
    for name, place in places_of(run).items():
        now, before = found[name].sha256, saved_sha256.get(name)
        # rank zero alone has hashed them
        if now and before and now != before:
            raise CheckpointError(
                f"objective.{name} {place} holds weights of SHA-256 {now[:16]}, this run was"
                f" trained with {before[:16]}. Name that model (of a run that has gone on: its"
                " checkpoint), or start anew with out=ANOTHER_FOLDER."
            )
