"""What an objective must be (`Corrupt`, giving a `Question`), and what it may know of a tokenizer (`Specials`)."""

from __future__ import annotations

from typing import Protocol

from encoder.base.question import Corrupt, Question

__all__ = ["Corrupt", "Question", "Specials"]


class Specials(Protocol):
    """The special ids of a tokenizer (a card's SpecialIds is one)."""

    mask_id: int
    pad_id: int
    all_special: tuple[int, ...]
