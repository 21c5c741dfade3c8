"""Folders of classes without the head over masked tokens: bodies alone, and models fine-tuned for a task.

    ModernBertModel                      embeddings.*, layers.*        model.embeddings.*, model.layers.*
    BertForSequenceClassification        bert.*, classifier            bert.*                                classifier set apart

Read as a pretrained model they have the body, what they share with its head (ModernBERT's dense and norm), and a drawn rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from encoder.models.hf.task import FORMS, Names
from encoder.models.with_task import HeadFamily, HeadKind

# tensors that are a task's head and nothing of a pretrained model, whatever the class
TASK_STEMS = ("classifier.", "pre_classifier.", "qa_outputs.", "logits_proj.", "sequence_summary.")
MASKED = "ForMaskedLM"
# of classes whose body is no model of masked tokens
PRETRAINED = {"Electra": "ForPreTraining"}


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """What a model with a task has beside its body."""

    kind: HeadKind
    labels: tuple[str, ...] | None  # of its outputs; None: they have no names
    weights: dict[str, Tensor]  # by our names
    problem: str | None = None  # of a head on texts: transformers' problem_type


def kind_of(settings: Mapping[str, Any]) -> HeadKind | None:
    """The kind of head that config.json's class has; None: no head of a task."""
    named = _class_of(settings)
    for kind, form in FORMS.items():
        if named.endswith(form.suffix):
            return kind
    return None


def as_pretrained(settings: dict[str, Any]) -> dict[str, Any]:
    """config.json of the class with a head over masked tokens, for that of a body or of a task; others stay as they are."""
    named = _class_of(settings)
    if kind := kind_of(settings):
        family = named.removesuffix(FORMS[kind].suffix)
        return {**settings, "architectures": [family + PRETRAINED.get(family, MASKED)]}
    # BERT's bridges read bodies themselves
    if named == "ModernBertModel":
        return {**settings, "architectures": [f"ModernBert{MASKED}"]}
    return settings


def set_apart(
    raw: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a pretrained model has, the rest) of a file's tensors.

    raw: by the names of the file
    settings: config.json as it was read
    """
    if _class_of(settings) == "ModernBertModel":
        return {f"model.{name}": w for name, w in raw.items()}, {}
    if kind_of(settings) is None:
        return dict(raw), {}
    apart = {name: w for name, w in raw.items() if name.startswith(TASK_STEMS)}
    return {name: w for name, w in raw.items() if name not in apart}, apart


def task_head(
    raw: Mapping[str, Tensor], *, kind: HeadKind, family: HeadFamily
) -> dict[str, Tensor]:
    """The head of a task by our names, as far as the file has it.

    raw: by the names of the file
    kind, family: of the class
    """
    names: Names = FORMS[kind].names[family]
    found = {}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in raw:
                found[f"{ours}.{part}"] = raw[f"{theirs}.{part}"]
    return found


def problem_of(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str | None:
    """transformers' problem_type of a class's head on texts, by its outputs where none is said; None of other heads.

    settings: config.json as it was read
    weights: of the head, by our names
    """
    if kind_of(settings) != "text":
        return None
    said = settings.get("problem_type")
    if isinstance(said, str):
        return said
    outputs = len(weights.get("classifier.weight", ()))
    return "regression" if outputs == 1 else "single_label_classification"


def labels_of(settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a class's outputs 0 to K - 1; None where they are not told apart by them.

    {"0": "bad", "1": "good"}          ("bad", "good")
    {"0": "LABEL_0", "1": "LABEL_1"}   None: names that say nothing
    {"0": "bad", "2": "good"}          None: which output is 2?
    {"0": "bad", "1": "bad"}           None: two of one name
    """
    named = settings.get("id2label")
    if not isinstance(named, dict):
        return None
    try:
        ordered = sorted((int(number), str(name)) for number, name in named.items())
    except ValueError:
        return None
    labels = tuple(name for _, name in ordered)
    numbers = [number for number, _ in ordered]
    if numbers != [*range(len(numbers))] or len({*labels}) != len(labels):
        return None
    if all(name == f"LABEL_{number}" for number, name in enumerate(labels)):
        return None
    return labels


def _class_of(settings: Mapping[str, Any]) -> str:
    named = settings.get("architectures")
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str):
        return named[0]
    return ""
