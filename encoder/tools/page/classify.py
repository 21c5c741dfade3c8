"""Labels of a text, or of two: probabilities, or a number for a regression."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from encoder.tools.page.encoding import checked, encode
from encoder.tools.page.folders import Opened

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What was found."""

    # label -> probability; of several labels each has its own, and they sum to anything
    probabilities: dict[str, float]
    number: float | None = None  # of a regression
    notes: list[str] = field(default_factory=list)


def problem_of(opened: Opened) -> str:
    """transformers' word for what the outputs mean; where the folder says none, as transformers guesses it."""
    config = opened.model.config
    if config.problem_type in (SINGLE, SEVERAL, NUMBER):
        return str(config.problem_type)
    return NUMBER if config.num_labels == 1 else SINGLE


def classify(opened: Opened, text: str, second: str | None = None) -> Classified:
    """Asks a model of kind classify about a text, or a pair of texts. Raises UserError."""
    other = checked(second, what="second text") if second and second.strip() else None
    found = encode(opened, checked(text), other)
    with torch.no_grad():
        logits_K = opened.model(**found.inputs).logits[0].float()
    problem = problem_of(opened)
    if problem == NUMBER:
        return Classified(probabilities={}, number=float(logits_K[0]), notes=found.notes)
    if problem == SEVERAL:
        shares = torch.sigmoid(logits_K).tolist()
    else:
        shares = torch.softmax(logits_K, -1).tolist()
    names = distinct(opened.labels(len(shares)))
    return Classified(
        probabilities=dict(zip(names, shares, strict=True)),
        notes=found.notes,
    )


def distinct(names: list[str]) -> list[str]:
    """The names, each with its number where two are equal: a bar each, not one for both."""
    if len({*names}) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names)]
