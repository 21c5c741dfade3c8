"""Weights for an edited vocabulary: tokens that stay keep their rows, added ones get new rows.

    rows of the old model      [PAD] ... cat dog  .  .       the last two are padding
    rows of the new model      [PAD] ... cat dog vi  ru  .   of an added token: drawn, or the mean of rows that were there

A row is one of the embedding, of an untied decoder, and of its bias: of every parameter with the axis vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.models.catalog import build_model
from encoder.models.contract import ModelConfig
from encoder.models.growth import axes_of

VOCABULARY = "vocab_size"  # the axis


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """The tokens that the old model has not, by id."""

    drawn: tuple[int, ...] = ()  # as a new model draws them
    means: Mapping[int, Sequence[int]]  # id -> old ids, the mean of whose rows it gets


def with_new_rows(
    weights: Mapping[str, Tensor],
    new: ModelConfig,
    rows: NewRows,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """The weights with rows for the new settings' vocabulary; what is beyond the old rows is drawn, too.

    weights: fp32, whole, as state_dict() names them; not changed
    new: the settings, which differ from the old ones in vocab_size alone
    rows: of the added tokens
    seed: of what is drawn
    """
    with torch.device("meta"):
        model = build_model(new, seed=seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    changed = dict(weights)
    for name, old in weights.items():
        axes = [axis.name for axis in axes_of(name, new.growth())]
        if VOCABULARY in axes:
            # the whole parameter as a new model of this seed has it
            drawn = model.initial_values(name, shapes[name]).float()
            changed[name] = _filled(old, drawn, rows, axis=axes.index(VOCABULARY))
    return changed


def _filled(old: Tensor, drawn: Tensor, rows: NewRows, *, axis: int) -> Tensor:
    """A parameter with the vocabulary on one axis."""
    # a view with the vocabulary first: rows of the embedding, elements of a bias
    old_V = old.movedim(axis, 0)
    new_V = drawn.movedim(axis, 0).clone()
    # an added id may lie in the old padding: such a row is made anew
    kept = torch.ones(len(old_V), dtype=torch.bool)
    added = [number for number in (*rows.drawn, *rows.means) if number < len(old_V)]
    kept[added] = False
    new_V[: len(old_V)][kept] = old_V[kept]
    for number, pieces in rows.means.items():
        # pieces are ids of the old tokenizer, so their rows are the old ones
        new_V[number] = old_V[[*pieces]].mean(dim=0)
    return new_V.movedim(0, axis).contiguous()
