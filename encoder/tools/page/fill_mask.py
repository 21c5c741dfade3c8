"""The likeliest tokens for each [MASK].

The capital of France is [MASK].     [[(" Paris", 0.62), (" Lyon", 0.08)]]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from encoder.base.errors import ExportError, UserError
from encoder.tools.page.encoding import checked, encode
from encoder.tools.page.folders import Opened

MASK = "[MASK]"  # in the text of any model, beside its own name for it


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What was found for a text."""

    text: str
    # for each mask: text of a token and its probability, the likeliest first
    masks: list[list[tuple[str, float]]]
    token_ids: list[list[int]]  # of the same
    notes: list[str] = field(default_factory=list)


def fill_mask(opened: Opened, text: str, *, top: int = 5, cut: bool = True) -> Filled:
    """Asks a model.

    opened: of kind fill_mask
    text: with [MASK] in it, or the model's own name for it
    top: answers for each mask
    cut: a text longer than the model is cut; else refused

    Raises UserError.
    """
    tokenizer = opened.tokenizer
    asked = check_masks(opened, text)
    found = encode(opened, asked, plain=False)
    if found.notes and not cut:
        length = len(tokenizer(asked, verbose=False)["input_ids"])
        raise ExportError(
            f"a text of {length:,} tokens is longer than the model's {opened.max_tokens:,}. Shorten"
            " it."
        )
    ids_T = found.inputs["input_ids"][0]
    places = (ids_T == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not places:
        raise UserError(
            f"[MASK] stands behind token {opened.max_tokens:,}, where the model's longest text"
            " ends. Shorten the text before it."
        )
    with torch.no_grad():
        logits_TV = opened.model(**found.inputs).logits[0]
    masks = []
    token_ids = []
    for place in places:
        best = torch.softmax(logits_TV[place].float(), -1).topk(top)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        masks.append([(tokenizer.decode([token]), share) for share, token in pairs])
        token_ids.append(best.indices.tolist())
    return Filled(text=text, masks=masks, token_ids=token_ids, notes=found.notes)


def check_masks(opened: Opened, text: str) -> str:
    """The text with the model's own name for [MASK]: <mask> in RoBERTa and XLNet. Raises ExportError where it has none."""
    asked = checked(text).replace(MASK, opened.tokenizer.mask_token)
    if opened.tokenizer.mask_token not in asked:
        raise ExportError(f"{text!r} has no [MASK]; write one where the model shall answer.")
    return asked


def bars(opened: Opened, filled: Filled) -> list[dict[str, float]]:
    """For each mask the answers by what can be seen of them: a blank before a word is an open box."""
    found = []
    for answers, ids in zip(filled.masks, filled.token_ids, strict=True):
        shown: dict[str, float] = {}
        for (text, share), token in zip(answers, ids, strict=True):
            label = visible(text)
            # bytes of a letter have no text of their own; an id beyond the vocabulary has no token
            if label in shown or "\ufffd" in text:
                label = f"{label} ({opened.tokenizer.convert_ids_to_tokens(token) or token})"
            shown[label] = share
        found.append(shown)
    return found


def visible(text: str) -> str:
    """A token's text so that blanks, tabs and line ends are seen: `␣Paris`, `\\n`."""
    body = text.lstrip(" ")
    blanks = "␣" * (len(text) - len(body))
    if body.isprintable():
        return blanks + body
    return blanks + body.encode("unicode_escape").decode()
