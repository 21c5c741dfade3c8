"""Labels of words, as spans that can be coloured.

EU rejects German call      [("EU", "ORG"), (" rejects ", None), ("German", "MISC"), (" call", None)]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from encoder.tools.page.encoding import checked, encode
from encoder.tools.page.folders import Opened

# words, with a point, an apostrophe or a hyphen inside; other signs are words of their own
WORD = re.compile(r"\w+(?:[.'’-]\w+)*|[^\w\s]")
NOTHING = "O"  # the label of a word that is no part of anything


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """What was found."""

    spans: list[tuple[str, str | None]]  # all of the text in order, with its label
    words: list[tuple[str, str, float]]  # word, label as the model has it, probability
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Word:
    start: int
    end: int
    label: str
    share: float


def tags(opened: Opened, text: str) -> Tagged:
    """Asks a model of kind tags. Raises UserError.

    A word has the label of its first token, as it was trained. Neighbours of one entity are one span: B-PER I-PER.
    """
    found = encode(opened, checked(text))
    with torch.no_grad():
        logits_TK = opened.model(**found.inputs).logits[0].float()
    shares_TK = torch.softmax(logits_TK, -1)
    names = opened.labels(shares_TK.shape[-1])
    words = []
    tokens = first_tokens(text, found.offsets)
    for match, token in zip(WORD.finditer(text), tokens, strict=True):
        if token is not None:
            share, label = shares_TK[token].max(-1)
            words.append(_Word(match.start(), match.end(), names[int(label)], float(share)))
    return Tagged(
        spans=_spans(text, words),
        words=[(text[w.start : w.end], w.label, w.share) for w in words],
        notes=found.notes,
    )


def first_tokens(text: str, offsets: list[tuple[int, int]]) -> list[int | None]:
    """For each word the first token that holds a letter of it; None behind the cut.

    text: that was encoded
    offsets: of its tokens; a byte-level token begins at the blank before its word
    """
    found: list[int | None] = []
    at = 0
    for match in WORD.finditer(text):
        # tokens that end before the word begins, and the frame, whose offsets are empty
        while at < len(offsets) and (
            offsets[at][1] <= match.start() or offsets[at][0] == offsets[at][1]
        ):
            at += 1
        found.append(at if at < len(offsets) else None)
    return found


def _spans(text: str, words: list[_Word]) -> list[tuple[str, str | None]]:
    """The words of one entity and the text between them as one; everything else without a label."""
    spans: list[tuple[int, int, str]] = []
    for word in words:
        prefix, entity = _parts(word.label)
        if entity is None:
            continue
        if spans and prefix == "I" and spans[-1][2] == entity and _touch(words, spans[-1][1], word):
            spans[-1] = (spans[-1][0], word.end, entity)
        else:
            spans.append((word.start, word.end, entity))
    found: list[tuple[str, str | None]] = []
    at = 0
    for start, end, entity in spans:
        if start > at:
            found.append((text[at:start], None))
        found.append((text[start:end], entity))
        at = end
    if at < len(text):
        found.append((text[at:], None))
    return found


def _parts(label: str) -> tuple[str, str | None]:
    """B-PER is (B, PER), O is nothing, and a label without a prefix stands for each word alone."""
    if label == NOTHING:
        return "", None
    prefix, dash, entity = label.partition("-")
    if dash and prefix in ("B", "I", "E", "S", "L", "U"):
        return ("I" if prefix in ("I", "E", "L") else "B"), entity
    return "B", label


def _touch(words: list[_Word], end: int, word: _Word) -> bool:
    """Whether no other word stands between the end of a span and a word."""
    return not any(end <= other.start < word.start for other in words)
