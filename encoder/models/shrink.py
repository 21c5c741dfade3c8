"""A smaller model that starts from some layers of a larger one: the student of a distillation (Sanh et al. 2019, section 3).

teacher   0 1 2 3 4 5 6 7 8 9 10 11          student layer i has the weights of teacher layer sources[i];
student   0   1   2     3   4     5          tables, norms and head are the teacher's
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.base.errors import ModelError, nearest
from encoder.base.units import counted, with_article
from encoder.models.catalog import SYSTEMS, build_model, system_of
from encoder.models.contract import ModelConfig
from encoder.models.growth import source_name


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The student's weights, and what a person should know about them."""

    weights: dict[str, Tensor]  # fp32, as the student's state_dict() names them
    left_out: tuple[str, ...]  # parameters outside the layers that the student has not
    not_inherited: tuple[str, ...]  # parameters of the student that the teacher has not


def shrink(
    weights: Mapping[str, Tensor], new: ModelConfig, layers: Sequence[int], *, seed: int = 0
) -> Shrunk:
    """The student with its teacher's weights in it. Raises ModelError where they do not fit.

    weights: the teacher's, as its state_dict() names them
    new: the student's settings, of so many layers
    layers: of the teacher, one for each of the student's
    seed: draws what the teacher has not
    """
    taken: set[str] = set()
    fresh: list[str] = []
    found: dict[str, Tensor] = {}
    for name, own in build_model(new, seed=seed).state_dict().items():
        # student layer i -> teacher layer layers[i]; other names stay
        source = source_name(name, tuple(layers))
        if source not in weights:
            fresh.append(name)
            found[name] = own.float()
            continue
        if weights[source].shape != own.shape:
            raise ModelError(
                f"{name} is {list(own.shape)} in the student and {list(weights[source].shape)} in"
                " the source; a student has fewer layers, and is as wide as its source."
            )
        taken.add(source)
        found[name] = weights[source].detach().float()

    # told as left out: what lies outside layers or in one that was taken; other layers were to go
    kept = re.compile(r"\blayers\.(" + "|".join(map(str, layers)) + r")\.")
    others = (n for n in weights if n not in taken and ("layers." not in n or kept.search(n)))
    return Shrunk(weights=found, left_out=tuple(others), not_inherited=tuple(fresh))


def student_config(
    old: ModelConfig, layers: Sequence[int], *, system: str | None = None
) -> ModelConfig:
    """The teacher's settings with some of its layers. Raises ModelError for layers that it has not, or that share weights.

    old: the teacher's
    layers: of the teacher, ascending
    system: of the student, such as distilbert for a BERT; None: the teacher's. Where two families have other defaults,
        the student has its own family's (no segments, in DistilBERT)
    """
    if shared := old.growth().shared_blocks:
        raise ModelError(
            f"the layers of this model share {counted(shared, 'block')} of weights: there is none"
            " to leave out. Distil to a smaller model of its own: teacher: SOURCE in a run file."
        )
    if why := old.growth().refused:
        raise ModelError(f"{why}. Train another one from the seed.")
    ascending = [*layers] == sorted({*layers})
    if not layers or not ascending or layers[0] < 0 or layers[-1] >= old.num_hidden_layers:
        raise ModelError(
            f"layers {', '.join(map(str, layers)) or 'none'}; needed: some of 0 to"
            f" {old.num_hidden_layers - 1}, each once and ascending, such as 0,2,4,7,9,11 of 12."
        )
    changes: dict[str, object] = {"num_hidden_layers": len(layers)}
    # no loss of a distillation trains it
    if getattr(old, "sentence_head", False):
        changes["sentence_head"] = False
    if system is None or system == system_of(old):
        return dataclasses.replace(old, **changes)
    if system not in SYSTEMS:
        raise ModelError(f"system {system} is no family. {nearest(system, list(SYSTEMS))}")
    own, theirs = _defaults(SYSTEMS[system]), _defaults(type(old))
    if own.keys() != theirs.keys():
        raise ModelError(
            f"{with_article(system_of(old))} has other settings than {with_article(system)}: its"
            " weights do not fit. Leave --system out."
        )

    # a setting on whose default the families agree is the teacher's, another the student's own.
    # Both read one tokenizer, whatever its size
    kept = {
        name: value
        for name, value in dataclasses.asdict(old).items()
        if own[name] == theirs[name] or name == "vocab_size"
    }
    student = SYSTEMS[system](**{**kept, **changes})

    # tables of positions would not be of one size, and a row not of one place
    offsets = [getattr(config, "position_offset", 0) for config in (old, student)]
    if offsets[0] != offsets[1]:
        raise ModelError(
            f"positions of {with_article(system_of(old))} begin at row {offsets[0]} of its table,"
            f" those of {with_article(system)} at row {offsets[1]}: they do not fit. Leave --system out."
        )
    return student


def _defaults(settings: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(settings)}


def other_kinds(old: ModelConfig, new: ModelConfig, layers: Sequence[int]) -> tuple[int, ...]:
    """The student's layers that are of another kind than their source, such as global instead of local."""
    there, here = old.growth().layer_kinds, new.growth().layer_kinds
    return tuple(i for i, source in enumerate(layers) if there[source] != here[i])


def values(weights: Mapping[str, Tensor]) -> int:
    """How many numbers they hold."""
    return sum(torch.numel(w) for w in weights.values())
