"""From a stored model to a weights folder that holds some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from encoder.models.shrink import Shrunk, other_kinds, shrink, student_config, values
from encoder.models.stored import StoredModel
from encoder.tools.weights.derived import read_source, write_derived


@dataclass(frozen=True, kw_only=True)
class Student:
    """What was made of what."""

    source: StoredModel
    model: StoredModel
    layers: tuple[int, ...]  # of the source
    shrunk: Shrunk


def shrink_model(
    source: Path, out: Path, *, layers: Sequence[int], system: str | None = None
) -> Student:
    """Reads any stored model and writes the weights folder `out` with some of its layers, whole or not at all.

    source: a run folder, a checkpoint, a weights or Hugging Face folder, or a name on the hub
    out: the folder to write
    layers: of the source, ascending
    system: family of the smaller model; None: the source's

    Raises UserError.
    """
    old = read_source(source, out=out)
    config = student_config(old.config, layers, system=system)
    shrunk = shrink(old.weights, config, layers)
    origin = f"layers {', '.join(map(str, layers))} of {old.origin}"
    model = write_derived(old, out, config=config, weights=shrunk.weights, origin=origin)
    return Student(source=old, model=model, layers=tuple(layers), shrunk=shrunk)


def student_text(student: Student) -> str:
    """What a person should know: sizes, where each layer comes from, and what was left out."""
    old, new = student.source.config, student.model.config
    sizes = (values(student.source.weights), values(student.model.weights))
    lines = [
        f"source      {student.source.origin}",
        f"{'layers':<22}{old.num_hidden_layers:>13,} -> {new.num_hidden_layers:,}",
        f"{'values':<22}{sizes[0]:>13,} -> {sizes[1]:,}",
        "new layer   " + "".join(f"{i:>4}" for i in range(len(student.layers))),
        "source      " + "".join(f"{layer:>4}" for layer in student.layers),
    ]
    if changed := other_kinds(old, new, student.layers):
        listed = ", ".join(map(str, changed))
        lines.append(f"global here and local there, or the other way round: {listed}")
    lines += [f"left out: {name}" for name in student.shrunk.left_out]
    lines += [
        f"not inherited: {name}, as the new model has it" for name in student.shrunk.not_inherited
    ]
    if student.model.tokenizer_json is None:
        lines.append("the source has no tokenizer.json, so the new folder has none")
    return "\n".join(lines)
