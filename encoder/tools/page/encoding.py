"""Texts as a model takes them: framed, cut at its longest text, and what was cut is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from encoder.base.errors import UserError
from encoder.tools.page.folders import Opened

MOST_CHARACTERS = 200_000  # of a text: 8,192 tokens are about 40,000


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One text, or two, as tensors [1, T]."""

    inputs: dict[str, Any]
    offsets: list[tuple[int, int]]  # of each token, in characters of its own text
    sequences: list[int | None]  # of each token: 0 first text, 1 second, None frame
    notes: list[str] = field(default_factory=list)


def checked(text: str, *, what: str = "text") -> str:
    """The text. Raises UserError where there is none, or far too much."""
    if not text.strip():
        raise UserError(f"there is no {what}. Type one, or take an example.")
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"the {what} has {len(text):,} characters; the page takes {MOST_CHARACTERS:,}. Shorten"
            " it."
        )
    return text


def encode(
    opened: Opened,
    text: str,
    second: str | None = None,
    *,
    plain: bool = True,
    cut: Literal["longest_first", "only_first"] = "longest_first",
) -> Encoded:
    """Tokens of a text or of a pair.

    opened: whose tokenizer is asked
    text: the first text
    second: the other one
    plain: a special token that the text spells is text, as in training; else it is that token
    cut: which of two texts gives way

    Raises UserError for a pair without a form.
    """
    tokenizer = opened.tokenizer
    if second is not None:
        check_pair_form(opened)
    told = {"split_special_tokens": plain, "verbose": False}
    whole = len(tokenizer(text, second, **told)["input_ids"])
    found = tokenizer(
        text,
        second,
        truncation=cut,
        max_length=opened.max_tokens,
        return_offsets_mapping=True,
        return_tensors="pt",
        **told,
    )
    offsets = found.pop("offset_mapping")[0].tolist()
    notes = []
    if whole > opened.max_tokens:
        notes.append(
            f"The text has {whole:,} tokens, the model takes {opened.max_tokens:,}: the rest was"
            " cut."
        )
    return Encoded(
        inputs=dict(found),
        offsets=[(start, end) for start, end in offsets],
        sequences=found.sequence_ids(0),
        notes=notes,
    )


def check_pair_form(opened: Opened) -> None:
    """Raises UserError where two texts would be encoded without a separator between them."""
    tokenizer = opened.tokenizer
    single = tokenizer.num_special_tokens_to_add(pair=False)
    if tokenizer.num_special_tokens_to_add(pair=True) <= single:
        raise UserError(
            f"the tokenizer of {opened.name} has no form for two texts. Ask it one text, or export"
            " the model again with tessera export."
        )
