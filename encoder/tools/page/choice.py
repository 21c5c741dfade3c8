"""One of several answers to a text: the text with each of them, and a softmax over their scores.

[CLS] text [SEP] question answer [SEP]      the question may be left out
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from encoder.base.errors import UserError
from encoder.tools.page.encoding import checked, encode
from encoder.tools.page.folders import Opened

FRAME = 4  # special tokens around two texts, at most, and a token of the text


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was found."""

    probabilities: dict[str, float]  # by answer
    notes: list[str] = field(default_factory=list)


def choose(opened: Opened, text: str, answers: list[str], *, question: str = "") -> Chosen:
    """Asks a model of kind choice. Raises UserError for less than two answers, and for one that stands twice.

    Each answer is scored alone: no padding can reach a score.
    """
    checked(text)
    answers = [answer.strip() for answer in answers if answer.strip()]
    if len(answers) < 2:
        raise UserError(f"there are {len(answers)} answers; needed: at least 2, one a line.")
    if twice := [answer for answer in answers if answers.count(answer) > 1]:
        raise UserError(f"the answer {twice[0]!r} stands twice. Write each once.")
    scores = []
    notes: list[str] = []
    for answer in answers:
        second = f"{question.strip()} {answer}".lstrip()
        if len(opened.tokenizer(second, verbose=False)["input_ids"]) > opened.max_tokens - FRAME:
            raise UserError(
                f"the answer {answer[:40]!r} leaves no room for a text in the model's"
                f" {opened.max_tokens:,} tokens. Shorten it, or the question."
            )
        found = encode(opened, text, second, cut="only_first")
        notes += [note for note in found.notes if note not in notes]
        with torch.no_grad():
            # [1 example, 1 choice, T]
            inputs = {name: x_1T[None] for name, x_1T in found.inputs.items()}
            scores.append(float(opened.model(**inputs).logits[0, 0]))
    shares = torch.tensor(scores).softmax(0).tolist()
    return Chosen(probabilities=dict(zip(answers, shares, strict=True)), notes=notes[:1])
