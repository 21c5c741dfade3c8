"""The part of a text that answers a question, as SQuAD asks it.

    When was it built?     [("The tower was built in ", None), ("1889", "answer"), (".", None)]

A context longer than the model is read in windows that overlap. Which answer of all windows is given, and when none is, says
the rule of encoder/finetune/kinds/answers.py, with the threshold that the folder carries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from encoder.base.errors import ConfigError, ExportError, UserError
from encoder.base.schema import from_mapping
from encoder.finetune.kinds.answers import (
    ANSWER_RULE,
    AnswerRule,
    BestAnswer,
    WindowLogits,
    best_answer,
)
from encoder.tools.page.encoding import check_pair_form, checked
from encoder.tools.page.folders import Opened

ANSWER = "answer"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer, or that there is none."""

    answer: str  # empty: none
    start: int  # in characters of the context
    end: int
    probability: float  # of start times that of end, in its window; of none: of the first token
    missing: float  # by how much the empty answer scores higher than the best stretch
    spans: list[tuple[str, str | None]]  # all of the context in order
    windows: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A stretch of the context behind the question."""

    inputs: dict[str, Any]
    offsets: list[tuple[int, int]]
    inside: list[bool]  # tokens of the context
    begin: int  # number of the first one in the context


def span(opened: Opened, question: str, context: str) -> Found:
    """Asks a model of kind span. Raises UserError."""
    checked(question, what="question")
    checked(context, what="context")
    carried = _carried(opened)
    rule, windows = _windows(opened, question, context, carried)
    logits = [_asked(opened, window) for window in windows]
    best = best_answer(logits, rule)
    gives_none = best.window is None or rule.gives_none(best.missing)
    start = end = 0
    if best.window is not None and not gives_none:
        offsets = windows[best.window].offsets
        start, end = offsets[best.first][0], offsets[best.last][1]
    parts = ((context[:start], None), (context[start:end], ANSWER), (context[end:], None))
    return Found(
        answer=context[start:end],
        start=start,
        end=end,
        probability=_probability(logits, best, gives_none=gives_none),
        missing=best.missing,
        spans=[(text, label) for text, label in parts if text],
        windows=len(windows),
        notes=_notes(best, rule, windows=len(windows)),
    )


def _carried(opened: Opened) -> AnswerRule | None:
    """The rule of config.json; None in folders from elsewhere. Raises ExportError."""
    given = getattr(opened.model.config, ANSWER_RULE, None)
    if given is None:
        return None
    try:
        return from_mapping(AnswerRule, given, where=f"{opened.name}: {ANSWER_RULE}")
    except ConfigError as error:
        raise ExportError(f"{error} Export again with tessera export.") from error


def _notes(best: BestAnswer, rule: AnswerRule, *, windows: int) -> list[str]:
    """What is said beside an answer.

    best, rule: of all windows
    windows: how many there are
    """
    notes = []
    if windows > 1:
        notes.append(f"The context was read in {windows} windows that overlap.")
    if best.window is None:
        notes.append("No answer: none of the likeliest starts and ends make a stretch.")
    elif rule.gives_none(best.missing):
        notes.append(
            f"No answer: that scores higher than the best stretch by {best.missing:.2f}, more than"
            f" the threshold of {rule.no_answer_threshold:.2f}."
        )
    elif rule.no_answer_threshold is None and best.missing > 0:
        notes.append(
            f"That there is no answer scores higher by {best.missing:.2f}; the folder has no"
            " threshold for it."
        )
    return notes


def _windows(
    opened: Opened, question: str, context: str, carried: AnswerRule | None
) -> tuple[AnswerRule, list[_Window]]:
    """The rule, and question and a stretch of the context each."""
    check_pair_form(opened)
    tokenizer = opened.tokenizer
    asked = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
    frame = tokenizer.num_special_tokens_to_add(pair=True)
    room = opened.max_tokens - frame - len(asked)
    rule = carried or AnswerRule(overlap_tokens=max(0, min(128, room // 2)))
    if len(asked) > rule.max_question_tokens or room < 2:
        most = min(rule.max_question_tokens, opened.max_tokens - frame - 2)
        raise UserError(
            f"the question has {len(asked):,} tokens; needed: at most {most:,}. Shorten it."
        )
    found = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=opened.max_tokens,
        stride=min(rule.overlap_tokens, room - 1),  # of Hugging Face: the overlap
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        split_special_tokens=True,
        verbose=False,
    )
    names = [name for name in tokenizer.model_input_names if name in found]
    windows: list[_Window] = []
    begin = 0
    for k in range(len(found["input_ids"])):
        inside = [part == 1 for part in found.sequence_ids(k)]
        inputs = {name: torch.tensor([found[name][k]]) for name in names}
        windows.append(
            _Window(inputs=inputs, offsets=found["offset_mapping"][k], inside=inside, begin=begin)
        )
        begin += sum(inside) - min(rule.overlap_tokens, room - 1)
    return rule, windows


def _asked(opened: Opened, window: _Window) -> WindowLogits:
    with torch.no_grad():
        out = opened.model(**window.inputs)
    logits_L2 = torch.stack([out.start_logits[0], out.end_logits[0]], dim=1)
    return WindowLogits(
        logits_L2=logits_L2.double().numpy(),
        inside_L=torch.tensor(window.inside).numpy(),
        begin=window.begin,
    )


def _probability(logits: list[WindowLogits], best: BestAnswer, *, gives_none: bool) -> float:
    """Of the start times that of the end, over the context and the first token, which means that there is no answer.

    logits: of all windows
    best: of them
    gives_none: there is no answer: the least of all windows
    """
    found = []
    for number, window in enumerate(logits):
        allowed_L = torch.from_numpy(window.inside_L).clone()
        allowed_L[0] = True
        chance_L2 = torch.from_numpy(window.logits_L2).masked_fill(~allowed_L[:, None], -torch.inf)
        chance_L2 = chance_L2.softmax(dim=0)
        if gives_none:
            found.append(float(chance_L2[0].prod()))
        elif number == best.window:
            found.append(float(chance_L2[best.first, 0] * chance_L2[best.last, 1]))
    return min(found)
