"""The part of a text that answers a question, as SQuAD asks it.

    When was it built?     [("The tower was built in ", None), ("1889", "answer"), (".", None)]

A context longer than the model is read in windows that overlap; the best answer of all windows counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from encoder.base.errors import UserError
from encoder.tools.page.encoding import check_pair_form, checked
from encoder.tools.page.folders import Opened

ANSWER = "answer"
MOST_ANSWER_TOKENS, BEST_ENDS = 30, 20  # as SQuAD is predicted
MOST_QUESTION_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best answer."""

    answer: str
    start: int  # in characters of the context
    end: int
    probability: float  # of start times that of end, in its window
    no_answer: float  # the same of "there is none", at the first token
    spans: list[tuple[str, str | None]]  # all of the context in order
    windows: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Best:
    score: float  # logit of the start plus that of the end
    start: int
    end: int
    probability: float
    no_answer: float


def span(opened: Opened, question: str, context: str) -> Found:
    """Asks a model of kind span. Raises UserError."""
    checked(question, what="question")
    checked(context, what="context")
    windows = _windows(opened, question, context)
    best = max((_best_of(opened, window) for window in windows), key=lambda one: one.score)
    notes = []
    if len(windows) > 1:
        notes.append(f"The context was read in {len(windows)} windows that overlap.")
    if best.no_answer > best.probability:
        notes.append(f"The model rather says that there is no answer ({best.no_answer:.0%}).")
    parts = (
        (context[: best.start], None),
        (context[best.start : best.end], ANSWER),
        (context[best.end :], None),
    )
    return Found(
        answer=context[best.start : best.end],
        start=best.start,
        end=best.end,
        probability=best.probability,
        no_answer=best.no_answer,
        spans=[(text, label) for text, label in parts if text],
        windows=len(windows),
        notes=notes,
    )


def _windows(opened: Opened, question: str, context: str) -> list[dict[str, Any]]:
    """Question and a stretch of the context each, with offsets, and where the context is."""
    check_pair_form(opened)
    tokenizer = opened.tokenizer
    asked = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
    frame = tokenizer.num_special_tokens_to_add(pair=True)
    room = opened.max_tokens - frame - len(asked)
    if len(asked) > MOST_QUESTION_TOKENS or room < 2:
        most = min(MOST_QUESTION_TOKENS, opened.max_tokens - frame - 2)
        raise UserError(
            f"the question has {len(asked):,} tokens; needed: at most {most:,}. Shorten it."
        )
    found = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=opened.max_tokens,
        stride=min(128, room // 2),  # of Hugging Face: the overlap
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        split_special_tokens=True,
        verbose=False,
    )
    names = [name for name in tokenizer.model_input_names if name in found]
    return [
        {
            "inputs": {name: torch.tensor([found[name][k]]) for name in names},
            "offsets": found["offset_mapping"][k],
            "context": [part == 1 for part in found.sequence_ids(k)],
        }
        for k in range(len(found["input_ids"]))
    ]


def _best_of(opened: Opened, window: dict[str, Any]) -> _Best:
    with torch.no_grad():
        out = opened.model(**window["inputs"])
    inside_T = torch.tensor(window["context"])
    # the first token means that there is no answer
    allowed_T = inside_T.clone()
    allowed_T[0] = True
    start_T = _within(out.start_logits[0], allowed_T)
    end_T = _within(out.end_logits[0], allowed_T)
    start, end = best_pair(start_T, end_T, inside_T)
    p_start, p_end = start_T.softmax(0), end_T.softmax(0)
    return _Best(
        score=float(start_T[start] + end_T[end]),
        start=window["offsets"][start][0],
        end=window["offsets"][end][1],
        probability=float(p_start[start] * p_end[end]),
        no_answer=float(p_start[0] * p_end[0]),
    )


def best_pair(start_T: Tensor, end_T: Tensor, inside_T: Tensor) -> tuple[int, int]:
    """First and last token of the best answer: of the 20 best starts and ends, at most 30 tokens apart.

    start_T, end_T: logits
    inside_T: where an answer may be
    """
    starts = _within(start_T, inside_T).topk(min(BEST_ENDS, int(inside_T.sum()))).indices.tolist()
    ends = _within(end_T, inside_T).topk(min(BEST_ENDS, int(inside_T.sum()))).indices.tolist()
    pairs = [(s, e) for s in starts for e in ends if 0 <= e - s < MOST_ANSWER_TOKENS]
    # no start before an end among the best: the best start alone
    pairs = pairs or [(starts[0], starts[0])]
    return max(pairs, key=lambda pair: float(start_T[pair[0]] + end_T[pair[1]]))


def _within(logits_T: Tensor, allowed_T: Tensor) -> Tensor:
    return logits_T.float().masked_fill(~allowed_T, float("-inf"))
