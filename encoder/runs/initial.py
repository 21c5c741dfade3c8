"""Where a run's first weights come from when it is not the seed: `init_from`, a stored model of the same shape and tokenizer,
or of a tokenizer that was edited as the run says (vocabulary.py)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from encoder.base.command import as_typed
from encoder.base.errors import ModelError
from encoder.models.contract import ModelConfig
from encoder.models.growth import differing, must_be_equal
from encoder.models.stored import StoredModel, drawn_weights, parameter_names, stems
from encoder.models.vocabulary import VOCABULARY, NewRows, with_new_rows
from encoder.runs.config import RunConfig
from encoder.runs.facts import DataFacts
from encoder.runs.vocabulary import edits_of
from encoder.runs.weights import read_model


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Whole weights by name, and what the run says about them."""

    weights: dict[str, Tensor]  # fp32 on the CPU
    sha256: str | None  # of names, shapes and values; None where it was not asked for
    lines: tuple[str, ...]  # for the run's header


def read_initial(run: RunConfig, facts: DataFacts, *, hashed: bool) -> InitialWeights:
    """The weights of `run.init_from`, checked to fit. Raises ModelError for another shape or tokenizer, CheckpointError."""
    stored = read_fitting(run)
    fitting = with_heads(stored, run)
    sha256 = weights_sha256(stored.weights) if hashed else None
    lines = [
        f"weights from {run.init_from}: {stored.origin}"
        + (f", SHA-256 {sha256[:16]}" if sha256 else "")
    ]
    # settings that may differ with the same weights, such as thetas
    lines += [
        f"    {name} is {there} there, {here} in the run"
        for name, there, here in differing(stored.config, _at_start(run))
    ]
    weights = fitting.weights
    if stored.tokenizer_json is None:
        if run.vocabulary is not None:
            raise ModelError(
                f"{run.init_from} has no tokenizer.json, so what vocabulary says cannot be seen."
                " Put the model's own there."
            )
        lines.append(
            f"    {run.init_from} has no tokenizer.json: that its ids mean the shards' tokens was"
            " not seen"
        )
    else:
        # raises where an id is another token than the run says
        edits = edits_of(stored.tokenizer_json, facts.tokenizer_json, run.vocabulary)
        if run.vocabulary is not None:
            rows = NewRows(drawn=edits.drawn, means=edits.means)
            weights = with_new_rows(weights, _at_start(run), rows, seed=run.seed)
            lines.append(f"    {edits.text}")
    lines += [f"    {line}" for line in fitting.lines]
    return InitialWeights(weights=weights, sha256=sha256, lines=tuple(lines))


def with_heads(stored: StoredModel, run: RunConfig) -> InitialWeights:
    """The weights of a run's model: those of a stored one, and drawn ones for a head that it lacks; `lines` say which."""
    needed = parameter_names(run.model)
    lacking = [name for name in needed if name not in stored.weights]
    kept = {name: w for name, w in stored.weights.items() if name in needed}
    left_out = [name for name in stored.weights if name not in kept]
    lines = []
    if lacking:
        lines.append(f"drawn, for it has none: {', '.join(stems(lacking))}")
    if left_out:
        lines.append(f"left out, for the run's model has none: {', '.join(stems(left_out))}")
    return InitialWeights(
        weights={**kept, **drawn_weights(run.model, lacking, seed=run.seed)},
        sha256=None,
        lines=tuple(lines),
    )


def read_fitting(run: RunConfig) -> StoredModel:
    """The model of `run.init_from`, whose every parameter has its place in the run's model. Raises ModelError, CheckpointError."""
    assert run.init_from, "a run that starts from the seed has no stored model"
    path = Path(run.init_from)
    stored = read_model(path)
    check_same_shape(stored.config, run, key="init_from", path=path)
    return stored


def check_same_shape(there: ModelConfig, run: RunConfig, *, key: str, path: Path) -> None:
    """Every parameter of the model at `path` has its place in the run's model, and means the same there. Raises ModelError.

    there: the model at `path`.
    run: the run that starts from it.
    key: the setting that names it. A branch goes on with the optimizer's state, so it has the same heads as well.
    path: for the message.
    """
    rules = run.model.growth()
    may_grow = rules.grows
    heads = rules.heads if key == "init_from" else ()
    # what may grow is held equal here: growing is a command of its own
    judged = [name for name in (*may_grow, *must_be_equal(run.model)) if name not in heads]
    wrong = [d for d in differing(there, run.model) if d[0] in judged]
    if run.vocabulary and run.vocabulary.added != "refused":
        # more rows, for added tokens
        wrong = [d for d in wrong if d[0] != VOCABULARY or d[1] > d[2]]
    if wrong:
        found = ", ".join(f"{name} {old} there, {new} in the run" for name, old, new in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        grows = all(name in may_grow and old < new for name, old, new in wrong)
        advice = (
            f"Leave model out of the run file (or model=null), which then is that of {key}, or name"
            " another model."
        )
        if grows:
            grow = as_typed("grow", path, "OUT", "--run", "RUN.yaml")
            advice = (
                f"To train it on as it is, leave model out of the run file (or model=null). Grow it:"
                f" {grow}, then init_from: OUT."
            )
        raise ModelError(f"{key} {path} has another shape: {found}{more}. {advice}")


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Hex SHA-256 of the weights themselves: equal for the same values in whatever folder they lie."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{list(weights[name].shape)}".encode())
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()


def _at_start(run: RunConfig) -> ModelConfig:
    return run.model_of(run.phases[0])
